//! What goes wrong with a policy, as opposed to what a policy denies.

use std::{error::Error, fmt};

use casemate_spec::{Location, Refusal};
use serde::{Deserialize, Serialize};

/// Kinds of errors. Each has a code that never changes its meaning, and a remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// There is no bundle.
    BundleMissing,
    /// The bundle can't be read, or says what can't be.
    Bundle,
    /// The bundle isn't signed by the host's key.
    Signature,
    /// The bundle names no plugin: nothing would decide.
    Empty,
    /// A plugin's file isn't there.
    Missing,
    /// A folder is no OCI layout with a plugin in it.
    Oci,
    /// A plugin's file is not the one that the bundle names.
    Digest,
    /// A plugin's file is larger than any is.
    Size,
    /// A plugin's file is no component.
    Invalid,
    /// A plugin wants what no plugin gets.
    Import,
    /// A plugin does not speak the contract, or a newer one.
    Contract,
    /// A plugin doesn't take the settings that the bundle gives it.
    Settings,
    /// The compiler is missing, failed or took too long.
    Compiler,
    /// The cache can't be used as it is.
    Cache,
    /// Compiled code in the cache is not what Casemate put there.
    Tampered,
    /// The request is larger than any is.
    Request,
    /// A plugin stopped.
    Trap,
    /// A plugin took too long.
    Timeout,
    /// A plugin took too much memory.
    Memory,
    /// A plugin's answer breaks the rules.
    Answer,
    /// A plugin changes what it may not, or to what can't be.
    Change,
    /// Two plugins want a field to be two things.
    Conflict,
    /// A plugin isn't content with what it has changed itself.
    Unstable,
    /// A plugin failed too often, and isn't asked any more.
    Suspended,
    /// A file of cases can't be used.
    Cases,
    /// The engine itself can't be had.
    Engine,
}

impl Fault {
    /// The stable code.
    pub const fn code(self) -> &'static str {
        self.texts().0
    }

    /// What the reader can do.
    pub const fn remedy(self) -> &'static str {
        self.texts().1
    }

    const fn texts(self) -> (&'static str, &'static str) {
        match self {
            Self::BundleMissing => (
                "policy-bundle-missing",
                "name a bundle that exists; policies/default.toml is the shipped one",
            ),
            Self::Bundle => ("policy-bundle", "correct the bundle; docs/policies.md shows every key"),
            Self::Signature => {
                ("policy-signature", "have whoever holds the key sign it: minisign -S -m BUNDLE")
            }
            Self::Empty => {
                ("policy-none", "name at least one [[plugin]]: without a policy nothing is admitted")
            }
            Self::Missing => {
                ("policy-missing", "put the plugin's file there, or correct `path` in the bundle")
            }
            Self::Oci => (
                "policy-oci",
                "name a folder with oci-layout, index.json and blobs, and the digest of a manifest or a Wasm layer",
            ),
            Self::Digest => (
                "policy-digest",
                "if you changed the plugin yourself, put its new sha256 in the bundle; else restore it",
            ),
            Self::Size => ("policy-size", "build it smaller: strip it, leave out debug information"),
            Self::Invalid => ("policy-invalid", "build it as a component; docs/policies.md shows how"),
            Self::Import => {
                ("policy-import", "build the plugin without it: for wasm32-unknown-unknown, not for WASI")
            }
            Self::Contract => ("policy-contract", "build the plugin with the contract in policies/wit"),
            Self::Settings => ("policy-settings", "correct the plugin's settings in the bundle"),
            Self::Compiler => {
                ("policy-compiler", "build casemate-policy-compiler as docs/policies.md says, and try again")
            }
            Self::Cache => ("policy-cache", "give Casemate a folder of its own with mode 0700"),
            Self::Tampered => (
                "policy-cache-tampered",
                "find out who wrote there, then remove the file: it's compiled anew",
            ),
            Self::Request => ("policy-request", "make the guest's file smaller"),
            Self::Trap => {
                ("policy-trap", "report it to the plugin's author, or take the plugin out of the bundle")
            }
            Self::Timeout => (
                "policy-timeout",
                "raise the plugin's limits in the bundle, or report it to the plugin's author",
            ),
            Self::Memory => (
                "policy-memory",
                "raise the plugin's limits in the bundle, or report it to the plugin's author",
            ),
            Self::Answer => ("policy-answer", "report it to the plugin's author"),
            Self::Change => (
                "policy-change",
                "permit it in the bundle (`may_change`), or report it to the plugin's author",
            ),
            Self::Conflict => (
                "policy-conflict",
                "let only one of them change the field: take it out of the other's `may_change`",
            ),
            Self::Unstable => (
                "policy-unstable",
                "report it to the plugin's author, or take the field out of its `may_change`",
            ),
            Self::Suspended => {
                ("policy-suspended", "see why it failed, mend or replace it, then have the bundle read again")
            }
            Self::Cases => ("policy-cases", "correct the file; docs/policies.md shows one"),
            Self::Engine => (
                "policy-engine",
                "see that casemate-policy-engine stands beside casemate and is of its version, or report it with this message",
            ),
        }
    }
}

/// Why there is no verdict. Whoever gets one refuses the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyError {
    fault: Fault,
    location: Option<Location>,
    subject: String,
    cause: String,
}

impl PolicyError {
    /// One about `subject`; both texts become one line, of at most 1,000 characters.
    pub fn new(fault: Fault, subject: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self { fault, location: None, subject: one_line(subject), cause: one_line(cause) }
    }

    pub(crate) fn at(mut self, location: Location) -> Self {
        self.location.get_or_insert(location);
        self
    }

    /// The kind of error.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// What it's about.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// What is wrong.
    pub fn cause(&self) -> &str {
        &self.cause
    }

    /// The stable code: `policy-trap`. It's listed in `docs/policies.md`.
    pub fn code(&self) -> &'static str {
        self.fault.code()
    }
}

/// The text as one line without control characters; some of it may come from a plugin or the compiler.
fn one_line(text: impl fmt::Display) -> String {
    let text = text.to_string();
    let mut line: String = text.chars().take(1_000).map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.truncate(line.trim_end().len());
    line
}

impl From<PolicyError> for Refusal {
    fn from(error: PolicyError) -> Self {
        Refusal::new(error.code(), error.subject, error.cause, error.fault.remedy()).at(error.location)
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Refusal::from(self.clone()).fmt(f)
    }
}

impl Error for PolicyError {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn the_handbook_lists_each_code() {
        use Fault::*;
        let all = [
            BundleMissing,
            Bundle,
            Signature,
            Empty,
            Missing,
            Digest,
            Size,
            Invalid,
            Import,
            Contract,
            Settings,
            Compiler,
            Cache,
            Tampered,
            Request,
            Trap,
            Timeout,
            Memory,
            Answer,
            Change,
            Conflict,
            Unstable,
            Cases,
            Engine,
        ];
        let handbook = include_str!("../../../docs/policies.md");
        for fault in all {
            assert!(handbook.contains(&format!("| `{}` |", fault.code())), "{}", fault.code());
        }
    }

    #[test]
    fn prints_as_one_line_with_code_place_cause_and_remedy() {
        let location = Location { file: PathBuf::from("p.toml"), line: 3, key: "plugin[0].path".into() };
        let error = PolicyError::new(Fault::Missing, "limits.wasm", "no such file\n\x1b[31m").at(location);
        assert_eq!(
            error.to_string(),
            "[policy-missing] p.toml:3: plugin[0].path: limits.wasm: no such file  [31m; \
             put the plugin's file there, or correct `path` in the bundle"
        );
    }
}
