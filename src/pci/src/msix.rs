//! MSI-X: capability, vector table and pending bits (PCI Express Base Specification 5.0, sections 6.1.4 and 7.7.2).

use std::ops::Range;

use crate::{BarRequest, Capability, Config, ConfigError, regs};

/// Vectors that one function can have at most.
pub const MSIX_VECTORS_MAX: u16 = 2048;

const ENTRY_BYTES: u64 = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// What the device writes, and where, to interrupt. Both are the guest's words, unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// Who delivers the interrupts of a function: routes and irqfds in the VMM.
pub trait VectorSink {
    /// From now on `vector` delivers this message, or (`None`) is masked or off. Called on changes only; every vector
    /// starts with `None`. After `None`, events have to be kept ([`VectorSink::is_pending`]) and delivered by the next
    /// `Some`.
    fn set(&mut self, vector: u16, message: Option<MsiMessage>);
    /// Whether an event came for `vector` while it was masked.
    fn is_pending(&self, vector: u16) -> bool;
}

impl<T: VectorSink + ?Sized> VectorSink for Box<T> {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        (**self).set(vector, message);
    }
    fn is_pending(&self, vector: u16) -> bool {
        (**self).is_pending(vector)
    }
}

/// A place within a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarOffset {
    /// Register number, 0 to 5.
    pub bar: u8,
    /// Bytes from the BAR's base; a multiple of 8.
    pub offset: u32,
}

/// Where a function has its MSI-X structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Vectors, 1 to [`MSIX_VECTORS_MAX`].
    pub vectors: u16,
    /// The table, 16 bytes a vector.
    pub table: BarOffset,
    /// The pending bits, 8 bytes for each 64 vectors begun.
    pub pba: BarOffset,
    /// Where the capability has to stand, or `None` for the next free place.
    pub capability_at: Option<u8>,
}

impl MsixLayout {
    /// The bytes of its BAR that the table covers.
    pub fn table_range(&self) -> Range<u64> {
        let start = u64::from(self.table.offset);
        start..start + u64::from(self.vectors) * ENTRY_BYTES
    }

    /// The bytes of its BAR that the pending bits cover.
    pub fn pba_range(&self) -> Range<u64> {
        let start = u64::from(self.pba.offset);
        start..start + u64::from(self.vectors.div_ceil(64)) * 8
    }

    fn check(&self, bars: &[BarRequest]) -> Result<(), &'static str> {
        let fits = |place: BarOffset, range: &Range<u64>| {
            bars.iter().any(|bar| bar.index == place.bar && range.end <= bar.size)
        };
        let (table, pba) = (self.table_range(), self.pba_range());
        if !(1..=MSIX_VECTORS_MAX).contains(&self.vectors) {
            return Err("there must be 1 to 2048 vectors");
        }
        if !self.table.offset.is_multiple_of(8) || !self.pba.offset.is_multiple_of(8) {
            return Err("table and pending bits must stand at multiples of 8");
        }
        if !fits(self.table, &table) || !fits(self.pba, &pba) {
            return Err("table or pending bits lie outside their BARs");
        }
        if self.table.bar == self.pba.bar && table.start < pba.end && pba.start < table.end {
            return Err("table and pending bits overlap");
        }
        Ok(())
    }
}

/// Whether a configuration write turned MSI-X on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsixTransition {
    /// It is on now.
    Enabled,
    /// It is off now.
    Disabled,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    message: MsiMessage,
    control: u32,
    /// What the sink was told last.
    told: Option<MsiMessage>,
}

/// The MSI-X state of one function.
#[derive(Debug)]
pub struct Msix {
    layout: MsixLayout,
    capability: u8,
    entries: Vec<Entry>,
    control: u16,
}

impl Msix {
    /// Adds the capability to `config`, whose BARs must have been added before. All vectors start masked and off.
    ///
    /// # Errors
    /// [`ConfigError::Msix`] when the layout contradicts itself or the BARs, or [`ConfigError::CapabilityPlace`].
    pub fn add(config: &mut Config, layout: MsixLayout) -> Result<Self, ConfigError> {
        let bars: Vec<BarRequest> = config.bars().collect();
        layout.check(&bars).map_err(ConfigError::Msix)?;
        let place = |place: BarOffset| (place.offset | u32::from(place.bar)).to_le_bytes();
        let size = (layout.vectors - 1).to_le_bytes();
        let body = [&size[..], &place(layout.table), &place(layout.pba)].concat();
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        let capability = config.add_capability(Capability {
            id: regs::CAP_ID_MSIX,
            at: layout.capability_at,
            body: &body,
            writable: &writable,
            clear: &[],
        })?;
        let masked = Entry { message: MsiMessage::default(), control: VECTOR_MASKED, told: None };
        Ok(Self { layout, capability, entries: vec![masked; layout.vectors.into()], control: 0 })
    }

    /// The layout it was made with.
    pub fn layout(&self) -> &MsixLayout {
        &self.layout
    }

    /// Whether the guest has turned MSI-X on.
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// To be called after each guest write to `config`: takes over message control, tells the sink what changed, and
    /// returns whether MSI-X as a whole went on or off.
    pub fn config_written(&mut self, config: &Config, sink: &mut dyn VectorSink) -> Option<MsixTransition> {
        let control =
            config.u16_at(u16::from(self.capability) + 2) & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        let changed = control ^ self.control;
        if changed == 0 {
            return None;
        }
        self.control = control;
        for vector in 0..self.layout.vectors {
            self.tell(vector, sink);
        }
        match (changed & CONTROL_ENABLE != 0, self.enabled()) {
            (false, _) => None,
            (true, true) => Some(MsixTransition::Enabled),
            (true, false) => Some(MsixTransition::Disabled),
        }
    }

    /// To be called after [`Config::reset`]: MSI-X is off, every vector masked and without a message.
    pub fn reset(&mut self, config: &Config, sink: &mut dyn VectorSink) -> Option<MsixTransition> {
        for entry in &mut self.entries {
            (entry.message, entry.control) = (MsiMessage::default(), VECTOR_MASKED);
        }
        self.config_written(config, sink)
    }

    /// Answers a read of BAR `bar` when it begins in the table or the pending bits; returns whether it did. Aligned
    /// reads of 4 and 8 bytes are understood; others read as all ones.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8], sink: &dyn VectorSink) -> bool {
        let Some((part, start)) = self.part(bar, offset) else { return false };
        if !is_aligned(start, data.len()) {
            data.fill(0xff);
            return true;
        }
        for (dword, bytes) in (start / 4..).zip(data.chunks_exact_mut(4)) {
            let value = match part {
                Part::Table => self.table_dword(dword),
                Part::Pba => self.pba_dword(dword, sink),
            };
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        true
    }

    /// Takes a write to BAR `bar` when it begins in the table or the pending bits; returns whether it did. Aligned
    /// writes of 4 and 8 bytes to the table are understood; others, and those to the pending bits, go nowhere.
    pub fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8], sink: &mut dyn VectorSink) -> bool {
        let Some((part, start)) = self.part(bar, offset) else { return false };
        if part == Part::Pba || !is_aligned(start, data.len()) {
            return true;
        }
        for (dword, bytes) in (start / 4..).zip(data.chunks_exact(4)) {
            if let Ok(bytes) = bytes.try_into() {
                self.set_table_dword(dword, u32::from_le_bytes(bytes));
            }
        }
        if let Ok(vector) = u16::try_from(start / ENTRY_BYTES) {
            self.tell(vector, sink);
        }
        true
    }

    /// Which structure holds `offset`, and how far into it.
    fn part(&self, bar: u8, offset: u64) -> Option<(Part, u64)> {
        let (table, pba) = (self.layout.table_range(), self.layout.pba_range());
        if bar == self.layout.table.bar && table.contains(&offset) {
            return Some((Part::Table, offset - table.start));
        }
        (bar == self.layout.pba.bar && pba.contains(&offset)).then(|| (Part::Pba, offset - pba.start))
    }

    fn table_dword(&self, dword: u64) -> u32 {
        let Some(entry) = usize::try_from(dword / 4).ok().and_then(|i| self.entries.get(i)) else {
            return u32::MAX;
        };
        match dword % 4 {
            0 => entry.message.address as u32,
            1 => (entry.message.address >> 32) as u32,
            2 => entry.message.data,
            _ => entry.control,
        }
    }

    fn set_table_dword(&mut self, dword: u64, value: u32) {
        let Some(entry) = usize::try_from(dword / 4).ok().and_then(|i| self.entries.get_mut(i)) else {
            return;
        };
        let address = entry.message.address;
        match dword % 4 {
            // A message is a dword; the two lowest bits of its address are 0.
            0 => entry.message.address = address & !0xffff_ffff | u64::from(value & !3),
            1 => entry.message.address = address & 0xffff_ffff | u64::from(value) << 32,
            2 => entry.message.data = value,
            _ => entry.control = value & VECTOR_MASKED,
        }
    }

    fn pba_dword(&self, dword: u64, sink: &dyn VectorSink) -> u32 {
        let mut value = 0;
        for bit in 0..32u64 {
            let pending = u16::try_from(dword * 32 + bit).is_ok_and(|vector| {
                // What is delivered at once is never pending.
                self.entries.get(usize::from(vector)).is_some_and(|entry| entry.told.is_none())
                    && sink.is_pending(vector)
            });
            value |= u32::from(pending) << bit;
        }
        value
    }

    /// Tells the sink when what `vector` delivers is no longer what it was told last.
    fn tell(&mut self, vector: u16, sink: &mut dyn VectorSink) {
        let open = self.control == CONTROL_ENABLE;
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else { return };
        let now = (open && entry.control & VECTOR_MASKED == 0).then_some(entry.message);
        if entry.told != now {
            entry.told = now;
            sink.set(vector, now);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Table,
    Pba,
}

fn is_aligned(start: u64, len: usize) -> bool {
    match len {
        4 => start.is_multiple_of(4),
        8 => start.is_multiple_of(8),
        _ => false,
    }
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
