//! Cases that a bundle or a plugin is held against: a question, and what has to be answered. TOML in, results out. A question
//! is a request to admit, a look at running guests, or a device that comes back.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    Action, Config, Engine, Fault, Lane, Memory, Outcome, PolicyError, Programs, ReleasedDevice, Request,
    Samples, Stance, Tick,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCases {
    /// The bundle, counted from this file's folder.
    bundle: Option<String>,
    /// Or one plugin, and the lane that it is for.
    plugin: Option<String>,
    #[serde(default)]
    lane: Lane,
    /// Of the plugin, for cases that have none of their own.
    #[serde(default)]
    settings: serde_json::Map<String, Value>,
    /// The question that each case starts from, as JSON, counted from this file's folder: one of these three.
    request: Option<String>,
    samples: Option<String>,
    device: Option<String>,
    #[serde(default)]
    case: Vec<RawCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCase {
    name: String,
    settings: Option<serde_json::Map<String, Value>>,
    /// What is otherwise than in the question: `"guest.vcpus" = 64`, `"guest.devices.0.vendor" = 4660`.
    #[serde(default)]
    set: BTreeMap<String, Value>,
    expect: Expect,
    /// All reasons of a denial, or the code of a failure.
    #[serde(default)]
    reasons: BTreeSet<String>,
    /// All warnings of a yes; not looked at when left out.
    warnings: Option<BTreeSet<String>>,
    /// All changes of a yes: field and value.
    #[serde(default)]
    changes: BTreeMap<String, Value>,
    /// All that a governor wants: `web cpu-weight 200`.
    #[serde(default)]
    actions: BTreeSet<String>,
    /// How often a governor looks at it before it's seen what it wants.
    #[serde(default)]
    after: u32,
    /// In those looks, what was otherwise than in the question; `set` when left out.
    before: Option<BTreeMap<String, Value>>,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Expect {
    Allow,
    Deny,
    Fail,
    /// Of a governor: it does what `actions` say.
    Act,
    /// Of a judge of devices.
    GiveBack,
    Quarantine,
}

/// What is asked in each case of a file.
#[derive(Clone, Copy)]
enum Asked {
    Admission,
    Resources,
    Device,
}

/// What came of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseResult {
    /// Its name.
    pub name: String,
    /// What was answered instead of what was expected; none when it was as expected.
    pub instead: Option<String>,
}

/// Which reasons were seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Those that the plugins say they give and that some case saw, as `plugin/code`.
    pub seen: BTreeSet<String>,
    /// Those that no case saw.
    pub never: BTreeSet<String>,
    /// Those that were seen and that no plugin says it gives.
    pub undeclared: BTreeSet<String>,
}

/// Runs all cases of a file.
///
/// # Errors
/// The file, its request, its bundle or its plugin can't be read: `policy-cases`, or as [`Engine::open`].
pub fn run_cases(
    file: &Path,
    cache: &Path,
    programs: &Programs,
) -> Result<(Vec<CaseResult>, Coverage), PolicyError> {
    let bad = |cause: &dyn std::fmt::Display| PolicyError::new(Fault::Cases, file.display(), cause);
    let folder = file.parent().unwrap_or(Path::new(""));
    let text = std::fs::read_to_string(file).map_err(|error| bad(&error))?;
    let raw: RawCases = toml::from_str(&text).map_err(|error| bad(&error.to_string()))?;
    let (asked, base) = match (&raw.request, &raw.samples, &raw.device) {
        (Some(name), None, None) => (Asked::Admission, name),
        (None, Some(name), None) => (Asked::Resources, name),
        (None, None, Some(name)) => (Asked::Device, name),
        _ => return Err(bad(&"it names one of `request`, `samples` and `device`")),
    };
    let unreadable = |error: &dyn std::fmt::Display| bad(&format!("{base}: {error}"));
    let base: Value = std::fs::read_to_string(folder.join(base))
        .map_err(|error| unreadable(&error))
        .and_then(|text| serde_json::from_str(&text).map_err(|error| unreadable(&error)))?;
    if raw.case.is_empty() {
        return Err(bad(&"it has no [[case]]"));
    }
    let open = |settings: &serde_json::Map<String, Value>| match (&raw.bundle, &raw.plugin) {
        (Some(bundle), None) => {
            Engine::open(Config { bundle: &folder.join(bundle), cache, programs, key: None })
        }
        (None, Some(plugin)) => {
            let settings = Value::Object(settings.clone()).to_string();
            Engine::open_plugin(&folder.join(plugin), raw.lane, &settings, cache, programs)
        }
        _ => Err(bad(&"it names either a `bundle` or a `plugin`")),
    };
    let engine = open(&raw.settings)?;
    let mut coverage = Coverage::default();
    for plugin in engine.plugins() {
        coverage.never.extend(plugin.reasons.iter().map(|code| format!("{}/{code}", plugin.name)));
    }
    let mut results = Vec::new();
    for case in &raw.case {
        if case.settings.is_some() && raw.bundle.is_some() {
            return Err(bad(&format!("{}: a bundle has its own settings", case.name)));
        }
        let own = case.settings.as_ref().map(&open).transpose()?;
        let engine = own.as_ref().unwrap_or(&engine);
        let answer =
            case.ask(engine, asked, &base).map_err(|cause| bad(&format!("{}: {cause}", case.name)))?;
        coverage.see(&answer.codes);
        let instead = (!case.is_met(&answer)).then_some(answer.text);
        results.push(CaseResult { name: case.name.clone(), instead });
    }
    Ok((results, coverage))
}

/// What came of a question.
struct Answer {
    kind: Expect,
    /// Reasons, or the code of a failure, as `plugin/code`.
    codes: BTreeSet<String>,
    warnings: BTreeSet<String>,
    changes: BTreeMap<String, Value>,
    actions: BTreeSet<String>,
    /// In words.
    text: String,
}

impl Answer {
    fn new(kind: Expect, codes: BTreeSet<String>, text: String) -> Self {
        let (warnings, changes, actions) = Default::default();
        Self { kind, codes, warnings, changes, actions, text }
    }
}

impl From<Stance> for Answer {
    fn from(stance: Stance) -> Self {
        let text = stance.to_string();
        match stance {
            Stance::Allowed { changes, warnings } => Self {
                changes: changes
                    .iter()
                    .map(|change| (change.field.name().to_owned(), serde_json::json!(change.to)))
                    .collect(),
                warnings: warnings.clone(),
                ..Self::new(Expect::Allow, warnings, text)
            },
            Stance::Denied { reasons } => Self::new(Expect::Deny, reasons, text),
            Stance::Failed { code } => Self::new(Expect::Fail, BTreeSet::from([code]), text),
        }
    }
}

impl From<Tick> for Answer {
    fn from(tick: Tick) -> Self {
        if let Some(failure) = tick.failures.first() {
            let codes = BTreeSet::from([failure.code.clone()]);
            return Self::new(Expect::Fail, codes, format!("failed: {}", failure.message));
        }
        let code = |action: &Action| format!("{}/{}", action.why.plugin, action.why.code);
        let codes = tick.actions.iter().map(code).collect();
        let actions: BTreeSet<String> =
            tick.actions.iter().map(|action| format!("{} {}", action.guest, action.deed)).collect();
        let list: Vec<_> = actions.iter().map(String::as_str).collect();
        let text = if list.is_empty() { "does nothing".to_owned() } else { list.join(", ") };
        Self { actions, ..Self::new(Expect::Act, codes, text) }
    }
}

impl RawCase {
    fn ask(&self, engine: &Engine, asked: Asked, base: &Value) -> Result<Answer, String> {
        let now = question(base, &self.set)?;
        let unfit = |error: serde_json::Error| error.to_string();
        Ok(match asked {
            Asked::Admission => {
                let request: Request = serde_json::from_value(now).map_err(unfit)?;
                Stance::from(&Outcome::from(&engine.admit(&request, None))).into()
            }
            Asked::Resources => {
                let samples: Samples = serde_json::from_value(now).map_err(unfit)?;
                let before = question(base, self.before.as_ref().unwrap_or(&self.set))?;
                let before: Samples = serde_json::from_value(before).map_err(unfit)?;
                let mut memory = Memory::new();
                for _ in 0..self.after.min(10_000) {
                    engine.tick(&before, &mut memory);
                }
                engine.tick(&samples, &mut memory).into()
            }
            Asked::Device => {
                let device: ReleasedDevice = serde_json::from_value(now).map_err(unfit)?;
                let ruling = engine.release(&device);
                let codes = |reasons: &[crate::Reason]| -> BTreeSet<String> {
                    reasons.iter().map(|reason| format!("{}/{}", reason.plugin, reason.code)).collect()
                };
                let (why, warnings) = (codes(&ruling.quarantine), codes(&ruling.warnings));
                let list: Vec<_> = why.iter().map(String::as_str).collect();
                if list.is_empty() {
                    let all = warnings.clone();
                    Answer { warnings, ..Answer::new(Expect::GiveBack, all, "given back".into()) }
                } else {
                    let text = format!("quarantined by {}", list.join(", "));
                    Answer::new(Expect::Quarantine, why, text)
                }
            }
        })
    }

    fn is_met(&self, answer: &Answer) -> bool {
        if self.expect != answer.kind {
            return false;
        }
        match answer.kind {
            Expect::Allow | Expect::GiveBack => {
                self.warnings.as_ref().is_none_or(|expected| *expected == answer.warnings)
                    && self.changes == answer.changes
            }
            Expect::Deny | Expect::Quarantine => self.reasons == answer.codes,
            Expect::Fail => self.reasons.iter().all(|expected| answer.codes.contains(expected)),
            Expect::Act => {
                self.actions == answer.actions && (self.reasons.is_empty() || self.reasons == answer.codes)
            }
        }
    }
}

impl Coverage {
    fn see(&mut self, codes: &BTreeSet<String>) {
        // A failure's code is Casemate's own, without a plugin before it.
        for code in codes.iter().filter(|code| code.contains('/')) {
            if self.never.remove(code) {
                self.seen.insert(code.clone());
            } else if !self.seen.contains(code) && !code.starts_with("casemate/") {
                self.undeclared.insert(code.clone());
            }
        }
    }
}

fn question(base: &Value, set: &BTreeMap<String, Value>) -> Result<Value, String> {
    let mut value = base.clone();
    for (path, new) in set {
        let mut place = &mut value;
        for part in path.split('.') {
            let next = match place {
                Value::Object(fields) => Some(fields.entry(part).or_insert(Value::Null)),
                Value::Array(items) => part.parse::<usize>().ok().and_then(|index| items.get_mut(index)),
                _ => None,
            };
            place = next.ok_or_else(|| format!("the question has no place {path}"))?;
        }
        *place = new.clone();
    }
    Ok(value)
}
