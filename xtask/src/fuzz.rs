//! `cargo xtask fuzz`: builds the targets in `fuzz/` with the toolchain that is there, and runs them for a bounded time.
//!
//! What cargo-fuzz adds, a nightly toolchain for the address sanitizer, is left out: the code under test has next to no
//! unsafe blocks, and what it must not do is panic, overflow, grow or hang. Counters in every branch are stable flags.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use casemate_hwtests::LabError;

use crate::steps::{Counts, cargo, target_directory, workspace};

/// For each target, in the test run.
pub(crate) const BRIEFLY: Duration = Duration::from_secs(3);

/// What a run may have of memory: libFuzzer ends one that has more.
const MEMORY_MIB: u32 = 1024;
/// What one input may take: libFuzzer ends one that takes longer. Generous, for a busy machine.
const INPUT_SECONDS: u32 = 20;

/// Counters in each branch and the values that are compared, which is what libFuzzer steers by.
const FLAGS: &str = "--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// `cargo xtask fuzz [TARGET]`.
pub(crate) fn run(target: Option<&str>, seconds: u64) -> Result<ExitCode, LabError> {
    let all = targets();
    if let Some(target) = target
        && !all.iter().any(|name| name == target)
    {
        return Err(LabError::new(
            format_args!("there is no fuzz target {target:?}"),
            format!("name one of {}", all.join(", ")),
        ));
    }
    let (ok, _) = fuzz(target, Duration::from_secs(seconds));
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the targets, runs them one after the other for so long each, and counts how many found nothing.
pub(crate) fn fuzz(only: Option<&str>, each: Duration) -> (bool, Counts) {
    let mut counts = Counts::default();
    let directory = target_directory().join("fuzz");
    let mut build =
        cargo(&["build", "--release", "--locked", "--bins", "--manifest-path", "fuzz/Cargo.toml"]);
    build.env("CARGO_TARGET_DIR", &directory).env("RUSTFLAGS", FLAGS);
    if !build.status().is_ok_and(|status| status.success()) {
        return (false, counts);
    }
    for target in targets().into_iter().filter(|name| only.is_none_or(|only| only == name)) {
        match run_target(&directory, &target, each) {
            Ok(done) => {
                println!("fuzz {target}: {done}");
                counts.passed += 1;
            }
            Err(found) => {
                println!("fuzz {target}: FAILED\n{found}");
                counts.failed += 1;
            }
        }
    }
    (counts.failed == 0 && counts.passed > 0, counts)
}

/// The targets' names: their files'.
fn targets() -> Vec<String> {
    let entries = fs::read_dir(workspace().join("fuzz/targets")).into_iter().flatten().flatten();
    let stem = |path: PathBuf| Some(path.file_stem()?.to_str()?.to_owned());
    let mut names: Vec<_> = entries.filter_map(|entry| stem(entry.path())).collect();
    names.sort_unstable();
    names
}

/// Runs one; gives libFuzzer's closing line, or what it found and where the input is.
fn run_target(directory: &Path, target: &str, each: Duration) -> Result<String, String> {
    // What is found new stays out of the repository; the corpus there is only read.
    let (found, crashes) = (directory.join("corpus").join(target), directory.join("crashes").join(target));
    for folder in [&found, &crashes] {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let mut command = Command::new(directory.join("x86_64-unknown-linux-gnu/release").join(target));
    command
        .arg(format!("-max_total_time={}", each.as_secs().max(1)))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-artifact_prefix={}/", crashes.display()))
        .arg(&found);
    let seeds = workspace().join("fuzz/corpus").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    match said.lines().rev().find(|line| line.starts_with("Done ")) {
        Some(done) if output.status.success() => Ok(done.to_owned()),
        _ => {
            let lines: Vec<_> = said.lines().collect();
            let last = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n");
            Err(format!(
                "{last}\nThe input is in {}; run the target with it as its argument",
                crashes.display()
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_has_seeds() {
        let manifest = fs::read_to_string(workspace().join("fuzz/Cargo.toml")).unwrap();
        let targets = targets();
        assert!(targets.len() > 10, "{targets:?}");
        for target in targets {
            assert!(manifest.contains(&format!("path = \"targets/{target}.rs\"")), "{target} is not built");
            let seeds = workspace().join("fuzz/corpus").join(&target);
            assert!(
                fs::read_dir(&seeds).is_ok_and(|mut seeds| seeds.next().is_some()),
                "{target} has no corpus"
            );
        }
    }
}
