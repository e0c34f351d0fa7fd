//! Kinds of PCI devices, written as `lspci -d` takes them.

use std::fmt;

use serde::{Deserialize, Deserializer, de::Error};

use crate::Device;

/// `[vendor]:[device][:class]` in hexadecimal, where what is left out, or `*`, matches all: `8086:100e`, `10de:`,
/// `::0108`. A class has 2, 4 or 6 digits: base class, subclass, programming interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Pattern {
    text: String,
    vendor: Option<u16>,
    device: Option<u16>,
    /// The digits given, and how many bits of a class code are below them.
    class: Option<(u32, u32)>,
}

impl Pattern {
    /// The kind that a text says, or none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (vendor, device) = (parts.next()?, parts.next()?);
        let class = parts.next().unwrap_or("");
        if parts.next().is_some() {
            return None;
        }
        let class = match class {
            "" | "*" => None,
            _ => Some((hex(class, &[2, 4, 6])?, 24 - 4 * u32::try_from(class.len()).ok()?)),
        };
        Some(Self { text: text.to_owned(), vendor: id(vendor)?, device: id(device)?, class })
    }

    /// Whether a device is of this kind.
    pub fn matches(&self, device: &Device) -> bool {
        self.vendor.is_none_or(|vendor| vendor == device.vendor)
            && self.device.is_none_or(|id| id == device.device)
            && self.class.is_none_or(|(class, below)| class == device.class >> below)
    }
}

fn id(text: &str) -> Option<Option<u16>> {
    match text {
        "" | "*" => Some(None),
        _ => Some(Some(u16::try_from(hex(text, &[4])?).ok()?)),
    }
}

fn hex(text: &str, lengths: &[usize]) -> Option<u32> {
    let good = lengths.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    good.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            let how = "write vendor:device or ::class in hexadecimal, as `lspci -d` takes it: \"8086:100e\", \"::0108\"";
            D::Error::custom(format!("{text:?} is not a kind of device; {how}"))
        })
    }
}
