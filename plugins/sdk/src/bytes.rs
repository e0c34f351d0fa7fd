//! Amounts of memory in settings and messages.

use std::fmt;

use serde::{Deserialize, Deserializer, de::Error};

/// A number of bytes that settings write as the guest's file does: `"512 MiB"`, `"4GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];

impl Bytes {
    /// The amount that a text says, or none.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start_matches(' ');
        let shift = match unit {
            "" | "B" => 0,
            _ => UNITS.iter().find(|(_, name)| *name == unit)?.0,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift).map(Self)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is not a size; write it as \"512 MiB\"")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_prints_units() {
        for (text, bytes) in [("512 MiB", 512 << 20), ("4GiB", 4 << 30), ("1000", 1000), ("0 B", 0)] {
            assert_eq!(Bytes::parse(text), Some(Bytes(bytes)), "{text}");
            assert_eq!(Bytes::parse(&Bytes(bytes).to_string()), Some(Bytes(bytes)), "{text}");
        }
        for text in ["", "MiB", "-1 B", "1.5 GiB", "512 MB", "99999999 TiB"] {
            assert_eq!(Bytes::parse(text), None, "{text}");
        }
    }
}
