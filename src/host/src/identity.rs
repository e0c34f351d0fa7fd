//! Which device it is: what tells one card from another of its kind, and whether it is the one that was meant.

use std::{collections::BTreeMap, fmt::Write};

use casemate_spec::{DevicePin, PciAddress, PciId, Refusal};

use crate::{
    PciFunction,
    config::{CONFIG_BYTES_MAX, ConfigSnapshot},
    host::{Host, attribute, names, read_bytes},
};

/// Nothing real is longer.
const SERIAL_BYTES_MAX: usize = 64;

impl Host {
    /// The serial numbers that a function tells: that of its Device Serial Number capability (PCI Express base 7.9.3), as
    /// lspci writes it, and an NVMe drive's own while the host's driver has it. Config space past the header is root's to
    /// read.
    pub(crate) fn serials(&self, address: PciAddress, configs: &Configs) -> Vec<String> {
        let directory = self.pci(address);
        let config = configs.get(&address);
        let of_card = config.and_then(|config| config.serial_number()).map(dashed);
        let drives = names(directory.join("nvme")).into_iter();
        let of_drive =
            drives.filter_map(|drive| attribute(directory.join("nvme").join(drive).join("serial")));
        of_card.into_iter().chain(of_drive).filter(|serial| is_serial(serial)).collect()
    }

    /// The config spaces of these functions, as far as this process may read them.
    pub(crate) fn configs(&self, functions: &[PciFunction]) -> Configs {
        let bytes_max = u64::try_from(CONFIG_BYTES_MAX).unwrap_or(u64::MAX);
        let read = |function: &PciFunction| {
            let bytes = read_bytes(&self.pci(function.address).join("config"), bytes_max).ok()?;
            Some((function.address, ConfigSnapshot::new(bytes)?))
        };
        functions.iter().filter_map(read).collect()
    }
}

/// Config spaces as they were read, by function.
pub(crate) type Configs = BTreeMap<PciAddress, ConfigSnapshot>;

/// A device says what it likes: what isn't short and printable is no serial number.
fn is_serial(text: &str) -> bool {
    (1..=SERIAL_BYTES_MAX).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// Eight bytes, the uppermost first.
fn dashed(number: u64) -> String {
    let bytes = number.to_be_bytes().map(|byte| format!("{byte:02x}"));
    bytes.join("-")
}

impl PciFunction {
    /// Vendor and device.
    pub fn id(&self) -> PciId {
        PciId { vendor: self.vendor, device: self.device }
    }

    /// Subsystem vendor and subsystem; zeros for bridges.
    pub fn subsystem(&self) -> PciId {
        PciId { vendor: self.subsystem_vendor, device: self.subsystem_device }
    }

    /// That this function is what the pin says.
    ///
    /// # Errors
    /// `device-changed` with both, what is there and what was meant.
    pub fn is_the_one(&self, pin: &DevicePin) -> Result<(), Refusal> {
        let holds = pin.id.is_none_or(|id| id == self.id())
            && pin.subsystem.is_none_or(|subsystem| subsystem == self.subsystem())
            && pin.serial.as_ref().is_none_or(|serial| self.serials.contains(serial));
        if holds {
            return Ok(());
        }
        let mut meant = String::new();
        let mut add = |what: &str, value: &dyn std::fmt::Display| {
            let separator = if meant.is_empty() { "" } else { ", " };
            // Writing to a String does not fail.
            let _ = write!(meant, "{separator}{what}{value}");
        };
        if let Some(id) = pin.id {
            add("", &id);
        }
        if let Some(subsystem) = pin.subsystem {
            add("subsystem ", &subsystem);
        }
        if let Some(serial) = &pin.serial {
            add("serial ", serial);
        }
        let serials =
            if self.serials.is_empty() { "none that can be read".into() } else { self.serials.join(" or ") };
        let found = format!("{}, subsystem {}, serial {serials}", self.id(), self.subsystem());
        Err(Refusal::new(
            "device-changed",
            self.address,
            format!("here is {found}; {meant} was meant"),
            "put the right card back, or write down the one that is there (casemate devices --json shows it)",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    const NVME: &str = "0000:03:00.0";

    fn drive(machine: &Fixture) -> PciFunction {
        let functions = machine.host().functions().unwrap();
        functions.into_iter().find(|function| function.address.to_string() == NVME).unwrap()
    }

    fn pin(id: &str, subsystem: &str, serial: &str) -> DevicePin {
        DevicePin {
            id: id.parse().ok(),
            subsystem: subsystem.parse().ok(),
            serial: Some(serial.to_owned()).filter(|serial| !serial.is_empty()),
        }
    }

    #[test]
    fn another_card_is_told_from_the_one_that_was_meant() {
        let machine = Fixture::typical();
        machine.write(&format!("sys/devices/pci0000:00/{NVME}/nvme/nvme0/serial"), "lab-1            \n");
        let drive = drive(&machine);
        assert_eq!(drive.serials.last().map(String::as_str), Some("lab-1"));
        for good in [pin("", "", ""), pin("1b36:0010", "", ""), pin("1b36:0010", "0000:0000", "lab-1")] {
            assert_eq!(drive.is_the_one(&good), Ok(()), "{good:?}");
        }
        for wrong in [pin("1b36:0011", "", ""), pin("", "1af4:1100", ""), pin("1b36:0010", "", "lab-2")] {
            assert_eq!(drive.is_the_one(&wrong).unwrap_err().code, "device-changed", "{wrong:?}");
        }
        let both = drive.is_the_one(&pin("1b36:0010", "", "lab-2")).unwrap_err().cause;
        assert!(both.contains("lab-1") && both.ends_with("1b36:0010, serial lab-2 was meant"), "{both}");
    }

    #[test]
    fn a_card_tells_its_serial_number_in_config_space() {
        let machine = Fixture::typical();
        let path = machine.path(&format!("sys/devices/pci0000:00/{NVME}/config"));
        let mut config = std::fs::read(&path).unwrap();
        config.resize(4096, 0);
        config[0x100..0x104].copy_from_slice(&0x0001_0003u32.to_le_bytes());
        config[0x104..0x10c].copy_from_slice(&0x5254_00ff_ff12_3456u64.to_le_bytes());
        std::fs::write(path, config).unwrap();
        assert_eq!(drive(&machine).serials, ["52-54-00-ff-ff-12-34-56"]);
    }

    #[test]
    fn nonsense_is_no_serial_number() {
        let machine = Fixture::typical();
        let long = "x".repeat(65);
        for nonsense in ["", "\u{1b}[2J", long.as_str()] {
            machine.write(&format!("sys/devices/pci0000:00/{NVME}/nvme/nvme0/serial"), nonsense);
            assert_eq!(drive(&machine).serials, [] as [&str; 0], "{nonsense:?}");
        }
    }
}
