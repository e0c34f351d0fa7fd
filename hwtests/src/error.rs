//! What stops the lab from being prepared or run.

use std::{fmt, io, path::Path};

/// Why the lab can't be prepared or run, and what to do about it. Prints as one line.
#[derive(Debug, thiserror::Error)]
#[error("lab: {what}; {remedy}")]
pub struct LabError {
    what: String,
    remedy: String,
}

impl LabError {
    /// `what` names what is missing or went wrong, `remedy` what the reader can do.
    pub fn new(what: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self { what: what.to_string(), remedy: remedy.to_string() }
    }

    /// An I/O error on `path`; `verb` as in "cannot `verb` PATH".
    pub(crate) fn io(verb: &str, path: &Path, error: io::Error) -> Self {
        let remedy = match error.kind() {
            io::ErrorKind::StorageFull => "free some space (the lab needs about 1 GB) and try again",
            io::ErrorKind::PermissionDenied => "check the owner and the mode of this path",
            _ => "check this path, or remove target/lab and run `cargo xtask lab prepare` again",
        };
        Self::new(format_args!("cannot {verb} {}: {error}", path.display()), remedy)
    }
}
