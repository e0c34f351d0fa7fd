//! Networks in settings, and addresses held against them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Deserializer, de::Error};

/// A network as `192.0.2.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    address: IpAddr,
    length: u8,
}

impl Network {
    fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let length: u8 = length.parse().ok()?;
        (length <= bits(address)).then_some(Self { address, length })
    }

    /// Whether an interface with this address, written with the length of its prefix, sees nothing beyond this network.
    pub(crate) fn contains(&self, interface: &str) -> bool {
        let Some(inner) = Self::parse(interface) else { return false };
        inner.length >= self.length && self.first() == Self { address: inner.address, ..*self }.first()
    }

    /// Its first address; of the family of `address`, so that two families are never equal.
    fn first(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length.min(32))).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length.min(128))).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!("{text:?} is not a network; write it as \"192.0.2.0/24\""))
        })
    }
}

/// Whether a MAC address in lower case can begin so.
pub(crate) fn begins_a_mac(text: &str) -> bool {
    let fits = |(index, byte): (usize, u8)| match index % 3 {
        2 => byte == b':',
        _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
    };
    !text.is_empty() && text.len() <= 17 && text.bytes().enumerate().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_lies_in_them() {
        let holds = |network: &str, address: &str| Network::parse(network).unwrap().contains(address);
        assert!(holds("192.0.2.0/24", "192.0.2.1/24") && holds("192.0.2.0/24", "192.0.2.255/32"));
        assert!(!holds("192.0.2.0/24", "192.0.3.1/24") && !holds("192.0.2.0/24", "192.0.2.1/23"));
        assert!(holds("0.0.0.0/0", "192.0.2.1/0") && !holds("0.0.0.0/0", "2001:db8::1/64"));
        assert!(holds("2001:db8::/32", "2001:db8:1::1/64") && !holds("2001:db8::/32", "2001:db9::1/64"));
        assert!(!holds("192.0.2.0/24", "nonsense") && !holds("192.0.2.0/24", "192.0.2.1"));
        for text in ["", "192.0.2.0", "192.0.2.0/33", "192.0.2/24", "::/129", "/24"] {
            assert_eq!(Network::parse(text), None, "{text}");
        }
    }

    #[test]
    fn macs_begin_in_lower_case() {
        assert!(["0", "02", "02:", "02:ac", "02:ac:00:00:00:01"].into_iter().all(begins_a_mac));
        assert!(
            ["", "2:", "zz", "02-ac", "02:AC", "02:ac:00:00:00:01:"].into_iter().all(|t| !begins_a_mac(t))
        );
    }
}
