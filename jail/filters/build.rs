//! Compiles the filter files beside it into BPF programs and tables of rules; see `compile/mod.rs`.

#[path = "src/calls.rs"]
mod calls;
mod compile;

use std::{env, fs, path::Path, process::exit};

/// The roles whose filters go over that of the building phase, each a file.
const NARROW: [&str; 12] = [
    "vcpu", "control", "blk", "net", "vsock", "device", "port", "console", "intx", "spare", "hotplug",
    "peers",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=compile");
    println!("cargo::rerun-if-changed=src/calls.rs");
    if let Err(problem) = run() {
        eprintln!("{problem}");
        exit(1);
    }
}

fn run() -> Result<(), String> {
    let load = |name: &str| compile::load(name, &read);
    let narrow = NARROW.into_iter().map(|name| Ok((name, load(name)?)));
    let narrow = narrow.collect::<Result<Vec<_>, String>>()?;
    let compiler = compile::source_alone(&load("compiler")?, "COMPILER")?;
    let policy = [("policy", load("policy")?), ("policy_ticker", load("policy-ticker")?)];
    let policy = compile::source("POLICY_LOAD", &load("policy-load")?, &policy)?;
    let source = compile::source("BUILD", &load("build")?, &narrow)? + &compiler + &policy;
    let directory = env::var("OUT_DIR").map_err(|error| error.to_string())?;
    fs::write(Path::new(&directory).join("filters.rs"), source).map_err(|error| error.to_string())
}

fn read(file: &str) -> Result<String, String> {
    println!("cargo::rerun-if-changed={file}");
    fs::read_to_string(file).map_err(|error| format!("jail/filters/{file}: {error}"))
}
