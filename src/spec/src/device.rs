//! What a person writes down about a PCI device: which one is meant.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::{
    Assigned, Location, PciAddress, Pooled, Refusal, Rom,
    guest::{Reader, short},
};

/// A vendor's number and the vendor's number for a thing: `1b36:0010`. Of a device, or of its subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciId {
    /// The vendor, as the PCI SIG numbers them.
    pub vendor: u16,
    /// The thing, as the vendor numbers them.
    pub device: u16,
}

impl From<PciId> for String {
    fn from(id: PciId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for PciId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

/// Why a text is no [`PciId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two numbers of four hexadecimal digits with a colon between are wanted, as in 1b36:0010")]
pub struct PciIdError;

impl TryFrom<String> for PciId {
    type Error = PciIdError;

    fn try_from(text: String) -> Result<Self, PciIdError> {
        text.parse()
    }
}

impl FromStr for PciId {
    type Err = PciIdError;

    fn from_str(text: &str) -> Result<Self, PciIdError> {
        let (vendor, device) = text.split_once(':').ok_or(PciIdError)?;
        Ok(Self { vendor: hex16(vendor).ok_or(PciIdError)?, device: hex16(device).ok_or(PciIdError)? })
    }
}

/// Four hexadecimal digits.
pub(crate) fn hex16(text: &str) -> Option<u16> {
    let digits = text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u16::from_str_radix(text, 16).ok()).flatten()
}

/// Whether a text can be a serial number: 1 to 64 printable ASCII characters.
pub(crate) fn is_serial(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// What the device behind an address must be; what is absent may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DevicePin {
    /// Vendor and device.
    pub id: Option<PciId>,
    /// Subsystem vendor and subsystem.
    pub subsystem: Option<PciId>,
    /// A serial number that the device tells.
    pub serial: Option<String>,
}

/// A `[[device]]` as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawDevice {
    address: Option<Spanned<String>>,
    pool: Option<Spanned<String>>,
    id: Option<Spanned<String>>,
    subsystem: Option<Spanned<String>>,
    serial: Option<Spanned<String>>,
    rom: Option<Spanned<String>>,
    rom_sha256: Option<Spanned<String>>,
}

/// What a `[[device]]` asks for.
pub(crate) enum Wanted {
    /// This one, whose address was written there.
    Assigned(Location, Assigned),
    /// One of a pool.
    Pooled(Pooled),
}

impl Reader<'_> {
    /// Table `table` of a guest's devices.
    pub(crate) fn device(&mut self, raw: RawDevice, table: usize) -> Result<Wanted, Refusal> {
        let is_pinned =
            raw.id.is_some() || raw.subsystem.is_some() || raw.serial.is_some() || raw.rom.is_some();
        match (&raw.address, raw.pool) {
            (None, Some(pool)) if !is_pinned => Ok(Wanted::Pooled(Pooled { pool: self.name(pool)?, table })),
            (Some(address), None) => {
                let pin = DevicePin {
                    id: self.id(raw.id)?,
                    subsystem: self.id(raw.subsystem)?,
                    serial: self.serial(raw.serial)?,
                };
                let rom = self.rom(raw.rom, raw.rom_sha256)?;
                let (location, address) = self.address(address)?;
                Ok(Wanted::Assigned(location, Assigned { address, pin, table, rom }))
            }
            (Some(wrong), Some(_)) => Err(self.no_source(Some(wrong))),
            (None, wrong) => Err(self.no_source(wrong.as_ref())),
        }
    }

    /// A `[[device]]` that doesn't say which.
    fn no_source(&mut self, near: Option<&Spanned<String>>) -> Refusal {
        let location = near.map(|value| self.note(value));
        let subject = if location.is_none() { "[[device]]" } else { "" };
        let remedy = "give it an address, with id, subsystem and serial if you like, or a pool alone";
        Refusal::new("bad-device", subject, "the device must be named in one way", remedy).at(location)
    }

    fn id(&mut self, raw: Option<Spanned<String>>) -> Result<Option<PciId>, Refusal> {
        let Some(raw) = raw else { return Ok(None) };
        let location = self.note(&raw);
        raw.get_ref().parse().map(Some).map_err(|_| {
            let cause = format!("{:?} is not a pair of PCI IDs", short(raw.get_ref()));
            Refusal::new("bad-device", "", cause, "write it as \"1b36:0010\"").at(Some(location))
        })
    }

    fn serial(&mut self, raw: Option<Spanned<String>>) -> Result<Option<String>, Refusal> {
        let Some(raw) = raw else { return Ok(None) };
        let location = self.note(&raw);
        if !is_serial(raw.get_ref()) {
            let cause = "a serial number has 1 to 64 printable ASCII characters";
            let remedy = "write it as casemate devices --json shows it";
            return Err(Refusal::new("bad-device", "", cause, remedy).at(Some(location)));
        }
        Ok(Some(raw.into_inner()))
    }

    /// An option ROM is named with its digest: what of it runs, runs before the guest's system does.
    fn rom(
        &mut self,
        path: Option<Spanned<String>>,
        sha256: Option<Spanned<String>>,
    ) -> Result<Option<Rom>, Refusal> {
        let (path, sha256) = match (path, sha256) {
            (None, None) => return Ok(None),
            (Some(path), Some(sha256)) => (path, sha256),
            (path, sha256) => {
                let location = path.or(sha256).map(|value| self.note(&value));
                let cause = "an option ROM's file and its digest go together";
                let remedy = "write both rom and rom_sha256, as sha256sum prints it";
                return Err(Refusal::new("bad-device", "", cause, remedy).at(location));
            }
        };
        let location = self.note(&sha256);
        let is_digest = |text: &str| {
            text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        if !is_digest(sha256.get_ref()) {
            let cause = "this is no SHA-256 in 64 hexadecimal digits";
            return Err(
                Refusal::new("bad-device", "", cause, "write it as sha256sum prints it").at(Some(location))
            );
        }
        Ok(Some(Rom { path: self.path(&path)?, sha256: sha256.into_inner() }))
    }

    fn address(&mut self, raw: &Spanned<String>) -> Result<(Location, PciAddress), Refusal> {
        let location = self.note(raw);
        let address = raw.get_ref().parse().map_err(|_| {
            let cause = format!("{:?} is not a PCI address", short(raw.get_ref()));
            Refusal::new(
                "bad-pci-address",
                "",
                cause,
                "write it as `casemate devices` shows it: \"0000:03:00.0\"",
            )
            .at(Some(location.clone()))
        })?;
        Ok((location, address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};
    use proptest::prelude::*;

    #[test]
    fn reads_what_lspci_shows_and_nothing_else() {
        assert_eq!("1B36:0010".parse(), Ok(PciId { vendor: 0x1b36, device: 0x10 }));
        for text in ["", ":", "1b36", "1b36:10", "+b36:0010", "1b36:0010:", "01b36:0010", "1b36:0x10"] {
            assert_eq!(text.parse::<PciId>(), Err(PciIdError), "{text}");
        }
    }

    #[test]
    fn devices_are_pinned_or_come_from_pools_in_the_order_written() {
        let more = "id = \"1b36:0010\"\nserial = \"lab\"\n[[device]]\npool = \"nics\"\n[[device]]\naddress = \"04:00.0\"\n";
        let mut located = parse(&format!("{GOOD}{more}")).unwrap();
        let pin = &located.guest.devices[0].pin;
        assert_eq!(pin.id.unwrap().to_string(), "1b36:0010");
        assert_eq!((pin.subsystem, pin.serial.as_deref()), (None, Some("lab")));
        assert_eq!(located.device_location(1).unwrap().key, "device[1].pool");
        let chosen = located.guest.pooled.clone();
        assert_eq!(chosen.len(), 1);
        located.choose(chosen.into_iter().map(|pooled| (pooled, "05:00.0".parse().unwrap())));
        let addresses: Vec<_> =
            located.guest.devices.iter().map(|device| device.address.to_string()).collect();
        assert_eq!(addresses, ["0000:03:00.0", "0000:05:00.0", "0000:04:00.0"]);
        assert_eq!(located.guest.pooled, []);
    }

    #[test]
    fn a_device_is_named_in_one_way() {
        for (more, code) in [
            ("pool = \"nics\"", "bad-device"),
            ("id = \"1b36\"", "bad-device"),
            ("serial = \"\"", "bad-device"),
            ("rom = \"vbios\"", "bad-device"),
            ("rom_sha256 = \"00\"", "bad-device"),
            ("rom = \"vbios\"\nrom_sha256 = \"00\"", "bad-device"),
            ("[[device]]\npool = \"nics\"\nrom = \"vbios\"", "bad-device"),
            ("[[device]]", "bad-device"),
            ("[[device]]\npool = \"nics\"\nid = \"1b36:0010\"", "bad-device"),
            ("[[device]]\npool = \"N\"", "bad-name"),
        ] {
            assert_eq!(parse(&format!("{GOOD}{more}\n")).unwrap_err().code, code, "{more}");
        }
    }

    proptest! {
        #[test]
        fn comes_back_from_its_text(vendor: u16, device: u16) {
            let id = PciId { vendor, device };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }
    }
}
