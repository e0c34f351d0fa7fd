//! How an operator names one of a guest's emulated devices: `0`, `1`, … in the order of its file, or `slot1` for what came into a
//! slot.

use std::{fmt, str::FromStr};

use casemate_wire::Which;
use serde::{Deserialize, Serialize};

/// One of a guest's disks or network cards. In JSON a number, or `"slot1"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Raw", into = "Raw")]
pub enum DeviceName {
    /// One that the guest started with: its number among those of its kind, from 0.
    Number(u16),
    /// What is in a slot, from 1.
    Slot(u8),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Raw {
    Number(u16),
    Text(String),
}

/// Why a text names no device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write its number from 0, in the order of the guest's file, or slot1 for what is in slot 1")]
pub struct DeviceNameError;

impl DeviceName {
    /// As its VMM knows it: slots are counted from 0 there.
    pub(crate) fn which(self) -> Which {
        match self {
            Self::Number(number) => Which::Number(number),
            Self::Slot(slot) => Which::Slot(slot.saturating_sub(1)),
        }
    }
}

impl FromStr for DeviceName {
    type Err = DeviceNameError;

    fn from_str(text: &str) -> Result<Self, DeviceNameError> {
        let Some(slot) = text.strip_prefix("slot") else {
            return text.parse().map(Self::Number).map_err(|_| DeviceNameError);
        };
        let slot: Option<u8> = slot.parse().ok().filter(|slot| *slot > 0);
        slot.map(Self::Slot).ok_or(DeviceNameError)
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Slot(slot) => write!(f, "slot{slot}"),
        }
    }
}

impl TryFrom<Raw> for DeviceName {
    type Error = DeviceNameError;

    fn try_from(raw: Raw) -> Result<Self, DeviceNameError> {
        match raw {
            Raw::Number(number) => Ok(Self::Number(number)),
            Raw::Text(text) => text.parse(),
        }
    }
}

impl From<DeviceName> for Raw {
    fn from(name: DeviceName) -> Self {
        match name {
            DeviceName::Number(number) => Self::Number(number),
            DeviceName::Slot(_) => Self::Text(name.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_shown() {
        for (text, name, json) in [
            ("0", DeviceName::Number(0), "0"),
            ("17", DeviceName::Number(17), "17"),
            ("slot1", DeviceName::Slot(1), "\"slot1\""),
            ("slot8", DeviceName::Slot(8), "\"slot8\""),
        ] {
            assert_eq!((text.parse(), name.to_string().as_str()), (Ok(name), text));
            assert_eq!(serde_json::to_string(&name).unwrap(), json);
            assert_eq!(serde_json::from_str::<DeviceName>(json).unwrap(), name);
        }
        for wrong in ["", "slot", "slot0", "slot256", "-1", "65536", "disk0", "slot 1"] {
            assert_eq!(wrong.parse::<DeviceName>(), Err(DeviceNameError), "{wrong}");
        }
        assert_eq!(DeviceName::Slot(2).which(), Which::Slot(1));
    }
}
