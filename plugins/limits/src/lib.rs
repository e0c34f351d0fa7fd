//! Policy `limits`: how much one guest may ask for, and which physical devices.
//!
//! All settings may be left out; what isn't set isn't limited. `docs/policies.md` lists them.

use casemate_plugin_sdk::{
    Bytes, Device, Operation, Pattern, Policy, Reason, Request, Severity, Verdict, export_policy, verdict,
};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// The most memory that a guest may have.
    max_memory: Option<Bytes>,
    /// Memory that has to stay free on the host once the guest has its own.
    keep_free: Option<Bytes>,
    /// The most vCPUs that a guest may have.
    max_vcpus: Option<u32>,
    /// The largest disk that a guest may have, and that one may grow to.
    max_disk: Option<Bytes>,
    /// The most physical devices that a guest may have.
    max_devices: Option<usize>,
    /// Devices that may be assigned, as `lspci -d` selects them; with an empty list, none may.
    devices: Option<Vec<Pattern>>,
}

struct Limits;

impl Policy for Limits {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));

    const REASONS: &'static [&'static str] =
        &["memory", "host-memory", "vcpus", "disk", "devices", "device-kind", "overcommitted"];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        if settings.max_vcpus == Some(0) {
            reasons.push(
                Reason::new("no-guest-fits", "every guest has at least one vCPU")
                    .field("settings.max_vcpus")
                    .remedy("allow 1 or more"),
            );
        }
        if settings.max_memory == Some(Bytes(0)) {
            reasons.push(
                Reason::new("no-guest-fits", "every guest has memory")
                    .field("settings.max_memory")
                    .remedy("allow some"),
            );
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn admit(settings: Settings, request: Request) -> Verdict {
        let mut reasons = Vec::new();
        reasons.extend(memory(&settings, &request));
        reasons.extend(vcpus(&settings, &request));
        reasons.extend(disks(&settings, &request));
        reasons.extend(device_count(&settings, &request));
        reasons.extend(device_kinds(&settings, &request));
        verdict(reasons, overcommitted(&request).into_iter().collect())
    }
}

export_policy!(Limits);

fn memory(settings: &Settings, request: &Request) -> Option<Reason> {
    let asked = Bytes(request.guest.memory_bytes);
    if let Some(most) = settings.max_memory.filter(|most| asked > *most) {
        let message = format!("{asked} is more than the {most} that one guest may have");
        return Some(
            Reason::new("memory", message).field("memory").remedy(format!("ask for at most {most}")),
        );
    }
    // The memory of a guest that runs already is no longer free.
    let new = match request.operation {
        Operation::Create | Operation::Resume | Operation::Migrate => asked.0,
        Operation::Update | Operation::HotPlug => {
            asked.0.saturating_sub(request.old.as_ref().map_or(0, |old| old.memory_bytes))
        }
    };
    let most = request.host.memory_free_bytes.saturating_sub(settings.keep_free?.0);
    if new <= most {
        return None;
    }
    // In whole MiB, since that is what a guest can ask for.
    let (free, most) = (Bytes(request.host.memory_free_bytes >> 20 << 20), Bytes(most >> 20 << 20));
    let message = format!(
        "{} is more than the host can give: {free} are free, and {} of them stay so",
        Bytes(new),
        settings.keep_free?
    );
    let remedy = format!("ask for at most {most}, or stop another guest");
    Some(Reason::new("host-memory", message).field("memory").severity(Severity::High).remedy(remedy))
}

fn vcpus(settings: &Settings, request: &Request) -> Option<Reason> {
    let (asked, most) = (request.guest.vcpus, settings.max_vcpus?);
    (asked > most).then(|| {
        let message = format!("{asked} vCPUs are more than the {most} that one guest may have");
        Reason::new("vcpus", message).field("vcpus").remedy(format!("ask for at most {most}"))
    })
}

fn disks(settings: &Settings, request: &Request) -> Vec<Reason> {
    let Some(most) = settings.max_disk else { return Vec::new() };
    let disks = request.guest.disks.iter().enumerate();
    disks
        .filter(|(_, disk)| Bytes(disk.size_bytes) > most)
        .map(|(number, disk)| {
            let message = format!("{} is more than the {most} that a disk may have", Bytes(disk.size_bytes));
            Reason::new("disk", message)
                .field(format!("disk[{number}].path"))
                .remedy(format!("ask for at most {most}"))
        })
        .collect()
}

fn device_count(settings: &Settings, request: &Request) -> Option<Reason> {
    let (asked, most) = (request.guest.devices.len(), settings.max_devices?);
    (asked > most).then(|| {
        let message = format!("{asked} devices are more than the {most} that one guest may have");
        Reason::new("devices", message)
            .field(format!("device[{most}].address"))
            .remedy(format!("ask for at most {most}"))
    })
}

fn device_kinds(settings: &Settings, request: &Request) -> Vec<Reason> {
    let Some(allowed) = &settings.devices else { return Vec::new() };
    let refuse = |(slot, device): (usize, &Device)| {
        let message = format!(
            "{} ({:04x}:{:04x}, class {:06x}) is not of a kind that guests may have",
            device.address, device.vendor, device.device, device.class
        );
        let kinds: Vec<_> = allowed.iter().map(Pattern::to_string).collect();
        let remedy = if kinds.is_empty() {
            "remove the device: no kind is allowed".to_owned()
        } else {
            format!("choose a device of {}, or have an operator allow this kind", kinds.join(", "))
        };
        Reason::new("device-kind", message)
            .field(format!("device[{slot}].address"))
            .severity(Severity::High)
            .remedy(remedy)
    };
    let mut refused = request
        .guest
        .devices
        .iter()
        .enumerate()
        .filter(|(_, device)| !allowed.iter().any(|kind| kind.matches(device)));
    refused.by_ref().map(refuse).collect()
}

fn overcommitted(request: &Request) -> Option<Reason> {
    let (asked, cpus) = (request.guest.vcpus, request.host.cpus);
    (asked > cpus).then(|| {
        Reason::new("overcommitted", format!("{asked} vCPUs share the host's {cpus} processors"))
            .field("vcpus")
            .severity(Severity::Low)
            .remedy(format!("ask for at most {cpus} if the guest is to run at full speed"))
    })
}

#[cfg(test)]
mod tests;
