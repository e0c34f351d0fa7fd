//! The guest's physical address space.
//!
//! ```text
//! 0                 639 KiB RAM, with the boot structures below
//! 0x0009_FC00       the pointer to the MP table (reserved)
//! 0x000E_0000       ACPI tables, the MP table (reserved)
//! 0x000F_0000       SMBIOS tables; in the last two pages the generation's identifier and the reset vector (reserved)
//! 0x0010_0000       RAM, up to 3 GiB
//! 0xC000_0000       window for 32-bit BARs, 512 MiB
//! 0xE000_0000       ECAM, 1 MiB a bus: the root bus and up to 8 slots for hot-plug
//! 0xFEC0_0000       IOAPIC
//! 0xFEE0_0000       local APICs, and where MSIs go: never RAM, so no DMA map can touch it
//! 0xFFFB_C000       KVM's own pages (Intel real mode)
//! 0x1_0000_0000     RAM beyond 3 GiB
//! then              window for 64-bit BARs
//! ```

/// The kernel reads how it was started here (`struct hvm_start_info`, Xen's `arch-x86/hvm/start_info.h`).
pub(crate) const START_INFO: u64 = 0x6000;
/// The memory map that the start info names.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// The module list (the initrd) that the start info names.
pub(crate) const MODULES: u64 = 0x8000;
/// The boot parameters of Linux's own protocol (`struct boot_params`), one page.
pub(crate) const BOOT_PARAMETERS: u64 = 0x9000;
/// A table of segments for kernels that load their selectors before they have one of their own.
pub(crate) const SEGMENTS: u64 = 0x5000;
/// The kernel's command line, at most 64 KiB.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// End of the RAM below the legacy hole. In the KiB that is left until 640 KiB, guests look for the pointer to the MP table.
pub(crate) const LOW_END: u64 = 0x9_FC00;
/// ACPI tables, which end where those of SMBIOS begin.
pub(crate) const ACPI: u64 = 0xE_0000;
/// The page of the generation's identifier; SMBIOS tables end here at the latest.
pub(crate) const GENERATION: u64 = 0xF_E000;
/// Where RAM goes on.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// 32-bit BARs.
pub(crate) const WINDOW32: Range = Range { start: 0xC000_0000, size: 0x2000_0000 };
/// Slots that cards can be put into while the guest runs, each on a bus of its own.
pub(crate) const HOTPLUG_SLOTS_MOST: u8 = 8;
/// ECAM: 1 MiB for the root bus and as much for each slot.
pub(crate) const ECAM: Range = Range { start: 0xE000_0000, size: (1 + HOTPLUG_SLOTS_MOST as u64) << 20 };
/// The IOAPIC's registers.
pub(crate) const IOAPIC: Range = Range { start: 0xFEC0_0000, size: 0x1000 };
/// KVM's identity map page on Intel.
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// KVM's three task-state pages on Intel.
pub(crate) const KVM_TSS: usize = 0xFFFB_D000;
/// I/O BARs, among the ports: above all that the platform has.
pub(crate) const PORTS: Range = Range { start: 0xC000, size: 0x4000 };
/// The first address past 32 bits.
pub(crate) const FOUR_GIB: u64 = 1 << 32;
/// Alignment of the 64-bit window, so that large BARs find a place.
const WINDOW64_ALIGN: u64 = 1 << 30;
/// Size of the 64-bit window where the address width allows it.
const WINDOW64_MOST: u64 = 1 << 38;
/// AMD keeps 12 GiB below 1 TiB for HyperTransport; no guest address goes there.
const HYPERTRANSPORT: u64 = 0xFD_0000_0000;

/// A piece of the guest's physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First address.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) size: u64,
}

impl Range {
    /// The first address past it.
    pub(crate) const fn end(self) -> u64 {
        self.start + self.size
    }
    /// Whether `size` bytes at `start` lie in it wholly.
    pub(crate) fn holds(self, start: u64, size: u64) -> bool {
        start >= self.start && start.checked_add(size).is_some_and(|end| end <= self.end())
    }
    /// Where in it the `length` bytes at `address` lie, if wholly.
    pub(crate) fn offset(self, address: u64, length: usize) -> Option<u64> {
        self.holds(address, length as u64).then(|| address - self.start)
    }
}

/// Where RAM of `memory_bytes` lies: one piece, or two around the hole below 4 GiB.
pub(crate) fn ram(memory_bytes: u64) -> Vec<Range> {
    let pieces = casemate_wire::ram(memory_bytes).into_iter();
    pieces.map(|piece| Range { start: piece.start, size: piece.end - piece.start }).collect()
}

/// The window for 64-bit BARs of a guest with `memory_bytes`, within an address width of `bits`, and below `dma_end`: what its
/// devices can reach. `None` when RAM leaves no room.
pub(crate) fn window64(memory_bytes: u64, bits: u32, dma_end: Option<u64>) -> Option<Range> {
    let ram_end = ram(memory_bytes).last()?.end().max(FOUR_GIB);
    let start = ram_end.checked_next_multiple_of(WINDOW64_ALIGN)?;
    let end = 1u64.checked_shl(bits)?.min(HYPERTRANSPORT).min(dma_end.unwrap_or(u64::MAX));
    let size = end.checked_sub(start)?.min(WINDOW64_MOST);
    (size > 0).then_some(Range { start, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_guests_have_one_piece() {
        assert_eq!(ram(64 << 20), [Range { start: 0, size: 64 << 20 }]);
        assert_eq!(ram(3 << 30).len(), 1);
    }

    #[test]
    fn large_guests_go_around_the_hole() {
        assert_eq!(ram(5 << 30)[1], Range { start: FOUR_GIB, size: 2 << 30 });
    }

    #[test]
    fn the_window_is_above_ram_and_within_the_width() {
        for memory in [64 << 20, 3 << 30, 5 << 30, 100 << 30] {
            let window = window64(memory, 40, None).unwrap();
            assert!(ram(memory).iter().all(|piece| piece.end() <= window.start));
            assert!(window.end() <= 1 << 40 && window.start.is_multiple_of(1 << 30));
        }
        assert_eq!(window64(1 << 40, 40, None), None);
        assert_eq!(window64(64 << 20, 32, None), None);
        assert_eq!(window64(64 << 20, 48, Some(1 << 39)).unwrap().end(), FOUR_GIB + WINDOW64_MOST);
        assert_eq!(window64(64 << 20, 48, Some(1 << 33)).unwrap().end(), 1 << 33);
        assert_eq!(window64(64 << 20, 48, Some(FOUR_GIB)), None);
    }

    #[test]
    fn pieces_do_not_overlap() {
        let order = [WINDOW32, ECAM, IOAPIC];
        assert!(order.windows(2).all(|pair| pair[0].end() <= pair[1].start));
        const { assert!(casemate_wire::RAM_LOW_MOST <= WINDOW32.start) };
    }
}
