//! `casemate policy`.

use std::{path::PathBuf, process::ExitCode};

use casemate_keep::{Paths, launcher};
use casemate_policy::{Config, Engine, install_with};
use casemate_spec::Refusal;
use clap::Subcommand;
use serde_json::json;

use crate::output::{self, Failure};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Check a bundle: load each of its plugins, compile what is not compiled yet, and check its settings.
    Check {
        /// The bundle.
        bundle: PathBuf,
    },
    /// Compile a plugin now, so that the first guest does not wait for it, and show what it says of itself.
    Install {
        /// The plugin: a WebAssembly component.
        plugin: PathBuf,
    },
}

pub(crate) fn policy(paths: &Paths, command: &Command, as_json: bool) -> Result<ExitCode, Failure> {
    match command {
        Command::Check { bundle } => check(paths, bundle, as_json),
        Command::Install { plugin } => show(paths, plugin, as_json),
    }
}

fn check(paths: &Paths, bundle: &std::path::Path, as_json: bool) -> Result<ExitCode, Failure> {
    let config = Config { bundle, cache: &paths.cache, compiler: &paths.policy_compiler };
    let engine = Engine::open_with(config, &*launcher(paths)).map_err(Refusal::from)?;
    for plugin in engine.plugins() {
        let compiled_ms = plugin.compile_time.map(|time| time.as_millis());
        if as_json {
            output::json(&json!({
                "name": plugin.name, "version": plugin.version, "digest": plugin.digest,
                "summary": plugin.summary, "compiled_ms": compiled_ms,
            }));
        } else {
            let compiled =
                compiled_ms.map_or("compiled before".to_owned(), |ms| format!("compiled in {ms} ms"));
            output::line(&format!("{} {}: {} ({compiled})", plugin.name, plugin.version, plugin.summary));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(paths: &Paths, plugin: &std::path::Path, as_json: bool) -> Result<ExitCode, Failure> {
    let seen = install_with(plugin, &paths.cache, &paths.policy_compiler, &*launcher(paths))
        .map_err(Refusal::from)?;
    if as_json {
        output::json(&json!({
            "name": seen.name, "version": seen.version, "digest": seen.digest, "size_bytes": seen.size_bytes,
            "summary": seen.summary, "imports": seen.imports, "settings_schema": seen.settings_schema,
        }));
    } else {
        output::line(&format!("{} {}: {}", seen.name, seen.version, seen.summary));
        output::line(&format!("sha256   {}", seen.digest));
        output::line(&format!("size     {} bytes", seen.size_bytes));
        output::line(&format!("imports  {}", seen.imports.join(", ")));
    }
    Ok(ExitCode::SUCCESS)
}
