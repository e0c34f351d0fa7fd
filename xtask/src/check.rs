//! `cargo xtask test`: everything that must hold, in one run with one closing line.

use std::{
    path::Path,
    process::{Command, ExitCode, Stdio},
};

use casemate_hwtests::{LabError, harness::NO_LABS};

use crate::{
    deny, fuzz, lab,
    steps::{Counts, Part, Parts, Tests, build_programs, cargo, other_vmms, programs},
    tidy,
};

const UNIT_TESTS: &str = "unit tests";
const LAB_TESTS: &str = "lab tests";

/// Runs it. A part that fails does not keep the others from running, except where they need what it makes.
pub(crate) fn run(long: bool, filter: Option<&str>) -> Result<ExitCode, LabError> {
    let mut parts = Parts::default();
    if filter.is_none() {
        parts.run("format", [cargo(&["fmt", "--all", "--check"])]);
        parts.record("house rules", || (tidy::holds(), Counts::default()));
        parts.record("licenses, bans, sources", deny::run);
        let lints = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
        parts.run("lints", [cargo(&lints)]);
    }
    // Before the unit tests: some of them use the tools that the lab installs.
    let prepared = parts.record("lab", || match lab::prepare() {
        Ok(_) => (true, Counts::default()),
        Err(error) => {
            eprintln!("{error}");
            (false, Counts::default())
        }
    });
    // Before the unit tests: those of the policies ask the compiler.
    let built = parts.run("release programs", build_programs(Tests::Too));
    if long {
        parts.run("other builds of the VMM", other_vmms());
    }
    parts.run(UNIT_TESTS, unit_tests(long, filter));
    if built && filter.is_none() {
        parts.record("commands in the documents", || documented_commands(&programs().join("casemate")));
    }
    if filter.is_none() {
        parts.record("fuzz targets", || fuzz::fuzz(None, fuzz::BRIEFLY));
    }
    if prepared && built {
        parts.run(LAB_TESTS, lab_tests(long, filter));
    }
    parts.print_times();
    let complaint = complaint(&parts, filter);
    let counts = parts.counts();
    if let Some(complaint) = &complaint {
        println!("\n{complaint}");
    }
    println!("\n{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
    Ok(if complaint.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All but the lab's. Of the whole workspace, as it was built: cargo builds what is shared anew for another choice of packages.
fn unit_tests(long: bool, filter: Option<&str>) -> [Command; 1] {
    let mut command =
        with_choice(cargo(&["test", "--release", "--workspace", "--no-fail-fast"]), long, filter);
    command.env("CASEMATE_POLICY_COMPILER", programs().join("casemate-policy-compiler"));
    command.env(NO_LABS, "1");
    [command]
}

fn lab_tests(long: bool, filter: Option<&str>) -> Vec<Command> {
    let test = |name: &str| cargo(&["test", "--release", "--workspace", "--test", name]);
    let mut commands = vec![with_choice(test("lab"), long, filter)];
    if filter.is_none() {
        commands.push(test("harness"));
    }
    for command in &mut commands {
        command.env("CASEMATE_PROGRAMS", programs());
    }
    commands
}

/// Whether `casemate` takes the words of each command of its own that a document shows. It is asked for help with them,
/// so it does nothing, and yet complains of a word that it does not know.
fn documented_commands(casemate: &Path) -> (bool, Counts) {
    let mut counts = Counts::default();
    for (path, text) in tidy::read_all() {
        if path.extension().is_none_or(|ending| ending != "md") {
            continue;
        }
        for (line, words) in tidy::commands(&text) {
            let ["casemate", rest @ ..] = &words.iter().map(String::as_str).collect::<Vec<_>>()[..] else {
                continue;
            };
            let mut command = Command::new(casemate);
            command.args(rest).arg("--help").stdin(Stdio::null()).stdout(Stdio::null());
            if command.status().is_ok_and(|status| status.success()) {
                counts.passed += 1;
            } else {
                println!("{}:{line}: casemate takes no such words: {rest:?}", path.display());
                counts.failed += 1;
            }
        }
    }
    (counts.failed == 0 && counts.passed > 0, counts)
}

fn with_choice(mut command: Command, long: bool, filter: Option<&str>) -> Command {
    if long {
        command.env("CASEMATE_LONG", "1");
    }
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    command
}

/// Why the run as a whole has failed, if it has.
fn complaint(parts: &Parts, filter: Option<&str>) -> Option<String> {
    let failed: Vec<&str> = parts.0.iter().filter(|part| !part.ok).map(|part| part.name).collect();
    let ran = |name: &str| {
        parts.0.iter().filter(|part: &&Part| part.name == name).map(|part| part.counts.ran()).sum::<u64>()
    };
    if !failed.is_empty() {
        return Some(format!("failed: {}", failed.join(", ")));
    }
    if parts.counts().failed > 0 {
        return Some("failed: a test failed though its runner did not say so".to_owned());
    }
    match filter {
        None if ran(LAB_TESTS) == 0 => Some("failed: not one test ran in the lab".to_owned()),
        None if ran(UNIT_TESTS) == 0 => Some("failed: not one unit test ran".to_owned()),
        Some(filter) if parts.counts().ran() == 0 => {
            Some(format!("failed: no test with {filter:?} in its name ran"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn part(name: &'static str, ok: bool, passed: u64) -> Part {
        Part { name, ok, took: Duration::ZERO, counts: Counts { passed, ..Counts::default() } }
    }

    #[test]
    fn a_run_without_lab_tests_fails() {
        let mut parts = Parts(vec![part(UNIT_TESTS, true, 9), part(LAB_TESTS, true, 0)]);
        assert_eq!(complaint(&parts, None).as_deref(), Some("failed: not one test ran in the lab"));
        assert_eq!(complaint(&parts, Some("x")), None);
        parts.0.push(part(LAB_TESTS, true, 1));
        assert_eq!(complaint(&parts, None), None);
        parts.0.push(part("lints", false, 0));
        assert_eq!(complaint(&parts, None).as_deref(), Some("failed: lints"));
    }

    #[test]
    fn commands_in_documents_are_tried() {
        let (ok, tried) = documented_commands(Path::new("/bin/true"));
        assert!(ok && tried.passed >= 4 && tried.failed == 0, "{tried:?}");
        let (ok, refused) = documented_commands(Path::new("/bin/false"));
        assert!(!ok && refused.failed == tried.passed, "{refused:?}");
    }
}
