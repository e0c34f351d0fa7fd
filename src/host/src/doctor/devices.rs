//! What stands between a host and giving its devices away: by cause, since each is mended elsewhere.

use super::{Check, CheckState, check, ok_or};
use crate::{
    Host,
    host::{attribute, names},
};

/// What the kernel calls the memory in which the firmware's picture is, in /proc/iomem.
const FRAMEBUFFERS: [&str; 5] = ["BOOTFB", "efifb", "vesafb", "simplefb", "simple-framebuffer"];
/// How many devices are named.
const TOLD_MAX: usize = 4;

/// The three checks. None of them keeps a guest without devices from running.
pub(super) fn checks(host: &Host) -> [Check; 3] {
    [boot_framebuffer(host), reserved_memory(host), vfio_parameters(host)]
}

/// Why there are no IOMMU groups, and what to do: the firmware, or the kernel's command line.
pub(super) fn why_no_groups(host: &Host) -> (&'static str, &'static str) {
    let table = |name: &str| host.path("sys/firmware/acpi/tables").join(name).exists();
    let command_line = host.table("proc/cmdline").unwrap_or_default();
    let has = |word: &str| command_line.split_whitespace().any(|other| other == word);
    match (table("DMAR"), table("IVRS")) {
        _ if has("iommu=off") || has("intel_iommu=off") || has("amd_iommu=off") => (
            "the kernel's command line turns the IOMMU off",
            "remove iommu=off, intel_iommu=off or amd_iommu=off from it",
        ),
        (true, _) => (
            "the firmware has VT-d on, and the kernel does not use it",
            "put intel_iommu=on on the kernel's command line, and restart",
        ),
        (_, true) => (
            "the firmware has AMD-Vi on, and the kernel does not use it",
            "see dmesg for AMD-Vi: a broken table of the firmware's; look for an update of it",
        ),
        (false, false) => (
            "the firmware tells of none",
            "turn VT-d or AMD-Vi (IOMMU) on in the firmware; then put intel_iommu=on on the kernel's command line",
        ),
    }
}

/// Whether the boot's framebuffer has memory of a PCI function: then VFIO can't map it.
fn boot_framebuffer(host: &Host) -> Check {
    const NAME: &str = "boot-framebuffer";
    let map = host.table("proc/iomem").unwrap_or_default();
    // What holds a piece stands above it, by indentation: the function comes last before its pieces.
    let mut function = None;
    let mut owned = None;
    for line in map.lines() {
        let Some((_, what)) = line.split_once(" : ") else { continue };
        let what = what.trim();
        if what.parse::<casemate_spec::PciAddress>().is_ok() {
            function = Some(what);
        } else if FRAMEBUFFERS.contains(&what) && line.starts_with(' ') {
            owned = function.map(|function| (function, what));
        }
    }
    let remedy = "to give that card to a guest, put initcall_blacklist=sysfb_init (or video=efifb:off) on the kernel's command line";
    match owned {
        None => check(NAME, CheckState::Ok, "no card's memory is the boot's picture", remedy),
        Some((function, what)) => {
            check(NAME, CheckState::Warn, format!("{what} has memory of {function}"), remedy)
        }
    }
}

/// Devices that the firmware uses behind the host's back.
fn reserved_memory(host: &Host) -> Check {
    const NAME: &str = "reserved-memory";
    let addresses = names(host.path("sys/bus/pci/devices")).into_iter().filter_map(|name| name.parse().ok());
    let is_firmwares = |address: &casemate_spec::PciAddress| {
        host.reserved_regions(*address).iter().any(crate::dma::ReservedRegion::is_firmwares)
    };
    let all: Vec<String> = addresses.filter(is_firmwares).map(|address| address.to_string()).collect();
    let told: Vec<&str> = all.iter().take(TOLD_MAX).map(String::as_str).collect();
    let found = match all.len() {
        0 => "the firmware keeps memory for no device (RMRR)".to_owned(),
        count => format!("the firmware keeps memory for {count} devices (RMRR): {}", told.join(", ")),
    };
    let remedy = "these can't be given to guests; turn off in the firmware what uses them (remote management, health reports)";
    check(NAME, ok_or(all.is_empty(), CheckState::Warn), found, remedy)
}

/// Parameters of VFIO's modules that give guests more than they should have.
fn vfio_parameters(host: &Host) -> Check {
    const NAME: &str = "module-parameters";
    let is_on = |path: &str| attribute(host.path("sys/module").join(path)).as_deref() == Some("Y");
    let bad: Vec<&str> = [
        "vfio/parameters/enable_unsafe_noiommu_mode",
        "vfio_pci/parameters/disable_denylist",
        "vfio_pci/parameters/enable_sriov",
    ]
    .into_iter()
    .filter(|path| is_on(path))
    .collect();
    let found =
        if bad.is_empty() { "as they should be".to_owned() } else { format!("on: {}", bad.join(", ")) };
    let remedy = "echo N > /sys/module/... for each, and remove the options from modprobe.d";
    check(NAME, ok_or(bad.is_empty(), CheckState::Warn), found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn each_cause_has_its_own_words() {
        let machine = Fixture::typical();
        let why = || why_no_groups(&machine.host());
        machine.write("proc/cmdline", "quiet\n");
        assert!(why().0.contains("firmware tells of none") && why().1.contains("VT-d"), "{:?}", why());
        machine.write("sys/firmware/acpi/tables/DMAR", "");
        assert!(why().1.contains("intel_iommu=on"), "{:?}", why());
        machine.write("proc/cmdline", "quiet intel_iommu=off\n");
        assert!(why().0.contains("command line turns"), "{:?}", why());
    }

    #[test]
    fn a_framebuffer_names_its_card() {
        let machine = Fixture::typical();
        assert_eq!(boot_framebuffer(&machine.host()).state, CheckState::Ok);
        machine.write(
            "proc/iomem",
            "00000000-00000fff : Reserved\n  c0000000-febfffff : PCI Bus 0000:00\n    c0000000-cfffffff : 0000:00:02.0\n      \
             c0000000-c0ffffff : BOOTFB\n    febf0000-febf0fff : 0000:03:00.0\n",
        );
        let found = boot_framebuffer(&machine.host());
        assert_eq!(
            (found.state, found.found.as_str()),
            (CheckState::Warn, "BOOTFB has memory of 0000:00:02.0")
        );
    }

    #[test]
    fn what_the_firmware_keeps_and_what_parameters_give() {
        let machine = Fixture::typical();
        assert!(checks(&machine.host()).iter().all(|check| check.state == CheckState::Ok));
        machine.write("sys/kernel/iommu_groups/10/reserved_regions", "0x7b000000 0x7fffffff direct\n");
        let found = reserved_memory(&machine.host());
        assert!(found.state == CheckState::Warn && found.found.contains("0000:03:00.0"), "{found:?}");
        machine.write("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
        assert_eq!(vfio_parameters(&machine.host()).state, CheckState::Warn);
    }
}
