//! cargo-deny, where it is installed: licenses, bans, sources, by `deny.toml`.

use std::process::Stdio;

use crate::steps::{Counts, cargo, workspace};

const WORKSPACES: &[&str] = &["Cargo.toml", "src/policy-compiler/Cargo.toml", "plugins/Cargo.toml"];

/// Checks each workspace; counts one test for each, or one skipped where cargo-deny is missing.
pub(crate) fn run() -> (bool, Counts) {
    let installed = cargo(&["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !installed.is_ok_and(|status| status.success()) {
        println!("skipped: cargo-deny is not installed (cargo install --locked cargo-deny)");
        return (true, Counts { skipped: 1, ..Counts::default() });
    }
    let config = workspace().join("deny.toml").display().to_string();
    let mut counts = Counts::default();
    for manifest in WORKSPACES {
        let manifest = workspace().join(manifest).display().to_string();
        let mut deny = cargo(&["deny", "--manifest-path", &manifest, "--config", &config]);
        deny.args(["check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
        match deny.status() {
            Ok(status) if status.success() => counts.passed += 1,
            _ => {
                println!("FAILED: cargo deny of {manifest}");
                counts.failed += 1;
            }
        }
    }
    (counts.failed == 0, counts)
}
