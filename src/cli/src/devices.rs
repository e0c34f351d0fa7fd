//! `casemate devices`.

use std::process::ExitCode;

use casemate_host::{
    DeviceState, Host, Ledger, Life, PciFunction, give_to_host, keep_for_guests, scrub_device,
};
use casemate_keep::{ListedDevice, Paths, list_devices};
use casemate_spec::{PciAddress, Refusal, ScrubStep};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::json;

use crate::{
    output::{self, Failure},
    run::scrubbed,
};

#[derive(Args)]
pub(crate) struct Options {
    /// Show bridges too.
    #[arg(long)]
    bridges: bool,
    /// Tell more of each: the path to the root with what is missing on it, vectors, power, virtual functions.
    #[arg(long)]
    details: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Take a free device, with its group, from the host's driver: it stays with vfio-pci, also between guests, until it is released.
    Claim {
        /// Where it sits, as in 0000:03:00.0.
        address: PciAddress,
    },
    /// Give a free device that vfio-pci has back to the host's driver: after `claim`, or when it came out of quarantine.
    Release {
        /// Where it sits, as in 0000:03:00.0.
        address: PciAddress,
    },
    /// Erase what a free device stores: an NVMe drive's namespaces, all of them. Nothing brings that back.
    Scrub {
        /// Where it sits, as in 0000:03:00.0.
        address: PciAddress,
        /// Say that what it stores may go.
        #[arg(long, required = true)]
        erase: bool,
    },
    /// Keep a free device from all guests, until it is freed. The host's driver, if it has one, keeps it.
    Quarantine {
        /// Where it sits, as in 0000:03:00.0.
        address: PciAddress,
        /// Why, for those who come after.
        #[arg(long, default_value = "an operator wanted it so")]
        why: String,
    },
    /// Say that a device is sound: its quarantine ends, and the tenant whose guest had it last is forgotten.
    Free {
        /// Where it sits, as in 0000:03:00.0.
        address: PciAddress,
    },
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    function: &'a PciFunction,
    assignable: bool,
    why_not: Option<String>,
    /// What the ledger tells of it; only root can read that.
    #[serde(flatten)]
    life: Option<&'a Life>,
    pool: Option<&'a str>,
    code: Option<&'static str>,
}

impl<'a> Line<'a> {
    fn of(device: &'a ListedDevice) -> Self {
        let refusal = device.refusal.as_ref();
        Self {
            function: &device.function,
            assignable: refusal.is_none(),
            why_not: refusal.map(|refusal| format!("{}; {}", refusal.cause, refusal.remedy)),
            life: device.life.as_ref(),
            pool: device.pool.as_deref(),
            code: refusal.map(|refusal| refusal.code),
        }
    }
}

pub(crate) fn devices(paths: &Paths, options: &Options, json: bool) -> Result<ExitCode, Failure> {
    let host = Host::live();
    match &options.command {
        Some(Command::Claim { address }) => return claim(paths, &host, *address, json),
        Some(Command::Release { address }) => return release(paths, &host, *address, json),
        Some(Command::Scrub { address, erase: _ }) => return scrub(paths, &host, *address, json),
        Some(Command::Quarantine { address, why }) => return quarantine(paths, &host, *address, why, json),
        Some(Command::Free { address }) => return free(paths, *address, json),
        None => {}
    }
    let listed = list_devices(paths)?;
    let lines: Vec<Line<'_>> = listed
        .iter()
        .filter(|device| options.bridges || json || !device.function.is_bridge)
        .map(Line::of)
        .collect();
    if json {
        lines.iter().for_each(output::json);
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        ["ADDRESS", "ID", "DEVICE", "DRIVER", "GROUP +MATES", "RESET", "POOL", "STATE", "FOR A GUEST"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(lines.iter().map(row));
    output::line(output::table(&rows).trim_end());
    if options.details {
        lines.iter().for_each(|line| details(line.function));
    }
    for line in &lines {
        if let Some(why) = &line.why_not {
            output::line(&format!("{}: {why}", line.function.address));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A few lines on one function.
fn details(function: &PciFunction) {
    let details = &function.details;
    output::line(&format!("{}:", function.address));
    for step in &details.path {
        let missing = match step.acs_missing.as_slice() {
            [] => String::new(),
            missing => format!(", without {}", missing.join(", ")),
        };
        output::line(&format!("  by {} ({}{missing})", step.address, step.kind));
    }
    let mut words =
        vec![format!("{} MSI-X vectors", details.msix_vectors), format!("{} of MSI", details.msi_vectors)];
    words.push(if details.intx { "INTx" } else { "no INTx" }.to_owned());
    words.extend(details.power_state.as_ref().map(|state| format!("power state {state}")));
    words.extend(function.numa_node.map(|node| format!("NUMA node {node}")));
    let made = details.virtual_functions;
    words.extend(details.virtual_functions_most.map(|most| format!("{made} of {most} virtual functions")));
    words.extend(details.boot_display.then(|| "the boot's display".to_owned()));
    words.extend(function.serials.iter().map(|serial| format!("serial {serial}")));
    output::line(&format!("  {}", words.join(", ")));
}

fn claim(paths: &Paths, host: &Host, address: PciAddress, json: bool) -> Result<ExitCode, Failure> {
    for address in keep_for_guests(host, &Ledger::open(&paths.state)?, address)? {
        if json {
            output::json(&json!({ "address": address, "driver": "vfio-pci" }));
        } else {
            output::line(&format!(
                "{address} is kept for guests: the host has it back by casemate devices release {address}"
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn release(paths: &Paths, host: &Host, address: PciAddress, json: bool) -> Result<ExitCode, Failure> {
    let driver = give_to_host(host, &Ledger::open(&paths.state)?, address)?;
    match driver {
        _ if json => output::json(&json!({ "address": address, "driver": driver })),
        Some(driver) => output::line(&format!("{address} is the host's again: {driver} has it")),
        None => output::line(&format!("{address} is the host's again: no driver takes it")),
    }
    Ok(ExitCode::SUCCESS)
}

fn scrub(paths: &Paths, host: &Host, address: PciAddress, json: bool) -> Result<ExitCode, Failure> {
    output::aside(&format!("what {address} stores is erased, which may take minutes"));
    let returned = scrub_device(host, &Ledger::open(&paths.state)?, address, &[ScrubStep::NvmeFormat])?;
    let mut is_clean = true;
    for device in returned.iter().filter(|device| device.address == address) {
        is_clean &= device.quarantined.is_none();
        if json {
            output::json(device);
            continue;
        }
        let after = match (&device.quarantined, &device.error) {
            (Some(why), _) => format!("QUARANTINED: {why}"),
            (None, Some(error)) => error.clone(),
            (None, None) => device
                .returned_to
                .as_ref()
                .map_or_else(|| "no driver has it".to_owned(), |driver| format!("{driver} has it again")),
        };
        output::line(&format!("{address}: {}; {after}", scrubbed(device)));
    }
    Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn quarantine(
    paths: &Paths,
    host: &Host,
    address: PciAddress,
    why: &str,
    json: bool,
) -> Result<ExitCode, Failure> {
    let functions = host.functions()?;
    let function = functions.iter().find(|function| function.address == address).ok_or_else(|| {
        let remedy = "casemate devices shows what there is";
        Refusal::new("device-missing", address, "there is no such PCI device on this host", remedy)
    })?;
    Ledger::open(&paths.state)?.quarantine(address, (function.vendor, function.device), why)?;
    if json {
        output::json(&json!({ "address": address, "state": DeviceState::Quarantined, "why": why }));
    } else {
        output::line(&format!(
            "{address} is in quarantine: no guest gets it until casemate devices free {address}"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn free(paths: &Paths, address: PciAddress, json: bool) -> Result<ExitCode, Failure> {
    let life = Ledger::open(&paths.state)?.pardon(address)?;
    if json {
        // As it is now, and what was known of it before.
        output::json(&json!({ "address": address, "state": DeviceState::Free, "before": life }));
        return Ok(ExitCode::SUCCESS);
    }
    if life.state == DeviceState::Quarantined {
        let why = life.why.unwrap_or_default();
        output::line(&format!("{address} is out of quarantine, where it was because: {why}"));
    }
    if let Some(tenant) = life.last_tenant {
        output::line(&format!("{address} may go to any tenant; {tenant} had it last"));
    }
    Ok(ExitCode::SUCCESS)
}

/// An address without its domain, where that is 0.
fn short(address: casemate_spec::PciAddress) -> String {
    let text = address.to_string();
    text.strip_prefix("0000:").map_or_else(|| text.clone(), str::to_owned)
}

fn row(line: &Line<'_>) -> Vec<String> {
    let function = line.function;
    let group = match function.iommu_group {
        None => "none".to_owned(),
        Some(group) => {
            let mates = function.group_mates.iter().map(|mate| short(*mate));
            std::iter::once(group.to_string()).chain(mates).collect::<Vec<_>>().join(" +")
        }
    };
    let resets =
        if function.reset_methods.is_empty() { "none".into() } else { function.reset_methods.join(" ") };
    let name: String =
        format!("{} {}", function.vendor_name, function.device_name).chars().take(44).collect();
    vec![
        function.address.to_string(),
        format!("{:04x}:{:04x}", function.vendor, function.device),
        name,
        function.driver.clone().unwrap_or_else(|| "-".into()),
        group,
        resets,
        line.pool.unwrap_or("-").to_owned(),
        line.life.map_or_else(|| "?".to_owned(), |life| life.state.to_string()),
        line.code.map_or_else(|| "yes".to_owned(), |code| format!("no: {code}")),
    ]
}
