//! `casemate jail`.

use std::process::ExitCode;

use casemate_filters::{Role, rules};
use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use crate::output::{self, Failure};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the system calls that a cell's threads may make, each with its reason.
    Show {
        /// Which threads: of a VMM while the machine is built, those that run processors, or the rest; or the policy
        /// compiler's.
        #[arg(long, value_enum)]
        thread: Option<Thread>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Thread {
    Build,
    Vcpu,
    Rest,
    Compiler,
}

#[derive(Serialize)]
struct Line {
    thread: &'static str,
    call: &'static str,
    when: &'static [&'static str],
    fails_with: Option<&'static str>,
    why: &'static str,
}

pub(crate) fn jail(command: &Command, json: bool) -> Result<ExitCode, Failure> {
    let Command::Show { thread } = command;
    let roles = [
        (Thread::Build, Role::Build, "build"),
        (Thread::Vcpu, Role::Vcpu, "vcpu"),
        (Thread::Rest, Role::Rest, "rest"),
        (Thread::Compiler, Role::Compiler, "compiler"),
    ];
    for (name, role, word) in
        roles.into_iter().filter(|(name, ..)| thread.is_none_or(|thread| thread == *name))
    {
        let _ = name;
        let lines = rules(role).iter().map(|rule| Line {
            thread: word,
            call: rule.call,
            when: rule.when,
            fails_with: rule.fails_with,
            why: rule.why,
        });
        if json {
            lines.for_each(|line| output::json(&line));
        } else {
            let rows: Vec<Vec<String>> =
                lines.map(|line| vec![line.call.into(), condition(&line), line.why.into()]).collect();
            output::line(&format!("{word}: {} rules; every other call ends the process", rows.len()));
            output::line(&output::table(&rows));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn condition(line: &Line) -> String {
    match line.fails_with {
        Some(error) => format!("fails with {error}"),
        None => line.when.join(", "),
    }
}
