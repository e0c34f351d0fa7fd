//! `casemate run`.

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use casemate_host::Returned;
use casemate_keep::{ConsoleLog, DeviceReport, Event, Input, Paths, Report, RunOptions, Step};
use casemate_spec::ByteSize;
use clap::Args;

use crate::{
    output::{self, Failure},
    policy::BundleChoice,
};

#[derive(Args)]
pub(crate) struct Options {
    /// The guest's file.
    file: PathBuf,
    #[command(flatten)]
    bundle: BundleChoice,
    /// Start it although a policy refuses, where the bundle lets an operator decide. The reason is kept with the decision.
    #[arg(long = "override", value_name = "REASON")]
    override_why: Option<String>,
    /// Report when the console first shows this text.
    #[arg(long, value_name = "TEXT")]
    note_line: Option<String>,
    /// Give the guest's console what standard input holds, though it is no terminal.
    #[arg(long)]
    stdin: bool,
    /// Keep the guest's console in this file too. Full, it becomes FILE.1, and so on.
    #[arg(long, value_name = "FILE")]
    console_log: Option<PathBuf>,
    /// Most of one file of the console's.
    #[arg(long, value_name = "SIZE", default_value = "1 MiB", requires = "console_log")]
    console_log_size: ByteSize,
    /// Most files of the console's, the newest one among them.
    #[arg(long, value_name = "COUNT", default_value_t = 4, requires = "console_log", value_parser = clap::value_parser!(u32).range(1..=100))]
    console_log_files: u32,
    /// How long a guest may take to power off when this program is asked to end, before it is stopped.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=86400))]
    grace: u32,
}

pub(crate) fn run(paths: &Paths, options: &Options, json: bool) -> Result<ExitCode, Failure> {
    let input = if options.stdin { Input::Stream } else { Input::terminal_if_any() };
    if input == Input::Terminal && !json {
        output::aside(
            "the terminal is the guest's; Ctrl-] asks it to power off, and stops it when pressed again",
        );
    }
    let run_options = RunOptions {
        file: &options.file,
        policy: &options.bundle.policy,
        override_why: options.override_why.as_deref(),
        line: options.note_line.as_deref(),
        console_log: options.console_log.as_deref().map(|path| ConsoleLog {
            path,
            file_bytes: options.console_log_size.bytes(),
            files: options.console_log_files,
        }),
        input,
        grace: Duration::from_secs(options.grace.into()),
    };
    let mut unclean = false;
    let ran = casemate_keep::run(paths, run_options, Box::new(io::stdout()), &mut |step| {
        if let Step::Returned { devices } = &step {
            unclean |= devices.iter().any(|device| !device.clean);
        }
        tell(&step, json);
    });
    let report = match ran {
        Ok(report) => report,
        Err(refusals) if unclean => {
            output::failure(&refusals, json);
            return Ok(ExitCode::from(4));
        }
        Err(refusals) => return Err(refusals),
    };
    if json {
        output::json_aside(&serde_json::json!({ "report": report }));
    } else {
        summary(&report);
    }
    Ok(match (report.ending.is_orderly(), unclean) {
        (_, true) => ExitCode::from(4),
        (false, false) => ExitCode::from(3),
        (true, false) => ExitCode::SUCCESS,
    })
}

/// Tells of a step on stderr.
pub(crate) fn tell(step: &Step, json: bool) {
    if json {
        output::json_aside(step);
        return;
    }
    match step {
        Step::Recovered { guest, devices, error } => {
            output::aside(&format!(
                "the keep of guest {guest} was killed; what it had claimed is given back"
            ));
            devices.iter().for_each(|device| output::aside(&returned(device)));
            if let Some(error) = error {
                output::aside(&format!("not all of it: {error}"));
            }
        }
        Step::Admitted { policy } => {
            let names: Vec<_> = policy.plugins.iter().map(|(name, _)| name.as_str()).collect();
            output::aside(&format!(
                "admitted by {} (asked in {} µs; decision {})",
                names.join(", "),
                policy.ask.as_micros(),
                policy.decision
            ));
            policy.changes.iter().for_each(|change| output::aside(&format!("changed: {change}")));
            policy.overridden.iter().for_each(|what| output::aside(&format!("overridden: {what}")));
            policy.warnings.iter().for_each(|warning| output::aside(&format!("warning: {warning}")));
            policy.caveats.iter().for_each(|caveat| output::aside(&format!("note: {caveat}")));
        }
        Step::Claiming { devices } => {
            let list: Vec<_> = devices.iter().map(ToString::to_string).collect();
            output::aside(&format!("taking {} from the host", list.join(", ")));
        }
        Step::Claimed { devices } => {
            for (address, driver, reset) in devices {
                let driver = driver.as_deref().unwrap_or("no driver");
                output::aside(&format!(
                    "{address} left {driver}, was reset ({reset}), and has bus master off"
                ));
            }
        }
        Step::CellClosed { pid, uid, landlock_abi, weakened } => {
            output::aside(&format!(
                "the cell is closed: process {pid}, uid {uid}, Landlock ABI {landlock_abi}"
            ));
            if !weakened.is_empty() {
                output::aside(&format!("the cell is WEAKENED: without {}", weakened.join(", ")));
            }
        }
        Step::Running { elapsed } => {
            output::aside(&format!("the guest runs, {} ms after its VMM was started", elapsed.as_millis()));
        }
        Step::Log { line } => output::aside(&format!("the VMM says: {line}")),
        Step::Paused => output::aside("the guest is paused"),
        Step::Resumed => output::aside("the guest goes on"),
        Step::Event { event: Event::Panicked } => {
            output::aside("the guest says that its kernel has panicked")
        }
        Step::DeviceWanted { device, slot } => {
            output::aside(&format!("the host wants {device} back, so {}", goes(*slot)));
        }
        Step::ParentReset { device, slot } => {
            output::aside(&format!("the card of {device} was reset, so {}", goes(*slot)));
        }
        Step::Attached { devices, slot } => {
            let devices: Vec<_> = devices.iter().map(ToString::to_string).collect();
            output::aside(&format!("{} came into slot {slot}", devices.join(", ")));
        }
        Step::DmaStopped { device, count } => output::aside(&format!(
            "{device} asked for memory that isn't the guest's, and was stopped by the IOMMU ({count} times at least)"
        )),
        Step::DeviceFailed { device } => output::aside(&format!(
            "{device} has reported an error that was not corrected, so the guest is stopped"
        )),
        Step::AskedToPowerOff { grace } => {
            output::aside(&format!("asked the guest to power off; it is stopped in {} s", grace.as_secs()));
        }
        Step::Ended { ending } => output::aside(&format!("the guest has ended: {ending}")),
        Step::Scrubbing { devices } => {
            let devices: Vec<_> = devices.iter().map(ToString::to_string).collect();
            output::aside(&format!("what {} stores is erased, which may take minutes", devices.join(", ")));
        }
        Step::Returned { devices } => devices.iter().for_each(|device| output::aside(&returned(device))),
    }
}

/// How a device goes.
fn goes(slot: Option<u8>) -> String {
    slot.map_or("the guest is to end".to_owned(), |slot| {
        format!("the guest is to let it go from slot {slot}")
    })
}

/// A device's return in a line.
pub(crate) fn returned(device: &DeviceReport) -> String {
    let seen = &device.returned;
    let to = seen
        .returned_to
        .as_deref()
        .map_or("given back to no driver".to_owned(), |to| format!("given back to {to}"));
    let mut line = match &seen.untouched {
        Some(why) => format!("{}: not reset, for {why}; {to}", seen.address),
        None => format!("{}: {}; {}; {to}", seen.address, proof(device), scrubbed(seen)),
    };
    if let Some(faults) = seen.iommu_faults.filter(|faults| *faults > 0) {
        line.push_str(&format!("; the IOMMU stopped its DMA {faults} times at least"));
    }
    if let Some(why) = &seen.quarantined {
        line.push_str(&format!("; QUARANTINED: {why}"));
    }
    if let Some(error) = &seen.error {
        line.push_str(&format!("; {error}"));
    }
    line
}

/// What was done about what it stores.
pub(crate) fn scrubbed(seen: &Returned) -> String {
    match &seen.scrubbed {
        None => "stored data was not scrubbed".to_owned(),
        Some(Ok(how)) => format!("scrubbed: {how}"),
        Some(Err(_)) => "NOT SCRUBBED".to_owned(),
    }
}

/// What was seen of a device after its guest.
fn proof(device: &DeviceReport) -> String {
    let seen = &device.returned;
    let reset = match &seen.reset {
        Ok(()) => format!("reset by {} with result 0", seen.reset_method),
        Err(error) => format!("reset by {} FAILED: {error}", seen.reset_method),
    };
    let master = if seen.bus_master_off { "bus master off" } else { "bus master ON" };
    let config =
        if seen.config_as_first_seen { "configuration as first seen" } else { "configuration CHANGED" };
    format!("{reset}, {master}, {config}")
}

fn summary(report: &Report) {
    if let Some(line) = report.machine.line {
        output::aside(&format!("the noted line came {} ms after the VMM was started", line.as_millis()));
    }
    if let Some(bytes) = report.cell.memory_bytes {
        let size = ByteSize::from_bytes(bytes.next_multiple_of(1024));
        output::aside(&format!("the VMM used {size} beside the guest's memory"));
    }
    if let Some(cpu) = report.cell.cpu {
        output::aside(&format!("the guest and its VMM used {} ms of processor time", cpu.as_millis()));
    }
    let calls = report.cell.calls.iter().map(|(role, calls)| format!("{role} {calls}"));
    output::aside(&format!("system calls that the filters allow: {}", calls.collect::<Vec<_>>().join(", ")));
    output::aside(&format!(
        "exits to the VMM: {} for ports, {} for registers, {} others",
        report.machine.pio_exits, report.machine.mmio_exits, report.machine.other_exits
    ));
}
