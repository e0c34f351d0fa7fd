//! The ACPI tables of a hardware-reduced machine (ACPI 6.5): RSDP, XSDT, FADT, MADT, MCFG, WDAT, DSDT.

use std::ops::{Range, RangeInclusive};

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    xsdt::XSDT,
};

use crate::{
    IOAPIC_ADDRESS, IOAPIC_SIZE_BYTES, POWER_PORT, mp,
    power::{RESET, RESET_VALUE, SLEEP_CONTROL, SLEEP_STATUS},
    rtc, watchdog,
};

mod dsdt;

pub(crate) const OEM_ID: [u8; 6] = *b"CSMATE";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"CASEMATE";
pub(crate) const OEM_REVISION: u32 = 1;

/// Local APIC ids of the MADT's processor entries are bytes, and 255 is the broadcast.
const VCPUS_MAX: usize = 255;
/// Configuration space of one bus (PCIe 6.0, 7.2.2).
const ECAM_BUS_SIZE_BYTES: u64 = 1 << 20;
/// The platform's own ports, and those of old that a guest may probe, are below.
const PLATFORM_PORTS_END: u64 = 0x1000;
const LOCAL_APIC: Range<u64> = 0xfee0_0000..0xfef0_0000;
const TABLE_ALIGNMENT: usize = 16;
/// Alignment of the generation's identifier, by Microsoft's "Virtual Machine Generation ID".
const GENERATION_ALIGNMENT: u64 = 8;

/// The interrupt that tells the guest of another generation: edge-triggered, active high.
pub const GENERATION_GSI: u8 = 6;

// FADT, IA-PC boot architecture flags.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const NO_PCIE_ASPM: u16 = 1 << 4;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The machine that the tables describe. The parts that are the same in every machine (serial port, IOAPIC, power
/// registers) are not told here.
#[derive(Clone, Debug)]
pub struct AcpiSpec {
    /// Guest physical address, a multiple of 16 below 4 GiB, at which the tables will lie.
    pub address: u64,
    /// The APIC id of each processor, 1 to 255 of them.
    pub apic_ids: Vec<u8>,
    /// Guest physical address, a multiple of 8, of the 16 bytes that tell one life of the machine from another. They lie
    /// outside of what the guest takes for its memory.
    pub generation: u64,
    /// The PCI host bridge.
    pub pci: PciHost,
    /// Whether there is a clock chip.
    pub has_rtc: bool,
}

/// The PCI host bridge of segment 0.
#[derive(Clone, Debug)]
pub struct PciHost {
    /// Guest physical address of bus 0's configuration space, even if bus 0 is not in `buses`; a multiple of 1 MiB.
    pub ecam_base: u64,
    /// The buses behind the bridge; the first is the root bus.
    pub buses: RangeInclusive<u8>,
    /// Ports for I/O BARs.
    pub ports: RangeInclusive<u16>,
    /// Addresses below 4 GiB for BARs.
    pub mmio32: Range<u64>,
    /// Addresses for 64-bit BARs; may be empty.
    pub mmio64: Range<u64>,
}

/// The tables, ready to be copied into guest memory.
#[derive(Clone, Debug)]
pub struct Tables {
    /// To be written at [`AcpiSpec::address`].
    pub bytes: Vec<u8>,
    /// Guest physical address of the RSDP, which the boot protocol hands to the guest.
    pub rsdp: u64,
    /// Leads to the tables of the MultiProcessor Specification, which lie behind those of ACPI: to be written at the start of the last KiB
    /// below 640 KiB, where guests look for it.
    pub mp_pointer: [u8; mp::POINTER_BYTES],
}

/// Why no tables can be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// See [`AcpiSpec::apic_ids`].
    #[error("{0} processors; the tables hold 1 to 255")]
    Vcpus(usize),
    /// Tables or ECAM lie at an odd address, or past the end of addresses.
    #[error("the {what} cannot lie at {address:#x}")]
    Address {
        /// What lies there.
        what: &'static str,
        /// The address asked for.
        address: u64,
    },
    /// A window is empty, reversed, or reaches where it must not.
    #[error("the {what} cannot be {start:#x} to {end:#x}")]
    Window {
        /// Which window.
        what: &'static str,
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
    },
}

impl PciHost {
    /// The ECAM addresses of `buses`.
    fn ecam(&self) -> Option<Range<u64>> {
        let bus = |number: u64| self.ecam_base.checked_add(number.checked_mul(ECAM_BUS_SIZE_BYTES)?);
        Some(bus(u64::from(*self.buses.start()))?..bus(u64::from(*self.buses.end()) + 1)?)
    }

    fn check(&self) -> Result<Range<u64>, AcpiError> {
        let misplaced = AcpiError::Address { what: "PCI configuration space", address: self.ecam_base };
        if !self.ecam_base.is_multiple_of(ECAM_BUS_SIZE_BYTES) || self.buses.is_empty() {
            return Err(misplaced);
        }
        let ecam = self.ecam().ok_or(misplaced)?;
        let ioapic = IOAPIC_ADDRESS..IOAPIC_ADDRESS + IOAPIC_SIZE_BYTES;
        let taken = [&ecam, &ioapic, &LOCAL_APIC];
        let refused =
            |what, window: &Range<u64>| Err(AcpiError::Window { what, start: window.start, end: window.end });
        if self.mmio32.is_empty()
            || self.mmio32.end > 1 << 32
            || taken.iter().any(|t| overlap(t, &self.mmio32))
        {
            return refused("32-bit PCI window", &self.mmio32);
        }
        if self.mmio64.start > self.mmio64.end
            || overlap(&self.mmio32, &self.mmio64)
            || taken.iter().any(|t| overlap(t, &self.mmio64))
        {
            return refused("64-bit PCI window", &self.mmio64);
        }
        // What the platform has itself lies below.
        let ports = u64::from(*self.ports.start())..u64::from(*self.ports.end()) + 1;
        if ports.is_empty() || ports.start < PLATFORM_PORTS_END {
            return refused("window of PCI ports", &ports);
        }
        Ok(ecam)
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    !one.is_empty() && !other.is_empty() && one.start < other.end && other.start < one.end
}

/// Makes the tables of the machine `spec`.
///
/// # Errors
/// When `spec` is not a machine: no processor or too many, misplaced tables or ECAM, windows that are empty or
/// overlap ECAM, the IOAPIC, the local APICs or each other.
pub fn tables(spec: &AcpiSpec) -> Result<Tables, AcpiError> {
    if !(1..=VCPUS_MAX).contains(&spec.apic_ids.len()) {
        return Err(AcpiError::Vcpus(spec.apic_ids.len()));
    }
    let ecam = spec.pci.check()?;
    if !spec.generation.is_multiple_of(GENERATION_ALIGNMENT) {
        return Err(AcpiError::Address { what: "generation's identifier", address: spec.generation });
    }
    let mut place = Placement::new(spec.address)?;
    let dsdt = place.add(&dsdt::dsdt(spec, &ecam))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in
        [&fadt(dsdt, spec.has_rtc) as &dyn Aml, &madt(&spec.apic_ids), &mcfg(&spec.pci), &watchdog::table()]
    {
        xsdt.add_entry(place.add(table)?);
    }
    let xsdt = place.add(&xsdt)?;
    let mp = place.put(|bytes| bytes.extend(mp::configuration(&spec.apic_ids)))?;
    // It has no more bits.
    let mp = u32::try_from(mp).map_err(|_| AcpiError::Address { what: "tables", address: spec.address })?;
    Ok(place.finish(&Rsdp::new(OEM_ID, xsdt), mp::pointer(mp)))
}

/// Tables one behind another, the RSDP first.
struct Placement {
    base: u64,
    bytes: Vec<u8>,
}

impl Placement {
    fn new(base: u64) -> Result<Self, AcpiError> {
        if !base.is_multiple_of(TABLE_ALIGNMENT as u64) {
            return Err(AcpiError::Address { what: "tables", address: base });
        }
        Ok(Self { base, bytes: vec![0; Rsdp::len()] })
    }

    /// Places `table` and returns its address.
    fn add(&mut self, table: &dyn Aml) -> Result<u64, AcpiError> {
        self.put(|bytes| table.to_aml_bytes(bytes))
    }

    /// Places what `append` appends and returns its address.
    fn put(&mut self, append: impl FnOnce(&mut Vec<u8>)) -> Result<u64, AcpiError> {
        self.bytes.resize(self.bytes.len().next_multiple_of(TABLE_ALIGNMENT), 0);
        let address = self.base.checked_add(self.bytes.len() as u64);
        append(&mut self.bytes);
        let end = self.base.checked_add(self.bytes.len() as u64);
        address.filter(|_| end.is_some()).ok_or(AcpiError::Address { what: "tables", address: self.base })
    }

    fn finish(mut self, rsdp: &Rsdp, mp_pointer: [u8; mp::POINTER_BYTES]) -> Tables {
        let mut first = Vec::new();
        rsdp.to_aml_bytes(&mut first);
        self.bytes.splice(..Rsdp::len(), first);
        Tables { bytes: self.bytes, rsdp: self.base, mp_pointer }
    }
}

fn fadt(dsdt: u64, has_rtc: bool) -> impl Aml {
    let port = |register: u16| {
        let address = u64::from(POWER_PORT + register);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        // No fixed power and sleep buttons: these flags say so when set.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    if has_rtc {
        fadt.iapc_boot_arch = (VGA_NOT_PRESENT | NO_PCIE_ASPM).into();
        fadt.century = rtc::CENTURY;
    } else {
        fadt.iapc_boot_arch = (VGA_NOT_PRESENT | NO_PCIE_ASPM | CMOS_RTC_NOT_PRESENT).into();
    }
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(apic_ids: &[u8]) -> impl Aml {
    let local_apic = LocalInterruptController::Address(0xfee0_0000);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for (id, uid) in apic_ids.iter().zip(0..=u8::MAX) {
        madt.add_structure(ProcessorLocalApic::new(uid, *id, EnabledStatus::Enabled));
    }
    // The truncation is none: the address is a constant below 4 GiB.
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS as u32, 0));
    madt
}

fn mcfg(pci: &PciHost) -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(pci.ecam_base, 0, *pci.buses.start(), *pci.buses.end());
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, process::Command};

    fn spec() -> AcpiSpec {
        AcpiSpec {
            address: 0xe0000,
            apic_ids: (0..4).collect(),
            generation: 0xf_e000,
            pci: PciHost {
                ecam_base: 0xe000_0000,
                buses: 0..=0,
                ports: 0xc000..=0xffff,
                mmio32: 0xc000_0000..0xe000_0000,
                mmio64: 0x10_0000_0000..0x20_0000_0000,
            },
            has_rtc: false,
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    /// The table at guest physical `address`, its checksum checked.
    fn table(tables: &Tables, address: u64) -> &[u8] {
        let bytes = &tables.bytes[usize::try_from(address - tables.rsdp).unwrap()..];
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        table
    }

    /// Follows the pointers as a guest does.
    fn walk(tables: &Tables) -> Vec<(String, Vec<u8>)> {
        let rsdp = &tables.bytes[..36];
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (b"RSD PTR ".as_slice(), 0, 0));
        let xsdt = table(tables, u64_at(rsdp, 24));
        let mut found: Vec<_> =
            (36..xsdt.len()).step_by(8).map(|at| table(tables, u64_at(xsdt, at))).collect();
        let fadt = found.iter().find(|table| table.starts_with(b"FACP")).unwrap();
        found.push(table(tables, u64_at(fadt, 140)));
        found.iter().map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table.to_vec())).collect()
    }

    #[test]
    fn the_pointers_lead_to_every_table() {
        let tables = tables(&spec()).unwrap();
        let names: Vec<_> = walk(&tables).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "WDAT", "DSDT"]);
    }

    #[test]
    fn the_fadt_is_hardware_reduced_and_tells_the_power_registers() {
        let tables = walk(&tables(&spec()).unwrap());
        let fadt = &tables[0].1;
        assert_eq!((fadt[8], fadt.len()), (6, 276));
        assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        let register = |offset: usize| (fadt[offset], fadt[offset + 1], u64_at(fadt, offset + 4));
        assert_eq!(register(116), (1, 8, 0x602), "reset");
        assert_eq!(register(244), (1, 8, 0x600), "sleep control");
        assert_eq!(register(256), (1, 8, 0x601), "sleep status");
    }

    #[test]
    fn the_madt_has_each_processor_and_the_ioapic() {
        for vcpus in [1, 64, 255] {
            // As of cores with two threads, of which every second is left out.
            let apic_ids = (0..vcpus).map(|id: u8| id.wrapping_mul(2)).collect();
            let tables = walk(&tables(&AcpiSpec { apic_ids, ..spec() }).unwrap());
            let madt = &tables[1].1;
            assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
            let last = &madt[44 + 8 * usize::from(vcpus - 1)..];
            assert_eq!(last[..4], [0, 8, vcpus - 1, (vcpus - 1).wrapping_mul(2)]);
            assert_eq!(u32_at(madt, madt.len() - 8), 0xfec0_0000);
        }
    }

    #[test]
    fn a_clock_chip_is_told_of_where_there_is_one() {
        for has_rtc in [false, true] {
            let tables = walk(&tables(&AcpiSpec { has_rtc, ..spec() }).unwrap());
            let (dsdt, fadt) = (&tables[4].1, &tables[0].1);
            let flags = u16::from_le_bytes([fadt[109], fadt[110]]);
            assert_eq!((flags & CMOS_RTC_NOT_PRESENT == 0, fadt[108] == rtc::CENTURY), (has_rtc, has_rtc));
            assert_eq!(dsdt.windows(4).any(|name| name == b"RTC_"), has_rtc);
        }
    }

    #[test]
    fn the_mp_table_lies_behind_them() {
        let tables = tables(&spec()).unwrap();
        let at = u32_at(&tables.mp_pointer, 4) - 0xe0000;
        assert!(tables.bytes[at as usize..].starts_with(b"PCMP"));
    }

    #[test]
    fn refuses_what_is_no_machine() {
        let with = |change: fn(&mut AcpiSpec)| {
            let mut spec = spec();
            change(&mut spec);
            tables(&spec).unwrap_err().to_string()
        };
        assert!(with(|s| s.apic_ids.clear()).contains("0 processors"));
        assert!(with(|s| s.apic_ids = vec![0; 256]).contains("256 processors"));
        assert!(with(|s| s.generation = 4).contains("generation"));
        assert!(with(|s| s.address = 8).contains("tables"));
        assert!(with(|s| s.address = u64::MAX - 15).contains("tables"));
        assert!(with(|s| s.address = 1 << 32).contains("tables"));
        assert!(with(|s| s.pci.ecam_base = 0x1000).contains("configuration space"));
        assert!(with(|s| s.pci.ecam_base = u64::MAX << 20).contains("configuration space"));
        assert!(with(|s| s.pci.mmio32 = 0xc000_0000..0xe000_1000).contains("32-bit"));
        assert!(with(|s| s.pci.mmio32 = 0xf000_0000..0x1_0000_0000).contains("32-bit"), "over the IOAPIC");
        assert!(with(|s| s.pci.mmio32 = 0..0).contains("32-bit"));
        assert!(with(|s| s.pci.mmio64 = 0xd000_0000..0x2_0000_0000).contains("64-bit"));
        assert!(with(|s| s.pci.mmio64.end = 1).contains("64-bit"));
        assert!(with(|s| s.pci.ports = 0x600..=0xffff).contains("ports"));
        assert!(with(|s| s.pci.ports = RangeInclusive::new(0xd000, 0xcfff)).contains("ports"));
    }

    /// The reference compiler takes every table apart and puts the DSDT together again, without an error or warning.
    #[test]
    fn iasl_agrees() {
        if Command::new("iasl").arg("-v").output().is_err() {
            println!("iasl (package acpica-tools) is not here: not checked");
            return;
        }
        let dir = std::env::temp_dir().join(format!("casemate-acpi-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (mmio64, has_rtc) in [(0..0, false), (spec().pci.mmio64, true)] {
            let pci = PciHost { mmio64, ..spec().pci };
            let spec = AcpiSpec { pci, apic_ids: (0..64).collect(), has_rtc, ..spec() };
            for (name, bytes) in walk(&tables(&spec).unwrap()) {
                let file = dir.join(format!("{name}.aml"));
                fs::write(&file, bytes).unwrap();
                let text = iasl(&["-d".as_ref(), file.as_os_str()]);
                assert!(!text.contains("Invalid") && !text.contains("Error"), "{name}: {text}");
                if name == "DSDT" {
                    let text = iasl(&["-ve".as_ref(), file.with_extension("dsl").as_os_str()]);
                    assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
                }
            }
        }
        fs::remove_dir_all(dir).unwrap();
    }

    fn iasl(arguments: &[&std::ffi::OsStr]) -> String {
        let output = Command::new("iasl").args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(output.status.success(), "{text}");
        text
    }

    proptest! {
        #[test]
        fn any_spec_makes_sound_tables_or_an_error(
            address: u64, vcpus in 0usize..300, ecam_base: u64, first: u8, last: u8,
            ports in any::<(u16, u16)>(), low in any::<(u32, u32)>(), high in any::<(u64, u64)>(), tidy: bool, has_rtc: bool,
        ) {
            let align = |value: u64, to: u64| if tidy { value & !(to - 1) } else { value };
            let spec = AcpiSpec {
                address: if tidy { address & 0xffff_fff0 } else { address },
                apic_ids: vec![7; vcpus],
                generation: address & !7,
                pci: PciHost {
                    ecam_base: align(ecam_base, 1 << 20),
                    buses: first..=last,
                    ports: ports.0..=ports.1,
                    mmio32: u64::from(low.0)..u64::from(low.1),
                    mmio64: high.0..high.1,
                },
                has_rtc,
            };
            if let Ok(tables) = tables(&spec) {
                prop_assert_eq!(walk(&tables).len(), 5);
            }
        }
    }
}
