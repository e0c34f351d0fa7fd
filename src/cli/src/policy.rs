//! `casemate policy`.

mod authors;
mod history;
mod template;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use casemate_keep::Paths;
use casemate_policy::{Config, Engine, PluginLimits, Programs, install};
use casemate_spec::{ByteSize, Refusal};
use clap::{Args, Subcommand};
use serde_json::json;

pub(crate) use history::utc;

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
    /// Show all that can be known of a plugin: what it imports and exports, its reasons, what it changes and needs.
    Inspect {
        /// The plugin: a WebAssembly component.
        plugin: PathBuf,
    },
    /// Show what would happen to a guest now. Nothing is changed or recorded.
    Try {
        /// The guest's file.
        file: PathBuf,
        #[command(flatten)]
        bundle: BundleChoice,
    },
    /// Have the keep of a running guest read its bundle anew. One that is no good is refused, and changes nothing.
    Reload {
        /// The guest's name.
        guest: String,
    },
    /// List decisions, oldest first.
    Decisions(history::Span),
    /// Show one decision: what was asked, what each plugin said, and what came of it.
    Explain {
        /// Its name, or the beginning of it; `last` is the last one.
        #[arg(default_value = "last")]
        decision: String,
    },
    /// Ask recorded questions again, of another bundle or with another plugin, and list what would be answered otherwise.
    Replay(history::Replay),
    /// Hold a bundle or a plugin against cases: requests, and what has to be answered.
    Test {
        /// Files of cases, in TOML.
        #[arg(required = true)]
        cases: Vec<PathBuf>,
    },
    /// Write a plugin to start from, with its tests, its SDK and a script that builds it.
    New {
        /// The plugin's name: a-z, 0-9 and -; a folder of this name is made here.
        name: String,
        /// What it is for.
        #[arg(long, value_enum, default_value = "admission")]
        kind: template::Kind,
    },
    /// Measure how long a bundle takes to decide.
    Bench {
        /// The bundle.
        bundle: PathBuf,
        /// The question, as JSON; a decision of the log when left out.
        request: Option<PathBuf>,
        /// How often it is asked.
        #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
        times: u32,
    },
}

/// Which bundle decides.
#[derive(Args)]
pub(crate) struct BundleChoice {
    /// The bundle of policies that decides.
    #[arg(
        long,
        env = "CASEMATE_POLICY",
        default_value = "/etc/casemate/policies/default.toml",
        value_name = "BUNDLE"
    )]
    pub(crate) policy: PathBuf,
}

pub(crate) fn policy(paths: &Paths, command: &Command, as_json: bool) -> Result<ExitCode, Failure> {
    // What reads bundles, plugins and questions isn't root. The others write into a folder of the user's, have a broker by themselves,
    // or ask a keep.
    let stays = matches!(command, Command::New { .. } | Command::Try { .. } | Command::Reload { .. });
    let _stepped_down = if stays { None } else { casemate_keep::step_down(paths)? };
    match command {
        Command::Check { bundle } => check(paths, bundle, as_json),
        Command::Install { plugin } => show(paths, plugin, as_json),
        Command::Inspect { plugin } => inspect(paths, plugin, as_json),
        Command::Try { file, bundle } => authors::rehearse(paths, file, &bundle.policy, as_json),
        Command::Reload { guest } => authors::reload(paths, guest, as_json),
        Command::Decisions(span) => history::list(paths, span, as_json),
        Command::Explain { decision } => history::explain(paths, decision, as_json),
        Command::Replay(replay) => history::replay_all(paths, replay, as_json),
        Command::Test { cases } => authors::test(paths, cases, as_json),
        Command::New { name, kind } => template::write(name, *kind),
        Command::Bench { bundle, request, times } => {
            authors::bench(paths, bundle, request.as_deref(), *times, as_json)
        }
    }
}

/// Opens a bundle.
fn open(paths: &Paths, bundle: &Path) -> Result<Engine, Refusal> {
    Ok(Engine::open(config(paths, &paths.programs(), bundle))?)
}

fn config<'a>(paths: &'a Paths, programs: &'a Programs, bundle: &'a Path) -> Config<'a> {
    Config { bundle, cache: &paths.cache, programs, key: paths.required_key() }
}

fn check(paths: &Paths, bundle: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let engine = open(paths, bundle)?;
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

fn show(paths: &Paths, plugin: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let seen = install(plugin, &paths.cache, &paths.programs()).map_err(Refusal::from)?;
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

fn inspect(paths: &Paths, plugin: &Path, as_json: bool) -> Result<ExitCode, Failure> {
    let seen = install(plugin, &paths.cache, &paths.programs()).map_err(Refusal::from)?;
    let limits = PluginLimits::DEFAULT;
    if as_json {
        output::json(&json!({
            "name": seen.name, "version": seen.version, "digest": seen.digest, "size_bytes": seen.size_bytes,
            "summary": seen.summary, "imports": seen.imports, "exports": seen.exports,
            "kinds": seen.kinds.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "reasons": seen.reasons, "changes": seen.changes, "needs": seen.needs,
            "settings_schema": seen.settings_schema,
            "default_limits": {
                "memory_bytes": limits.memory_bytes, "fuel": limits.fuel, "deadline_ms": limits.deadline_ms,
                "table_elements": limits.table_elements, "instances": limits.instances,
            },
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    output::line(&format!("{} {}: {}", seen.name, seen.version, seen.summary));
    for (name, value) in [
        ("sha256", seen.digest.clone()),
        ("size", format!("{} bytes", seen.size_bytes)),
        ("imports", list(&seen.imports)),
        ("exports", list(&seen.exports)),
        ("kinds", list(&seen.kinds.iter().map(ToString::to_string).collect::<Vec<_>>())),
        ("reasons", list(&seen.reasons)),
        ("changes", list(&seen.changes)),
        ("needs", list(&seen.needs)),
        (
            "limits",
            format!(
                "{}, {} units of fuel, {} ms; a bundle may set others",
                ByteSize::from_bytes(limits.memory_bytes as u64),
                limits.fuel,
                limits.deadline_ms
            ),
        ),
    ] {
        output::line(&format!("{name:<9}{value}"));
    }
    if let Some(schema) = &seen.settings_schema {
        // The plugin's own text: no control characters of it reach the terminal but its line ends.
        let clean = |line: &str| line.replace(char::is_control, " ");
        output::line("settings");
        schema.lines().for_each(|line| output::line(&format!("    {}", clean(line))));
    }
    Ok(ExitCode::SUCCESS)
}
