//! The bundle: which plugins decide, in which order, with which settings. TOML in, checked types out; no I/O.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use casemate_spec::{ByteSize, Location};
use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use crate::{
    Fault, PolicyError,
    change::{CASEMATE, Field},
    limits::{HOST_LIMITS, Lane, PluginLimits},
    rule::{Level, Mode, Rule, Rules, Selector},
    samples::Deed,
    text::is_code,
};

/// One plugin of a bundle.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// Its name in decisions: unique in the bundle.
    pub(crate) name: String,
    /// Its component, counted from the bundle's folder.
    pub(crate) path: PathBuf,
    /// SHA-256 of its component, 64 lower-case hexadecimal digits.
    pub(crate) digest: String,
    /// Its settings, a JSON object.
    pub(crate) settings: String,
    /// What one call may take.
    pub(crate) limits: PluginLimits,
    /// What its word counts for.
    pub(crate) rules: Rules,
    /// What it may change of a guest that asks to start.
    pub(crate) may_change: Vec<Field>,
    /// What it may do to a guest that runs.
    pub(crate) may_do: Vec<&'static str>,
    /// Which of its needs are met; all when none.
    pub(crate) needs: Option<Vec<String>>,
    /// Where its name stands in the bundle.
    pub(crate) location: Location,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBundle {
    #[serde(default)]
    plugin: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    name: Spanned<String>,
    path: Spanned<String>,
    sha256: Spanned<String>,
    #[serde(default)]
    settings: toml::Table,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    level: Level,
    #[serde(default)]
    r#for: Vec<Spanned<Selector>>,
    #[serde(default)]
    may_change: Vec<Spanned<String>>,
    #[serde(default)]
    may_do: Vec<Spanned<String>>,
    needs: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    #[serde(default)]
    lane: Lane,
    memory: Option<Spanned<String>>,
    fuel: Option<Spanned<u64>>,
    deadline_ms: Option<Spanned<u64>>,
    table_elements: Option<Spanned<u64>>,
    instances: Option<Spanned<u64>>,
}

/// Reads a bundle's text.
pub(crate) fn parse(file: &Path, source: &str) -> Result<Vec<Entry>, PolicyError> {
    let reader = Reader { file, source };
    let raw: RawBundle = toml::from_str(source).map_err(|error| match error.span() {
        Some(span) => {
            PolicyError::new(Fault::Bundle, "", error.message()).at(reader.location(span.start, ""))
        }
        None => PolicyError::new(Fault::Bundle, file.display(), error.message()),
    })?;
    if raw.plugin.is_empty() {
        return Err(PolicyError::new(Fault::Empty, file.display(), "the bundle has no [[plugin]]"));
    }
    if raw.plugin.len() > HOST_LIMITS.plugins {
        let cause = format!("{} plugins; a bundle has at most {}", raw.plugin.len(), HOST_LIMITS.plugins);
        return Err(PolicyError::new(Fault::Bundle, file.display(), cause));
    }
    let mut names = BTreeSet::new();
    let mut entries = Vec::new();
    for (index, raw) in raw.plugin.into_iter().enumerate() {
        let entry = reader.entry(index, raw)?;
        if !names.insert(entry.name.clone()) {
            let cause = format!("two plugins are called {:?}", entry.name);
            return Err(PolicyError::new(Fault::Bundle, "", cause).at(entry.location));
        }
        entries.push(entry);
    }
    Ok(entries)
}

struct Reader<'a> {
    file: &'a Path,
    source: &'a str,
}

impl Reader<'_> {
    fn location(&self, offset: usize, key: impl Into<String>) -> Location {
        let before = self.source.as_bytes().iter().take(offset);
        let line = before.filter(|byte| **byte == b'\n').count().saturating_add(1);
        Location { file: self.file.to_owned(), line, key: key.into() }
    }

    fn refuse<T>(&self, at: &Spanned<T>, key: String, cause: impl Into<String>) -> PolicyError {
        PolicyError::new(Fault::Bundle, "", cause.into()).at(self.location(at.span().start, key))
    }

    fn entry(&self, index: usize, raw: RawEntry) -> Result<Entry, PolicyError> {
        let key = |name: &str| format!("plugin[{index}].{name}");
        let name = raw.name.get_ref();
        if name == CASEMATE {
            return Err(self.refuse(&raw.name, key("name"), "this name is Casemate's own"));
        }
        if !is_code(name) {
            let cause = format!("{:?} is not a name: use 1 to 64 of a-z, 0-9 and -", short(name));
            return Err(self.refuse(&raw.name, key("name"), cause));
        }
        let path = raw.path.get_ref();
        if path.is_empty() || path.len() > 4_095 || path.contains('\0') {
            return Err(self.refuse(&raw.path, key("path"), "this is not a path"));
        }
        let digest = raw.sha256.get_ref();
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            let cause = "a sha256 has 64 lower-case hexadecimal digits, as sha256sum prints them";
            return Err(self.refuse(&raw.sha256, key("sha256"), cause));
        }
        let settings = raw.settings.into_iter().map(|(name, value)| Ok((name, json(value)?)));
        let settings: Map<String, Value> = settings
            .collect::<Result<_, &str>>()
            .map_err(|cause| self.refuse(&raw.name, key("settings"), cause))?;
        if let Some(selector) = raw.r#for.iter().find(|selector| selector.get_ref().flaw().is_some()) {
            let flaw = selector.get_ref().flaw().unwrap_or_default();
            return Err(self.refuse(selector, key("for"), flaw));
        }
        let selectors = raw.r#for.into_iter().map(Spanned::into_inner).collect();
        let may_change = raw.may_change.iter().map(|name| {
            Field::named(name.get_ref()).ok_or_else(|| {
                let all = Field::ALL.map(Field::name).join(", ");
                let cause = format!("{:?} can't be changed; these can: {all}", short(name.get_ref()));
                self.refuse(name, key("may_change"), cause)
            })
        });
        let may_do = raw.may_do.iter().map(|name| {
            Deed::NAMES.into_iter().find(|known| known == name.get_ref()).ok_or_else(|| {
                let all = Deed::NAMES.join(", ");
                let cause = format!("{:?} can't be done; these can: {all}", short(name.get_ref()));
                self.refuse(name, key("may_do"), cause)
            })
        });
        Ok(Entry {
            may_do: may_do.collect::<Result<_, _>>()?,
            rules: Rules { default: Rule { mode: raw.mode, level: raw.level }, selectors },
            may_change: may_change.collect::<Result<_, _>>()?,
            needs: raw.needs,
            path: self.file.parent().unwrap_or(Path::new("")).join(path),
            digest: digest.clone(),
            settings: Value::Object(settings).to_string(),
            limits: self.limits(&key("limits"), &raw.limits)?,
            location: self.location(raw.name.span().start, format!("plugin[{index}]")),
            name: raw.name.into_inner(),
        })
    }

    fn limits(&self, key: &str, raw: &RawLimits) -> Result<PluginLimits, PolicyError> {
        let (default, most) = (raw.lane.limits(), PluginLimits::MOST);
        let memory_bytes = match &raw.memory {
            None => default.memory_bytes,
            Some(memory) => {
                let size =
                    memory.get_ref().parse::<ByteSize>().ok().and_then(|size| size.bytes().try_into().ok());
                size.filter(|size| (1..=most.memory_bytes).contains(size)).ok_or_else(|| {
                    let most = ByteSize::from_bytes(most.memory_bytes as u64);
                    let cause = format!("{:?} is not a size from 1 B to {most}", short(memory.get_ref()));
                    self.refuse(memory, format!("{key}.memory"), cause)
                })?
            }
        };
        let number = |name: &str, raw: &Option<Spanned<u64>>, default: u64, most: u64| match raw {
            None => Ok(default),
            Some(number) if (1..=most).contains(number.get_ref()) => Ok(*number.get_ref()),
            Some(number) => {
                let cause = format!("{} is not from 1 to {most}", number.get_ref());
                Err(self.refuse(number, format!("{key}.{name}"), cause))
            }
        };
        let count = |name: &str, raw: &Option<Spanned<u64>>, default: usize, most: usize| {
            // What comes back is at most `most`.
            number(name, raw, default as u64, most as u64)
                .map(|number| usize::try_from(number).unwrap_or(most))
        };
        Ok(PluginLimits {
            memory_bytes,
            fuel: number("fuel", &raw.fuel, default.fuel, most.fuel)?,
            deadline_ms: number("deadline_ms", &raw.deadline_ms, default.deadline_ms, most.deadline_ms)?,
            table_elements: count(
                "table_elements",
                &raw.table_elements,
                default.table_elements,
                most.table_elements,
            )?,
            instances: count("instances", &raw.instances, default.instances, most.instances)?,
        })
    }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// A TOML value as JSON. Nesting is bounded by the TOML parser.
fn json(value: toml::Value) -> Result<Value, &'static str> {
    Ok(match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(number) => Value::from(number),
        toml::Value::Float(number) => serde_json::Number::from_f64(number)
            .map(Value::Number)
            .ok_or("JSON has no infinity and no NaN")?,
        toml::Value::Boolean(flag) => Value::Bool(flag),
        toml::Value::Datetime(time) => Value::String(time.to_string()),
        toml::Value::Array(values) => Value::Array(values.into_iter().map(json).collect::<Result<_, _>>()?),
        toml::Value::Table(table) => {
            let entries = table.into_iter().map(|(name, value)| Ok((name, json(value)?)));
            Value::Object(entries.collect::<Result<_, &str>>()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "a8c0a221501197f2f021eb1f6954748513bf344f8ae939e43b729d364869325c";

    fn good() -> String {
        format!(
            "[[plugin]]\nname = \"limits\"\npath = \"../x.wasm\"\nsha256 = \"{DIGEST}\"\n\
             [plugin.settings]\nmax_memory = \"16 GiB\"\ndevices = [\"8086:\"]\n\
             [plugin.limits]\nfuel = 1000\nmemory = \"1 MiB\"\n"
        )
    }

    fn refused(from: &str, to: &str) -> String {
        let text = good();
        assert!(text.contains(from), "{from}");
        parse(Path::new("p/b.toml"), &text.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_bundle() {
        let entries = parse(Path::new("p/b.toml"), &good()).unwrap();
        let entry = &entries[0];
        assert_eq!((entry.name.as_str(), entry.path.as_path()), ("limits", Path::new("p/../x.wasm")));
        assert_eq!(entry.settings, r#"{"devices":["8086:"],"max_memory":"16 GiB"}"#);
        let limits = PluginLimits { fuel: 1_000, memory_bytes: 1 << 20, ..PluginLimits::DEFAULT };
        assert_eq!(entry.limits, limits);
    }

    #[test]
    fn refusals_name_the_line_and_the_key() {
        for (from, to, start) in [
            ("name = \"limits\"", "name = \"Limits\"", "[policy-bundle] p/b.toml:2: plugin[0].name: "),
            ("path = \"../x.wasm\"", "path = \"\"", "[policy-bundle] p/b.toml:3: plugin[0].path: "),
            ("\"a8c0", "\"A8c0", "[policy-bundle] p/b.toml:4: plugin[0].sha256: "),
            ("fuel = 1000", "fuel = 0", "[policy-bundle] p/b.toml:9: plugin[0].limits.fuel: "),
            ("\"1 MiB\"", "\"1 TiB\"", "[policy-bundle] p/b.toml:10: plugin[0].limits.memory: "),
            ("fuel = 1000", "full = 1000", "[policy-bundle] p/b.toml:9: "),
            ("devices = [\"8086:\"]", "devices = inf", "[policy-bundle] p/b.toml:2: plugin[0].settings: "),
            ("[[plugin]]", "[[plugin]", "[policy-bundle] p/b.toml:1: "),
            ("path", "may_change = [\"name\"]\npath", "[policy-bundle] p/b.toml:3: plugin[0].may_change: "),
            ("path", "may_do = [\"dance\"]\npath", "[policy-bundle] p/b.toml:3: plugin[0].may_do: "),
            ("path", "for = [{ tenants = [] }]\npath", "[policy-bundle] p/b.toml:3: plugin[0].for: "),
            ("path", "for = [{ mode = \"on\" }]\npath", "[policy-bundle] p/b.toml:3: "),
            ("\"limits\"", "\"casemate\"", "[policy-bundle] p/b.toml:2: plugin[0].name: "),
        ] {
            let text = refused(from, to);
            assert!(text.starts_with(start), "{text}");
        }
    }

    #[test]
    fn the_first_selector_that_fits_holds() {
        let with = "path = \"x\"\nmode = \"warn\"\nfor = [\n\
            { tenants = [\"acme\"], operations = [\"create\"], mode = \"off\" },\n\
            { tenants = [\"acme\", \"b\"], mode = \"enforce\", level = \"soft\" },\n]";
        let text = good().replacen("path = \"../x.wasm\"", with, 1);
        let rules = parse(Path::new("b.toml"), &text).unwrap().remove(0).rules;
        let mut request: crate::Request =
            serde_json::from_str(include_str!("../examples/request.json")).unwrap();
        let mut rule = |tenant: &str, operation| {
            request.tenant.name = tenant.into();
            request.operation = operation;
            rules.rule(&request)
        };
        use crate::Operation::{Create, Resume};
        assert_eq!(rule("acme", Create), Rule { mode: Mode::Off, level: Level::Hard });
        assert_eq!(rule("acme", Resume), Rule { mode: Mode::Enforce, level: Level::Soft });
        assert_eq!(rule("b", Create), Rule { mode: Mode::Enforce, level: Level::Soft });
        assert_eq!(rule("c", Create), Rule { mode: Mode::Warn, level: Level::Hard });
    }

    #[test]
    fn a_bundle_without_plugins_admits_nothing() {
        assert_eq!(parse(Path::new("b.toml"), "").unwrap_err().code(), "policy-none");
    }

    #[test]
    fn refuses_a_name_twice_and_too_many_plugins() {
        let twice = format!("{0}{0}", good());
        assert!(
            parse(Path::new("b.toml"), &twice).unwrap_err().to_string().contains("two plugins are called")
        );
        let entry = |n| format!("[[plugin]]\nname = \"p{n}\"\npath = \"x\"\nsha256 = \"{DIGEST}\"\n");
        let many: String = (0..33).map(entry).collect();
        assert_eq!(parse(Path::new("b.toml"), &many).unwrap_err().code(), "policy-bundle");
    }

    proptest! {
        #[test]
        fn never_panics(cut in 0usize..300, put in ".{0,12}") {
            let mut text = good();
            text.insert_str(cut.min(text.len()), &put);
            let _ = parse(Path::new("b.toml"), &text);
        }
    }
}
