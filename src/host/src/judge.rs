//! Whether functions can be given to a guest: one place, asked by the inventory for its column and by every claim.

use std::fs;

use casemate_spec::{PciAddress, Refusal};

use crate::{
    Ledger, PciFunction, Use, block,
    host::{Host, attribute, hex_attribute, link_name, names},
    ledger::{Book, Entry},
    network::Network,
    process::Process,
    reset, sriov,
    variant::is_vfio_driver,
};

/// Whether `requested`, all together, can be given to one guest. `functions` is the inventory of the same moment; the
/// ledger tells what others have.
///
/// # Errors
/// The first reason found, each with its remedy: `device-named-twice`, `device-missing`, `device-is-bridge`,
/// `device-no-group`, `device-reserved-memory`, `host-no-interrupt-remapping`, `host-unsafe-interrupts`, `device-quarantined`, `device-claimed`,
/// `device-boot-disk`, `device-only-network`, `device-in-use`, `device-group-shared`, `device-no-reset`; `ledger-*` and
/// `host-unreadable` when it cannot be told.
pub fn assignable(
    host: &Host,
    functions: &[PciFunction],
    ledger: Option<&Ledger>,
    requested: &[PciAddress],
) -> Result<(), Refusal> {
    let book = ledger.map(Ledger::read).transpose()?.unwrap_or_default();
    judge(host, functions, &book, requested)
}

/// [`assignable`], with the ledger's content.
pub(crate) fn judge(
    host: &Host,
    functions: &[PciFunction],
    book: &Book,
    requested: &[PciAddress],
) -> Result<(), Refusal> {
    let find = |address: &PciAddress| functions.iter().find(|function| function.address == *address);
    for (index, address) in requested.iter().enumerate() {
        if requested.iter().take(index).any(|earlier| earlier == address) {
            return Err(Refusal::new(
                "device-named-twice",
                address,
                "this device is named twice",
                "name it once",
            ));
        }
        let function = find(address).ok_or_else(|| missing(*address))?;
        can_be_assigned(host, function)?;
        is_free(host, book, function)?;
        is_unused(host, function)?;
        for mate in function.group_mates.iter().filter(|mate| !requested.contains(mate)) {
            can_share_group(function, find(mate), *mate)?;
        }
        if function.reset_methods.is_empty() {
            can_be_reset_with_its_card(host, functions, function, requested)?;
        }
    }
    keeps_network(host, functions, requested)
}

/// That a function which can't be reset alone can be with its bus, since all that is on it goes to this guest.
fn can_be_reset_with_its_card(
    host: &Host,
    functions: &[PciFunction],
    function: &PciFunction,
    requested: &[PciAddress],
) -> Result<(), Refusal> {
    let refuse =
        |cause: &str, remedy: String| Err(Refusal::new("device-no-reset", function.address, cause, remedy));
    let Some(mates) = reset::card_mates(host, functions, function) else {
        let remedy = "name a device that has a reset method (casemate devices shows them)";
        return refuse(
            "the kernel knows no way to reset it, so it could never prove itself clean",
            remedy.into(),
        );
    };
    let missing: Vec<_> =
        mates.iter().filter(|mate| !requested.contains(mate)).map(ToString::to_string).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let remedy = format!("name {} too, so that the whole card is the guest's", missing.join(", "));
    refuse("it can only be reset together with all that is on its bus", remedy)
}

pub(crate) fn missing(address: PciAddress) -> Refusal {
    let remedy = "casemate devices shows what there is";
    Refusal::new("device-missing", address, "there is no such PCI device on this host", remedy)
}

/// What it is, and whether the host can contain it.
fn can_be_assigned(host: &Host, function: &PciFunction) -> Result<(), Refusal> {
    let address = function.address;
    if function.is_bridge {
        let remedy = "name the device behind it";
        return Err(Refusal::new(
            "device-is-bridge",
            address,
            "it is a bridge, which serves the host and others",
            remedy,
        ));
    }
    let directory = host.pci(address).join("iommu_group");
    let unsafe_group = attribute(directory.join("name")).is_some_and(|name| name == "vfio-noiommu");
    if function.iommu_group.is_none() || unsafe_group {
        return Err(Refusal::new(
            "device-no-group",
            address,
            "no IOMMU stands between it and the host's memory",
            "turn the IOMMU on: VT-d or AMD-Vi in the firmware, intel_iommu=on on the kernel's command line",
        ));
    }
    if let Some(region) = host.reserved_regions(address).iter().find(|region| region.is_firmwares()) {
        let (start, end) = (region.addresses.start(), region.addresses.end());
        return Err(Refusal::new(
            "device-reserved-memory",
            address,
            format!(
                "the firmware uses it behind the host's back, in the host's memory at {start:#x} to {end:#x} (an RMRR)"
            ),
            "turn off in the firmware what uses it (remote management, health reports), or put it into another slot",
        ));
    }
    if let Remapping::Off(why) = interrupt_remapping(host) {
        return Err(Refusal::new(
            "host-no-interrupt-remapping",
            address,
            format!("interrupts are not remapped, so a guest could forge them ({why})"),
            "turn on interrupt remapping in the firmware (x2APIC, VT-d), and remove intremap=off from the kernel's command line",
        ));
    }
    if attribute(host.path("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")).as_deref()
        == Some("Y")
    {
        return Err(Refusal::new(
            "host-unsafe-interrupts",
            address,
            "the kernel was told to allow unsafe interrupts",
            "echo N > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts, and remove the option from modprobe.d",
        ));
    }
    Ok(())
}

/// That no guest has it or a mate of it, and that it is not in quarantine.
pub(crate) fn is_free(host: &Host, book: &Book, function: &PciFunction) -> Result<(), Refusal> {
    let address = function.address;
    let is_mate = |other: PciAddress| other == address || function.group_mates.contains(&other);
    if let Some(device) = book.quarantined.iter().find(|device| is_mate(device.address)) {
        let which = if device.address == address {
            "it".to_owned()
        } else {
            format!("its group mate {}", device.address)
        };
        return Err(Refusal::new(
            "device-quarantined",
            address,
            match device.guest.as_str() {
                "" => format!("an operator keeps {which} from guests: {}", device.why),
                guest => format!("{which} did not prove clean after guest {guest} had it: {}", device.why),
            },
            format!("power-cycle the device, then casemate devices free {}", device.address),
        ));
    }
    if let Some(physical) = std::iter::once(address)
        .chain(function.group_mates.iter().copied())
        .find(|other| sriov::makes_virtual_functions(book, *other))
    {
        let cause = format!("{physical} makes virtual functions for guests, and who had it would rule them");
        let remedy = "name the pool of its virtual functions";
        return Err(Refusal::new("device-makes-vfs", address, cause, remedy));
    }
    let holds = |entry: &&Entry| entry.devices.iter().any(|device| is_mate(device.address));
    if let Some(entry) = book.entries.iter().find(holds) {
        let Process { pid, .. } = entry.owner.keep;
        let (state, remedy) = if entry.owner.keep.is_alive(host) {
            ("runs", format!("stop guest {} first", entry.owner.guest))
        } else {
            (
                "has ended, and has not been cleaned up after",
                "let casemate recover it, which every command does first".into(),
            )
        };
        let cause = format!(
            "guest {} has it or a mate of its group (process {pid}, which {state})",
            entry.owner.guest
        );
        return Err(Refusal::new("device-claimed", address, cause, remedy));
    }
    Ok(())
}

fn is_unused(host: &Host, function: &PciFunction) -> Result<(), Refusal> {
    // They are sorted, the gravest first.
    let held = || block::held_exclusively(host, function.address);
    match function.uses.first().cloned().or_else(held) {
        Some(reason) => Err(in_use(function.address, &reason)),
        None => Ok(()),
    }
}

fn in_use(address: PciAddress, reason: &Use) -> Refusal {
    let code = match reason {
        Use::BootDisk { .. } => "device-boot-disk",
        Use::OnlyNetwork { .. } => "device-only-network",
        _ => "device-in-use",
    };
    Refusal::new(code, address, reason, reason.remedy())
}

/// A mate that was not named: it must be in nobody's use. Bridges stay with their port driver, which does no DMA.
fn can_share_group(
    function: &PciFunction,
    mate: Option<&PciFunction>,
    address: PciAddress,
) -> Result<(), Refusal> {
    let group = function.iommu_group.unwrap_or_default();
    let refuse = |cause: String, remedy: String| {
        Err(Refusal::new("device-group-shared", function.address, cause, remedy))
    };
    let Some(mate) = mate else {
        return refuse(
            format!("its mate {address} in IOMMU group {group} is not seen"),
            "look at casemate devices again".into(),
        );
    };
    if mate.is_bridge {
        return Ok(());
    }
    if let Some(reason) = mate.uses.first() {
        let cause = format!("its mate {address} in IOMMU group {group} is in use: {reason}");
        return refuse(cause, reason.remedy());
    }
    match mate.driver.as_deref().filter(|driver| !is_vfio_driver(driver) && *driver != "pci-stub") {
        Some(driver) => refuse(
            format!("its mate {address} in IOMMU group {group} stays with the host's driver {driver}"),
            format!("name {address} too, for a group goes as a whole, or unbind it from {driver}"),
        ),
        None => Ok(()),
    }
}

/// That the host keeps a network card when all of `requested` are gone.
fn keeps_network(host: &Host, functions: &[PciFunction], requested: &[PciAddress]) -> Result<(), Refusal> {
    let network = Network::read(host, functions)?;
    match network.only(requested).first() {
        Some((address, reason)) => Err(in_use(*address, reason)),
        None => Ok(()),
    }
}

/// Whether devices' interrupts go through a table of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Remapping {
    /// As far as can be told.
    On(String),
    /// And why.
    Off(String),
}

/// What the IOMMUs and the kernel's command line say.
pub(crate) fn interrupt_remapping(host: &Host) -> Remapping {
    const ECAP_INTERRUPT_REMAPPING: u64 = 1 << 3;
    let class = host.path("sys/class/iommu");
    let units = names(&class);
    if units.is_empty() {
        return Remapping::Off("there is no IOMMU".into());
    }
    let command_line = host.table("proc/cmdline").unwrap_or_default();
    if command_line.split_whitespace().any(|word| word == "intremap=off" || word == "nointremap") {
        return Remapping::Off("the kernel's command line turns it off".into());
    }
    for unit in &units {
        let ecap = class.join(unit).join("intel-iommu/ecap");
        if fs::exists(&ecap).unwrap_or(false) {
            // Unreadable is not on.
            let ecap = hex_attribute(&ecap).unwrap_or(0);
            if ecap & ECAP_INTERRUPT_REMAPPING == 0 {
                return Remapping::Off(format!("{unit} cannot (ecap {ecap:#x})"));
            }
        }
    }
    // AMD-Vi has it on wherever the IOMMU is on.
    Remapping::On(units.join(", "))
}

/// The driver of each mate, for a message about a group that is not viable.
pub(crate) fn group_drivers(host: &Host, address: PciAddress) -> String {
    let mates = names(host.pci(address).join("iommu_group/devices"));
    let of = |mate: &String| {
        let mate: PciAddress = mate.parse().ok()?;
        Some(format!(
            "{mate} {}",
            link_name(host.pci(mate).join("driver")).unwrap_or_else(|| "(none)".into())
        ))
    };
    mates.iter().filter_map(of).collect::<Vec<_>>().join(", ")
}

/// That the device behind the address is the one that was meant.
pub(crate) fn same_device(host: &Host, address: PciAddress, ids: (u16, u16)) -> Result<PciFunction, Refusal> {
    let function = host.function(address).ok_or_else(|| missing(address))?;
    if (function.vendor, function.device) == ids {
        return Ok(function);
    }
    let (found, meant) =
        (format!("{:04x}:{:04x}", function.vendor, function.device), format!("{:04x}:{:04x}", ids.0, ids.1));
    Err(Refusal::new(
        "device-changed",
        address,
        format!("here is {found} now, not {meant}"),
        "name the device that is there",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Quarantined,
        fixture::{Fixture, at},
        ledger::tests::{entry, record},
    };

    const E1000E: &str = "0000:01:00.0";
    const NVME: &str = "0000:03:00.0";

    fn verdict(machine: &Fixture, addresses: &[&str]) -> Result<(), Refusal> {
        let functions = machine.host().functions().unwrap();
        let addresses: Vec<PciAddress> = addresses.iter().map(|address| at(address)).collect();
        assignable(&machine.host(), &functions, Some(&machine.ledger()), &addresses)
    }

    /// The refusal; each must name a device, a cause and a remedy.
    fn refused(machine: &Fixture, addresses: &[&str]) -> Refusal {
        let refusal = verdict(machine, addresses).unwrap_err();
        assert!(addresses.contains(&refusal.subject.as_str()), "{refusal}");
        assert!(!refusal.cause.is_empty() && !refusal.remedy.is_empty(), "{refusal}");
        refusal
    }

    fn code(machine: &Fixture, addresses: &[&str]) -> &'static str {
        refused(machine, addresses).code
    }

    #[test]
    fn a_drive_and_a_card_are_given() {
        assert_eq!(verdict(&Fixture::typical(), &[NVME, E1000E]), Ok(()));
    }

    #[test]
    fn what_it_is() {
        let machine = Fixture::typical();
        assert_eq!(code(&machine, &["0000:00:1e.0"]), "device-missing");
        assert_eq!(code(&machine, &["0000:00:01.0"]), "device-is-bridge");
        assert_eq!(code(&machine, &["0000:00:05.0"]), "device-no-reset");
        assert_eq!(code(&machine, &[NVME, NVME]), "device-named-twice");
        machine.pci("0000:06:00.0", &[("class", "0x020000"), ("reset_method", "flr")], None, None);
        assert_eq!(code(&machine, &["0000:06:00.0"]), "device-no-group");
        machine.write("sys/kernel/iommu_groups/10/reserved_regions", "0x7b000000 0x7fffffff direct\n");
        let refusal = refused(&machine, &[NVME]);
        assert_eq!(refusal.code, "device-reserved-memory");
        assert!(refusal.cause.contains("0x7b000000 to 0x7fffffff"), "{refusal}");
        machine.write("sys/kernel/iommu_groups/10/name", "vfio-noiommu\n");
        assert_eq!(code(&machine, &[NVME]), "device-no-group");
    }

    #[test]
    fn what_the_host_cannot_contain() {
        let machine = Fixture::typical();
        machine.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y\n");
        assert_eq!(code(&machine, &[NVME]), "host-unsafe-interrupts");
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "f00f46\n");
        assert_eq!(code(&machine, &[NVME]), "host-no-interrupt-remapping");
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "f00f4e\n");
        machine.write("proc/cmdline", "quiet intremap=off\n");
        assert_eq!(code(&machine, &[NVME]), "host-no-interrupt-remapping");
    }

    #[test]
    fn what_it_is_used_for() {
        let machine = Fixture::typical();
        machine.mounts(&["259:1 / /mnt rw - ext4 /dev/nvme0n1p1 rw"]);
        let refusal = refused(&machine, &[E1000E, NVME]);
        assert_eq!((refusal.code, refusal.subject.as_str()), ("device-in-use", NVME));
        assert_eq!(refusal.cause, "nvme0n1p1 is mounted on /mnt");
        machine
            .mounts(&["259:1 / / rw - ext4 /dev/nvme0n1p1 rw", "259:1 / /mnt rw - ext4 /dev/nvme0n1p1 rw"]);
        assert_eq!(code(&machine, &[NVME]), "device-boot-disk");
        machine.mounts(&[]);
        machine.netdev("eth0", E1000E, true);
        assert_eq!(code(&machine, &[E1000E]), "device-only-network");
        machine.netdev("eth1", "0000:02:00.0", true);
        assert_eq!(verdict(&machine, &[E1000E]), Ok(()));
        assert_eq!(code(&machine, &[E1000E, "0000:02:00.0"]), "device-only-network");
        machine.default_route("eth0");
        assert_eq!(code(&machine, &[E1000E]), "device-in-use");
        machine.write("sys/bus/pci/devices/0000:02:00.0/sriov_numvfs", "2\n");
        assert_eq!(code(&machine, &["0000:02:00.0"]), "device-in-use");
    }

    #[test]
    fn what_shares_its_group() {
        let machine = Fixture::typical();
        // The ISA bridge stays, the SMBus controller has no driver: only the mate's use matters.
        machine.pci("0000:00:1f.4", &[("class", "0x010601"), ("reset_method", "pm")], Some("ahci"), Some(7));
        let refusal = refused(&machine, &["0000:00:1f.4"]);
        assert_eq!(refusal.code, "device-group-shared");
        assert!(
            refusal.cause.contains("0000:00:1f.2") && refusal.remedy.contains("name 0000:00:1f.2 too"),
            "{refusal}"
        );
        assert_eq!(verdict(&machine, &["0000:00:1f.4", "0000:00:1f.2"]), Ok(()));
        machine.sata_disk();
        machine.mounts(&["8:0 / /srv rw - ext4 /dev/sda rw"]);
        let refusal = refused(&machine, &["0000:00:1f.4"]);
        assert_eq!(refusal.code, "device-group-shared");
        assert!(refusal.cause.ends_with("is in use: sda is mounted on /srv"), "{refusal}");
    }

    #[test]
    fn whose_it_is() {
        let machine = Fixture::typical();
        machine.pci("0000:01:00.1", &[("class", "0x020000"), ("reset_method", "flr")], None, Some(8));
        machine.ledger().update(|book| book.entries.push(entry("web", vec![record(E1000E, 8)]))).unwrap();
        let refusal = refused(&machine, &[E1000E]);
        assert_eq!(refusal.code, "device-claimed");
        assert!(refusal.cause.contains("guest web"), "{refusal}");
        assert_eq!(code(&machine, &["0000:01:00.1"]), "device-claimed", "by its mate");
        let why = "its reset failed".to_owned();
        let device = Quarantined { address: at(NVME), vendor: 0, device: 0, guest: "db".into(), why };
        machine.ledger().update(|book| book.quarantined.push(device)).unwrap();
        let refusal = refused(&machine, &[NVME]);
        assert_eq!(refusal.code, "device-quarantined");
        assert!(refusal.cause.contains("its reset failed"), "{refusal}");
    }
}
