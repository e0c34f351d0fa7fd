//! `casemate attach` and `casemate detach`: what comes and goes while a guest runs.

use std::{net::Ipv4Addr, path::PathBuf, process::ExitCode, time::Duration};

use casemate_keep::{Attachment, DeviceReport, OperatorRequest, Paths, operate};
use casemate_spec::{PciAddress, Refusal};
use clap::Args;
use serde_json::Value;

use crate::{
    output::{self, Failure},
    run,
};

#[derive(Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["disk", "net", "devices", "pool"])))]
pub(crate) struct AttachOptions {
    /// The guest's name.
    guest: String,
    /// A raw image or a block device, for an emulated disk.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// The guest may only read the disk.
    #[arg(long, requires = "disk")]
    read_only: bool,
    /// Name of a tap to be made, for an emulated network card.
    #[arg(long, value_name = "TAP")]
    net: Option<String>,
    /// The host's own address on the tap, with its prefix: 192.0.2.1/24.
    #[arg(long, requires = "net", value_name = "ADDRESS", value_parser = prefix)]
    host_address: Option<(Ipv4Addr, u8)>,
    /// A PCI device of the host's, by its address: 0000:03:00.0. Several become the functions of one card.
    #[arg(long = "device", value_name = "ADDRESS", conflicts_with = "pool")]
    devices: Vec<PciAddress>,
    /// A PCI device of this pool of the host's.
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,
}

#[derive(Args)]
pub(crate) struct DetachOptions {
    /// The guest's name.
    guest: String,
    /// The slot, as `casemate attach` told it; Linux in the guest has the same number in /sys/bus/pci/slots.
    slot: u8,
    /// How long the guest may take to let the device go. Linux waits 5 s before it begins, as for a button on a real slot.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    within: u64,
    /// Take the device when the guest has not let it go in time: to the guest that is a device that broke.
    #[arg(long)]
    force: bool,
}

pub(crate) fn attach(paths: &Paths, options: &AttachOptions, as_json: bool) -> Result<ExitCode, Failure> {
    let attachment = match options {
        AttachOptions { disk: Some(path), .. } => {
            // The keep may stand in another folder.
            let path = std::path::absolute(path).map_err(|error| {
                Refusal::new("bad-path", path.display(), error, "name the disk by its absolute path")
            })?;
            Attachment::Disk { path, read_only: options.read_only }
        }
        AttachOptions { net: Some(tap), .. } => {
            Attachment::Net { tap: tap.clone(), host_address: options.host_address }
        }
        AttachOptions { devices, pool, .. } => {
            Attachment::Devices { addresses: devices.clone(), pool: pool.clone() }
        }
    };
    let done = operate(paths, &options.guest, &OperatorRequest::Attach { attachment })?;
    if as_json {
        output::json(&done);
    } else {
        output::line(&format!("guest {}: attached in slot {}", options.guest, number(&done, "slot")));
        for device in done.get("devices").and_then(Value::as_array).into_iter().flatten() {
            let word = |key: &str| device.get(key).and_then(Value::as_str);
            let (address, how) =
                (word("address").unwrap_or_default(), word("reset_method").unwrap_or_default());
            let from = word("former_driver")
                .map_or("no driver had it".into(), |driver| format!("taken from {driver}"));
            output::line(&format!("{address}: {from}, reset by {how} with result 0"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn detach(paths: &Paths, options: &DetachOptions, as_json: bool) -> Result<ExitCode, Failure> {
    let DetachOptions { guest, slot, within, force } = options;
    let within_seconds = Duration::from_secs(*within).as_secs();
    let request = OperatorRequest::Detach { slot: *slot, within_seconds, force: *force };
    let done = operate(paths, guest, &request)?;
    if as_json {
        output::json(&done);
        return Ok(ExitCode::SUCCESS);
    }
    if done.get("forced") == Some(&Value::Bool(true)) {
        output::line(&format!(
            "guest {guest}: slot {slot} is empty; the guest had not let the device go, and it was taken"
        ));
    } else {
        output::line(&format!("guest {guest}: slot {slot} is empty"));
    }
    // What a keep of another version tells is passed over.
    let devices: Vec<DeviceReport> = done
        .get("devices")
        .and_then(|devices| serde_json::from_value(devices.clone()).ok())
        .unwrap_or_default();
    devices.iter().for_each(|device| output::line(&run::returned(device)));
    Ok(ExitCode::SUCCESS)
}

fn number(done: &Value, key: &str) -> u64 {
    done.get(key).and_then(Value::as_u64).unwrap_or_default()
}

fn prefix(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let wrong = || "write it as 192.0.2.1/24".to_owned();
    let (address, length) = text.split_once('/').ok_or_else(wrong)?;
    let length = length.parse().ok().filter(|length| (1..=30).contains(length)).ok_or_else(wrong)?;
    Ok((address.parse().map_err(|_| wrong())?, length))
}
