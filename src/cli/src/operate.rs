//! What can be done with a guest that runs: `casemate pause`, `resume`, `stats`, `power-off`, `stop`.

use std::process::ExitCode;

use casemate_keep::{
    BalloonStatistics, DeviceKind, DeviceStatistics, GuestStatistics, OperatorRequest, Paths, operate,
};
use casemate_spec::{ByteSize, Refusal};
use clap::Args;
use serde_json::Value;

use crate::output::{self, Failure};

#[derive(Args)]
pub(crate) struct Options {
    /// The guest's name.
    guest: String,
}

#[derive(Args)]
pub(crate) struct BalloonOptions {
    /// The guest's name.
    guest: String,
    /// How much of its memory the guest is to give up: "256 MiB", and "0" to have all of it again.
    size: ByteSize,
}

/// Sets the size of a guest's balloon.
pub(crate) fn balloon(paths: &Paths, options: &BalloonOptions, as_json: bool) -> Result<ExitCode, Failure> {
    let done =
        operate(paths, &options.guest, &OperatorRequest::Balloon { size_bytes: options.size.bytes() })?;
    if as_json {
        output::json(&done);
    } else {
        output::line(&format!(
            "guest {}: asked to give up {}; `casemate stats` shows how far it is",
            options.guest, options.size
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Has it done, and says how the guest is now.
pub(crate) fn act(
    paths: &Paths,
    options: &Options,
    request: &OperatorRequest,
    as_json: bool,
) -> Result<ExitCode, Failure> {
    let done = operate(paths, &options.guest, request)?;
    if as_json {
        output::json(&done);
    } else {
        let state = done.get("state").and_then(Value::as_str).unwrap_or("not known");
        output::line(&match request {
            OperatorRequest::PowerOff => format!("guest {}: its power button is pressed", options.guest),
            OperatorRequest::Stop => format!("guest {}: is being stopped", options.guest),
            _ => format!("guest {}: {state}", options.guest),
        });
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn stats(paths: &Paths, options: &Options, as_json: bool) -> Result<ExitCode, Failure> {
    let done = operate(paths, &options.guest, &OperatorRequest::Stats)?;
    if as_json {
        output::json(&done);
        return Ok(ExitCode::SUCCESS);
    }
    let statistics: GuestStatistics = serde_json::from_value(done).map_err(|error| {
        Refusal::new("operator-answer", &options.guest, error, "use one build of casemate")
    })?;
    show(&statistics);
    Ok(ExitCode::SUCCESS)
}

fn show(statistics: &GuestStatistics) {
    output::line(&format!("guest {}: {}", statistics.guest, statistics.state));
    if let (Some(vmm), Some(guest)) = (statistics.vmm_memory_bytes, statistics.guest_memory_bytes) {
        let size = |bytes: u64| ByteSize::from_bytes(bytes.next_multiple_of(1024));
        output::line(&format!(
            "memory on the host: {} of the guest's, {} of its VMM",
            size(guest),
            size(vmm)
        ));
    }
    if let Some(balloon) = &statistics.machine.balloon {
        show_balloon(balloon);
    }
    let cells = |row: [&dyn std::fmt::Display; 6]| row.map(ToString::to_string).to_vec();
    let head = cells([&"VCPU", &"PORT EXITS", &"MMIO EXITS", &"OTHER EXITS", &"", &""]);
    let vcpus = statistics.machine.vcpus.iter().enumerate();
    let rows = vcpus.map(|(number, vcpu)| {
        cells([&number, &vcpu.pio_exits, &vcpu.mmio_exits, &vcpu.other_exits, &"", &""])
    });
    output::line(output::table(&[head].into_iter().chain(rows).collect::<Vec<_>>()).trim_end());
    let head = cells([&"DEVICE", &"REQUESTS", &"BYTES TO GUEST", &"BYTES FROM GUEST", &"ERRORS", &""]);
    let rows = statistics.machine.devices.iter().map(|device| {
        let DeviceStatistics { requests, bytes_to_guest, bytes_from_guest, errors, .. } = device;
        cells([&name(device), requests, bytes_to_guest, bytes_from_guest, errors, &""])
    });
    output::line(output::table(&[head].into_iter().chain(rows).collect::<Vec<_>>()).trim_end());
}

fn show_balloon(balloon: &BalloonStatistics) {
    let size = |bytes: u64| ByteSize::from_bytes(bytes.next_multiple_of(4096));
    output::line(&format!(
        "balloon: {} given up, {} asked for",
        size(balloon.actual_bytes),
        size(balloon.target_bytes)
    ));
    let told = [
        ("free", balloon.free_bytes),
        ("available", balloon.available_bytes),
        ("caches", balloon.caches_bytes),
        ("of", balloon.total_bytes),
    ];
    let told = told.iter().filter_map(|(what, bytes)| bytes.map(|bytes| format!("{what} {}", size(bytes))));
    let told = told.collect::<Vec<_>>().join(", ");
    if !told.is_empty() {
        output::line(&format!("the guest says of its memory: {told}"));
    }
}

/// A device by its kind and number.
fn name(device: &DeviceStatistics) -> String {
    let kind = match device.kind {
        DeviceKind::Entropy => "entropy",
        DeviceKind::Disk => "disk",
        DeviceKind::Net => "net",
        DeviceKind::Balloon => "balloon",
    };
    format!("{kind} {}", device.number)
}
