//! What the guest's system reads of its machine when it starts: tables of ACPI, MP and SMBIOS, and which life of the machine this is.

use casemate_chipset::{
    AcpiSpec, Identity, PciHost, RESET_CODE, RESET_VECTOR, SMBIOS_ADDRESS, smbios, tables,
};
use rustix::rand::GetRandomFlags;
use vm_memory::GuestMemoryMmap;

use crate::{
    boot::put,
    cpu::Processors,
    error::{During, Error},
    layout,
};

/// Of which machine.
pub(crate) struct Told<'a> {
    pub(crate) processors: &'a Processors,
    /// For hot-plug.
    pub(crate) slots: u8,
    pub(crate) window64: layout::Range,
    pub(crate) platform: casemate_wire::Platform,
}

/// Writes all of it, and returns where the RSDP is.
pub(crate) fn write(memory: &GuestMemoryMmap, told: Told<'_>) -> Result<u64, Error> {
    let rsdp = write_acpi(memory, &told)?;
    let casemate_wire::Platform { uuid, serial, oem_strings, rtc: _ } = told.platform;
    put_within(memory, SMBIOS_ADDRESS..layout::GENERATION, &smbios(&Identity { uuid, serial, oem_strings }))?;
    // Which life of this machine it is: each is its first and last, as long as none is woken from a snapshot.
    let mut generation = [0; 16];
    rustix::rand::getrandom(&mut generation, GetRandomFlags::empty())
        .during("making the generation's identifier")?;
    put(memory, layout::GENERATION, &generation)?;
    // Where Linux jumps to when it resets "by BIOS": a few instructions that write the reset register.
    put(memory, RESET_VECTOR, &RESET_CODE)?;
    Ok(rsdp)
}

fn write_acpi(memory: &GuestMemoryMmap, told: &Told<'_>) -> Result<u64, Error> {
    let pci = PciHost {
        ecam_base: layout::ECAM.start,
        // Each slot is on a bus of its own.
        buses: 0..=told.slots,
        // Both ends were chosen to have 16 bits.
        ports: layout::PORTS.start as u16..=(layout::PORTS.end() - 1) as u16,
        mmio32: layout::WINDOW32.start..layout::WINDOW32.end(),
        mmio64: told.window64.start..told.window64.end(),
    };
    let spec = AcpiSpec {
        address: layout::ACPI,
        apic_ids: told.processors.topology().apic_ids().collect(),
        generation: layout::GENERATION,
        pci,
        has_rtc: told.platform.rtc,
    };
    let tables = tables(&spec).map_err(|error| Error::Layout(error.to_string()))?;
    put_within(memory, layout::ACPI..SMBIOS_ADDRESS, &tables.bytes)?;
    put(memory, layout::LOW_END, &tables.mp_pointer)?;
    Ok(tables.rsdp)
}

fn put_within(memory: &GuestMemoryMmap, place: std::ops::Range<u64>, bytes: &[u8]) -> Result<(), Error> {
    if bytes.len() as u64 > place.end - place.start {
        return Err(Error::Layout(format!("{} bytes of tables at {:#x}", bytes.len(), place.start)));
    }
    put(memory, place.start, bytes)
}
