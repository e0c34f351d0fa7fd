//! Reasons and verdicts, made in few words.

use crate::{Allowed, Change, Denied, Reason, Severity, Value, Verdict};

impl Reason {
    /// A reason of severity `medium`, without field or remedy yet. `code` is 1 to 64 of `a-z`, `0-9` and `-`.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            severity: Severity::Medium,
            message: message.into(),
            field: None,
            remedy: None,
            attrs: Vec::new(),
        }
    }

    /// The same with the key of the guest's file that is at fault: `memory`, `device[0].address`.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// The same with what can be done, as an imperative: `ask for at most 16 GiB`.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The same with another severity.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }
}

impl Change {
    /// A change of a field, a key of the guest's file, and why.
    pub fn new(field: &str, value: Value, reason: impl Into<String>) -> Self {
        Self { field: field.into(), value, reason: reason.into(), attrs: Vec::new() }
    }
}

impl Verdict {
    /// The same with changes, if it's a yes.
    #[must_use]
    pub fn with_changes(mut self, changes: Vec<Change>) -> Self {
        if let Self::Allow(allowed) = &mut self {
            allowed.changes.extend(changes);
        }
        self
    }
}

/// Yes, without a warning.
pub fn allow() -> Verdict {
    verdict(Vec::new(), Vec::new())
}

/// No, for one reason.
pub fn deny(reason: Reason) -> Verdict {
    verdict(vec![reason], Vec::new())
}

/// No when there is a reason, else yes with these warnings.
pub fn verdict(reasons: Vec<Reason>, warnings: Vec<Reason>) -> Verdict {
    if reasons.is_empty() {
        Verdict::Allow(Allowed { changes: Vec::new(), warnings, attrs: Vec::new() })
    } else {
        Verdict::Deny(Denied { reasons, attrs: Vec::new() })
    }
}
