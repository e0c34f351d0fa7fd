//! What goes to the terminal.

use std::io::{self, IsTerminal, Write};

use casemate_keep::Refusals;
use casemate_spec::Refusal;
use serde::Serialize;

/// Why a command did not do what it was asked.
pub(crate) type Failure = Refusals;

/// Prints a value as one line of JSON on stdout.
pub(crate) fn json(value: &impl Serialize) {
    print_line(&mut io::stdout().lock(), &serde_json::to_string(value).unwrap_or_default());
}

/// Prints a value as one line of JSON on stderr.
pub(crate) fn json_aside(value: &impl Serialize) {
    print_line(&mut io::stderr().lock(), &serde_json::to_string(value).unwrap_or_default());
}

/// A line on stderr: Casemate's own words beside a guest's console.
pub(crate) fn aside(line: &str) {
    print_line(
        &mut io::stderr().lock(),
        &format!("{} {line}", paint("1;36", "casemate:", io::stderr().is_terminal())),
    );
}

/// A line on stdout. A reader that went away is no error.
pub(crate) fn line(text: &str) {
    print_line(&mut io::stdout().lock(), text);
}

fn print_line(out: &mut dyn Write, text: &str) {
    let _ = writeln!(out, "{text}");
}

/// Text in a colour of the terminal's, if it is one.
pub(crate) fn paint(colour: &str, text: &str, terminal: bool) -> String {
    if terminal && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{colour}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

#[derive(Serialize)]
struct RefusalLine<'a> {
    refused: &'a str,
    file: Option<String>,
    line: Option<usize>,
    key: Option<&'a str>,
    subject: &'a str,
    cause: &'a str,
    remedy: &'a str,
}

impl<'a> From<&'a Refusal> for RefusalLine<'a> {
    fn from(refusal: &'a Refusal) -> Self {
        let location = refusal.location.as_ref();
        Self {
            refused: refusal.code,
            file: location.map(|location| location.file.display().to_string()),
            line: location.map(|location| location.line),
            key: location.map(|location| location.key.as_str()),
            subject: &refusal.subject,
            cause: &refusal.cause,
            remedy: &refusal.remedy,
        }
    }
}

/// Tells why, on stderr, a line each.
pub(crate) fn failure(failure: &Failure, as_json: bool) {
    for refusal in &failure.0 {
        if as_json {
            json_aside(&RefusalLine::from(refusal));
        } else {
            let word = paint("1;31", "refused:", io::stderr().is_terminal());
            print_line(&mut io::stderr().lock(), &format!("{word} {refusal}"));
        }
    }
}

/// Rows as a table: columns as wide as their widest cell, the last one free.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut written = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            written.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(written.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let rows = [vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}
