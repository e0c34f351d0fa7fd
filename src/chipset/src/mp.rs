//! The tables of Intel's MultiProcessor Specification 1.4, which came before ACPI.
//!
//! A guest that has read the ACPI tables takes nothing from these. But an x86 Linux looks for them first, and where there are none it maps
//! and looks through the last 64 KiB below 1 MiB at each multiple of 16 bytes, some eight million instructions of its start. One that is
//! told not to use ACPI finds its processors and the serial port by them.

use crate::{IOAPIC_ADDRESS, SERIAL_GSI};

/// How long the pointer is.
pub(crate) const POINTER_BYTES: usize = 16;
/// Chapter 4: version 1.4 of the specification.
const REVISION: u8 = 4;
const LOCAL_APIC: u32 = 0xfee0_0000;
/// Of local APICs in a processor's package, and of the IOAPIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x20;
/// As the MADT and the IOAPIC's register have it.
const IOAPIC_ID: u8 = 0;
const ISA_BUS: u8 = 0;
const HEADER_BYTES: usize = 44;

// Table 4-3: kinds of entries.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
// Table 4-4: flags of a processor, and of an IOAPIC.
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
// Table 4-10: types of interrupts.
const VECTORED: u8 = 0;
const NON_MASKABLE: u8 = 1;
/// As its bus has them.
const CONFORMING: [u8; 2] = [0; 2];
const ALL_LOCAL_APICS: u8 = 0xff;

/// The pointer to the configuration table at `configuration` (4.1), for the start of the last KiB below 640 KiB.
pub(crate) fn pointer(configuration: u32) -> [u8; POINTER_BYTES] {
    let mut bytes = [0; POINTER_BYTES];
    let [one, two, three, four] = configuration.to_le_bytes();
    // Its length is told in units of 16 bytes; the checksum is next, and the five bytes of features are 0.
    let told = [b'_', b'M', b'P', b'_', one, two, three, four, 1, REVISION];
    for (place, byte) in bytes.iter_mut().zip(told) {
        *place = byte;
    }
    bytes[10] = complement(&bytes);
    bytes
}

/// The configuration table (4.2) of a machine whose processors have these APIC ids.
pub(crate) fn configuration(apic_ids: &[u8]) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count = count.saturating_add(1);
    };
    for (number, id) in apic_ids.iter().enumerate() {
        let flags = if number == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        let mut entry = [0; 20];
        // What it is and can, which follows, is told by CPUID.
        for (place, byte) in entry.iter_mut().zip([PROCESSOR, *id, LOCAL_APIC_VERSION, flags]) {
            *place = byte;
        }
        add(&entry);
    }
    add(&[&[BUS, ISA_BUS][..], b"ISA   "].concat());
    // The truncation is none: the address is a constant below 4 GiB.
    let address = (IOAPIC_ADDRESS as u32).to_le_bytes();
    add(&[&[IOAPIC, IOAPIC_ID, IOAPIC_VERSION, ENABLED][..], &address].concat());
    let interrupt = |kind, what, from, to: [u8; 2]| {
        let [low, high] = CONFORMING;
        [kind, what, low, high, ISA_BUS, from, to[0], to[1]]
    };
    add(&interrupt(INTERRUPT, VECTORED, SERIAL_GSI, [IOAPIC_ID, SERIAL_GSI]));
    add(&interrupt(LOCAL_INTERRUPT, NON_MASKABLE, 0, [ALL_LOCAL_APICS, 1]));
    let mut table = header(entries.len(), count);
    table.append(&mut entries);
    let complement = complement(&table);
    if let Some(checksum) = table.get_mut(7) {
        *checksum = complement;
    }
    table
}

/// Table 4-2, without the checksum.
fn header(entries_bytes: usize, count: u16) -> Vec<u8> {
    // 255 processors, the most, take 5 KiB.
    let length = u16::try_from(HEADER_BYTES.saturating_add(entries_bytes)).unwrap_or(u16::MAX);
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend(b"PCMP");
    header.extend(length.to_le_bytes());
    header.extend([REVISION, 0]);
    header.extend(b"CASEMATECASEMATE    ");
    // No table of the maker's own.
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    // No extended entries.
    header.extend([0; 4]);
    header
}

/// What makes the sum of all bytes 0.
pub(crate) fn complement(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_leads_to_the_table() {
        let pointer = pointer(0xe_1000);
        assert_eq!((&pointer[..4], &pointer[4..8]), (b"_MP_".as_slice(), [0, 0x10, 0xe, 0].as_slice()));
        assert_eq!((pointer[8], pointer[9], complement(&pointer)), (1, 4, 0));
    }

    #[test]
    fn each_processor_is_told_and_the_first_is_the_one_that_boots() {
        let table = configuration(&[0, 2, 4]);
        assert_eq!((&table[..4], complement(&table)), (b"PCMP".as_slice(), 0));
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 3 + 4, "and bus, IOAPIC, two interrupts");
        let processors: Vec<_> = table[HEADER_BYTES..].chunks(20).take(3).map(|entry| &entry[..4]).collect();
        assert_eq!(processors, [[0, 0, 0x14, 3], [0, 2, 0x14, 1], [0, 4, 0x14, 1]]);
        assert_eq!(&table[HEADER_BYTES + 60..][..8], b"\x01\0ISA   ");
        assert_eq!(table.len(), HEADER_BYTES + 60 + 4 * 8);
    }

    #[test]
    fn the_most_processors_fit() {
        let table = configuration(&(0..=254).collect::<Vec<_>>());
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
    }
}
