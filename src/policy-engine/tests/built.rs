//! What is committed fits together: components and their digests, the shipped bundle, the versions of wasmtime, and
//! that no compiler is linked where decisions are made.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use std::{fs, process::Command};

use common::{root, sha256};

fn sums() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("plugins/built/SHA256SUMS")).unwrap();
    let lines = text.lines().map(|line| line.split_once("  ").unwrap());
    lines.map(|(digest, name)| (digest.to_owned(), name.to_owned())).collect()
}

#[test]
fn digests_are_those_of_the_committed_components() {
    let sums = sums();
    assert_eq!(sums.len(), 18);
    for (digest, name) in sums {
        let bytes = fs::read(root().join("plugins/built").join(&name)).unwrap();
        assert_eq!(sha256(&bytes), digest, "{name}: run plugins/build");
    }
}

#[test]
fn the_shipped_bundle_names_the_committed_component() {
    let bundle = fs::read_to_string(root().join("policies/default.toml")).unwrap();
    let (digest, _) = sums().into_iter().find(|(_, name)| name == "limits.wasm").unwrap();
    assert!(bundle.contains(&digest), "put {digest} in policies/default.toml");
}

fn wasmtime_in(lock: &str) -> String {
    let text = fs::read_to_string(root().join(lock)).unwrap();
    let (_, rest) = text.split_once("name = \"wasmtime\"\nversion = \"").unwrap();
    rest.split('"').next().unwrap().to_owned()
}

#[test]
fn host_and_compiler_have_the_same_wasmtime() {
    let source = fs::read_to_string(root().join("src/policy/src/loader.rs")).unwrap();
    let version = wasmtime_in("Cargo.lock");
    assert_eq!(version, wasmtime_in("src/policy-compiler/Cargo.lock"));
    assert!(source.contains(&format!("const WASMTIME: &str = \"{version}\";")), "WASMTIME is not {version}");
}

#[test]
fn no_compiler_is_linked_where_plugins_run() {
    let tree = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--offline",
            "--package",
            "casemate-policy-engine",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    let tree = String::from_utf8(tree.stdout).unwrap();
    assert!(tree.contains("wasmtime v"), "{tree}");
    // The tables of types that compiler and runtime share are not it.
    let compiler = tree.lines().find(|line| {
        ["cranelift-codegen", "wasmtime-internal-cranelift", "winch", "regalloc2", "wasmtime-wasi"]
            .iter()
            .any(|name| line.starts_with(name))
    });
    assert_eq!(compiler, None);
}
