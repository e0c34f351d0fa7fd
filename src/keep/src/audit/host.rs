//! The guest's devices as the host has them, and what only the record tells.

use std::{fs, path::PathBuf};

use casemate_host::{CheckState, Host, doctor, is_vfio_driver};
use casemate_spec::PciAddress;

use super::{AuditLine, Source, measured};
use crate::{GivenDevice, GuestRecord};

/// The host's name and kernel.
pub(super) fn name() -> String {
    let names = rustix::system::uname();
    let [node, release, version] =
        [names.nodename(), names.release(), names.version()].map(|name| name.to_string_lossy().into_owned());
    format!("{node}: Linux {release} {version}")
}

pub(super) fn lines(record: &GuestRecord) -> Vec<AuditLine> {
    let mut lines = vec![landlock(record), weakened(record)];
    lines.extend(record.devices.iter().map(device));
    lines.extend(record.devices.iter().map(reset));
    if !record.devices.is_empty() {
        let remapping = doctor(&Host::live()).into_iter().find(|check| check.name == "interrupt-remapping");
        let (found, passed) = remapping
            .map_or(("not told".into(), false), |check| (check.found, check.state == CheckState::Ok));
        lines.push(measured("interrupts", "devices' interrupts are remapped", found, passed));
    }
    lines
}

fn landlock(record: &GuestRecord) -> AuditLine {
    let given = &record.landlock;
    let count = |mask: u64| mask.count_ones();
    AuditLine {
        part: "landlock",
        wanted: "ABI 2 or newer, every right handled and none granted".into(),
        found: format!(
            "ABI {}: {} file rights, {} network rights, {} scopes",
            given.abi,
            count(given.filesystem),
            count(given.network),
            count(given.scopes)
        ),
        // The kernel tells nobody which rulesets a process is under.
        source: Source::Recorded,
        passed: given.abi >= 2 && count(given.filesystem) >= 14,
    }
}

fn weakened(record: &GuestRecord) -> AuditLine {
    AuditLine {
        part: "weakened",
        wanted: "no part is lacking".into(),
        found: match record.weakened.as_slice() {
            [] => "no part is lacking".into(),
            parts => format!("without {}, by the host file's leave", parts.join(", ")),
        },
        source: Source::Recorded,
        passed: record.weakened.is_empty(),
    }
}

fn device(device: &GivenDevice) -> AuditLine {
    let link = |name: &str| {
        let path = PathBuf::from(format!("/sys/bus/pci/devices/{}/{name}", device.address));
        fs::read_link(path).ok().and_then(|to| Some(to.file_name()?.to_string_lossy().into_owned()))
    };
    let (group, driver) = (link("iommu_group"), link("driver"));
    let strangers = strangers(device.address);
    let passed = group.as_deref() == Some(device.group.to_string().as_str())
        && driver.as_deref().is_some_and(is_vfio_driver)
        && strangers.is_empty();
    let mut found = format!(
        "{}: group {}, {}",
        device.address,
        group.as_deref().unwrap_or("none"),
        driver.as_deref().unwrap_or("no driver")
    );
    if !strangers.is_empty() {
        found.push_str(&format!("; in its group as well: {}", strangers.join(", ")));
    }
    let wanted =
        format!("{} in group {}, with vfio-pci, no other driver in the group", device.address, device.group);
    measured("devices", wanted, found, passed)
}

/// Functions of its group that a driver of the host's has.
fn strangers(address: PciAddress) -> Vec<String> {
    let mates = fs::read_dir(format!("/sys/bus/pci/devices/{address}/iommu_group/devices"));
    let has_driver = |mate: &fs::DirEntry| {
        let driver = fs::read_link(mate.path().join("driver")).ok()?;
        let driver = driver.file_name()?.to_string_lossy().into_owned();
        // A bridge's port driver does not program DMA, and VFIO lets it be.
        let is_harmless = is_vfio_driver(&driver) || ["pcieport", "pci-stub"].contains(&driver.as_str());
        (!is_harmless).then(|| format!("{} ({driver})", mate.file_name().to_string_lossy()))
    };
    mates.into_iter().flatten().flatten().filter_map(|mate| has_driver(&mate)).collect()
}

fn reset(device: &GivenDevice) -> AuditLine {
    let former = device.former_driver.as_deref().unwrap_or("no driver");
    AuditLine {
        part: "devices",
        wanted: format!("{} was reset, with result 0, before it was given", device.address),
        found: format!("{}: reset by {}, taken from {former}", device.address, device.reset_method),
        source: Source::Recorded,
        passed: !device.reset_method.is_empty(),
    }
}
