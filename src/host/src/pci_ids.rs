//! Names for numbers, from the `pci.ids` file that `lspci` reads.

use std::collections::{HashMap, HashSet};

/// Names found for what was asked. What the file does not know has no entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    vendors: HashMap<u16, String>,
    devices: HashMap<(u16, u16), String>,
    classes: HashMap<u16, String>,
}

impl Names {
    /// The vendor's name, or its number.
    pub(crate) fn vendor(&self, vendor: u16) -> String {
        self.vendors.get(&vendor).cloned().unwrap_or_else(|| format!("{vendor:04x}"))
    }
    /// The device's name, or its number.
    pub(crate) fn device(&self, vendor: u16, device: u16) -> String {
        self.devices.get(&(vendor, device)).cloned().unwrap_or_else(|| format!("{device:04x}"))
    }
    /// The name of a 24-bit class by its upper two bytes, or its number.
    pub(crate) fn class(&self, class: u32) -> String {
        let key = u16::try_from((class >> 8) & 0xffff).unwrap_or_default();
        self.classes.get(&key).cloned().unwrap_or_else(|| format!("class {key:04x}"))
    }
}

/// Reads `text` once and keeps what is wanted: `devices` as (vendor, device), every class.
///
/// The format: `vvvv  Vendor`, under it `<tab>dddd  Device`; `C cc  Class`, under it `<tab>ss  Subclass`.
pub(crate) fn parse(text: &str, devices: &HashSet<(u16, u16)>) -> Names {
    let vendors: HashSet<u16> = devices.iter().map(|(vendor, _)| *vendor).collect();
    let mut names = Names::default();
    let mut vendor = None;
    let mut class = None;
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.starts_with("\t\t")) {
        if let Some(rest) = line.strip_prefix('\t') {
            if let Some((vendor, (device, name))) = vendor.zip(entry(rest, 4)) {
                if devices.contains(&(vendor, device)) {
                    names.devices.insert((vendor, device), name);
                }
            } else if let Some((class, (subclass, name))) = class.zip(entry(rest, 2)) {
                names.classes.insert(class << 8 | subclass, name);
            }
        } else if let Some(rest) = line.strip_prefix("C ") {
            (vendor, class) = (None, entry(rest, 2).map(|(class, _): (u16, String)| class & 0xff));
        } else {
            let found = entry(line, 4).filter(|(id, _)| vendors.contains(id));
            (vendor, class) = (found.as_ref().map(|(id, _)| *id), None);
            names.vendors.extend(found);
        }
    }
    names
}

fn entry(line: &str, digits: usize) -> Option<(u16, String)> {
    let (id, name) = line.split_once("  ")?;
    let id = (id.len() == digits).then(|| u16::from_str_radix(id, 16).ok())??;
    Some((id, name.trim().chars().take(80).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOME: &str = "# comment\n8086  Intel Corporation\n\t10d3  82574L Gigabit Network Connection\n\t\t103c 1519  NC112T\n\
        \t10d4  Another\n1b36  Red Hat, Inc.\n\t0010  QEMU NVM Express Controller\nC 02  Network controller\n\
        \t00  Ethernet controller\nC 01  Mass storage controller\n\t08  Non-Volatile memory controller\n\t\t02  NVM Express\n";

    #[test]
    fn finds_what_was_asked() {
        let names = parse(SOME, &HashSet::from([(0x8086, 0x10d3), (0x1b36, 0x0010), (0x1234, 1)]));
        assert_eq!(names.vendor(0x8086), "Intel Corporation");
        assert_eq!(names.device(0x8086, 0x10d3), "82574L Gigabit Network Connection");
        assert_eq!(names.device(0x8086, 0x10d4), "10d4");
        assert_eq!(names.vendor(0x1234), "1234");
        assert_eq!(names.class(0x010802), "Non-Volatile memory controller");
        assert_eq!(names.class(0x020000), "Ethernet controller");
        assert_eq!(names.class(0xff0000), "class ff00");
    }

    proptest! {
        #[test]
        fn never_panics(text in "(C |\t|\t\t|)[0-9a-f]{2,4}  .{0,10}(\n(C |\t|)[0-9a-f]{2,4}  .{0,10}){0,5}|.{0,80}") {
            let _ = parse(&text, &HashSet::from([(0x8086, 0x10d3)]));
        }
    }
}
