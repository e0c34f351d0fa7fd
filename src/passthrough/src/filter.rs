//! The allow-list of an assigned function's configuration space.

use std::fmt;

use casemate_pci::regs;

/// Which part of configuration space a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Bytes of the header.
    Register {
        /// First byte.
        offset: u16,
        /// Bytes.
        size: u16,
    },
    /// A capability, wherever the device has it. It keeps its place.
    Capability {
        /// Capability ID.
        id: u8,
    },
}

/// What a guest's accesses to it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads give what the device said before the guest started; writes go nowhere.
    Snapshot,
    /// Reads and writes meet state of Casemate's own; nothing reaches the device.
    Virtual,
    /// Reads and writes meet state of Casemate's own. When a write changes one of the `guest` bits, the device's
    /// register of 16 bits is written: those bits as the guest has them, the `always` bits set, all others clear.
    Forwarded {
        /// Bits that are the guest's choice.
        guest: u16,
        /// Bits that are the guest's choice where its INTx is delivered, and set everywhere else.
        with_intx: u16,
        /// Bits that are set for as long as the guest has the function.
        always: u16,
        /// Bits that are set so where the guest has I/O BARs of it.
        with_ports: u16,
    },
}

/// One line of the allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The register's or capability's name.
    pub name: &'static str,
    /// Where it is.
    pub what: What,
    /// What accesses do.
    pub access: Access,
    /// Why that is safe, and what the guest needs it for.
    pub reason: &'static str,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Register { offset, size } => write!(f, "{} ({offset:#04x}, {size} bytes): ", self.name)?,
            What::Capability { id } => write!(f, "{} (capability {id:#04x}): ", self.name)?,
        }
        match self.access {
            Access::Snapshot => write!(f, "snapshot")?,
            Access::Virtual => write!(f, "virtual")?,
            Access::Forwarded { guest, with_intx, always, with_ports } => write!(
                f,
                "forwarded ({guest:#06x}, with INTx {with_intx:#06x}, always {always:#06x}, with ports {with_ports:#06x})"
            )?,
        }
        write!(f, "; {}", self.reason)
    }
}

const fn register(name: &'static str, offset: u16, size: u16, access: Access, reason: &'static str) -> Rule {
    Rule { name, what: What::Register { offset, size }, access, reason }
}

const fn capability(name: &'static str, id: u8, access: Access, reason: &'static str) -> Rule {
    Rule { name, what: What::Capability { id }, access, reason }
}

/// Everything of an assigned function's configuration space that a guest can reach. What is not here is absent.
pub static FILTER: &[Rule] = &[
    register("vendor and device", regs::VENDOR_ID, 4, Access::Snapshot, "drivers match on it"),
    register(
        "command",
        regs::COMMAND,
        2,
        Access::Forwarded {
            guest: regs::COMMAND_MASTER,
            with_intx: regs::COMMAND_INTX_DISABLE,
            always: regs::COMMAND_MEMORY,
            with_ports: regs::COMMAND_IO,
        },
        "bus master is off until the guest turns it on, and what the device then reaches is the IOMMU's business; \
         memory decoding at the device stays on, since turning it off makes mapped pages fault, and what the guest \
         sees of its BARs is ruled by the guest's own copy of the bit, and so with ports; INTx is never asserted where nobody listens to it, and elsewhere is \
         the guest's to turn off: VFIO keeps it masked meanwhile",
    ),
    register(
        "status",
        regs::STATUS,
        2,
        Access::Virtual,
        "says that there are capabilities; error bits are the host's to see and clear",
    ),
    register("revision and class", regs::REVISION_ID, 4, Access::Snapshot, "drivers match on it"),
    register("cache line size", regs::CACHE_LINE_SIZE, 1, Access::Virtual, "has no meaning in PCI Express"),
    register(
        "BARs",
        regs::BASE_ADDRESS_0,
        24,
        Access::Virtual,
        "the guest moves where it sees a BAR, never where the device has it; ports are reached by exits, since no page of memory stands for \
         one, and are absent behind a root port, which has no window for them",
    ),
    register("subsystem", regs::SUBSYSTEM_VENDOR_ID, 4, Access::Snapshot, "drivers match on it"),
    register(
        "expansion ROM",
        regs::EXPANSION_ROM,
        4,
        Access::Virtual,
        "the guest moves where it sees the ROM that its file names, and turns it on and off; without one there is none, and the \
         device's own is absent: a guest before may have written it",
    ),
    register(
        "capability pointer",
        regs::CAPABILITY_LIST,
        1,
        Access::Virtual,
        "links what this table lets through",
    ),
    register(
        "interrupt line and pin",
        regs::INTERRUPT_LINE,
        2,
        Access::Virtual,
        "the pin reads INTA where INTx is delivered, whichever line the device has, and 0 elsewhere; the line is a note \
         of the guest's to itself",
    ),
    capability(
        "Power Management",
        regs::CAP_ID_PM,
        Access::Virtual,
        "drivers insist on it; the guest's D3hot is kept and read back, and the device stays in D0: a device that \
         sleeps can't be reset or read by the host; PME is absent; No_Soft_Reset says that D3hot loses nothing",
    ),
    capability(
        "PCI Express",
        regs::CAP_ID_EXP,
        Access::Virtual,
        "drivers insist on it; a root complex integrated endpoint without link where it sits on the root bus, and \
         in a slot an endpoint with the link as the device says it, which is not the guest's to set; payload \
         and read request sizes read as the host set them, and are not the guest's to set, since others share the \
         link; no function level reset by the guest",
    ),
    capability(
        "MSI",
        regs::CAP_ID_MSI,
        Access::Virtual,
        "of functions without MSI-X: address, data and masks say where in the guest an interrupt goes; the device's own are the \
         host kernel's; pending bits read as the VMM has them",
    ),
    capability(
        "MSI-X",
        regs::CAP_ID_MSIX,
        Access::Virtual,
        "the guest's table says where in the guest an interrupt goes; the device's own table is the host kernel's",
    ),
    capability(
        "vendor specific",
        regs::CAP_ID_VNDR,
        Access::Snapshot,
        "some drivers find their registers by it (virtio 1.3, 4.1.4); a copy of what it held when the function was given, \
         and what a guest writes goes nowhere, for what a vendor does with it nobody knows",
    ),
];

/// The rule for capability `id`, when it is let through.
pub(crate) fn capability_rule(id: u8) -> Option<&'static Rule> {
    FILTER.iter().find(|rule| rule.what == What::Capability { id })
}

/// What a guest is told that a function has, beside memory BARs and messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Has {
    /// INTx.
    pub(crate) intx: bool,
    /// I/O BARs.
    pub(crate) ports: bool,
}

/// The registers of a function whose writes reach the device: offset, guest's bits, bits that are always set.
pub(crate) fn forwarded(has: Has) -> impl Iterator<Item = (u16, u16, u16)> {
    FILTER.iter().filter_map(move |rule| match (rule.what, rule.access) {
        (What::Register { offset, .. }, Access::Forwarded { guest, with_intx, always, with_ports }) => {
            let always = if has.ports { always | with_ports } else { always };
            Some(if has.intx {
                (offset, guest | with_intx, always)
            } else {
                (offset, guest, always | with_intx)
            })
        }
        _ => None,
    })
}

/// The registers that are shown as the device has them: offset and size.
pub(crate) fn snapshots() -> impl Iterator<Item = (u16, u16)> {
    FILTER.iter().filter_map(|rule| match (rule.what, rule.access) {
        (What::Register { offset, size }, Access::Snapshot) => Some((offset, size)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_reached_at_one_bit_or_two() {
        let with = |intx, ports| forwarded(Has { intx, ports }).collect::<Vec<_>>();
        assert_eq!(with(false, false), [(0x04, 0x0004, 0x0402)]);
        assert_eq!(with(true, false), [(0x04, 0x0404, 0x0002)]);
        assert_eq!(with(true, true), [(0x04, 0x0404, 0x0003)]);
    }

    #[test]
    fn what_could_do_harm_is_absent() {
        // Slot, VPD, HyperTransport, debug port, bridge ids, AGP, enhanced allocation.
        for id in [0x04, 0x03, 0x08, 0x0a, 0x0d, 0x0e, 0x14, 0x00, 0xff] {
            assert_eq!(capability_rule(id), None, "{id:#x}");
        }
    }

    #[test]
    fn rules_print_and_do_not_overlap() {
        let mut ends = 0;
        for rule in FILTER {
            assert!(rule.to_string().starts_with(rule.name) && rule.to_string().ends_with(rule.reason));
            if let What::Register { offset, size } = rule.what {
                assert!(offset >= ends && offset + size <= 0x40, "{rule}");
                ends = offset + size;
            }
        }
    }
}
