//! Amounts of memory and storage, as people write them.

use std::{fmt, str::FromStr};

/// A number of bytes, written with a binary unit: `512 MiB`, `4GiB`, `65536`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ByteSizeError {
    /// Not a number with one of the known units.
    #[error("{0:?} is not a size; write a whole number and one of KiB, MiB, GiB, TiB: \"512 MiB\"")]
    Malformed(String),
    /// More than 64 bits hold.
    #[error("{0:?} is larger than any machine")]
    TooLarge(String),
}

impl ByteSize {
    /// A size of this many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }
    /// A size of this many MiB, or `None` past 64 bits.
    pub const fn from_mib(mib: u64) -> Option<Self> {
        match mib.checked_mul(1 << 20) {
            Some(bytes) => Some(Self(bytes)),
            None => None,
        }
    }
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let short = || text.chars().take(64).collect::<String>();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.trim_start_matches(' ') {
            "" | "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(ByteSizeError::Malformed(short())),
        };
        if number.is_empty() {
            return Err(ByteSizeError::Malformed(short()));
        }
        let number: u64 = number.parse().map_err(|_| ByteSizeError::TooLarge(short()))?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| ByteSizeError::TooLarge(short()))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_units() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512 MiB", 512 << 20), ("1GiB", 1 << 30), ("3  TiB", 3 << 40)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes);
        }
    }

    #[test]
    fn refuses_other_texts() {
        for text in
            ["", "MiB", "-1", "1.5 GiB", "512 MB", "512M", "99999999999999999999", "99999999 TiB", "1 MiB "]
        {
            assert!(text.parse::<ByteSize>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,40}") {
            let _ = text.parse::<ByteSize>();
        }

        #[test]
        fn what_prints_reads_back(bytes: u64) {
            let size = ByteSize::from_bytes(bytes);
            prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }
    }
}
