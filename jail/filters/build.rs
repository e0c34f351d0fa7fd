//! Compiles `build.toml`, `vcpu.toml`, `rest.toml` and `compiler.toml` into BPF programs and tables of rules; see `compile/mod.rs`.

#[path = "src/calls.rs"]
mod calls;
mod compile;

use std::{env, fs, path::Path, process::exit};

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
    let mut files = Vec::new();
    for name in ["build.toml", "vcpu.toml", "rest.toml", "compiler.toml"] {
        println!("cargo::rerun-if-changed={name}");
        let text = fs::read_to_string(name).map_err(|error| format!("jail/filters/{name}: {error}"))?;
        files.push(compile::parse(&format!("jail/filters/{name}"), &text)?);
    }
    let [build, vcpu, rest, compiler] =
        <[compile::File; 4]>::try_from(files).map_err(|_| "four files make the filters")?;
    let source = compile::source(&build, &vcpu, &rest)? + &compile::source_alone(&compiler, "COMPILER")?;
    let directory = env::var("OUT_DIR").map_err(|error| error.to_string())?;
    fs::write(Path::new(&directory).join("filters.rs"), source).map_err(|error| error.to_string())
}
