//! `cargo xtask bench`: Casemate beside other VMMs in one lab run, as a table.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{ExitCode, Stdio},
};

use casemate_hwtests::{COUNTED, LabError, Layout};
use serde::Deserialize;

use crate::{
    lab,
    steps::{Tests, build_programs, cargo, programs},
};

/// What lines of a bench's log begin with that tell a row.
const ROW: &str = "# row ";

/// What is asked for to be measured without the lab.
const NATIVE: &str = "native";

/// Programs of other VMMs that are looked for on PATH. QEMU is not among them: the lab has one.
const PEERS: [&str; 3] = ["cloud-hypervisor", "firecracker", "jailer"];

#[derive(Deserialize)]
struct Row {
    name: String,
    unit: String,
    ours: f64,
    peer: String,
    peer_version: String,
    theirs: f64,
    ratio: Option<f64>,
    runs: u64,
}

/// Builds, measures, and shows what was measured: as a table, or as a line of JSON for each row.
pub(crate) fn run(name: Option<&str>, counted: bool, json: bool) -> Result<ExitCode, LabError> {
    if name == Some(NATIVE) {
        if counted {
            return Err(LabError::new(
                "only a lab counts instructions",
                "leave `native` out, or `--counted`",
            ));
        }
        can_natively()?;
    } else {
        lab::prepare()?;
    }
    for mut build in build_programs(Tests::No) {
        if !build.status().is_ok_and(|status| status.success()) {
            return Ok(ExitCode::FAILURE);
        }
    }
    let logs = Layout::of_workspace().logs();
    forget_logs(&logs);
    bring_peers(&Layout::of_workspace())?;
    if name == Some(NATIVE) {
        return natively(json);
    }
    let mut bench = cargo(&["test", "--release", "--package", "casemate-hwtests", "--test", "bench", "--"]);
    // `jail` for `bench-jail`.
    let name =
        name.map(|name| if name.starts_with("bench-") { name.to_owned() } else { format!("bench-{name}") });
    bench.args(name).env("CASEMATE_PROGRAMS", programs());
    if counted {
        bench.env(COUNTED, "1");
    }
    let ok = bench.status().is_ok_and(|status| status.success());
    let lines = rows(&logs);
    show(&lines, json);
    Ok(if ok && !lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What needs no lab, on this host itself.
fn natively(json: bool) -> Result<ExitCode, LabError> {
    let mut bench = cargo(&["test", "--release", "--package", "casemate-hwtests", "--test", "bench", "--"]);
    bench.args(["--one-test", "bench-exec"]).env("CASEMATE_PROGRAMS", programs());
    let output = bench.stderr(Stdio::inherit()).output().map_err(|error| {
        LabError::new(format!("the benchmark cannot be started: {error}"), "see the message of cargo above")
    })?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<String> =
        printed.lines().filter_map(|line| line.strip_prefix(ROW)).map(str::to_owned).collect();
    if lines.is_empty() {
        eprintln!("{printed}");
    }
    show(&lines, json);
    Ok(if output.status.success() && !lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Guests run on this host as they do in the lab.
fn can_natively() -> Result<(), LabError> {
    let refuse = |what: &str, remedy: &str| Err(LabError::new(what.to_owned(), remedy));
    let user = fs::metadata("/proc/self").map(|own| own.uid());
    if user.is_ok_and(|uid| uid != 0) {
        return refuse(
            "guests are run on this host itself, which takes root",
            "run it as root, or leave `native` out for the lab",
        );
    }
    if !Path::new("/dev/kvm").exists() {
        return refuse(
            "this host has no /dev/kvm",
            "see what `casemate doctor` says, or leave `native` out for the lab",
        );
    }
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    let lacks = ["memory", "pids", "cpu"]
        .iter()
        .find(|name| controllers.split_whitespace().all(|known| known != **name));
    match lacks {
        Some(name) => refuse(
            &format!("cgroup v2 of this host has no controller {name}, without which no cell is made"),
            "see what `casemate doctor` says, or leave `native` out for the lab",
        ),
        None => Ok(()),
    }
}

/// Other VMMs, where the lab sees them: those of this machine's PATH, and no others.
fn bring_peers(layout: &Layout) -> Result<(), LabError> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    for name in PEERS {
        let to = layout.peer(name);
        let _ = fs::remove_file(&to);
        let from =
            std::env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file());
        let Some(from) = from else { continue };
        let brought = to.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(&from, &to));
        brought.map_err(|error| {
            let what = format!("cannot copy {} to {}: {error}", from.display(), to.display());
            LabError::new(what, "check both paths")
        })?;
    }
    Ok(())
}

/// Rows of earlier runs are not told again.
fn forget_logs(logs: &Path) {
    for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("bench-") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The rows' JSON, a log after the other.
fn rows(logs: &Path) -> Vec<String> {
    let mut paths: Vec<_> =
        fs::read_dir(logs).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("bench-")));
    paths.sort_unstable();
    let text = paths.iter().filter_map(|path| fs::read_to_string(path).ok()).collect::<Vec<_>>().join("\n");
    text.lines().filter_map(|line| line.strip_prefix(ROW)).map(str::to_owned).collect()
}

fn show(lines: &[String], json: bool) {
    if json {
        lines.iter().for_each(|line| println!("{line}"));
    } else {
        table(lines);
    }
}

fn table(lines: &[String]) {
    println!("| what | unit | Casemate | the other | which | ratio | runs |\n|---|---|---|---|---|---|---|");
    for row in lines.iter().filter_map(|line| serde_json::from_str::<Row>(line).ok()) {
        let Row { name, unit, ours, peer, peer_version, theirs, ratio, runs } = row;
        // Against nothing there is no ratio.
        let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        println!("| {name} | {unit} | {ours} | {theirs} | {peer} {peer_version} | {ratio} | {runs} |");
    }
    println!(
        "\nMedians of runs in turn. A ratio above 1 is in Casemate's favour. docs/performance.md says what it tells."
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_off_the_logs() {
        let folder = tempfile::tempdir().unwrap();
        let row = r#"{"name":"n","unit":"ms","ours":1.0,"peer":"qemu","peer_version":"10","theirs":2.0,"ratio":2.0,"runs":5}"#;
        fs::write(folder.path().join("bench-start.log"), format!("$ x\n{ROW}{row}\n# other\n")).unwrap();
        fs::write(folder.path().join("boots.log"), format!("{ROW}{row}\n")).unwrap();
        let lines = rows(folder.path());
        assert_eq!(lines, [row]);
        assert!(serde_json::from_str::<Row>(&lines[0]).is_ok());
        forget_logs(folder.path());
        assert!(rows(folder.path()).is_empty() && folder.path().join("boots.log").exists());
    }
}
