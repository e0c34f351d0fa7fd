//! Addresses within the memory-mapped configuration window (PCI Express Base Specification 5.0, section 7.2.2).

/// Bytes of the window that belong to one bus.
pub const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

/// A function's register, as an offset within the window names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamAddress {
    /// Bus, counted from the first of the window.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
    /// Byte of the function's configuration space, 0 to 4095.
    pub register: u16,
}

impl EcamAddress {
    /// What `offset` names in a window of `buses` buses (at most 256); `None` past its end.
    pub fn decode(offset: u64, buses: u16) -> Option<Self> {
        let bus = offset / ECAM_BYTES_PER_BUS;
        if bus >= u64::from(buses) {
            return None;
        }
        Some(Self {
            bus: u8::try_from(bus).ok()?,
            device: (offset >> 15 & 0x1f) as u8,
            function: (offset >> 12 & 0x7) as u8,
            register: (offset & 0xfff) as u16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ends_with_its_buses() {
        assert!(EcamAddress::decode(ECAM_BYTES_PER_BUS - 1, 1).is_some());
        assert_eq!(EcamAddress::decode(ECAM_BYTES_PER_BUS, 1), None);
        assert_eq!(EcamAddress::decode(0, 0), None);
        assert_eq!(EcamAddress::decode(256 * ECAM_BYTES_PER_BUS, u16::MAX), None);
    }

    proptest! {
        #[test]
        fn decodes_what_was_encoded(bus: u8, device in 0u8..32, function in 0u8..8, register in 0u16..4096) {
            let offset = u64::from(bus) << 20 | u64::from(device) << 15 | u64::from(function) << 12 | u64::from(register);
            prop_assert_eq!(EcamAddress::decode(offset, 256), Some(EcamAddress { bus, device, function, register }));
        }

        #[test]
        fn never_panics(offset: u64, buses: u16) {
            if let Some(address) = EcamAddress::decode(offset, buses) {
                prop_assert!(u16::from(address.bus) < buses && address.register < 4096);
            }
        }
    }
}
