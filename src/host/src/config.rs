//! PCI configuration space as a reset must bring it back (PCI Local Bus 3.0 chapter 6, PCI Express base 7.5 and 7.6).

use serde::{Deserialize, Serialize};

/// Config space of a PCI Express function.
pub(crate) const CONFIG_BYTES_MAX: usize = 4096;
/// The header that every function has.
const HEADER_BYTES: usize = 64;
/// Capabilities begin behind the header, and take four bytes at least.
const CAPABILITIES_MAX: usize = (256 - HEADER_BYTES) / 4;
const EXTENDED_START: usize = 256;
const EXTENDED_CAPABILITIES_MAX: usize = (CONFIG_BYTES_MAX - EXTENDED_START) / 8;

/// Offset of the command register.
pub(crate) const COMMAND: u64 = 0x04;
/// Bus master enable, in the command register.
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Its BARs answer.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS_CAPABILITIES: u8 = 1 << 4;

const CAP_POWER: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;

/// Config space of one function at one moment: the 64 bytes of the header, then what could be read of the rest, 4096 at
/// most. Written as hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ConfigSnapshot(Vec<u8>);

/// What a function is in the PCI Express fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PortType {
    RootPort,
    UpstreamPort,
    DownstreamPort,
    BridgeToPci,
    Endpoint,
    /// In the root complex.
    Integrated,
    /// Without PCI Express.
    Conventional,
    Other,
    /// Its capabilities can't be read.
    Unreadable,
}

impl PortType {
    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::RootPort => "root port",
            Self::UpstreamPort => "upstream port",
            Self::DownstreamPort => "downstream port",
            Self::BridgeToPci => "bridge to PCI",
            Self::Endpoint => "endpoint",
            Self::Integrated => "integrated endpoint",
            Self::Conventional => "conventional PCI",
            Self::Other => "unknown",
            Self::Unreadable => "unreadable",
        }
    }
}

/// A capability: where it is and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Capability {
    offset: usize,
    id: u8,
}

impl ConfigSnapshot {
    /// Takes what was read of sysfs' `config`; `None` when that is no config space: too short, too long, or a function
    /// that does not answer (all ones).
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        // A virtual function has all ones for its IDs alone.
        let answers = bytes.iter().take(HEADER_BYTES).any(|byte| *byte != 0xff);
        (answers && (HEADER_BYTES..=CONFIG_BYTES_MAX).contains(&bytes.len())).then_some(Self(bytes))
    }

    fn byte(&self, offset: usize) -> u8 {
        self.0.get(offset).copied().unwrap_or(0)
    }

    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset + 1)])
    }

    /// Whether the function may start transactions of its own.
    pub(crate) fn bus_master(&self) -> bool {
        self.word(0x04) & COMMAND_BUS_MASTER != 0
    }

    /// Vendor and device ID.
    pub(crate) fn ids(&self) -> (u16, u16) {
        (self.word(0), self.word(2))
    }

    /// Offsets at which `now` differs from this, the first sight, in what must be as it was:
    ///
    /// - the IDs, class, header type, subsystem, interrupt pin, and the BARs and ROM address, which the kernel saves
    ///   before a reset and restores after it;
    /// - the capability lists, standard and extended: each link, ID and version;
    /// - of capabilities, the read-only words that say what the function can: power management, PCI Express, and size
    ///   and place of the MSI-X table.
    ///
    /// And at which MSI or MSI-X is still enabled in `now`, whatever it was at first (then a host driver had it).
    ///
    /// Not compared, since drivers and the kernel write them and status bits change by themselves: command, status,
    /// cache line size, latency timer, BIST, interrupt line, the ROM's enable bit, and the rest of all capabilities.
    pub(crate) fn differences(&self, now: &Self) -> Vec<u16> {
        let mask = self.stable();
        let differs = |offset: &usize| {
            let mask = mask.get(*offset).copied().unwrap_or(0);
            (self.byte(*offset) ^ now.byte(*offset)) & mask != 0
        };
        let mut offsets: Vec<usize> = (0..self.0.len()).filter(differs).collect();
        for capability in now.capabilities() {
            let (enable, bit) = match capability.id {
                CAP_MSI => (capability.offset + 2, 0x01),
                CAP_MSIX => (capability.offset + 3, 0x80),
                _ => continue,
            };
            if now.byte(enable) & bit != 0 {
                offsets.push(enable);
            }
        }
        offsets.sort_unstable();
        offsets.dedup();
        offsets.into_iter().filter_map(|offset| u16::try_from(offset).ok()).collect()
    }

    /// For each byte, the bits that must not change.
    fn stable(&self) -> Vec<u8> {
        let mut mask = vec![0u8; self.0.len()];
        let mut set = |offset: usize, bits: &[u8]| {
            for (byte, bits) in mask.iter_mut().skip(offset).zip(bits) {
                *byte |= bits;
            }
        };
        set(0x00, &[0xff; 4]); // vendor, device
        set(0x06, &[STATUS_CAPABILITIES]);
        set(0x08, &[0xff; 4]); // revision, class
        set(0x0e, &[0xff]); // header type
        set(0x10, &[0xff; 24]); // BARs
        set(0x28, &[0xff; 8]); // CardBus CIS, subsystem
        set(0x30, &[0xfe, 0xff, 0xff, 0xff]); // ROM address
        set(0x34, &[0xff]); // capability pointer
        set(0x3d, &[0xff; 3]); // interrupt pin, minimum grant, maximum latency
        for capability in self.capabilities() {
            set(capability.offset, &[0xff, 0xff]);
            match capability.id {
                CAP_POWER => set(capability.offset + 2, &[0xff, 0xff]),
                // Capabilities register, and device capabilities without the slot power that the port above sends.
                CAP_EXPRESS => set(capability.offset + 2, &[0xff, 0xff, 0xff, 0xff, 0x03, 0xf0]),
                // Table size; then table and pending bits, each with its BAR.
                CAP_MSIX => {
                    set(capability.offset + 2, &[0xff, 0x07, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
                }
                _ => {}
            }
        }
        for offset in self.extended_capabilities() {
            set(offset, &[0xff; 4]);
        }
        mask
    }

    /// The offset of a standard capability.
    fn capability(&self, id: u8) -> Option<usize> {
        self.capabilities().into_iter().find(|capability| capability.id == id).map(|found| found.offset)
    }

    /// The offset of an extended capability.
    fn extended(&self, id: u16) -> Option<usize> {
        self.extended_capabilities().into_iter().find(|offset| self.word(*offset) == id)
    }

    /// Vectors of MSI-X; 0 without.
    pub(crate) fn msix_vectors(&self) -> u16 {
        self.capability(CAP_MSIX).map_or(0, |offset| (self.word(offset + 2) & 0x7ff) + 1)
    }

    /// Vectors of MSI, a power of two; 0 without.
    pub(crate) fn msi_vectors(&self) -> u16 {
        self.capability(CAP_MSI).map_or(0, |offset| 1 << (self.word(offset + 2) >> 1 & 7))
    }

    /// Whether there is an interrupt pin.
    pub(crate) fn has_intx(&self) -> bool {
        self.byte(0x3d) != 0
    }

    /// Whether its device has more functions.
    pub(crate) fn is_multifunction(&self) -> bool {
        self.byte(0x0e) & 0x80 != 0
    }

    /// The control register of Access Control Services, where the function has them.
    pub(crate) fn acs_control(&self) -> Option<u16> {
        const CAP_ACS: u16 = 0x000d;
        self.extended(CAP_ACS).map(|offset| self.word(offset + 6))
    }

    /// What it is in the fabric (PCI Express base 7.5.3.2).
    pub(crate) fn port_type(&self) -> PortType {
        if self.0.len() <= HEADER_BYTES {
            return PortType::Unreadable;
        }
        match self.capability(CAP_EXPRESS).map(|offset| self.word(offset + 2) >> 4 & 0xf) {
            None => PortType::Conventional,
            Some(0 | 1) => PortType::Endpoint,
            Some(4) => PortType::RootPort,
            Some(5) => PortType::UpstreamPort,
            Some(6) => PortType::DownstreamPort,
            Some(7 | 8) => PortType::BridgeToPci,
            Some(9 | 10) => PortType::Integrated,
            Some(_) => PortType::Other,
        }
    }

    /// The number of the Device Serial Number capability; all zeros and all ones are none.
    pub(crate) fn serial_number(&self) -> Option<u64> {
        const CAP_SERIAL_NUMBER: u16 = 0x0003;
        let offset = self
            .extended_capabilities()
            .into_iter()
            .find(|offset| self.word(*offset) == CAP_SERIAL_NUMBER)?;
        let words = [10, 8, 6, 4].map(|word| u64::from(self.word(offset + word)));
        let number = words.iter().fold(0, |number, word| number << 16 | word);
        (number != 0 && number != u64::MAX).then_some(number)
    }

    /// The standard list. Ends at a link that points out of bounds or back.
    fn capabilities(&self) -> Vec<Capability> {
        let mut found: Vec<Capability> = Vec::new();
        if self.byte(0x06) & STATUS_CAPABILITIES == 0 {
            return found;
        }
        let mut offset = usize::from(self.byte(0x34) & !3);
        while found.len() < CAPABILITIES_MAX
            && (HEADER_BYTES..self.0.len().min(EXTENDED_START)).contains(&offset)
            && found.iter().all(|capability| capability.offset != offset)
        {
            found.push(Capability { offset, id: self.byte(offset) });
            offset = usize::from(self.byte(offset + 1) & !3);
        }
        found
    }

    /// Offsets of the extended list.
    fn extended_capabilities(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let mut offset = EXTENDED_START;
        while found.len() < EXTENDED_CAPABILITIES_MAX
            && (EXTENDED_START..self.0.len()).contains(&offset)
            && !found.contains(&offset)
        {
            found.push(offset);
            offset = usize::from(self.word(offset + 2) >> 4 & !3);
        }
        found
    }
}

impl From<ConfigSnapshot> for String {
    fn from(snapshot: ConfigSnapshot) -> Self {
        snapshot.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for ConfigSnapshot {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let pairs = text.as_bytes().chunks(2);
        let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let bytes = pairs.map(|pair| match pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        });
        bytes
            .collect::<Option<Vec<u8>>>()
            .and_then(Self::new)
            .ok_or("not a config space in hexadecimal digits")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Like the lab's network card: power management at c8, MSI at d0, Express at e0, MSI-X at a0; AER behind.
    pub(crate) fn some() -> Vec<u8> {
        let mut bytes = vec![0u8; CONFIG_BYTES_MAX];
        let mut put = |offset: usize, what: &[u8]| bytes[offset..offset + what.len()].copy_from_slice(what);
        put(0, &[0x86, 0x80, 0xd3, 0x10, 0x07, 0x05, 0x10, 0, 0, 0, 0, 2]);
        put(0x10, &[0, 0, 0x80, 0xfe, 0, 0, 0x82, 0xfe, 1, 0xe0]);
        put(0x34, &[0xc8]);
        put(0x3c, &[10, 1]);
        put(0xc8, &[CAP_POWER, 0xd0, 0x22, 0xc8]);
        put(0xd0, &[CAP_MSI, 0xe0, 0x80, 0]);
        put(0xe0, &[CAP_EXPRESS, 0xa0, 2, 0, 0xc1, 0x8c]);
        put(0xa0, &[CAP_MSIX, 0, 4, 0x80, 3, 0, 0, 0, 3, 0x20, 0, 0]);
        put(0x100, &[1, 0, 2, 0x14]);
        put(0x140, &[3, 0, 1, 0]);
        bytes
    }

    fn snapshot(change: impl FnOnce(&mut Vec<u8>)) -> ConfigSnapshot {
        let mut bytes = some();
        change(&mut bytes);
        ConfigSnapshot::new(bytes).unwrap()
    }

    /// After the reset: MSI-X off, bus master off.
    fn reset() -> ConfigSnapshot {
        snapshot(|bytes| (bytes[0xa3], bytes[4]) = (0, 0))
    }

    #[test]
    fn what_may_change_may_change() {
        let first = snapshot(|_| ());
        assert_eq!(first.differences(&reset()), [0u16; 0]);
        let mut now = reset();
        for offset in [0x04, 0x05, 0x07, 0x0c, 0x0d, 0x0f, 0x3c, 0xcc, 0xe8, 0x104] {
            now.0[offset] ^= 0xff;
        }
        now.0[0x30] ^= 1;
        assert_eq!(first.differences(&now), [0u16; 0]);
    }

    #[test]
    fn what_must_stay_must_stay() {
        let first = snapshot(|_| ());
        for offset in
            [0, 3, 8, 0x0b, 0x0e, 0x10, 0x27, 0x2d, 0x34, 0x3d, 0xc8, 0xc9, 0xa1, 0xa4, 0xe4, 0x102, 0x140]
        {
            let mut now = reset();
            now.0[offset] ^= 0x10;
            let differences = first.differences(&now);
            assert!(differences.contains(&u16::try_from(offset).unwrap()), "{offset:#x}: {differences:x?}");
        }
    }

    #[test]
    fn messages_left_on_are_a_difference() {
        assert_eq!(snapshot(|_| ()).differences(&snapshot(|_| ())), [0xa3]);
        assert_eq!(
            snapshot(|_| ()).differences(&snapshot(|bytes| (bytes[0xa3], bytes[0xd2]) = (0, 0x81))),
            [0xd2]
        );
    }

    #[test]
    fn what_does_not_answer_is_no_config_space() {
        assert_eq!(ConfigSnapshot::new(vec![0xff; 4096]), None);
        assert_eq!(ConfigSnapshot::new(some()[..63].to_vec()), None);
        assert_eq!(ConfigSnapshot::new(vec![0; 4097]), None);
    }

    #[test]
    fn bus_master_is_read() {
        assert!(snapshot(|_| ()).bus_master() && !reset().bus_master());
        assert_eq!(reset().ids(), (0x8086, 0x10d3));
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_and_equal_themselves(bytes in prop::collection::vec(any::<u8>(), 64..=4096usize)) {
            let mut bytes = bytes;
            bytes[0] = 0;
            bytes[6] |= STATUS_CAPABILITIES;
            let first = ConfigSnapshot::new(bytes).unwrap();
            let stay = first.differences(&first);
            // Only messages that are on can be found in what is the same.
            prop_assert!(stay.len() <= CAPABILITIES_MAX);
            prop_assert!(first.extended_capabilities().len() <= EXTENDED_CAPABILITIES_MAX);
        }

        #[test]
        fn capability_loops_end(links in prop::collection::vec(any::<u8>(), 192)) {
            let mut bytes = some();
            bytes[64..256].copy_from_slice(&links);
            let walked = ConfigSnapshot::new(bytes).unwrap().capabilities();
            prop_assert!(walked.len() <= CAPABILITIES_MAX);
            prop_assert!(walked.iter().all(|capability| (64..256).contains(&capability.offset)));
        }

        #[test]
        fn digits_come_back(length in 64usize..300, seed: u8) {
            let first = ConfigSnapshot::new((0..length).map(|i| seed ^ u8::try_from(i % 251).unwrap()).collect());
            if let Some(first) = first {
                prop_assert_eq!(ConfigSnapshot::try_from(String::from(first.clone())).unwrap(), first);
            }
        }

        #[test]
        fn texts_never_panic(text in "[0-9a-fé]{0,300}") {
            let _ = ConfigSnapshot::try_from(text);
        }
    }
}
