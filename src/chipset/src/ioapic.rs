//! The IOAPIC (Intel 82093AA, with the EOI register of version 0x20), for processors whose local APICs take MSIs.
//!
//! KVM's split irqchip leaves the IOAPIC to user space: pins become messages, and the end of a level-triggered
//! interrupt comes back as `KVM_EXIT_IOAPIC_EOI`, which is [`IoApic::eoi`].

/// Guest physical address of the registers.
pub const IOAPIC_ADDRESS: u64 = 0xfec0_0000;
/// Size of the register window.
pub const IOAPIC_SIZE_BYTES: u64 = 0x1000;
/// Number of pins; pin N is GSI N.
pub const IOAPIC_PINS: u8 = 24;

/// The first of the pins that INTx lines of the PCI root bus are wired to; they end with the last pin.
const INTX_FIRST: u8 = 16;

/// The GSI, and so the pin, that interrupt line `pin` (0 is INTA) of slot `slot` is wired to. Neighbouring slots go to
/// different pins.
pub fn intx_gsi(slot: u8, pin: u8) -> u8 {
    INTX_FIRST + slot.wrapping_add(pin) % (IOAPIC_PINS - INTX_FIRST)
}

const PINS: usize = IOAPIC_PINS as usize;
const VERSION: u32 = 0x20 | (IOAPIC_PINS as u32 - 1) << 16;

// Offsets in the register window.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

// Fields of a redirection table entry.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0b111 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// Bits a guest can set: all defined ones but delivery status and remote IRR.
const WRITABLE: u64 =
    VECTOR | DELIVERY_MODE | LOGICAL | (1 << 13) | LEVEL | MASKED | (0xff << DESTINATION_SHIFT);

/// A message-signalled interrupt: what a device would write, and where (Intel SDM volume 3, 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Destination: `0xfee00000`, destination id in bits 12 to 19, logical mode in bit 2.
    pub address: u64,
    /// Vector, delivery mode in bits 8 to 10, level assert in bit 14, level trigger in bit 15.
    pub data: u32,
}

/// Where the IOAPIC's interrupts go.
pub trait MsiSink {
    /// Delivers `msi` now.
    fn send(&mut self, msi: Msi);

    /// Pin `pin` now stands for `msi`, or for nothing while masked. KVM looks into the routes of GSI 0 to 23 to know
    /// which vectors are level-triggered and need an EOI exit; an owner with level-triggered pins sets them there.
    fn route(&mut self, _pin: u8, _msi: Option<Msi>) {}
}

/// The IOAPIC and the lines to its pins.
pub struct IoApic<S: MsiSink> {
    sink: S,
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Lines that are high, a bit a pin.
    high: u32,
    /// Lines that the next EOI lowers.
    until_eoi: u32,
}

impl<S: MsiSink> IoApic<S> {
    /// An IOAPIC as after reset: all pins masked, all lines low.
    pub fn new(sink: S) -> Self {
        Self { sink, id: 0, select: 0, entries: [MASKED; PINS], high: 0, until_eoi: 0 }
    }

    /// The sink, for its owner.
    pub fn sink_mut(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Reads at `offset` in the register window. Registers are 32 bits wide; a narrower read gets the low bytes, a
    /// wider one is filled up with zeros.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_selected(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// Writes at `offset` in the register window; bytes past the register's four are ignored. Returns the pins whose
    /// interrupt this ended, as [`IoApic::eoi`] does: a write to the EOI register can.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        let [low, ..] = bytes;
        match offset {
            SELECT => self.select = low,
            WINDOW => self.write_selected(value),
            EOI => return self.eoi(low),
            _ => {}
        }
        0
    }

    /// Sets the line to `pin`. On an edge-triggered pin a rising line is an interrupt, unless masked (as the 82093AA
    /// has it: an edge on a masked pin is lost); on a level-triggered one a high line is, whenever unmasked.
    pub fn set_level(&mut self, pin: u8, high: bool) {
        let Some(bit) = line(pin) else { return };
        let rises = high && self.high & bit == 0;
        if high {
            self.high |= bit;
        } else {
            self.high &= !bit;
            self.until_eoi &= !bit;
        }
        match self.entry(pin) {
            Some(entry) if entry & LEVEL != 0 => self.deliver_level(pin),
            Some(entry) if rises && entry & MASKED == 0 => self.sink.send(message(entry)),
            _ => {}
        }
    }

    /// An edge on `pin`: its line goes up and down again.
    pub fn pulse(&mut self, pin: u8) {
        self.set_level(pin, true);
        self.set_level(pin, false);
    }

    /// Raises the line to `pin` for a source that only tells when it begins to ask, not when it stops: the end of
    /// the interrupt lowers the line, and the source tells again if it still asks (VFIO's INTx).
    pub fn raise_until_eoi(&mut self, pin: u8) {
        self.until_eoi |= line(pin).unwrap_or(0);
        self.set_level(pin, true);
    }

    /// The guest ended its interrupt `vector`. Returns the pins that this concerned, a bit a pin; a line that is
    /// still high interrupts again.
    pub fn eoi(&mut self, vector: u8) -> u32 {
        let mut ended = 0;
        for pin in 0..IOAPIC_PINS {
            let Some(entry) = self.entries.get_mut(usize::from(pin)) else { break };
            if *entry & VECTOR == u64::from(vector) && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                ended |= 1 << pin;
            }
        }
        self.high &= !(ended & self.until_eoi);
        self.until_eoi &= !ended;
        for pin in (0..IOAPIC_PINS).filter(|pin| ended & (1 << pin) != 0) {
            self.deliver_level(pin);
        }
        ended
    }

    fn entry(&self, pin: u8) -> Option<u64> {
        self.entries.get(usize::from(pin)).copied()
    }

    /// Sends the interrupt of a level-triggered pin if its line is high and the last one has ended.
    fn deliver_level(&mut self, pin: u8) {
        let high = line(pin).is_some_and(|bit| self.high & bit != 0);
        let Some(entry) = self.entries.get_mut(usize::from(pin)) else { return };
        if high && *entry & LEVEL != 0 && *entry & (MASKED | REMOTE_IRR) == 0 {
            *entry |= REMOTE_IRR;
            self.sink.send(message(*entry));
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            0 | 2 => self.id << 24,
            1 => VERSION,
            register => {
                match table_place(register).and_then(|(pin, shift)| Some((self.entry(pin)?, shift))) {
                    Some((entry, shift)) => low_half(entry >> shift),
                    None => 0,
                }
            }
        }
    }

    fn write_selected(&mut self, value: u32) {
        if self.select == 0 {
            self.id = (value >> 24) & 0xf;
        }
        let Some((pin, shift)) = table_place(self.select) else { return };
        let Some(entry) = self.entries.get_mut(usize::from(pin)) else { return };
        let half = 0xffff_ffff << shift;
        let mut new = (*entry & !(half & WRITABLE)) | ((u64::from(value) << shift) & WRITABLE);
        if new & LEVEL == 0 {
            // Linux forces the end of a stuck interrupt by a turn through edge mode.
            new &= !REMOTE_IRR;
        }
        let changed = (*entry ^ new) & WRITABLE != 0;
        *entry = new;
        if changed {
            self.sink.route(pin, (new & MASKED == 0).then(|| message(new)));
        }
        self.deliver_level(pin);
    }
}

/// The bit of `pin` in a set of lines.
fn line(pin: u8) -> Option<u32> {
    (pin < IOAPIC_PINS).then(|| 1 << pin)
}

/// The pin whose entry register `register` is a half of, and that half's place.
fn table_place(register: u8) -> Option<(u8, u32)> {
    let half = register.checked_sub(0x10)?;
    (half < 2 * IOAPIC_PINS).then_some((half / 2, if half % 2 == 0 { 0 } else { 32 }))
}

fn low_half(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// The message of a redirection table entry, without interrupt remapping.
fn message(entry: u64) -> Msi {
    let destination = entry >> DESTINATION_SHIFT;
    let logical = u64::from(entry & LOGICAL != 0);
    let level = if entry & LEVEL == 0 { 0 } else { 1 << 15 | 1 << 14 };
    Msi {
        address: 0xfee0_0000 | destination << 12 | logical << 2,
        data: low_half(entry & (VECTOR | DELIVERY_MODE)) | level,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Sent {
        messages: Vec<Msi>,
        routes: Vec<(u8, Option<Msi>)>,
    }

    impl MsiSink for Sent {
        fn send(&mut self, msi: Msi) {
            self.messages.push(msi);
        }
        fn route(&mut self, pin: u8, msi: Option<Msi>) {
            self.routes.push((pin, msi));
        }
    }

    fn ioapic() -> IoApic<Sent> {
        IoApic::new(Sent::default())
    }

    fn set(ioapic: &mut IoApic<Sent>, register: u8, value: u32) {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        ioapic.write(WINDOW, &value.to_le_bytes());
    }

    fn get(ioapic: &mut IoApic<Sent>, register: u8) -> u32 {
        ioapic.write(SELECT, &[register, 0, 0, 0]);
        let mut bytes = [0; 4];
        ioapic.read(WINDOW, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Programs `pin` as Linux does: the high half first, then the low one.
    fn program(ioapic: &mut IoApic<Sent>, pin: u8, low: u32, destination: u32) {
        set(ioapic, 0x11 + 2 * pin, destination << 24);
        set(ioapic, 0x10 + 2 * pin, low);
    }

    fn sent(ioapic: &mut IoApic<Sent>) -> Vec<Msi> {
        std::mem::take(&mut ioapic.sink.messages)
    }

    const LEVEL_32: u32 = LEVEL as u32;
    const MASKED_32: u32 = MASKED as u32;
    const REMOTE_IRR_32: u32 = REMOTE_IRR as u32;

    #[test]
    fn identifies_itself() {
        let mut ioapic = ioapic();
        assert_eq!(get(&mut ioapic, 1), 0x0017_0020);
        set(&mut ioapic, 0, 0x0500_0000);
        assert_eq!((get(&mut ioapic, 0), get(&mut ioapic, 2)), (0x0500_0000, 0x0500_0000));
        assert_eq!(get(&mut ioapic, 0x10), MASKED_32);
        assert_eq!(get(&mut ioapic, 0x40), 0, "past the last entry");
    }

    #[test]
    fn an_edge_is_a_message_and_lost_when_masked() {
        let mut ioapic = ioapic();
        program(&mut ioapic, 4, 0x31 | LOGICAL as u32, 3);
        ioapic.pulse(4);
        ioapic.pulse(4);
        let msi = Msi { address: 0xfee0_3004, data: 0x31 };
        assert_eq!(sent(&mut ioapic), [msi, msi]);
        assert_eq!(ioapic.sink.routes.last(), Some(&(4, Some(msi))));

        set(&mut ioapic, 0x18, 0x31 | MASKED_32);
        assert_eq!(ioapic.sink.routes.last(), Some(&(4, None)));
        ioapic.pulse(4);
        set(&mut ioapic, 0x18, 0x31);
        assert_eq!(sent(&mut ioapic), []);
    }

    #[test]
    fn a_level_waits_for_the_mask_and_for_the_end_of_the_last() {
        let mut ioapic = ioapic();
        ioapic.set_level(17, true);
        program(&mut ioapic, 17, 0x55 | LEVEL_32, 0);
        let msi = Msi { address: 0xfee0_0000, data: 0xc055 };
        assert_eq!(sent(&mut ioapic), [msi], "delivered when unmasked");
        assert_ne!(get(&mut ioapic, 0x32) & REMOTE_IRR_32, 0);

        ioapic.set_level(17, false);
        ioapic.set_level(17, true);
        assert_eq!(sent(&mut ioapic), [], "the last one has not ended");
        assert_eq!(ioapic.eoi(0x56), 0, "another's vector");
        assert_eq!(ioapic.eoi(0x55), 1 << 17);
        assert_eq!(sent(&mut ioapic), [msi], "still high: again");
        ioapic.set_level(17, false);
        assert_eq!(ioapic.write(EOI, &[0x55, 0, 0, 0]), 1 << 17);
        assert_eq!(sent(&mut ioapic), []);
        assert_eq!(get(&mut ioapic, 0x32) & REMOTE_IRR_32, 0);
    }

    #[test]
    fn a_source_without_a_level_is_lowered_by_the_eoi() {
        let mut ioapic = ioapic();
        program(&mut ioapic, 20, 0x60 | LEVEL_32, 0);
        ioapic.raise_until_eoi(20);
        assert_eq!(sent(&mut ioapic).len(), 1);
        assert_eq!(ioapic.eoi(0x60), 1 << 20);
        assert_eq!(sent(&mut ioapic), []);
        ioapic.raise_until_eoi(20);
        assert_eq!(sent(&mut ioapic).len(), 1);
    }

    #[test]
    fn neighbours_do_not_share_a_line() {
        let of_eight: std::collections::BTreeSet<u8> = (5..13).map(|slot| intx_gsi(slot, 0)).collect();
        assert_eq!(of_eight, (16..24).collect());
        assert_eq!(intx_gsi(255, 255), 16 + 254 % 8);
    }

    #[test]
    fn a_turn_through_edge_mode_ends_a_stuck_interrupt() {
        let mut ioapic = ioapic();
        program(&mut ioapic, 9, 0x40 | LEVEL_32, 0);
        ioapic.set_level(9, true);
        set(&mut ioapic, 0x22, 0x40 | MASKED_32);
        assert_eq!(get(&mut ioapic, 0x22) & REMOTE_IRR_32, 0);
        sent(&mut ioapic);
        set(&mut ioapic, 0x22, 0x40 | LEVEL_32);
        assert_eq!(sent(&mut ioapic).len(), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, Vec<u8>),
        Read(u64, usize),
        Program(u8, u32),
        Level(u8, bool),
        UntilEoi(u8),
        Eoi(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let offset = prop_oneof![Just(SELECT), Just(WINDOW), Just(EOI), 0u64..IOAPIC_SIZE_BYTES];
        prop_oneof![
            (offset.clone(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(o, d)| Step::Write(o, d)),
            (offset, 0usize..9).prop_map(|(o, n)| Step::Read(o, n)),
            (0u8..0x50, any::<u32>()).prop_map(|(r, v)| Step::Program(r, v)),
            (0u8..30, any::<bool>()).prop_map(|(p, l)| Step::Level(p, l)),
            (0u8..30).prop_map(Step::UntilEoi),
            any::<u8>().prop_map(Step::Eoi),
        ]
    }

    proptest! {
        #[test]
        fn holds_its_invariants(steps in prop::collection::vec(step(), 0..300)) {
            let mut ioapic = ioapic();
            for step in steps {
                let before = ioapic.entries;
                match step {
                    Step::Write(offset, data) => drop(ioapic.write(offset, &data)),
                    Step::Read(offset, len) => ioapic.read(offset, &mut vec![0xaa; len]),
                    Step::Program(register, value) => set(&mut ioapic, register, value),
                    Step::Level(pin, high) => ioapic.set_level(pin, high),
                    Step::UntilEoi(pin) => ioapic.raise_until_eoi(pin),
                    Step::Eoi(vector) => drop(ioapic.eoi(vector)),
                }
                prop_assert!(sent(&mut ioapic).len() <= PINS, "one step, at most one interrupt a pin");
                for (pin, entry) in ioapic.entries.iter().enumerate() {
                    prop_assert_eq!(entry & !(WRITABLE | REMOTE_IRR), 0);
                    prop_assert!(entry & REMOTE_IRR == 0 || entry & LEVEL != 0, "remote IRR is for level pins");
                    if entry & LEVEL != 0 && entry & MASKED == 0 && ioapic.high & (1 << pin) != 0 {
                        prop_assert!(entry & REMOTE_IRR != 0, "an unmasked high line is always served: {before:x?}");
                    }
                }
                prop_assert_eq!(ioapic.until_eoi & !ioapic.high, 0);
                prop_assert_eq!(ioapic.high >> IOAPIC_PINS, 0);
            }
        }
    }
}
