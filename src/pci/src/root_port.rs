//! A PCI Express root port with a hot-plug slot (PCI Express Base Specification 5.0, 6.7 and 7.5.3).

use std::ops::{Range, RangeInclusive};

use crate::{
    BarKind, BarOffset, BarRequest, CONFIG_SPACE_BYTES, Capability, Config, ConfigError, DecodedBars,
    Function, Identity, Msix, MsixLayout, VectorSink, regs,
};

/// A bridge's windows begin and end at multiples of this.
pub const BRIDGE_WINDOW_BYTES: u64 = 1 << 20;

// BAR 0 holds the MSI-X table and its pending bits, for the one vector of hot-plug and power management events.
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x1000;
const MSIX_PBA: u32 = 0x800;

// The PCI Express capability, version 2: offsets from its start.
const EXPRESS_BYTES: usize = 0x3c;
const DEVICE_CAPABILITIES: usize = 0x04;
const DEVICE_CONTROL: usize = 0x08;
const DEVICE_STATUS: usize = 0x0a;
const LINK_CAPABILITIES: usize = 0x0c;
const LINK_CONTROL: usize = 0x10;
const LINK_STATUS: usize = 0x12;
const SLOT_CAPABILITIES: usize = 0x14;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;
const ROOT_CONTROL: usize = 0x1c;
const ROOT_STATUS: usize = 0x20;
const LINK_CAPABILITIES_2: usize = 0x2c;
const LINK_CONTROL_2: usize = 0x30;

/// Version 2, root port, slot implemented, interrupt message 0.
const EXPRESS_FLAGS: u16 = 2 | 4 << 4 | 1 << 8;
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// 2.5 GT/s and one lane: what is behind has no link of its own, and drivers only look whether there is one.
const LINK: u16 = 1 | 1 << 4;
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
const LINK_ACTIVE: u16 = 1 << 13;
/// What the guest may set of the link: ASPM, read completion boundary, common clock, extended synch. Not to disable it.
const LINK_CONTROL_WRITABLE: u16 = 0x00cb;

// Slot capabilities: button and indicator for an orderly goodbye, none of it takes time, and a card may go by surprise.
const ATTENTION_BUTTON: u32 = 1 << 0;
const POWER_INDICATOR: u32 = 1 << 4;
const SURPRISE: u32 = 1 << 5;
const HOT_PLUG: u32 = 1 << 6;
const NO_COMMAND_COMPLETED: u32 = 1 << 18;
const SLOT_NUMBER_SHIFT: u32 = 19;
/// Physical slot numbers have 13 bits.
const SLOT_NUMBER_MAX: u16 = (1 << 13) - 1;

// Slot status, and the same bits of slot control that let an event interrupt.
const BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const CARD_PRESENT: u16 = 1 << 6;
const LINK_CHANGED: u16 = 1 << 8;
/// In slot control, the link's enable stands elsewhere than its status.
const LINK_CHANGED_ENABLE: u16 = 1 << 12;
const INTERRUPT_ENABLE: u16 = 1 << 5;
const INDICATOR_SHIFT: u16 = 8;
const INDICATOR_BLINKING: u16 = 2;
const INDICATOR_OFF: u16 = 3;
const EVENTS: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | LINK_CHANGED;
const SLOT_CONTROL_WRITABLE: u16 =
    BUTTON_PRESSED | PRESENCE_CHANGED | INTERRUPT_ENABLE | 3 << INDICATOR_SHIFT | LINK_CHANGED_ENABLE;

/// What a [`RootPort`] lets through to the bus behind it, as the guest has set it. Whether it makes sense beside other
/// ports and the root's windows is the root's to see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// Buses behind the port; the first of them is the one that its slot is on.
    pub buses: Option<RangeInclusive<u8>>,
    /// Guest-physical addresses: memory below 4 GiB, and prefetchable memory. None overflows or is reversed.
    pub windows: [Option<RangeInclusive<u64>>; 2],
    /// The bus behind is held in reset; nothing goes through.
    pub reset: bool,
}

/// A root port whose slot a card can be put into and taken out of while the guest runs.
///
/// Linux's pciehp brings a card up as soon as the link is active. To take one out in order, the attention button is
/// pressed: the guest lets its driver go, and then turns the power indicator off ([`RootPort::let_go`]). There is no
/// power controller: a card in the slot has power.
pub struct RootPort {
    config: Config,
    msix: Msix,
    vectors: Box<dyn VectorSink + Send>,
    interrupt: Box<dyn FnMut() + Send>,
    express: u16,
    /// An event that may interrupt is there and has interrupted.
    told: bool,
}

impl std::fmt::Debug for RootPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RootPort").field("config", &self.config).finish_non_exhaustive()
    }
}

impl RootPort {
    /// A port with an empty slot of physical number `slot`, 1 to 8191. `vectors` delivers its one vector, and
    /// `interrupt` triggers it.
    ///
    /// # Errors
    /// [`ConfigError`] when there is no such slot number.
    pub fn new(
        slot: u16,
        vectors: Box<dyn VectorSink + Send>,
        interrupt: Box<dyn FnMut() + Send>,
    ) -> Result<Self, ConfigError> {
        if !(1..=SLOT_NUMBER_MAX).contains(&slot) {
            return Err(ConfigError::CapabilityPlace { id: regs::CAP_ID_EXP, size: EXPRESS_BYTES });
        }
        // The ids of QEMU's generic root port, for which no guest has a quirk.
        let identity = Identity { vendor: 0x1b36, device: 0x000c, class: 0x06_04_00, ..Identity::default() };
        let mut config = Config::new_bridge(identity);
        config.add_bar(BarRequest {
            index: BAR,
            size: BAR_BYTES,
            kind: BarKind::Memory32,
            prefetchable: false,
        })?;
        let express = u16::from(add_express(&mut config, slot)?);
        let place = |offset| BarOffset { bar: BAR, offset };
        let layout = MsixLayout { vectors: 1, table: place(0), pba: place(MSIX_PBA), capability_at: None };
        let msix = Msix::add(&mut config, layout)?;
        let mut port = Self { config, msix, vectors, interrupt, express, told: false };
        port.set_indicator_off();
        Ok(port)
    }

    /// Writes bus numbers and windows as firmware would: the port sits on bus 0 and has `bus` behind it.
    ///
    /// # Errors
    /// [`ConfigError::BridgeWindow`] when a window is empty, begins or ends elsewhere than at a multiple of
    /// [`BRIDGE_WINDOW_BYTES`], or (the first) does not lie below 4 GiB; nothing has changed then.
    pub fn place_windows(&mut self, bus: u8, windows: [Range<u64>; 2]) -> Result<(), ConfigError> {
        let [memory, prefetchable] = &windows;
        for window in &windows {
            let aligned =
                [window.start, window.end].iter().all(|end| end.is_multiple_of(BRIDGE_WINDOW_BYTES));
            if !aligned || window.is_empty() || (window == memory && memory.end > 1 << 32) {
                return Err(ConfigError::BridgeWindow { start: window.start, end: window.end });
            }
        }
        self.config.set(regs::PRIMARY_BUS, &[0, bus, bus]);
        let low = |address: u64| ((address >> 16) as u16 & 0xfff0).to_le_bytes();
        let high = |address: u64| ((address >> 32) as u32).to_le_bytes();
        self.config.set(regs::MEMORY_BASE, &low(memory.start));
        self.config.set(regs::MEMORY_LIMIT, &low(memory.end - 1));
        let wide = |address: u64| (u16::from_le_bytes(low(address)) | 1).to_le_bytes();
        self.config.set(regs::PREF_MEMORY_BASE, &wide(prefetchable.start));
        self.config.set(regs::PREF_MEMORY_LIMIT, &wide(prefetchable.end - 1));
        self.config.set(regs::PREF_BASE_UPPER32, &high(prefetchable.start));
        self.config.set(regs::PREF_LIMIT_UPPER32, &high(prefetchable.end - 1));
        Ok(())
    }

    /// What goes through to the bus behind it right now.
    pub fn forwarding(&self) -> Forwarding {
        if self.config.u16_at(regs::BRIDGE_CONTROL) & regs::BRIDGE_CONTROL_BUS_RESET != 0 {
            return Forwarding { reset: true, ..Forwarding::default() };
        }
        let [secondary, subordinate] = self.config.u16_at(regs::SECONDARY_BUS).to_le_bytes();
        let buses = (secondary != 0 && secondary <= subordinate).then_some(secondary..=subordinate);
        let memory_on = self.config.u16_at(regs::COMMAND) & regs::COMMAND_MEMORY != 0;
        let window = |base: u16, limit: u16, upper: Option<[u16; 2]>| {
            let address = |register: u16, upper: Option<u16>| {
                let high = upper.map_or(0, |upper| self.config.u32_at(upper));
                u64::from(high) << 32 | u64::from(self.config.u16_at(register) & 0xfff0) << 16
            };
            let start = address(base, upper.map(|[base, _]| base));
            let last = address(limit, upper.map(|[_, limit]| limit)) | (BRIDGE_WINDOW_BYTES - 1);
            (memory_on && start <= last).then_some(start..=last)
        };
        let memory = window(regs::MEMORY_BASE, regs::MEMORY_LIMIT, None);
        let upper = Some([regs::PREF_BASE_UPPER32, regs::PREF_LIMIT_UPPER32]);
        let prefetchable = window(regs::PREF_MEMORY_BASE, regs::PREF_MEMORY_LIMIT, upper);
        Forwarding { buses, windows: [memory, prefetchable], reset: false }
    }

    /// A card is in the slot from now on, or none is any more. [`RootPort::tell`] tells the guest.
    pub fn set_card(&mut self, present: bool) {
        let status = self.slot_status();
        if (status & CARD_PRESENT != 0) == present {
            return;
        }
        let (card, link) = if present { (CARD_PRESENT, LINK | LINK_ACTIVE) } else { (0, LINK) };
        self.set_express(LINK_STATUS, link);
        self.set_express(SLOT_STATUS, status & !CARD_PRESENT | card | PRESENCE_CHANGED | LINK_CHANGED);
        if !present {
            // Where the guest had no time to do it; else the next card would be let go at once.
            self.set_indicator_off();
        }
    }

    /// Whether a card is in the slot.
    pub fn has_card(&self) -> bool {
        self.slot_status() & CARD_PRESENT != 0
    }

    /// Presses the attention button: asks the guest to let the card go, or, when it is about to, to keep it. [`RootPort::tell`]
    /// tells the guest.
    pub fn press_button(&mut self) {
        self.set_express(SLOT_STATUS, self.slot_status() | BUTTON_PRESSED);
    }

    /// Whether the guest says by the power indicator that the card may be taken out. It says so too of a card that it has
    /// not yet brought up.
    pub fn let_go(&self) -> bool {
        self.express_at(SLOT_CONTROL) >> INDICATOR_SHIFT & 3 == INDICATOR_OFF
    }

    /// Whether the power indicator blinks: the guest is about to bring the card up, or to let it go.
    pub fn is_undecided(&self) -> bool {
        self.express_at(SLOT_CONTROL) >> INDICATOR_SHIFT & 3 == INDICATOR_BLINKING
    }

    fn slot_status(&self) -> u16 {
        self.express_at(SLOT_STATUS)
    }

    fn set_indicator_off(&mut self) {
        let control = self.express_at(SLOT_CONTROL) | INDICATOR_OFF << INDICATOR_SHIFT;
        self.set_express(SLOT_CONTROL, control);
    }

    fn express_at(&self, register: usize) -> u16 {
        self.config.u16_at(self.express + register as u16)
    }

    fn set_express(&mut self, register: usize, value: u16) {
        self.config.set(self.express + register as u16, &value.to_le_bytes());
    }

    /// Interrupts when an event that may do so has come since there was none (6.7.3.4). To be called after each
    /// [`Function::config_write`], [`RootPort::set_card`] and [`RootPort::press_button`], as soon as the guest can read what they did.
    pub fn tell(&mut self) {
        let (status, control) = (self.slot_status() & EVENTS, self.express_at(SLOT_CONTROL));
        let link = if control & LINK_CHANGED_ENABLE != 0 { LINK_CHANGED } else { 0 };
        let enabled = control & (BUTTON_PRESSED | PRESENCE_CHANGED) | link;
        let due = control & INTERRUPT_ENABLE != 0 && status & enabled != 0;
        if due && !self.told && self.msix.enabled() {
            (self.interrupt)();
        }
        self.told = due && self.msix.enabled();
    }
}

/// Adds the PCI Express capability and returns where it stands.
fn add_express(config: &mut Config, slot: u16) -> Result<u8, ConfigError> {
    let (mut body, mut writable, mut clear) = ([0; EXPRESS_BYTES], [0; EXPRESS_BYTES], [0; EXPRESS_BYTES]);
    let put = |bytes: &mut [u8; EXPRESS_BYTES], at: usize, value: u32, width: usize| {
        for (byte, new) in bytes.iter_mut().skip(at).zip(value.to_le_bytes()).take(width) {
            *byte = new;
        }
    };
    put(&mut body, 2, EXPRESS_FLAGS.into(), 2);
    put(&mut body, DEVICE_CAPABILITIES, ROLE_BASED_ERRORS, 4);
    // Error reporting enables, relaxed ordering, no snoop, read request size: notes of the guest's.
    put(&mut writable, DEVICE_CONTROL, 0x781f, 2);
    put(&mut clear, DEVICE_STATUS, 0x000f, 2);
    put(
        &mut body,
        LINK_CAPABILITIES,
        u32::from(LINK) | LINK_ACTIVE_REPORTING | u32::from(slot & 0xff) << 24,
        4,
    );
    put(&mut writable, LINK_CONTROL, LINK_CONTROL_WRITABLE.into(), 2);
    put(&mut body, LINK_STATUS, LINK.into(), 2);
    let features = ATTENTION_BUTTON | POWER_INDICATOR | SURPRISE | HOT_PLUG | NO_COMMAND_COMPLETED;
    put(&mut body, SLOT_CAPABILITIES, features | u32::from(slot) << SLOT_NUMBER_SHIFT, 4);
    put(&mut writable, SLOT_CONTROL, SLOT_CONTROL_WRITABLE.into(), 2);
    put(&mut clear, SLOT_STATUS, EVENTS.into(), 2);
    // System errors and power management events: nothing here raises any.
    put(&mut writable, ROOT_CONTROL, 0x000f, 2);
    put(&mut clear, ROOT_STATUS, 1 << 16, 4);
    put(&mut body, LINK_CAPABILITIES_2, 1 << 1, 4);
    put(&mut body, LINK_CONTROL_2, 1, 2);
    let behind_link = |bytes: &[u8; EXPRESS_BYTES]| bytes.get(2..).unwrap_or_default().to_vec();
    let (body, writable, clear) = (behind_link(&body), behind_link(&writable), behind_link(&clear));
    config.add_capability(Capability {
        id: regs::CAP_ID_EXP,
        at: None,
        body: &body,
        writable: &writable,
        clear: &clear,
    })
}

impl Function for RootPort {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.config_written(&self.config, &mut self.vectors);
    }

    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        Some(self.config.image())
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.msix.bar_read(bar, offset, data, &self.vectors) {
            data.fill(0xff);
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.msix.bar_write(bar, offset, data, &mut self.vectors);
    }

    fn bars(&self) -> Vec<BarRequest> {
        self.config.bars().collect()
    }

    fn place_bar(&mut self, bar: u8, base: u64) -> Result<(), ConfigError> {
        self.config.place_bar(bar, base)
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    fn reset(&mut self) {
        let (card, link) = (self.slot_status() & CARD_PRESENT, self.express_at(LINK_STATUS));
        self.config.reset();
        self.msix.reset(&self.config, &mut self.vectors);
        self.set_express(SLOT_STATUS, card);
        self.set_express(LINK_STATUS, link);
        self.set_indicator_off();
        self.told = false;
    }
}

#[cfg(test)]
#[path = "root_port_tests.rs"]
mod tests;
