//! Builds the plugins anew, in another folder, and compares them with what is committed.
//!
//! That takes the very std with which they were built, from source, since another one gives other bytes: where it isn't
//! at hand, the test is counted as ignored and its line says what it needs.

mod common;

use std::{fs, path::Path, process::Command};

use common::root;
use libtest_mimic::{Arguments, Failed, Trial};

/// The version of Rust with which the committed components were built.
const RUSTC: &str = "rustc 1.95.0 ";

fn main() {
    let version =
        Command::new("rustc").arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let possible = version.starts_with(RUSTC.as_bytes())
        && std::env::var_os("CASEMATE_RUST_SRC").is_some_and(|path| Path::new(&path).is_dir());
    let needs = if possible { "" } else { "needs Rust 1.95.0 and CASEMATE_RUST_SRC, see plugins/build" };
    let trial = Trial::test("the_committed_components_are_what_their_source_gives", compare)
        .with_kind(needs)
        .with_ignored_flag(!possible);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit();
}

fn compare() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("elsewhere");
    for part in ["plugins", "policies/wit"] {
        let to = copy.join(part);
        fs::create_dir_all(to.parent().ok_or("no parent")?)?;
        if !Command::new("cp").arg("-r").arg(root().join(part)).arg(&to).status()?.success() {
            return Err("the plugins can't be copied".into());
        }
    }
    let out = folder.path().join("out");
    let built = Command::new(copy.join("plugins/build"))
        .arg(&out)
        .env("CASEMATE_PLUGIN_TARGET_DIR", folder.path().join("target"))
        .output()?;
    if !built.status.success() {
        return Err(String::from_utf8_lossy(&built.stderr).into_owned().into());
    }
    // Scripts are made components by another tool, of which two runs give other bytes.
    let sums = |path: &Path| -> std::io::Result<String> {
        let text = fs::read_to_string(path.join("SHA256SUMS"))?;
        Ok(text
            .lines()
            .filter(|line| !line.ends_with("  naming.wasm"))
            .map(|line| format!("{line}\n"))
            .collect())
    };
    let (new, committed) = (sums(&out)?, sums(&root().join("plugins/built"))?);
    if new != committed {
        return Err(format!("run plugins/build and commit what it gives:\n{new}is not\n{committed}").into());
    }
    Ok(())
}
