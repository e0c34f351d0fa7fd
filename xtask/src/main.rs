//! The project's own commands, run as `cargo xtask ...`.
//!
//! Whatever a contributor or a machine runs is here, in Rust, and nowhere else: [`check`] is the whole test run, [`lab`]
//! prepares and explores the hardware lab, [`demo`] shows the main job, [`fuzz`] throws
//! anything at what can be reached from outside, [`tidy`] holds the house rules.

mod bench;
mod check;
mod demo;
mod deny;
mod fuzz;
mod lab;
mod progress;
mod steps;
mod tidy;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Casemate's own commands",
    after_help = "First steps, on a Debian 12 machine with a Rust toolchain, as root:\n  \
        cargo xtask demo            see a guest with real PCI devices, in the hardware lab (about 10 minutes at first)\n  \
        cargo xtask test            run every test\n  \
        cargo xtask test --long     and the long ones\n  \
        cargo xtask test numa       only tests with `numa` in their name\n  \
        cargo xtask lab run bash    look around in the lab by hand\n\n\
        The lab is a QEMU machine with AMD-V, an IOMMU and PCIe devices; it is kept in target/lab."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run every test: format, lints, house rules, unit tests, and the tests in the hardware lab
    Test {
        /// Also run what takes long
        #[arg(long)]
        long: bool,
        /// Run only tests whose name contains this, and no format, lint or house rule checks
        filter: Option<String>,
    },
    /// Show the main job: one guest admitted by a policy, jailed, with an NVMe drive and a network card of the host's
    Demo(demo::DemoArguments),
    /// Measure Casemate beside other VMMs, with the same kernel and image, in turn, in one lab run
    #[command(
        after_help = "The others are the lab's QEMU, and those of cloud-hypervisor, firecracker and jailer that are on PATH.\n\
        docs/performance.md says how each row is measured and what it does not tell.\n\
        NAME is start, exec, memory, disk, queue, net, assigned, attach, card or jail; or native, for a guest of a few\n\
        instructions on this host itself."
    )]
    Bench {
        /// A line of JSON for each row
        #[arg(long)]
        json: bool,
        /// In a lab whose time is the number of executed instructions, whatever this machine does: once, `hwtests/qemu/build` makes its QEMU
        #[arg(long)]
        counted: bool,
        /// Measure this alone
        name: Option<String>,
    },
    /// Throw anything at what guests, devices and users can reach, for a while; the test run does so briefly
    #[command(
        after_help = "What is found goes to target/fuzz: inputs that reached new code to corpus, those that failed to \
        crashes. The targets\nare the files in fuzz/targets."
    )]
    Fuzz {
        /// For each target
        #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
        /// Run this one alone
        target: Option<String>,
    },
    /// Prepare or use the hardware lab
    #[command(subcommand)]
    Lab(LabCommand),
    /// Check the house rules alone: walls between crates, documents, codes of refusals, unsafe code, lengths of files
    Tidy,
}

#[derive(Subcommand)]
enum LabCommand {
    /// Install what the lab needs (needs root the first time) and build its images; says what it does
    Prepare,
    /// Run a program in the lab as root; this machine's files are there, and what it changes is forgotten
    #[command(
        after_help = "Programs see this machine's root, read-only under a tmpfs, in the current directory. \
            What they leave in /lab/out is kept.\nWith a terminal, `cargo xtask lab run bash` is interactive; \
            leave it with `exit`."
    )]
    Run {
        /// Kill the lab after this many seconds
        #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
        deadline: u64,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        program: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Test { long, filter } => check::run(long, filter.as_deref()),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench { json, counted, name } => bench::run(name.as_deref(), counted, json),
        Command::Fuzz { seconds, target } => fuzz::run(target.as_deref(), seconds),
        Command::Lab(LabCommand::Prepare) => lab::prepare().map(|_| ExitCode::SUCCESS),
        Command::Lab(LabCommand::Run { deadline, program }) => lab::run(&program, deadline),
        Command::Tidy => tidy::run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}
