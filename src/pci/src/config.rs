//! A function's 4 KiB configuration space.

use std::{fmt, ops::Range};

use crate::{
    bar::{BAR_COUNT, BarKind, BarRequest, DecodedBar, DecodedBars, ROM_INDEX, Space},
    regs,
};

/// Bytes of a PCI Express function's configuration space.
pub const CONFIG_SPACE_BYTES: usize = 4096;
/// Capabilities of the old kind end here.
const CAPABILITIES_END: u16 = 0x100;

/// What a function says that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and interface in 24 bits, as Linux prints it: `0x02_00_00` is an Ethernet controller.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A capability to be added.
#[derive(Clone, Copy, Debug, Default)]
pub struct Capability<'a> {
    /// Capability ID.
    pub id: u8,
    /// Where it has to stand (a multiple of 4, at least 0x40), or `None` for the next free place.
    pub at: Option<u8>,
    /// Its bytes after ID and link.
    pub body: &'a [u8],
    /// Bits of `body` that the guest may write, byte for byte; what is missing is read-only.
    pub writable: &'a [u8],
    /// Bits of `body` that the guest clears by writing ones.
    pub clear: &'a [u8],
}

/// Why a configuration space can't be built as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The register doesn't exist, or another BAR has it.
    #[error("BAR {0} does not exist or is taken")]
    BarIndex(u8),
    /// The size is not one that the BAR's registers can say.
    #[error("BAR {index} cannot have {size:#x} bytes")]
    BarSize {
        /// Register number.
        index: u8,
        /// Bytes asked for.
        size: u64,
    },
    /// The function has no such BAR, or the base is not aligned to its size or does not fit its registers.
    #[error("BAR {index} cannot stand at {base:#x}")]
    BarBase {
        /// Register number.
        index: u8,
        /// The address asked for.
        base: u64,
    },
    /// The place is outside 0x40 to 0xff, unaligned, or taken.
    #[error("capability {id:#04x} of {size} bytes does not fit")]
    CapabilityPlace {
        /// Capability ID.
        id: u8,
        /// Bytes with ID and link.
        size: usize,
    },
    /// Not a window that a bridge can have.
    #[error("a bridge cannot have a window from {start:#x} to {end:#x}")]
    BridgeWindow {
        /// First address.
        start: u64,
        /// The address behind the last.
        end: u64,
    },
    /// MSI has a power of two of vectors.
    #[error("MSI cannot have {0} vectors")]
    Msi(u16),
    /// MSI-X vectors, table or pending bits don't fit each other or their BARs.
    #[error("MSI-X: {0}")]
    Msix(&'static str),
}

/// The configuration space of a function, endpoint or bridge: what each bit is, and what a guest's write does to it.
///
/// Two masks say per bit what a write does: replace it, clear it by a one, or (in neither mask) nothing. BARs are
/// such bits too, so the all-ones sizing protocol needs no state of its own.
#[derive(Clone)]
pub struct Config {
    bytes: Box<[u8; CONFIG_SPACE_BYTES]>,
    writable: Box<[u8; CONFIG_SPACE_BYTES]>,
    clear: Box<[u8; CONFIG_SPACE_BYTES]>,
    /// The ROM is the last.
    bars: [Option<BarRequest>; BAR_COUNT + 1],
    /// Extents of the capabilities, in the order of their links.
    capabilities: Vec<Range<u16>>,
}

impl Config {
    /// A function without BARs, capabilities and interrupt pin. Its command register is 0: it answers to nothing.
    pub fn new(identity: Identity) -> Self {
        let mut config = Self::blank();
        config.set(regs::SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        config.set(regs::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        config.common_header(identity);
        config
    }

    /// A bridge between PCI buses: a type 1 header, whose bus numbers and windows are 0 and the guest's to write. It
    /// has no window for I/O ports, and its prefetchable one is 64 bits wide. Subsystem ids are not where an endpoint
    /// has them, and are left out. Of its BARs only the first two exist.
    pub fn new_bridge(identity: Identity) -> Self {
        let mut config = Self::blank();
        config.common_header(identity);
        config.set(regs::HEADER_TYPE, &[regs::HEADER_TYPE_BRIDGE]);
        store(&mut config.writable, regs::PRIMARY_BUS, &[0xff; 3]);
        store(&mut config.clear, regs::SECONDARY_STATUS, &regs::STATUS_ERRORS.to_le_bytes());
        store(&mut config.writable, regs::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        // The lowest bits say that the upper halves below exist.
        config.set(regs::PREF_MEMORY_BASE, &[1, 0, 1, 0]);
        store(&mut config.writable, regs::PREF_MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        store(&mut config.writable, regs::PREF_BASE_UPPER32, &[0xff; 8]);
        let control =
            regs::BRIDGE_CONTROL_PARITY | regs::BRIDGE_CONTROL_SERR | regs::BRIDGE_CONTROL_BUS_RESET;
        store(&mut config.writable, regs::BRIDGE_CONTROL, &control.to_le_bytes());
        config
    }

    fn blank() -> Self {
        let zeroes = || Box::new([0; CONFIG_SPACE_BYTES]);
        Self {
            bytes: zeroes(),
            writable: zeroes(),
            clear: zeroes(),
            bars: [None; BAR_COUNT + 1],
            capabilities: Vec::new(),
        }
    }

    /// What both types of header have in common.
    fn common_header(&mut self, identity: Identity) {
        self.set(regs::VENDOR_ID, &identity.vendor.to_le_bytes());
        self.set(regs::DEVICE_ID, &identity.device.to_le_bytes());
        self.set(regs::REVISION_ID, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        let command = regs::COMMAND_MEMORY
            | regs::COMMAND_MASTER
            | regs::COMMAND_PARITY
            | regs::COMMAND_SERR
            | regs::COMMAND_INTX_DISABLE;
        store(&mut self.writable, regs::COMMAND, &command.to_le_bytes());
        store(&mut self.clear, regs::STATUS, &regs::STATUS_ERRORS.to_le_bytes());
        store(&mut self.writable, regs::CACHE_LINE_SIZE, &[0xff]);
        store(&mut self.writable, regs::INTERRUPT_LINE, &[0xff]);
    }

    /// As a reset of the bus leaves it: all that a guest can write is 0, so it answers to nothing and is no master.
    pub fn reset(&mut self) {
        let masks = self.writable.iter().zip(self.clear.iter());
        for (byte, (writable, clear)) in self.bytes.iter_mut().zip(masks) {
            *byte &= !(writable | clear);
        }
    }

    /// Sets interrupt pin (0 none, 1 INTA) and the line that firmware would have written.
    pub fn set_interrupt(&mut self, pin: u8, line: u8) {
        self.set(regs::INTERRUPT_LINE, &[line, pin]);
    }

    /// Adds a BAR at base 0, where it is not decoded.
    ///
    /// # Errors
    /// [`ConfigError::BarIndex`] or [`ConfigError::BarSize`]; nothing has changed then.
    pub fn add_bar(&mut self, bar: BarRequest) -> Result<(), ConfigError> {
        let BarRequest { index, size, kind, prefetchable } = bar;
        let sizes = match kind {
            BarKind::Io => 4..=256,
            BarKind::Memory32 => 16..=1 << 31,
            BarKind::Memory64 => 16..=1 << 63,
        };
        if !size.is_power_of_two() || !sizes.contains(&size) {
            return Err(ConfigError::BarSize { index, size });
        }
        let registers: u8 = if kind == BarKind::Memory64 { 2 } else { 1 };
        let free =
            (index..index.saturating_add(registers)).all(|i| usize::from(i) < BAR_COUNT && !self.bar_uses(i));
        let slot =
            self.bars.get_mut(usize::from(index)).filter(|_| free).ok_or(ConfigError::BarIndex(index))?;
        *slot = Some(bar);

        let width = if kind == BarKind::Io { u64::from(u16::MAX) } else { u64::MAX };
        let mask = (!(size - 1) & width).to_le_bytes();
        let flags = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => u32::from(prefetchable) << 3,
            BarKind::Memory64 => 1 << 2 | u32::from(prefetchable) << 3,
        };
        let register = bar_register(index);
        store(&mut self.writable, register, mask.get(..4 * usize::from(registers)).unwrap_or_default());
        self.set(register, &flags.to_le_bytes());
        if kind == BarKind::Io {
            let command = self.writable.get(usize::from(regs::COMMAND)).copied().unwrap_or_default();
            store(&mut self.writable, regs::COMMAND, &[command | regs::COMMAND_IO as u8]);
        }
        Ok(())
    }

    /// Adds an option ROM at base 0, not decoded.
    ///
    /// # Errors
    /// [`ConfigError::BarIndex`] when there is one, [`ConfigError::BarSize`]; nothing has changed then.
    pub fn add_rom(&mut self, size: u64) -> Result<(), ConfigError> {
        let index = ROM_INDEX;
        // The register has no bits for smaller ones, and real ones end at 16 MiB.
        if !size.is_power_of_two() || !(1 << 11..=1 << 24).contains(&size) {
            return Err(ConfigError::BarSize { index, size });
        }
        let slot = self.bars.get_mut(usize::from(index)).filter(|slot| slot.is_none());
        *slot.ok_or(ConfigError::BarIndex(index))? =
            Some(BarRequest { index, size, kind: BarKind::Memory32, prefetchable: true });
        let mask = !(size as u32 - 1) | regs::EXPANSION_ROM_ENABLE;
        store(&mut self.writable, regs::EXPANSION_ROM, &mask.to_le_bytes());
        Ok(())
    }

    /// Whether register `index` belongs to a BAR already.
    fn bar_uses(&self, index: u8) -> bool {
        self.bars.iter().flatten().any(|bar| {
            bar.index == index || bar.kind == BarKind::Memory64 && bar.index.saturating_add(1) == index
        })
    }

    /// Links a capability at the end of the list and returns where it stands.
    ///
    /// # Errors
    /// [`ConfigError::CapabilityPlace`]; nothing has changed then.
    pub fn add_capability(&mut self, capability: Capability<'_>) -> Result<u8, ConfigError> {
        let Capability { id, at, body, writable, clear } = capability;
        let size = body.len().saturating_add(2);
        let fault = ConfigError::CapabilityPlace { id, size };
        let free = self.capabilities.iter().map(|taken| taken.end).max();
        let start = match at {
            Some(start) => u16::from(start),
            None => free.unwrap_or(u16::from(regs::CAPABILITIES_START)).next_multiple_of(4),
        };
        let end = u16::try_from(size).ok().and_then(|size| start.checked_add(size)).ok_or(fault)?;
        let taken = self.capabilities.iter().any(|other| start < other.end && other.start < end);
        let offset = u8::try_from(start).map_err(|_| fault)?;
        if offset < regs::CAPABILITIES_START || offset % 4 != 0 || end > CAPABILITIES_END || taken {
            return Err(fault);
        }

        let link = self.capabilities.last().map_or(regs::CAPABILITY_LIST, |last| last.start + 1);
        self.set(link, &[offset]);
        self.set(start, &[id, 0]);
        self.set(start + 2, body);
        store(&mut self.writable, start + 2, writable.get(..body.len()).unwrap_or(writable));
        store(&mut self.clear, start + 2, clear.get(..body.len()).unwrap_or(clear));
        let status = self.u16_at(regs::STATUS) | regs::STATUS_CAP_LIST;
        self.set(regs::STATUS, &status.to_le_bytes());
        self.capabilities.push(start..end);
        Ok(offset)
    }

    /// All of it.
    pub fn image(&self) -> &[u8; CONFIG_SPACE_BYTES] {
        &self.bytes
    }

    /// A guest's read: 1, 2 or 4 bytes within one aligned dword; anything else reads as all ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        match within_dword(offset, data.len()).and_then(|span| self.bytes.get(span)) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// A guest's write: 1, 2 or 4 bytes within one aligned dword; anything else goes nowhere.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let Some(span) = within_dword(offset, data.len()) else { return };
        for (at, new) in span.zip(data) {
            let masks = (self.bytes.get_mut(at), self.writable.get(at), self.clear.get(at));
            if let (Some(byte), Some(writable), Some(clear)) = masks {
                *byte = (*byte & !writable | new & writable) & !(new & clear);
            }
        }
    }

    /// The device's own side: stores bytes whatever the masks say. What would lie past the end is left out.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        store(&mut self.bytes, offset, data);
    }

    /// The 16 bits at `offset`, all ones past the end.
    pub fn u16_at(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.load(offset))
    }

    /// The 32 bits at `offset`, all ones past the end.
    pub fn u32_at(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.load(offset))
    }

    fn load<const N: usize>(&self, offset: u16) -> [u8; N] {
        let start = usize::from(offset);
        self.bytes.get(start..start + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0xff; N])
    }

    /// The BARs that were added.
    pub fn bars(&self) -> impl Iterator<Item = BarRequest> + '_ {
        self.bars.iter().flatten().copied()
    }

    /// Writes a BAR as firmware would.
    ///
    /// # Errors
    /// [`ConfigError::BarBase`]; nothing has changed then.
    pub fn place_bar(&mut self, index: u8, base: u64) -> Result<(), ConfigError> {
        let fault = ConfigError::BarBase { index, base };
        let bar = self.bars.get(usize::from(index)).copied().flatten().ok_or(fault)?;
        if !base.is_multiple_of(bar.size)
            || base.checked_add(bar.size - 1).is_none_or(|last| last > last_address(bar.kind))
        {
            return Err(fault);
        }
        let flags = self.u32_at(bar_register(index)) & !address_bits(bar.kind);
        let value = (base | u64::from(flags)).to_le_bytes();
        let width = if bar.kind == BarKind::Memory64 { 8 } else { 4 };
        self.set(bar_register(index), value.get(..width).unwrap_or_default());
        Ok(())
    }

    /// What the function answers to: with the decoding of memory or ports on, each BAR of that kind, and the ROM where it is
    /// enabled, whose base is neither 0 nor what the sizing protocol leaves there (the last addresses that its registers can
    /// say).
    pub fn decoded(&self) -> DecodedBars {
        self.bars().filter_map(|bar| self.decode(bar)).collect()
    }

    /// Whether the function has I/O BARs.
    pub fn has_ports(&self) -> bool {
        self.bars().any(|bar| bar.kind == BarKind::Io)
    }

    fn decode(&self, bar: BarRequest) -> Option<DecodedBar> {
        let (space, decoding) = match bar.kind {
            BarKind::Io => (Space::Ports, regs::COMMAND_IO),
            BarKind::Memory32 | BarKind::Memory64 => (Space::Memory, regs::COMMAND_MEMORY),
        };
        if self.u16_at(regs::COMMAND) & decoding == 0 {
            return None;
        }
        let register = bar_register(bar.index);
        let value = self.u32_at(register);
        if bar.index == ROM_INDEX && value & regs::EXPANSION_ROM_ENABLE == 0 {
            return None;
        }
        let low = u64::from(value & address_bits(bar.kind));
        let high = match bar.kind {
            BarKind::Io | BarKind::Memory32 => 0,
            BarKind::Memory64 => u64::from(self.u32_at(register + 4)) << 32,
        };
        let base = high | low;
        let end = base.checked_add(bar.size)?;
        (base != 0 && end <= last_address(bar.kind)).then_some(DecodedBar {
            index: bar.index,
            space,
            base,
            size: bar.size,
        })
    }

    /// Whether the guest lets the function start transactions.
    pub fn bus_master(&self) -> bool {
        self.u16_at(regs::COMMAND) & regs::COMMAND_MASTER != 0
    }

    /// Whether the guest forbids INTx.
    pub fn intx_disabled(&self) -> bool {
        self.u16_at(regs::COMMAND) & regs::COMMAND_INTX_DISABLE != 0
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field(
                "id",
                &format_args!("{:04x}:{:04x}", self.u16_at(regs::VENDOR_ID), self.u16_at(regs::DEVICE_ID)),
            )
            .field("command", &format_args!("{:#06x}", self.u16_at(regs::COMMAND)))
            .field("bars", &self.bars)
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

/// The register of BAR `index`, which is 0 to 5 in every call, or of the ROM.
fn bar_register(index: u8) -> u16 {
    if index == ROM_INDEX {
        return regs::EXPANSION_ROM;
    }
    regs::BASE_ADDRESS_0 + 4 * u16::from(index)
}

/// Which bits of a BAR's lower register are of its address; the others say what it is.
fn address_bits(kind: BarKind) -> u32 {
    match kind {
        BarKind::Io => 0xfffc,
        BarKind::Memory32 | BarKind::Memory64 => !0xf,
    }
}

fn last_address(kind: BarKind) -> u64 {
    match kind {
        BarKind::Io => u64::from(u16::MAX),
        BarKind::Memory32 => u64::from(u32::MAX),
        BarKind::Memory64 => u64::MAX,
    }
}

fn within_dword(offset: u16, len: usize) -> Option<Range<usize>> {
    let start = usize::from(offset);
    let fits = matches!(len, 1 | 2 | 4) && start % 4 + len <= 4 && start < CONFIG_SPACE_BYTES;
    fits.then(|| start..start + len)
}

fn store(bytes: &mut [u8; CONFIG_SPACE_BYTES], offset: u16, data: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(usize::from(offset)).zip(data) {
        *byte = *new;
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
