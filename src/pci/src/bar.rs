//! What base address registers ask for and what they answer to.

use std::ops::Deref;

/// Base address registers of a type 0 header.
pub const BAR_COUNT: usize = 6;
/// The option ROM, where BARs are numbered.
pub const ROM_INDEX: u8 = 6;

/// What a BAR's addresses are, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports, 16 bits; one register.
    Io,
    /// Below 4 GiB; one register.
    Memory32,
    /// Anywhere; two registers, of which `index` names the lower.
    Memory64,
}

/// One BAR that a function implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRequest {
    /// Register number, 0 to 5, or [`ROM_INDEX`].
    pub index: u8,
    /// Bytes: a power of two, at least 16; at most 2 GiB for [`BarKind::Memory32`], 2^63 for [`BarKind::Memory64`]. For
    /// [`BarKind::Io`] 4 to 256 (PCI Local Bus Specification 3.0, 6.2.5.1).
    pub size: u64,
    /// Memory or ports, and the width of its addresses.
    pub kind: BarKind,
    /// Reads have no side effects.
    pub prefetchable: bool,
}

/// Where an address means something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Space {
    /// Guest-physical memory.
    #[default]
    Memory,
    /// I/O ports.
    Ports,
}

/// A range of guest-physical memory, or of ports, that a function answers to. `base` is a multiple of `size` and not 0, and
/// `base + size` does not overflow; nothing more is promised: where it lies was chosen by the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodedBar {
    /// Register number, 0 to 5, or [`ROM_INDEX`].
    pub index: u8,
    /// Memory or ports.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// All that a function answers to, in the order of the registers. Derefs to a slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodedBars {
    bars: [DecodedBar; BAR_COUNT + 1],
    count: usize,
}

impl Deref for DecodedBars {
    type Target = [DecodedBar];

    fn deref(&self) -> &[DecodedBar] {
        self.bars.get(..self.count).unwrap_or_default()
    }
}

impl FromIterator<DecodedBar> for DecodedBars {
    /// What comes after six and the ROM is left out: a function has no more.
    fn from_iter<I: IntoIterator<Item = DecodedBar>>(all: I) -> Self {
        let mut decoded = Self::default();
        for (slot, bar) in decoded.bars.iter_mut().zip(all) {
            *slot = bar;
            decoded.count += 1;
        }
        decoded
    }
}
