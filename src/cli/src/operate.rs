//! What can be done with a guest that runs: `casemate pause`, `resume`, `stats`, `power-off`, `stop`.

use std::process::ExitCode;

use casemate_keep::{
    BalloonStatistics, DeviceKind, DeviceName, DeviceStatistics, GuestStatistics, OperatorRequest, Paths,
    operate,
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

/// Takes back what a guest has free.
pub(crate) fn reclaim(paths: &Paths, options: &Options, as_json: bool) -> Result<ExitCode, Failure> {
    let done = operate(paths, &options.guest, &OperatorRequest::Reclaim)?;
    if as_json {
        output::json(&done);
    } else {
        let size = ByteSize::from_bytes(done.get("reclaimed_bytes").and_then(Value::as_u64).unwrap_or(0));
        output::line(&format!("guest {}: {size} that it has free went back to the host", options.guest));
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Args)]
pub(crate) struct ResizeOptions {
    /// The guest's name.
    guest: String,
    /// The disk: its number, from 0, in the order of the guest's file; or slot1, for what was attached and is in slot 1.
    disk: DeviceName,
    /// The size that its file is made to have; without it, the guest is told the size that file or block device has by now.
    size: Option<ByteSize>,
    /// Let it become smaller: what is beyond the new size is lost.
    #[arg(long)]
    shrink: bool,
}

/// Makes a guest's disk larger or smaller.
pub(crate) fn resize(paths: &Paths, options: &ResizeOptions, as_json: bool) -> Result<ExitCode, Failure> {
    let request = OperatorRequest::Resize {
        number: options.disk,
        size_bytes: options.size.map(ByteSize::bytes),
        shrink: options.shrink,
    };
    let done = operate(paths, &options.guest, &request)?;
    if as_json {
        output::json(&done);
    } else {
        let size = ByteSize::from_bytes(done.get("size_bytes").and_then(Value::as_u64).unwrap_or(0));
        output::line(&format!("guest {}: disk {} has {size} now", options.guest, options.disk));
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Args)]
pub(crate) struct LimitOptions {
    /// The guest's name.
    guest: String,
    /// Which of its devices: disk or net.
    #[arg(value_parser = ["disk", "net"])]
    device: String,
    /// Which of those: its number, from 0, in the order of the guest's file; or slot1, for what was attached and is in slot 1.
    number: DeviceName,
    /// Bytes a second, of both directions together: "10 MiB".
    #[arg(long, value_name = "SIZE")]
    bytes_per_second: Option<ByteSize>,
    /// Bytes at once, after a while of nothing [default: those of a second].
    #[arg(long, value_name = "SIZE")]
    burst_bytes: Option<ByteSize>,
    /// Requests or frames a second.
    #[arg(long, value_name = "COUNT")]
    operations_per_second: Option<u64>,
    /// Requests or frames at once, after a while of nothing [default: those of a second].
    #[arg(long, value_name = "COUNT")]
    burst_operations: Option<u64>,
}

/// Limits what a guest's disk or network card does.
pub(crate) fn limit(paths: &Paths, options: &LimitOptions, as_json: bool) -> Result<ExitCode, Failure> {
    let kind = if options.device == "net" { DeviceKind::Net } else { DeviceKind::Disk };
    let request = OperatorRequest::Limit {
        device: kind,
        number: options.number,
        bytes_per_second: options.bytes_per_second.map(ByteSize::bytes),
        burst_bytes: options.burst_bytes.map(ByteSize::bytes),
        operations_per_second: options.operations_per_second,
        burst_operations: options.burst_operations,
    };
    let done = operate(paths, &options.guest, &request)?;
    if as_json {
        output::json(&done);
        return Ok(ExitCode::SUCCESS);
    }
    let limits = [
        options.bytes_per_second.map(|size| format!("{size} a second")),
        options.operations_per_second.map(|count| format!("{count} operations a second")),
    ];
    let limits: Vec<String> = limits.into_iter().flatten().collect();
    let limits = if limits.is_empty() { "not limited".to_owned() } else { limits.join(", ") };
    output::line(&format!("guest {}: {} {}: {limits}", options.guest, options.device, options.number));
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
        DeviceKind::Vsock => "vsock",
        DeviceKind::Console => "console",
    };
    match device.slot {
        Some(slot) => format!("{kind} slot{slot}"),
        None => format!("{kind} {}", device.number),
    }
}
