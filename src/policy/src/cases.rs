//! Cases that a bundle or a plugin is held against: a request, and what has to be answered. TOML in, results out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Deserialize;
use serde_json::Value;

use crate::{Compiler, Config, Engine, Fault, Outcome, PolicyError, Request, Stance};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCases {
    /// The bundle, counted from this file's folder.
    bundle: Option<String>,
    /// Or one plugin.
    plugin: Option<String>,
    /// Of the plugin, for cases that have none of their own.
    #[serde(default)]
    settings: serde_json::Map<String, Value>,
    /// The request that each case starts from, as JSON; counted from this file's folder.
    request: String,
    #[serde(default)]
    case: Vec<RawCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCase {
    name: String,
    settings: Option<serde_json::Map<String, Value>>,
    /// What is otherwise than in the request: `"guest.vcpus" = 64`, `"guest.devices.0.vendor" = 4660`.
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
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Expect {
    Allow,
    Deny,
    Fail,
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
    compiler: Compiler<'_>,
) -> Result<(Vec<CaseResult>, Coverage), PolicyError> {
    let bad = |cause: &dyn std::fmt::Display| PolicyError::new(Fault::Cases, file.display(), cause);
    let folder = file.parent().unwrap_or(Path::new(""));
    let text = std::fs::read_to_string(file).map_err(|error| bad(&error))?;
    let raw: RawCases = toml::from_str(&text).map_err(|error| bad(&error.to_string()))?;
    let base = std::fs::read_to_string(folder.join(&raw.request))
        .map_err(|error| bad(&format!("{}: {error}", raw.request)))?;
    let base: Value =
        serde_json::from_str(&base).map_err(|error| bad(&format!("{}: {error}", raw.request)))?;
    if raw.case.is_empty() {
        return Err(bad(&"it has no [[case]]"));
    }
    let open = |settings: &serde_json::Map<String, Value>| match (&raw.bundle, &raw.plugin) {
        (Some(bundle), None) => {
            Engine::open(Config { bundle: &folder.join(bundle), cache, compiler, key: None })
        }
        (None, Some(plugin)) => {
            let settings = Value::Object(settings.clone()).to_string();
            Engine::open_plugin(&folder.join(plugin), &settings, cache, compiler)
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
        let request = request(&base, case).map_err(|cause| bad(&format!("{}: {cause}", case.name)))?;
        let outcome = Outcome::from(&own.as_ref().unwrap_or(&engine).admit(&request, None));
        let stance = Stance::from(&outcome);
        coverage.see(&stance);
        let instead = (!case.is_met(&stance)).then(|| stance.to_string());
        results.push(CaseResult { name: case.name.clone(), instead });
    }
    Ok((results, coverage))
}

impl RawCase {
    fn is_met(&self, stance: &Stance) -> bool {
        match stance {
            Stance::Allowed { changes, warnings } => {
                let made = changes
                    .iter()
                    .map(|change| (change.field.name().to_owned(), serde_json::json!(change.to)))
                    .collect::<BTreeMap<_, _>>();
                self.expect == Expect::Allow
                    && self.warnings.as_ref().is_none_or(|expected| expected == warnings)
                    && self.changes == made
            }
            Stance::Denied { reasons } => self.expect == Expect::Deny && self.reasons == *reasons,
            Stance::Failed { code } => {
                self.expect == Expect::Fail && self.reasons.iter().all(|expected| expected == code)
            }
        }
    }
}

impl Coverage {
    fn see(&mut self, stance: &Stance) {
        let codes = match stance {
            Stance::Allowed { warnings: codes, .. } | Stance::Denied { reasons: codes } => codes,
            Stance::Failed { .. } => return,
        };
        for code in codes {
            if self.never.remove(code) {
                self.seen.insert(code.clone());
            } else if !self.seen.contains(code) && !code.starts_with("casemate/") {
                self.undeclared.insert(code.clone());
            }
        }
    }
}

fn request(base: &Value, case: &RawCase) -> Result<Request, String> {
    let mut value = base.clone();
    for (path, new) in &case.set {
        let mut place = &mut value;
        for part in path.split('.') {
            let next = match place {
                Value::Object(fields) => Some(fields.entry(part).or_insert(Value::Null)),
                Value::Array(items) => part.parse::<usize>().ok().and_then(|index| items.get_mut(index)),
                _ => None,
            };
            place = next.ok_or_else(|| format!("the request has no place {path}"))?;
        }
        *place = new.clone();
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}
