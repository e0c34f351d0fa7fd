//! The address of a PCI function.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Where a PCI function sits: domain, bus, device, function (`0000:03:00.0`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Why a text is not a PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a PCI address; write domain:bus:device.function in hexadecimal, as `lspci -D` shows it: 0000:03:00.0"
)]
pub struct PciAddressError(String);

impl PciAddress {
    /// The address of `function` (0 to 7) of `device` (0 to 31) on `bus`; `None` when out of range.
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self { domain, bus, device, function })
    }
    /// PCI segment ("domain" in Linux's words).
    pub fn domain(self) -> u32 {
        self.domain
    }
    /// Bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }
    /// Whether both are on one bus.
    pub fn is_on_the_bus_of(self, other: Self) -> bool {
        (self.domain, self.bus) == (other.domain, other.bus)
    }
    /// Device number, 0 to 31.
    pub fn device(self) -> u8 {
        self.device
    }
    /// Function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = PciAddressError;

    /// Accepts `0000:03:00.0` and, for domain 0, the short `03:00.0`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| PciAddressError(text.chars().take(64).collect()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let hex = |digits: &str, least: usize, most: usize| {
        let fits = (least..=most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
        fits.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
    };
    PciAddress::new(
        hex(domain, 4, 8)?,
        u8::try_from(hex(bus, 2, 2)?).ok()?,
        u8::try_from(hex(device, 2, 2)?).ok()?,
        u8::try_from(hex(function, 1, 1)?).ok()?,
    )
}

impl TryFrom<String> for PciAddress {
    type Error = PciAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_long_and_short_forms() {
        let long: PciAddress = "0000:03:1f.7".parse().unwrap();
        assert_eq!(long, "03:1f.7".parse().unwrap());
        assert_eq!(long.to_string(), "0000:03:1f.7");
        assert_eq!("10000:e1:00.0".parse::<PciAddress>().unwrap().domain(), 0x10000);
    }

    #[test]
    fn refuses_what_is_not_an_address() {
        for text in [
            "",
            "3:0.0",
            "0000:03:20.0",
            "0000:03:00.8",
            "+000:03:00.0",
            "0000:03:00",
            "nvme0",
            "0000:03:00.0 ",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = text.parse::<PciAddress>();
        }

        #[test]
        fn what_prints_reads_back(domain in 0u32..0x20000, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(address.to_string().parse::<PciAddress>().unwrap(), address);
        }
    }
}
