//! The inventory: every PCI function of the host, and what it is used for.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use casemate_spec::{PciAddress, Refusal};
use serde::{Deserialize, Serialize};

use crate::{
    Details, Use, block,
    host::{Host, attribute, hex_attribute, link_name, names, pci_parent, read_text},
    mountinfo, network, pci_ids,
};

/// `pci.ids` is 1.4 MB and grows.
const PCI_IDS_BYTES_MAX: u64 = 16 << 20;

/// One PCI function, as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciFunction {
    /// Where it sits.
    pub address: PciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID; 0 for bridges.
    pub subsystem_vendor: u16,
    /// Subsystem ID; 0 for bridges.
    pub subsystem_device: u16,
    /// Class code, 24 bits: class, subclass, programming interface.
    pub class: u32,
    /// The vendor in words, or its ID.
    pub vendor_name: String,
    /// The device in words, or its ID.
    pub device_name: String,
    /// The class in words, or its code.
    pub class_name: String,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// Serial numbers that it tells; empty where there are none, or they can't be read.
    pub serials: Vec<String>,
    /// The physical function that makes it, when it is a virtual one.
    pub physical_function: Option<PciAddress>,
    /// Its IOMMU group; `None` when no IOMMU translates for it.
    pub iommu_group: Option<u32>,
    /// The other functions of its group, sorted.
    pub group_mates: Vec<PciAddress>,
    /// How the kernel can reset it, the method it tries first in front (`flr`, `pm`, `bus`).
    pub reset_methods: Vec<String>,
    /// The NUMA node it is near to, where the host says so.
    pub numa_node: Option<u32>,
    /// Class 06: host and PCI bridges. They stay with their port driver.
    pub is_bridge: bool,
    /// Its BARs that have a size, without the ROM.
    pub bars: Vec<Bar>,
    /// What else an operator asks of it.
    pub details: Details,
    /// Why the host needs it; empty when it doesn't.
    pub uses: Vec<Use>,
}

/// What a base address register decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory, with a 64-bit address.
    Memory64,
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bar {
    /// Its number, 0 to 5.
    pub index: u8,
    /// How much it decodes, a power of two on real hardware.
    pub size_bytes: u64,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

impl Host {
    /// All PCI functions, sorted by address, with serial numbers, details, and what each is used for; without
    /// [names](Self::name).
    ///
    /// # Errors
    /// `host-no-pci` when there is no PCI in sysfs; `host-unreadable` when the tables that tell what is in use cannot
    /// be read: then nothing may be given away.
    pub fn functions(&self) -> Result<Vec<PciFunction>, Refusal> {
        let mut functions = self.survey()?;
        // Each once: a read of config space is slow, and a bridge is on the way to many functions.
        let configs = self.configs(&functions);
        for function in &mut functions {
            function.serials = self.serials(function.address, &configs);
            function.details = self.details(function.address, &configs);
        }
        Ok(functions)
    }

    /// The same without serial numbers and details: no device is touched.
    pub(crate) fn survey(&self) -> Result<Vec<PciFunction>, Refusal> {
        let mut functions = self.outline_where(|_| true)?;
        let mut uses = self.uses(&functions)?;
        for function in &mut functions {
            function.uses = uses.remove(&function.address).unwrap_or_default();
            function.uses.sort();
            function.uses.dedup();
        }
        Ok(functions)
    }

    /// Those of the PCI functions at `addresses` that are there, sorted by address, and in which groups, for whoever takes none of them: it
    /// isn't looked what they are used for, so none may be given away by it.
    ///
    /// # Errors
    /// `host-no-pci`, if there is any address.
    pub fn outline(&self, addresses: &BTreeSet<PciAddress>) -> Result<Vec<PciFunction>, Refusal> {
        if addresses.is_empty() {
            return Ok(Vec::new());
        }
        self.outline_where(|address| addresses.contains(&address))
    }

    fn outline_where(&self, wanted: impl Fn(PciAddress) -> bool) -> Result<Vec<PciFunction>, Refusal> {
        let devices = self.path("sys/bus/pci/devices");
        if !devices.is_dir() {
            return Err(Refusal::new(
                "host-no-pci",
                devices.display(),
                "this host shows no PCI devices",
                "mount sysfs on /sys, or run on a machine with PCI",
            ));
        }
        let all: Vec<PciAddress> = names(&devices).iter().filter_map(|name| name.parse().ok()).collect();
        let of = all.iter().copied().filter(|address| wanted(*address));
        let mut functions: Vec<PciFunction> = of.filter_map(|address| self.function(address)).collect();
        functions.sort_by_key(|function| function.address);
        leave_out_resets_of_others(&mut functions, &all);
        Ok(functions)
    }

    /// One function without names and uses; `None` when it is not there (or just went).
    pub(crate) fn function(&self, address: PciAddress) -> Option<PciFunction> {
        let directory = self.pci(address);
        let id = |name: &str| u16::try_from(hex_attribute(directory.join(name))?).ok();
        let class = u32::try_from(hex_attribute(directory.join("class"))?).ok()?;
        let resource = attribute(directory.join("resource")).unwrap_or_default();
        let iommu_group = link_name(directory.join("iommu_group")).and_then(|name| name.parse().ok());
        let mates =
            names(directory.join("iommu_group/devices")).into_iter().filter_map(|name| name.parse().ok());
        Some(PciFunction {
            address,
            vendor: id("vendor")?,
            device: id("device")?,
            subsystem_vendor: id("subsystem_vendor").unwrap_or(0),
            subsystem_device: id("subsystem_device").unwrap_or(0),
            class,
            vendor_name: String::new(),
            device_name: String::new(),
            class_name: String::new(),
            driver: link_name(directory.join("driver")),
            serials: Vec::new(),
            physical_function: link_name(directory.join("physfn")).and_then(|name| name.parse().ok()),
            iommu_group,
            group_mates: mates.filter(|mate| *mate != address).collect(),
            reset_methods: reset_methods(&attribute(directory.join("reset_method")).unwrap_or_default()),
            numa_node: attribute(directory.join("numa_node")).and_then(|node| node.parse().ok()),
            is_bridge: class >> 16 == 0x06,
            bars: parse_bars(&resource),
            details: Details::default(),
            uses: Vec::new(),
        })
    }

    /// Gives functions the names that this host's list of PCI ids has for them; to be shown only.
    pub fn name(&self, functions: &mut [PciFunction]) {
        let wanted: HashSet<_> =
            functions.iter().map(|function| (function.vendor, function.device)).collect();
        let text = read_text(&self.path("usr/share/misc/pci.ids"), PCI_IDS_BYTES_MAX).unwrap_or_default();
        let names = pci_ids::parse(&text, &wanted);
        for function in functions {
            function.vendor_name = names.vendor(function.vendor);
            function.device_name = names.device(function.vendor, function.device);
            function.class_name = names.class(function.class);
        }
    }

    fn uses(&self, functions: &[PciFunction]) -> Result<BTreeMap<PciAddress, Vec<Use>>, Refusal> {
        let mut uses: BTreeMap<PciAddress, Vec<Use>> = BTreeMap::new();
        let mounts = self.mounts()?;
        for (address, reason) in block::uses(self, &mounts)? {
            uses.entry(address).or_default().push(reason);
        }
        for (address, reason) in shared_folders(self) {
            uses.entry(address).or_default().push(reason);
        }
        let network = network::Network::read(self, functions)?;
        for function in functions {
            let of_network =
                network.default_routes(function.address).chain(network.only(&[function.address]));
            uses.entry(function.address).or_default().extend(of_network.map(|(_, reason)| reason));
            let count =
                attribute(self.pci(function.address).join("sriov_numvfs")).and_then(|n| n.parse().ok());
            if let Some(count) = count.filter(|count| *count > 0) {
                uses.entry(function.address).or_default().push(Use::VirtualFunctions { count });
            }
        }
        Ok(uses)
    }

    /// The mounts of this process and of process 1, whose namespace may hold more.
    fn mounts(&self) -> Result<Vec<mountinfo::Mount>, Refusal> {
        let unreadable = |cause: &dyn std::fmt::Display| unreadable("proc/self/mountinfo", cause);
        let read = |text: &str| {
            mountinfo::parse(text).map_err(|line| unreadable(&format!("line {line} is not understood")))
        };
        let mut mounts = read(&self.table("proc/self/mountinfo").map_err(|error| unreadable(&error))?)?;
        if let Ok(text) = self.table("proc/1/mountinfo") {
            mounts.extend(read(&text)?);
        }
        Ok(mounts)
    }
}

/// What cannot be read cannot be judged.
pub(crate) fn unreadable(what: &str, cause: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        "host-unreadable",
        format!("/{what}"),
        format!("what is in use cannot be told: {cause}"),
        "make it readable for this process (run as root, with /proc and /sys mounted)",
    )
}

/// Folders of an outer machine. A mount of one may be out of sight (below an overlay, in another mount namespace), so a
/// bound driver is enough.
fn shared_folders(host: &Host) -> Vec<(PciAddress, Use)> {
    let devices = host.path("sys/bus/virtio/devices");
    let of = |name: String| {
        let device = devices.join(name);
        let tag = attribute(device.join("mount_tag")).or_else(|| attribute(device.join("tag")))?;
        device.join("driver").exists().then_some(())?;
        Some((pci_parent(&device)?, Use::SharedFolder { tag }))
    };
    names(&devices).into_iter().filter_map(of).collect()
}

/// A function's bus reset is none of its own where others are on the bus. The kernel lists it all the same for the first
/// function of a card, which was alone when it was found, and refuses it when it is asked for (`pci_parent_bus_reset`).
fn leave_out_resets_of_others(functions: &mut [PciFunction], addresses: &[PciAddress]) {
    for function in functions {
        let own = function.address;
        if addresses.iter().any(|other| *other != own && other.is_on_the_bus_of(own)) {
            function.reset_methods.retain(|method| method != "bus");
        }
    }
}

/// The `reset_method` attribute: methods with spaces between, or `default` from kernels that don't tell.
fn reset_methods(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).take(16).collect()
}

/// The `resource` attribute: a line `START END FLAGS` for each BAR, then the ROM and bridge windows. Lines that are not
/// of this form, and ranges that end before they start, are no BARs.
fn parse_bars(text: &str) -> Vec<Bar> {
    const IO: u64 = 0x100;
    const MEMORY: u64 = 0x200;
    const PREFETCH: u64 = 0x2000;
    const MEMORY_64: u64 = 0x10_0000;
    let of = |(index, line): (u8, &str)| {
        let mut numbers =
            line.split_whitespace().map(|n| u64::from_str_radix(n.strip_prefix("0x")?, 16).ok());
        let (start, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let kind = match (flags & IO != 0, flags & MEMORY != 0, flags & MEMORY_64 != 0) {
            (true, false, _) => BarKind::Io,
            (false, true, true) => BarKind::Memory64,
            (false, true, false) => BarKind::Memory32,
            _ => return None,
        };
        let size_bytes = end.checked_sub(start)?.checked_add(1)?;
        (size_bytes > 1).then_some(Bar { index, size_bytes, kind, prefetchable: flags & PREFETCH != 0 })
    };
    (0u8..6).zip(text.lines()).filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};
    use proptest::prelude::*;

    #[test]
    fn reads_bars() {
        let text = "0x00000000fe800000 0x00000000fe81ffff 0x0000000000040200\n0x0 0x0 0x0\n\
                    0x000000000000e000 0x000000000000e01f 0x0000000000040101\n\
                    0x000000e000000000 0x000000e1ffffffff 0x000000000014220c\n";
        let bars = parse_bars(text);
        assert_eq!(bars.len(), 3);
        assert_eq!((bars[0].index, bars[0].size_bytes, bars[0].kind), (0, 0x20000, BarKind::Memory32));
        assert_eq!((bars[1].index, bars[1].size_bytes, bars[1].kind), (2, 32, BarKind::Io));
        assert_eq!(
            (bars[2].size_bytes, bars[2].kind, bars[2].prefetchable),
            (8 << 30, BarKind::Memory64, true)
        );
    }

    #[test]
    fn reads_a_machine() {
        let machine = Fixture::typical();
        let functions = machine.host().functions().unwrap();
        let nvme = functions.iter().find(|f| f.address == at("0000:03:00.0")).unwrap();
        assert_eq!((nvme.vendor, nvme.device, nvme.class), (0x1b36, 0x0010, 0x01_0802));
        assert_eq!(nvme.driver.as_deref(), Some("nvme"));
        assert_eq!(nvme.reset_methods, ["flr", "bus"]);
        assert_eq!((nvme.iommu_group, nvme.numa_node), (Some(10), None));
        assert_eq!(nvme.uses, []);
        let port = functions.iter().find(|f| f.address == at("0000:00:01.0")).unwrap();
        assert!(port.is_bridge && port.reset_methods.is_empty());
        assert!(functions.is_sorted_by_key(|f| f.address));
    }

    /// Whoever wants no device has none looked at.
    #[test]
    fn an_outline_tells_groups_and_nothing_of_uses() {
        let machine = Fixture::typical();
        let all = machine.host().functions().unwrap();
        let addresses: BTreeSet<_> = all.iter().map(|function| function.address).collect();
        let outline = machine.host().outline(&addresses).unwrap();
        let groups = |functions: &[PciFunction]| -> Vec<_> {
            functions
                .iter()
                .map(|f| (f.address, f.iommu_group, f.group_mates.clone(), f.reset_methods.clone()))
                .collect()
        };
        assert_eq!(groups(&outline), groups(&all));
        let nvme = BTreeSet::from([at("0000:03:00.0"), at("0000:7f:00.0")]);
        let of_nvme = machine.host().outline(&nvme).unwrap();
        assert_eq!(of_nvme.iter().map(|f| f.address).collect::<Vec<_>>(), [at("0000:03:00.0")]);
        assert_eq!(machine.host().outline(&BTreeSet::new()).unwrap(), []);
        assert!(all.iter().any(|f| f.details != Details::default()));
        assert!(outline.iter().all(|f| f.uses.is_empty() && f.details == Details::default()));
        assert!(all.iter().all(|f| f.vendor_name.is_empty()), "names are for who shows them");
    }

    #[test]
    fn a_bus_reset_is_told_of_whoever_is_alone_on_the_bus() {
        let machine = Fixture::typical();
        let of_card =
            [("class", "0x00ff00"), ("vendor", "0x1234"), ("device", "0x11e8"), ("reset_method", "bus")];
        machine.pci("0000:06:00.0", &of_card, None, Some(20));
        let methods = |machine: &Fixture| {
            let functions = machine.host().functions().unwrap();
            functions.iter().find(|f| f.address == at("0000:06:00.0")).unwrap().reset_methods.clone()
        };
        assert_eq!(methods(&machine), ["bus"]);
        machine.pci("0000:06:00.1", &of_card[..3], None, Some(21));
        assert_eq!(methods(&machine), [""; 0]);
    }

    #[test]
    fn an_unreadable_mount_table_is_refused() {
        let machine = Fixture::typical();
        machine.write("proc/self/mountinfo", "nonsense\n");
        assert_eq!(machine.host().functions().unwrap_err().code, "host-unreadable");
    }

    #[test]
    fn a_shared_folder_is_in_use() {
        let machine = Fixture::typical();
        machine.pci(
            "0000:00:06.0",
            &[("class", "0x000200"), ("vendor", "0x1af4")],
            Some("virtio-pci"),
            Some(6),
        );
        machine.write("sys/devices/pci0000:00/0000:00:06.0/virtio0/mount_tag", "host\0");
        machine.link("sys/bus/virtio/devices/virtio0", "sys/devices/pci0000:00/0000:00:06.0/virtio0");
        assert_eq!(machine.uses("0000:00:06.0"), []);
        machine.write("sys/bus/virtio/drivers/9pnet_virtio/uevent", "");
        machine.link(
            "sys/devices/pci0000:00/0000:00:06.0/virtio0/driver",
            "sys/bus/virtio/drivers/9pnet_virtio",
        );
        assert_eq!(machine.uses("0000:00:06.0"), [Use::SharedFolder { tag: "host".into() }]);
    }

    proptest! {
        #[test]
        fn bars_never_panic(text in "((0x)?[0-9a-f]{0,17} ?){0,4}(\n(0x[0-9a-f]{0,17} ?){0,4}){0,7}") {
            let bars = parse_bars(&text);
            prop_assert!(bars.len() <= 6);
        }

        #[test]
        fn a_bar_comes_back(index in 0u8..6, start in 0u64..1 << 40, shift in 1u32..40, prefetchable: bool) {
            let mut lines = vec!["0x0 0x0 0x0".to_owned(); 7];
            let flags = if prefetchable { 0x14_2200 } else { 0x14_0200 };
            lines[usize::from(index)] = format!("{start:#x} {:#x} {flags:#x}", start + (1 << shift) - 1);
            let bar = Bar { index, size_bytes: 1 << shift, kind: BarKind::Memory64, prefetchable };
            prop_assert_eq!(parse_bars(&lines.join("\n")), [bar]);
        }
    }
}
