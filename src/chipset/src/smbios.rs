//! The tables of DMTF's System Management BIOS Reference Specification 3.7 (DSP0134): who the machine says that it is.
//!
//! Guests find them by looking for the entry point; Linux shows them below `/sys/class/dmi/id`. A first boot of systemd makes the guest's
//! `/etc/machine-id` from the UUID, cloud-init looks at the serial number, and systemd takes credentials from the OEM strings.

use crate::mp::complement;

/// Where guests begin to look for the entry point (5.2.2), at each multiple of 16 bytes.
pub const SMBIOS_ADDRESS: u64 = 0xf_0000;

/// How long the entry point is.
const ENTRY_BYTES: u8 = 24;
const VERSION: [u8; 2] = [3, 7];
/// Structures' types.
const FIRMWARE: u8 = 0;
const SYSTEM: u8 = 1;
const OEM_STRINGS: u8 = 11;
const END: u8 = 127;
/// 7.1.1: nothing is told of what a BIOS has; and the second byte after: this is a virtual machine.
const CHARACTERISTICS: u64 = 1 << 3;
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// 7.1: firmware and embedded controller without releases of their own.
const NO_RELEASES: [u8; 4] = [0xff; 4];
/// 7.2.2: by its power switch.
const WOKEN_BY: u8 = 6;
const MAKER: &str = "Casemate";
const PRODUCT: &str = "Casemate guest";

/// What is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The machine's, in the order in which it's written.
    pub uuid: [u8; 16],
    /// Its serial number; one without characters is none.
    pub serial: String,
    /// For whoever knows what they mean. As the serial number's, their characters are printable.
    pub oem_strings: Vec<String>,
}

/// Entry point and tables, to be written at [`SMBIOS_ADDRESS`].
pub fn smbios(identity: &Identity) -> Vec<u8> {
    let mut tables = Structures::default();
    let [major, minor] = VERSION;
    let mut firmware = vec![1, 2, 0, 0, 0, 0];
    firmware.extend(CHARACTERISTICS.to_le_bytes());
    firmware.extend([0, VIRTUAL_MACHINE]);
    firmware.extend(NO_RELEASES);
    firmware.extend([0, 0]);
    tables.add(FIRMWARE, &firmware, [MAKER, "none"].into_iter());
    // Maker and product, no version, and the serial number if there is one.
    let mut system = vec![1, 2, 0, if identity.serial.is_empty() { 0 } else { 3 }];
    system.extend(little_endian(identity.uuid));
    system.extend([WOKEN_BY, 0, 0]);
    tables.add(SYSTEM, &system, [MAKER, PRODUCT, &identity.serial].into_iter());
    if let Some(count) = u8::try_from(identity.oem_strings.len()).ok().filter(|count| *count > 0) {
        tables.add(OEM_STRINGS, &[count], identity.oem_strings.iter().map(String::as_str));
    }
    tables.add(END, &[], std::iter::empty());
    let tables = tables.bytes;
    let mut bytes = b"_SM3_".to_vec();
    bytes.extend([0, ENTRY_BYTES, major, minor, 0, 1, 0]);
    bytes.extend(u32::try_from(tables.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend((SMBIOS_ADDRESS + u64::from(ENTRY_BYTES)).to_le_bytes());
    let checksum = complement(&bytes);
    if let Some(place) = bytes.get_mut(5) {
        *place = checksum;
    }
    bytes.extend(tables);
    bytes
}

/// 7.2.1: a UUID's first three fields are little-endian.
fn little_endian(uuid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// Structures one behind another (6.1); a handle is a structure's number.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
}

impl Structures {
    /// Adds one with these bytes behind its header, and those of the strings that are none.
    fn add<'a>(&mut self, kind: u8, formatted: &[u8], strings: impl Iterator<Item = &'a str>) {
        const HEADER_BYTES: usize = 4;
        // The longest here has 26.
        let length = u8::try_from(HEADER_BYTES + formatted.len()).unwrap_or(u8::MAX);
        self.bytes.extend([kind, length]);
        self.bytes.extend(self.count.to_le_bytes());
        self.bytes.extend(formatted);
        let before = self.bytes.len();
        for string in strings.filter(|string| !string.is_empty()) {
            self.bytes.extend(string.bytes());
            self.bytes.push(0);
        }
        // Two zeros end them, also where there are none.
        self.bytes.extend(if self.bytes.len() == before { &[0, 0][..] } else { &[0] });
        self.count = self.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type, formatted area with the header, strings; as a guest takes them apart.
    type Structure = (u8, Vec<u8>, Vec<String>);

    fn read(bytes: &[u8]) -> Vec<Structure> {
        let (entry, mut rest) = bytes.split_at(24);
        assert_eq!((&entry[..5], complement(entry)), (&b"_SM3_"[..], 0));
        assert_eq!(entry[12..16], u32::try_from(rest.len()).unwrap().to_le_bytes());
        assert_eq!(entry[16..24], (SMBIOS_ADDRESS + 24).to_le_bytes());
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let (formatted, behind) = rest.split_at(rest[1].into());
            let end = behind.windows(2).position(|two| two == [0, 0]).unwrap();
            let strings = behind[..end].split(|byte| *byte == 0).filter(|string| !string.is_empty());
            let strings = strings.map(|string| String::from_utf8(string.to_vec()).unwrap()).collect();
            structures.push((formatted[0], formatted.to_vec(), strings));
            rest = &behind[end + 2..];
        }
        structures
    }

    #[test]
    fn a_guest_finds_who_it_is() {
        let uuid =
            [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        let oem_strings = vec!["one".to_owned(), "io.systemd.credential:two=2".to_owned()];
        let structures =
            read(&smbios(&Identity { uuid, serial: "ds=nocloud".into(), oem_strings: oem_strings.clone() }));
        let [firmware, system, oem, end] = structures.as_slice() else { panic!("{structures:?}") };
        assert_eq!((firmware.0, firmware.1.len(), firmware.1[19]), (0, 24 + 2, VIRTUAL_MACHINE));
        assert_eq!((system.0, system.1.len(), system.1[7]), (1, 27, 3));
        assert_eq!(
            system.1[8..24],
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
        assert_eq!(system.2, ["Casemate", "Casemate guest", "ds=nocloud"]);
        assert_eq!((oem.0, oem.1[4], &oem.2), (11, 2, &oem_strings));
        assert_eq!((end.0, end.1.len()), (127, 4));
        let handles: Vec<_> = structures.iter().map(|(_, bytes, _)| bytes[2]).collect();
        assert_eq!(handles, [0, 1, 2, 3]);
    }

    #[test]
    fn what_is_not_given_is_not_there() {
        let structures = read(&smbios(&Identity::default()));
        assert_eq!(structures.iter().map(|structure| structure.0).collect::<Vec<_>>(), [0, 1, 127]);
        assert_eq!((structures[1].1[7], structures[1].2.len()), (0, 2));
    }
}
