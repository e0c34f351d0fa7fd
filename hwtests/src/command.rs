//! Running the machine's own tools, with errors that say which and why.

use std::{
    ffi::OsStr,
    path::Path,
    process::{Command, Stdio},
};

use crate::LabError;

/// Runs a tool to its end and returns what it printed; a failure carries the last line of its complaint.
pub(crate) fn output_of(command: &mut Command) -> Result<Vec<u8>, LabError> {
    let shown = shown(command);
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        LabError::new(format_args!("cannot run `{shown}`: {error}"), "install this program")
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(LabError::new(
        format_args!("`{shown}` failed ({}): {last}", output.status),
        "run it by hand to see all of its messages",
    ))
}

/// As [`output_of`], as text.
pub(crate) fn text_of(command: &mut Command) -> Result<String, LabError> {
    output_of(command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The file decompressed by `tool -dc`.
pub(crate) fn decompressed(tool: &str, file: &Path) -> Result<Vec<u8>, LabError> {
    output_of(Command::new(tool).args([OsStr::new("-dc"), file.as_os_str()]))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
