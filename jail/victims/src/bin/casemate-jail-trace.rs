//! Runs a program and prints which rules of the filters the threads in its cells used, one JSON object a line.
//!
//! `casemate-jail-trace OUT PROGRAM ARGUMENT…`: PROGRAM is `casemate` with a guest to run, or `casemate-jail-probe`.
//! OUT is added to. It needs to be root. It ends as the program ends.

use std::{
    fs::File,
    io::{self, Write},
    process::{Command, ExitCode},
};

use casemate_filters::rules;
use casemate_victims::trace::{Seen, follow};
use serde_json::json;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let (Some(out), Some(program)) = (words.next(), words.next()) else {
        eprintln!("usage: casemate-jail-trace OUT PROGRAM ARGUMENT…");
        return ExitCode::from(2);
    };
    let mut command = Command::new(program);
    command.args(words);
    let open = || File::options().create(true).append(true).open(&out);
    match open().and_then(|file| follow(command).and_then(|seen| tell(file, &seen).map(|()| seen.exit))) {
        Ok(exit) => ExitCode::from(exit.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("casemate-jail-trace: {error}");
            ExitCode::from(2)
        }
    }
}

fn tell(mut file: File, seen: &Seen) -> io::Result<()> {
    for ((role, index), count) in &seen.used {
        let Some(rule) = rules(*role).get(*index) else { continue };
        let line = json!({ "role": role.name(), "file": rule.file, "call": rule.call, "when": rule.when, "count": count });
        writeln!(file, "{line}")?;
    }
    for (role, call, arguments) in &seen.unruled {
        let line = json!({ "role": role.name(), "call": call, "arguments": arguments, "rule": null });
        writeln!(file, "{line}")?;
    }
    Ok(())
}
