//! The answer, in types of ours. They go to the audit log as JSON.

use std::{fmt, time::Duration};

use casemate_spec::Refusal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    change::{CASEMATE, Change},
    request::Attrs,
    rule::Rule,
};

/// How grave a reason is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// A preference.
    Low,
    /// A rule.
    Medium,
    /// Others would suffer.
    High,
    /// The host's security is at stake.
    Critical,
}

/// Why, and what to do about it. Prints as `[plugin/code] field: message; remedy`, one line without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The plugin that gave it, by its name in the bundle.
    pub plugin: String,
    /// The plugin's own code: 1 to 64 of `a-z`, `0-9` and `-`.
    pub code: String,
    /// How grave it is.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// The key of the guest's file at fault: `memory`, `device[0].address`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What can be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Whether an operator may override it with a reason; set by the bundle, not by the plugin.
    #[serde(default, skip_serializing_if = "is_false")]
    pub overridable: bool,
    /// What is said besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

impl Reason {
    /// One that Casemate gives itself.
    pub fn of_casemate(code: &str, message: String) -> Self {
        Self {
            plugin: CASEMATE.into(),
            code: code.into(),
            severity: Severity::Medium,
            message,
            field: None,
            remedy: None,
            overridable: false,
            attrs: Attrs::new(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}/{}] ", self.plugin, self.code)?;
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

/// What all plugins of the bundle say together: one denial is enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// Yes.
    Allow {
        /// For the user; they hold nothing up.
        warnings: Vec<Reason>,
    },
    /// No.
    Deny {
        /// At least one, in the order of the bundle.
        reasons: Vec<Reason>,
    },
}

/// How grave a line of a plugin's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// For the plugin's author.
    Debug,
    /// For whoever asks.
    Info,
    /// Something is odd.
    Warn,
    /// Something is wrong.
    Error,
}

/// A line of a plugin's log, without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// How grave it is.
    pub level: LogLevel,
    /// The line.
    pub message: String,
}

/// What asking one plugin took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginRun {
    /// Its name in the bundle.
    pub name: String,
    /// SHA-256 of its component, in hexadecimal.
    pub digest: String,
    /// By the clock, with making and dropping the instance.
    #[serde(rename = "elapsed_us", serialize_with = "microseconds", deserialize_with = "from_microseconds")]
    pub elapsed: Duration,
    /// Fuel used: the same for the same question.
    pub fuel: u64,
    /// What it wrote.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<LogLine>,
    /// Bytes that it wrote past the log's limit; they were dropped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub log_dropped_bytes: usize,
    /// What its word counted for.
    pub rule: Rule,
    /// Whether it allowed the guest; none when it failed.
    pub allowed: Option<bool>,
    /// Where its word held nothing up: what it refused, so that a rule can be watched before it's enforced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub would_refuse: Vec<Reason>,
    /// Where its changes were not made: what it would have changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub would_change: Vec<Change>,
    /// Why it failed, where that held nothing up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What an operator has overridden, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Override {
    /// The operator's reason.
    pub why: String,
    /// What would have refused the guest.
    pub reasons: Vec<Reason>,
}

/// A verdict and how it came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Yes or no.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// What is otherwise than it was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<Change>,
    /// Refusals that an operator has overridden.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overridden: Option<Override>,
    /// Every plugin that was asked, in the order of the bundle.
    pub plugins: Vec<PluginRun>,
    /// All of it by the clock.
    #[serde(rename = "elapsed_us", serialize_with = "microseconds", deserialize_with = "from_microseconds")]
    pub elapsed: Duration,
}

impl Decision {
    /// Whether the guest may start.
    pub fn is_allowed(&self) -> bool {
        matches!(self.verdict, Verdict::Allow { .. })
    }

    /// The denial, one refusal a reason under the code `policy-denied`; none when it's allowed. A reason's `field` is a
    /// key of the guest's file: whoever has the file can tell line and column with it.
    pub fn refusals(&self) -> Vec<Refusal> {
        let Verdict::Deny { reasons } = &self.verdict else { return Vec::new() };
        let refusal = |reason: &Reason| {
            let field = reason.field.as_ref().map(|field| format!(": {field}")).unwrap_or_default();
            let subject = format!("{}/{}{field}", reason.plugin, reason.code);
            let mut remedy = reason.remedy.clone().unwrap_or_else(|| "ask whoever wrote the policy".into());
            if reason.overridable {
                remedy.push_str(", or override it: --override REASON");
            }
            Refusal::new("policy-denied", subject, &reason.message, remedy)
        };
        reasons.iter().map(refusal).collect()
    }
}

fn microseconds<S: Serializer>(elapsed: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX))
}

fn from_microseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    u64::deserialize(deserializer).map(Duration::from_micros)
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &usize) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied() -> Decision {
        let reason = Reason {
            plugin: "limits".into(),
            code: "memory".into(),
            severity: Severity::Medium,
            message: "64 GiB is more than the 16 GiB that one guest may have".into(),
            field: Some("memory".into()),
            remedy: Some("ask for at most 16 GiB".into()),
            overridable: false,
            attrs: Attrs::new(),
        };
        Decision {
            verdict: Verdict::Deny { reasons: vec![reason] },
            changes: Vec::new(),
            overridden: None,
            plugins: Vec::new(),
            elapsed: Duration::from_millis(1),
        }
    }

    #[test]
    fn a_reason_reads_as_a_sentence() {
        let Verdict::Deny { reasons } = denied().verdict else { panic!("allowed") };
        let line = "[limits/memory] memory: 64 GiB is more than the 16 GiB that one guest may have; ask for at most 16 GiB";
        assert_eq!(reasons[0].to_string(), line);
    }

    #[test]
    fn a_denial_becomes_refusals() {
        let refusals = denied().refusals();
        assert!(refusals[0].to_string().starts_with("[policy-denied] limits/memory: memory: 64 GiB is more"));
    }

    #[test]
    fn a_decision_goes_to_the_audit_log_as_flat_json() {
        let json = serde_json::to_value(denied()).unwrap();
        assert_eq!(json["verdict"], "deny");
        assert_eq!(json["reasons"][0]["code"], "memory");
        assert_eq!(json["elapsed_us"], 1_000);
        assert_eq!(serde_json::from_value::<Decision>(json).unwrap(), denied());
    }
}
