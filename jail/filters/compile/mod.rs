//! From the words of a filter file to a BPF program. This is the build script's part: none of it is in a program that
//! links the filters.
//!
//! Filters stack, and a thread may do what all of them allow. So the filter of the building phase allows what it names
//! itself and what the narrower ones name: a call stands in the one file where it belongs. What the run time of the
//! language needs on every thread stands in one file that theirs take in by `with`.

mod condition;
mod constants;
mod emit;
mod shorten;

pub(crate) use condition::Condition;
#[cfg(test)]
pub(crate) use constants::IOCTLS;
pub(crate) use emit::{source, source_alone};

use std::collections::BTreeSet;

use serde::Deserialize;
use toml::Spanned;

use crate::calls::CALLS;

/// A filter file, checked.
#[derive(Debug)]
pub(crate) struct File {
    /// Its rules in the order of the file, and then those of the files that it takes in.
    pub(crate) rules: Vec<Rule>,
    /// Names of files that it takes in, without `.toml`, as long as they are not.
    with: Vec<String>,
}

/// One rule, checked.
#[derive(Clone, Debug)]
pub(crate) struct Rule {
    /// The file that it stands in.
    pub(crate) file: String,
    /// The line on which it stands.
    pub(crate) line: usize,
    /// The call's name.
    pub(crate) call: String,
    /// The call's number.
    pub(crate) number: u32,
    /// As written.
    pub(crate) when: Vec<String>,
    /// All of them must hold.
    pub(crate) conditions: Vec<Condition>,
    /// The error that the call gives instead of running: name and number.
    pub(crate) fails_with: Option<(String, u16)>,
    /// The reason.
    pub(crate) why: String,
    /// Why no test sees it used.
    pub(crate) unseen: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    #[serde(default)]
    with: Vec<String>,
    #[serde(default)]
    rule: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    call: Spanned<String>,
    #[serde(default)]
    when: Vec<Spanned<String>>,
    fails_with: Option<Spanned<String>>,
    why: Spanned<String>,
    unseen: Option<String>,
}

/// Reads the filter file `name`.toml and those that it takes in, each by `read`.
pub(crate) fn load(name: &str, read: &dyn Fn(&str) -> Result<String, String>) -> Result<File, String> {
    let parse_named = |name: &str| {
        let name = format!("{name}.toml");
        parse(&format!("jail/filters/{name}"), &read(&name)?)
    };
    let mut file = parse_named(name)?;
    for part in std::mem::take(&mut file.with) {
        let part = parse_named(&part)?;
        if !part.with.is_empty() {
            return Err(format!("jail/filters/{name}.toml takes in a file that takes in others"));
        }
        refuse_idle(&file.rules, &part.rules)?;
        file.rules.extend(part.rules);
    }
    Ok(file)
}

/// All rules of these files, each once: rules that allow the same are the first one.
pub(crate) fn union<'f>(files: impl IntoIterator<Item = &'f File>) -> Vec<&'f Rule> {
    let mut known = BTreeSet::new();
    let rules = files.into_iter().flat_map(|file| &file.rules);
    rules.filter(|rule| known.insert((&rule.call, &rule.when, &rule.fails_with))).collect()
}

/// Reads a filter file; what is wrong with it is told as `file:line: subject: cause`.
pub(crate) fn parse(name: &str, text: &str) -> Result<File, String> {
    let line_of = |offset: usize| text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1;
    let raw: RawFile = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(span.start));
        format!("{name}:{line}: {}", error.message())
    })?;
    let mut rules = Vec::new();
    for rule in raw.rule {
        let call = rule.call.get_ref().clone();
        let tell = |offset: usize, cause: String| format!("{name}:{}: {call}: {cause}", line_of(offset));
        let rule_at = rule.call.span().start;
        let number = CALLS.iter().find(|(_, known)| *known == call).map(|(number, _)| *number);
        let number = number.ok_or_else(|| tell(rule_at, "x86-64 has no call of this name".into()))?;
        if rule.why.get_ref().trim().is_empty() {
            return Err(tell(
                rule.why.span().start,
                "`why` is empty; say what the call is needed for".into(),
            ));
        }
        let conditions = rule.when.iter().map(|text| {
            Condition::parse(&call, text.get_ref()).map_err(|cause| tell(text.span().start, cause))
        });
        let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
        let fails_with = rule.fails_with.as_ref().map(|error| {
            let known = constants::value(error.get_ref()).filter(|_| error.get_ref().starts_with('E'));
            let value = known.and_then(|value| u16::try_from(value).ok());
            let value = value.ok_or_else(|| {
                tell(error.span().start, format!("{:?} is not an error known here", error.get_ref()))
            })?;
            if !rule.when.is_empty() {
                return Err(tell(
                    rule_at,
                    "`fails_with` answers every use of a call, so it stands without `when`".into(),
                ));
            }
            Ok((error.get_ref().clone(), value))
        });
        rules.push(Rule {
            file: name.into(),
            line: line_of(rule_at),
            number,
            when: rule.when.into_iter().map(Spanned::into_inner).collect(),
            conditions,
            fails_with: fails_with.transpose()?,
            why: rule.why.into_inner(),
            unseen: rule.unseen,
            call,
        });
    }
    refuse_idle(&rules, &rules)?;
    Ok(File { rules, with: raw.with })
}

/// Refuses a rule that allows nothing which one of `others` does not allow as well.
pub(crate) fn refuse_idle(rules: &[Rule], others: &[Rule]) -> Result<(), String> {
    for rule in rules {
        let covers = |other: &Rule| {
            let same_file = other.file == rule.file;
            let is_itself = same_file && other.line == rule.line;
            let both_allow = other.fails_with.is_none() && rule.fails_with.is_none();
            let at_odds = same_file && !both_allow;
            let wider = other.conditions.iter().all(|condition| rule.conditions.contains(condition));
            // Of two equal rules in one file, the later one is idle.
            let first =
                !same_file || other.line < rule.line || other.conditions.len() < rule.conditions.len();
            !is_itself && other.number == rule.number && (at_odds || (both_allow && wider && first))
        };
        if let Some(other) = others.iter().find(|other| covers(other)) {
            return Err(format!(
                "{}:{}: {}: this rule is idle: {}:{} covers it; take one of the two out",
                rule.file, rule.line, rule.call, other.file, other.line
            ));
        }
    }
    Ok(())
}
