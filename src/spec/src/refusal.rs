//! The one way in which Casemate says no.

use std::{error::Error, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where in a TOML file the refused value stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// The file, as the user named it.
    pub file: PathBuf,
    /// The line, counted from 1.
    pub line: usize,
    /// The key with its tables, as in `device[0].address`.
    pub key: String,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.key)
    }
}

/// A refusal: what was refused, why, and what to do about it, under a code that never changes its meaning.
///
/// It prints as one line: `[code] file:line: key: subject: cause; remedy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Stable, kebab-case: `device-in-use`, `unknown-key`. Scripts match on it; it is listed in `docs/refusals.md`.
    pub code: &'static str,
    /// Where the refused value was written, when it came from a file.
    pub location: Option<Location>,
    /// What was refused: a device's address, a path, a value. May be empty when the location says it all.
    pub subject: String,
    /// Why.
    pub cause: String,
    /// What the reader can do.
    pub remedy: String,
}

impl Refusal {
    /// A refusal without a location.
    pub fn new(
        code: &'static str,
        subject: impl fmt::Display,
        cause: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self {
            code,
            location: None,
            subject: subject.to_string(),
            cause: cause.to_string(),
            remedy: remedy.to_string(),
        }
    }

    /// The same refusal, told where its value was written. A location that is already known is kept.
    #[must_use]
    pub fn at(mut self, location: Option<Location>) -> Self {
        self.location = self.location.or(location);
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] ", self.code)?;
        if let Some(location) = &self.location {
            write!(f, "{location}: ")?;
        }
        if !self.subject.is_empty() {
            write!(f, "{}: ", self.subject)?;
        }
        write!(f, "{}; {}", self.cause, self.remedy)
    }
}

impl Error for Refusal {}
