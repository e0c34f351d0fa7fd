//! `casemate`: runs guests in cells of their own, with physical devices, under policies.

mod attach;
mod audit;
mod devices;
mod doctor;
mod events;
mod jail;
mod operate;
mod output;
mod policy;
mod recover;
mod run;

use std::{path::PathBuf, process::ExitCode};

use casemate_keep::{OperatorRequest, Paths};
use casemate_spec::Refusal;
use clap::{Parser, Subcommand};

use crate::output::Failure;

const EXIT_CODES: &str = "\
Exit codes:
  0  done; a guest powered itself off, or was stopped, and its devices are clean
  1  refused: what, why and what to do is on stderr, one line each; the host is as it was
  2  the command line is wrong
  3  the guest ended as it should not: reset, panic, watchdog, triple fault, a fault, or its VMM died
  4  the guest ended, or a killed run was cleaned up after, and a device did not prove itself clean or is not back
  5  casemate audit found a line that is not as it must be

A first hour:
  casemate doctor                       what this host can do, and what is missing
  casemate devices                      which PCI functions a guest can have, and why not the others
  casemate run examples/nvme-and-nic.toml
";

/// Runs guests that do not trust each other, each in a cell of its own, with physical PCI devices, under policies.
#[derive(Parser)]
#[command(name = "casemate", version, after_help = EXIT_CODES)]
struct Arguments {
    /// Print JSON, one value a line, instead of text.
    #[arg(long, global = true)]
    json: bool,
    /// Where compiled plugins are kept.
    #[arg(long, global = true, env = "CASEMATE_CACHE", hide_env_values = true, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Where the ledger of claimed devices is kept.
    #[arg(long, global = true, env = "CASEMATE_STATE", hide_env_values = true, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// The host file, with the pools of devices [default: /etc/casemate/host.toml if there is one].
    #[arg(long, global = true, env = "CASEMATE_HOST_CONFIG", hide_env_values = true, value_name = "FILE")]
    host_config: Option<PathBuf>,
    /// The program that runs in a cell [default: casemate-vmm beside this program].
    #[arg(long, global = true, env = "CASEMATE_VMM", hide_env_values = true, value_name = "PROGRAM")]
    vmm: Option<PathBuf>,
    /// The program that is root for a run [default: casemate-broker beside this program].
    #[arg(long, global = true, env = "CASEMATE_BROKER", hide_env_values = true, value_name = "PROGRAM")]
    broker: Option<PathBuf>,
    /// The program that compiles plugins [default: casemate-policy-compiler beside this program].
    #[arg(
        long,
        global = true,
        env = "CASEMATE_POLICY_COMPILER",
        hide_env_values = true,
        value_name = "PROGRAM"
    )]
    policy_compiler: Option<PathBuf>,
    /// The program that runs plugins [default: casemate-policy-engine beside this program].
    #[arg(
        long,
        global = true,
        env = "CASEMATE_POLICY_ENGINE",
        hide_env_values = true,
        value_name = "PROGRAM"
    )]
    policy_engine: Option<PathBuf>,
    /// A public key of minisign; where the file exists, bundles have to be signed by it.
    #[arg(
        long,
        global = true,
        env = "CASEMATE_POLICY_KEY",
        hide_env_values = true,
        value_name = "FILE",
        default_value = "/etc/casemate/policy.pub"
    )]
    policy_key: PathBuf,
    /// A folder of public keys of minisign, NAME.pub each: those who may sign what guests boot.
    #[arg(
        long,
        global = true,
        env = "CASEMATE_IMAGE_KEYS",
        hide_env_values = true,
        value_name = "FOLDER",
        default_value = "/etc/casemate/image-keys"
    )]
    image_keys: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what this host can do for guests, what is missing, and how to get it.
    Doctor,
    /// List the PCI functions of this host, and say of each whether a guest can have it, or why not.
    Devices(devices::Options),
    /// Run one guest from its file until it ends. Its console is on stdout and, if that is a terminal, on stdin; Casemate's
    /// own words are on stderr. SIGTERM and SIGINT press the guest's power button; a second one stops it.
    Run(run::Options),
    /// List the guests that run on this host.
    Ps,
    /// Hold the processors of a running guest; its devices finish what they were asked. Time goes on, and the guest sees so.
    Pause(operate::Options),
    /// Let the processors of a paused guest go on.
    Resume(operate::Options),
    /// Show what a running guest has done and what it takes: exits of each processor, requests and bytes of each device.
    Stats(operate::Options),
    /// Have a running guest give up some of its memory, or take it back. It gives what it can, and takes back what it needs
    /// before it kills a process for want of memory.
    Balloon(operate::BalloonOptions),
    /// Have a running guest name all memory that it has free, and take that back at once: for kernels that don't report it as
    /// they free it (Linux before 5.7).
    Reclaim(operate::Options),
    /// Make a disk of a running guest larger or smaller, and tell the guest.
    Resize(operate::ResizeOptions),
    /// Limit what a disk or a network card of a running guest does. What is not named is not limited any more.
    Limit(operate::LimitOptions),
    /// Press the power button of a running guest. It is stopped if it does not heed it within the `--grace` of its `run`.
    PowerOff(operate::Options),
    /// Stop a running guest at once; it is not asked.
    Stop(operate::Options),
    /// Give a running guest a disk or a network card, in one of its slots for hot-plug.
    Attach(attach::AttachOptions),
    /// Take what is in a slot from a running guest: its kernel is asked to let it go first.
    Detach(attach::DetachOptions),
    /// Measure the cell of a running guest, and say of each part whether it is as it must be, with a digest to keep.
    Audit(audit::Options),
    /// Show what happened to guests while they ran: what governors did, and why.
    Events(events::Options),
    /// Give back devices that a killed `casemate run` left claimed. Every `run` does it first by itself.
    Recover,
    /// Ask, install or look at policy plugins.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Show what a cell may do.
    #[command(subcommand)]
    Jail(jail::Command),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.json;
    match carry_out(arguments) {
        Ok(code) => code,
        Err(failure) => {
            output::failure(&failure, json);
            ExitCode::from(1)
        }
    }
}

fn carry_out(arguments: Arguments) -> Result<ExitCode, Failure> {
    let json = arguments.json;
    let paths = paths(&arguments)?;
    match arguments.command {
        Command::Doctor => doctor::doctor(json),
        Command::Devices(options) => devices::devices(&paths, &options, json),
        Command::Run(options) => run::run(&paths, &options, json),
        Command::Ps => audit::ps(&paths, json),
        Command::Pause(options) => operate::act(&paths, &options, &OperatorRequest::Pause, json),
        Command::Resume(options) => operate::act(&paths, &options, &OperatorRequest::Resume, json),
        Command::Stats(options) => operate::stats(&paths, &options, json),
        Command::Balloon(options) => operate::balloon(&paths, &options, json),
        Command::Reclaim(options) => operate::reclaim(&paths, &options, json),
        Command::Resize(options) => operate::resize(&paths, &options, json),
        Command::Limit(options) => operate::limit(&paths, &options, json),
        Command::PowerOff(options) => operate::act(&paths, &options, &OperatorRequest::PowerOff, json),
        Command::Stop(options) => operate::act(&paths, &options, &OperatorRequest::Stop, json),
        Command::Attach(options) => attach::attach(&paths, &options, json),
        Command::Detach(options) => attach::detach(&paths, &options, json),
        Command::Audit(options) => audit::report(&paths, &options, json),
        Command::Events(options) => events::events(&paths, &options, json),
        Command::Recover => recover::recover(&paths, json),
        Command::Policy(command) => policy::policy(&paths, &command, json),
        Command::Jail(command) => jail::jail(&command, json),
    }
}

fn paths(arguments: &Arguments) -> Result<Paths, Failure> {
    let mut paths = Paths::standard()
        .map_err(|error| Refusal::new("program-path", "casemate", error, "start it by its path"))?;
    let choices = [
        (&arguments.cache, &mut paths.cache),
        (&arguments.state, &mut paths.state),
        (&arguments.host_config, &mut paths.host_file),
        (&arguments.vmm, &mut paths.vmm),
        (&arguments.broker, &mut paths.broker),
        (&arguments.policy_compiler, &mut paths.policy_compiler),
        (&arguments.policy_engine, &mut paths.policy_engine),
    ];
    paths.policy_key.clone_from(&arguments.policy_key);
    paths.image_keys.clone_from(&arguments.image_keys);
    for (choice, path) in choices {
        if let Some(chosen) = choice {
            path.clone_from(chosen);
        }
    }
    Ok(paths)
}
