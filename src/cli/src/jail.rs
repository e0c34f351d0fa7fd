//! `casemate jail`.

use std::process::ExitCode;

use casemate_filters::{Role, calls_of, rules};
use clap::{Subcommand, builder::PossibleValuesParser};
use serde::Serialize;

use crate::output::{self, Failure};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the system calls that a cell's threads may make, each with its reason.
    Show {
        /// Which threads: all of a VMM while the machine is built (build), and once the guest runs: those that run processors
        /// (vcpu), the one that changes the machine (control), those of disks (blk), network cards (net), sockets (vsock)
        /// and other devices (device), that of the console's input (console), those of INTx (intx); or the
        /// policy compiler's (compiler), or the policy engine's: all of it while plugins are loaded (policy-load), then the one that
        /// asks them (policy) and the one that counts time (policy-ticker).
        #[arg(long, value_parser = PossibleValuesParser::new(Role::ALL.map(Role::name)))]
        thread: Option<String>,
    },
}

#[derive(Serialize)]
struct Line {
    thread: &'static str,
    call: &'static str,
    when: &'static [&'static str],
    fails_with: Option<&'static str>,
    why: &'static str,
    /// The file of jail/filters that it stands in.
    file: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    unseen: Option<&'static str>,
}

pub(crate) fn jail(command: &Command, json: bool) -> Result<ExitCode, Failure> {
    let Command::Show { thread } = command;
    let is_asked = |role: &Role| thread.as_deref().is_none_or(|thread| thread == role.name());
    for role in Role::ALL.into_iter().filter(is_asked) {
        let lines = rules(role).iter().map(|rule| Line {
            thread: role.name(),
            call: rule.call,
            when: rule.when,
            fails_with: rule.fails_with,
            why: rule.why,
            file: rule.file,
            unseen: rule.unseen,
        });
        if json {
            lines.for_each(|line| output::json(&line));
        } else {
            let rows: Vec<Vec<String>> =
                lines.map(|line| vec![line.call.into(), condition(&line), line.why.into()]).collect();
            output::line(&format!(
                "{role}: {} calls by {} rules; every other call ends the process",
                calls_of(role),
                rows.len()
            ));
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
