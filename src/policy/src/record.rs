//! A decision as it's kept: question, answer, and who decided. And the same question asked again.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    Engine, PolicyError,
    change::Change,
    request::Request,
    verdict::{Decision, Reason, Verdict},
};

/// How a question ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// With a verdict.
    Decided(Decision),
    /// Without one, which refuses too.
    Failed {
        /// The stable code: `policy-trap`.
        code: String,
        /// All of the message.
        message: String,
    },
}

impl From<&Result<Decision, PolicyError>> for Outcome {
    fn from(result: &Result<Decision, PolicyError>) -> Self {
        match result {
            Ok(decision) => Self::Decided(decision.clone()),
            Err(error) => Self::from(error),
        }
    }
}

impl From<&PolicyError> for Outcome {
    fn from(error: &PolicyError) -> Self {
        Self::Failed { code: error.code().to_owned(), message: error.to_string() }
    }
}

/// One decision: a line of the log. A later Casemate may add keys; an older one ignores those it doesn't know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What people name it by: seconds and a random part, in hexadecimal, so that names sort by time.
    pub id: String,
    /// Seconds since 1970-01-01T00:00:00Z.
    pub time_seconds: u64,
    /// The user on the host who asked.
    pub uid: u32,
    /// The bundle's path.
    pub bundle: String,
    /// SHA-256 of the bundle's text; none when it couldn't be opened. The plugins' stand in the outcome.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle_sha256: Option<String>,
    /// The operator's reason to override what can be, when one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub override_why: Option<String>,
    /// The question.
    pub request: Request,
    /// The answer.
    pub outcome: Outcome,
}

impl Record {
    /// A name for a decision of now.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn new_id(time_seconds: u64) -> std::io::Result<String> {
        let mut random = [0u8; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        Ok(format!("{time_seconds:010x}-{}", crate::text::hex(&random)))
    }
}

/// What of an outcome matters to who asked. Prints in a few words: `denied by limits/memory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "stance", rename_all = "kebab-case")]
pub enum Stance {
    /// Yes.
    Allowed {
        /// What was changed.
        changes: Vec<Change>,
        /// The warnings, as `plugin/code`.
        warnings: BTreeSet<String>,
    },
    /// No.
    Denied {
        /// The reasons, as `plugin/code`.
        reasons: BTreeSet<String>,
    },
    /// No verdict.
    Failed {
        /// The code.
        code: String,
    },
}

impl From<&Outcome> for Stance {
    fn from(outcome: &Outcome) -> Self {
        let codes = |reasons: &[Reason]| reasons.iter().map(|r| format!("{}/{}", r.plugin, r.code)).collect();
        match outcome {
            Outcome::Decided(decision) => match &decision.verdict {
                Verdict::Allow { warnings } => {
                    Self::Allowed { changes: decision.changes.clone(), warnings: codes(warnings) }
                }
                Verdict::Deny { reasons } => Self::Denied { reasons: codes(reasons) },
            },
            Outcome::Failed { code, .. } => Self::Failed { code: code.clone() },
        }
    }
}

impl std::fmt::Display for Stance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |codes: &BTreeSet<String>| codes.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::Allowed { changes, warnings } => {
                f.write_str("allowed")?;
                if !changes.is_empty() {
                    let changes: Vec<_> = changes.iter().map(ToString::to_string).collect();
                    write!(f, " with {}", changes.join(", "))?;
                }
                if !warnings.is_empty() {
                    write!(f, " with warnings {}", list(warnings))?;
                }
                Ok(())
            }
            Self::Denied { reasons } => write!(f, "denied by {}", list(reasons)),
            Self::Failed { code } => write!(f, "failed: {code}"),
        }
    }
}

/// A question that would be answered otherwise now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The decision.
    pub id: String,
    /// The guest.
    pub guest: String,
    /// Its tenant.
    pub tenant: String,
    /// What was answered.
    pub was: Stance,
    /// What would be.
    pub would_be: Stance,
}

/// Asks a recorded question again; none when the answer is the same but for texts and times.
pub fn replay(engine: &Engine, record: &Record) -> Option<Difference> {
    let again = Outcome::from(&engine.admit(&record.request, record.override_why.as_deref()));
    let (was, would_be) = (Stance::from(&record.outcome), Stance::from(&again));
    (was != would_be).then(|| Difference {
        id: record.id.clone(),
        guest: record.request.guest.name.clone(),
        tenant: record.request.tenant.name.clone(),
        was,
        would_be,
    })
}
