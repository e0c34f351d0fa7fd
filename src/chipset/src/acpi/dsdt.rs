//! The DSDT: what the guest finds by name.

use std::ops::Range;

use acpi_tables::{
    Aml, AmlSink,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO,
        If, Interrupt, Local, Method, Name, NotEqual, Notify, ONE, Or, Package, PackageBuilder, Path,
        ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
    },
    sdt::Sdt,
};

use super::{AcpiSpec, GENERATION_GSI, OEM_ID, OEM_REVISION, OEM_TABLE_ID, PciHost};
use crate::{
    PANIC_PORT, PANIC_PORTS, POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, RTC_PORT, RTC_PORTS, SERIAL_GSI,
    SERIAL_PORT, SERIAL_PORTS, WATCHDOG_PORT, WATCHDOG_PORTS, intx_gsi, power::SLEEP_TYPE_S5,
};

const HEADER_SIZE_BYTES: u32 = 36;

/// What the guest may take over of PCIe by `_OSC` (PCI Firmware 3.3, 4.5.1): native hotplug, PME and the capability
/// structures. Not AER: no port here reports errors.
const OSC_GRANTED: u8 = 1 << 0 | 1 << 2 | 1 << 4;

type Space<T> = AddressSpace<T>;

/// The DSDT of `spec`, whose configuration space is at `ecam`.
pub(super) fn dsdt(spec: &AcpiSpec, ecam: &Range<u64>) -> Sdt {
    let mut body = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    let mut devices = Vec::new();
    host_bridge(&spec.pci, &mut devices);
    motherboard(ecam, &mut devices);
    serial_port(&mut devices);
    power_button(&mut devices);
    generation(spec.generation, &mut devices);
    events(&mut devices);
    panic_notifier(&mut devices);
    if spec.has_rtc {
        clock_chip(&mut devices);
    }
    for (uid, _) in (0..).zip(&spec.apic_ids) {
        processor(uid, &mut devices);
    }
    body.extend(Scope::raw("\\_SB_".into(), devices));

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_SIZE_BYTES, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn host_bridge(pci: &PciHost, sink: &mut dyn AmlSink) {
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let buses = Space::new_bus_number(u16::from(*pci.buses.start()), u16::from(*pci.buses.end()));
    // Both ends were checked to be below 4 GiB.
    let low =
        Space::new_memory(not_cacheable, true, pci.mmio32.start as u32, (pci.mmio32.end - 1) as u32, None);
    let high = (!pci.mmio64.is_empty())
        .then(|| Space::new_memory(not_cacheable, true, pci.mmio64.start, pci.mmio64.end - 1, None));
    let ports = Space::new_io(*pci.ports.start(), *pci.ports.end(), None);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports, &low];
    if let Some(high) = &high {
        resources.push(high);
    }
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), pci.buses.start()),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &Name::new("_PRT".into(), &interrupt_routes()),
            &OperatingSystemCapabilities,
        ],
    )
    .to_aml_bytes(sink);
}

/// `_PRT` (ACPI 6.5, 6.2.13): where INTA to INTD of each slot of the root bus go. Level-triggered, as PCI has it.
fn interrupt_routes() -> PackageBuilder {
    const ALL_FUNCTIONS: u32 = 0xffff;
    let mut routes = PackageBuilder::new();
    for slot in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | ALL_FUNCTIONS;
            // No link device: the line is wired to this GSI.
            routes.add_element(&Package::new(vec![&address, &pin, &ZERO, &intx_gsi(slot, pin)]));
        }
    }
    routes
}

/// `_OSC` of a PCIe host bridge: grants what is in [`OSC_GRANTED`] and masks the rest.
struct OperatingSystemCapabilities;

impl Aml for OperatingSystemCapabilities {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        const UNKNOWN_UUID: u8 = 1 << 2;
        const UNKNOWN_REVISION: u8 = 1 << 3;
        const MASKED: u8 = 1 << 4;
        let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
        let set = |bit: &'static u8| Or::new(&status, &status, bit);
        let known = Uuid::new("33db4d5b-1ff7-401c-9657-7441c03dd766");
        Method::new(
            "_OSC".into(),
            4,
            false,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &ZERO),
                &If::new(
                    &Equal::new(&Arg(0), &known),
                    vec![
                        &CreateDWordField::new(&control, &Arg(3), &8u8),
                        &If::new(&NotEqual::new(&Arg(1), &ONE), vec![&set(&UNKNOWN_REVISION)]),
                        &And::new(&Local(0), &control, &OSC_GRANTED),
                        &If::new(&NotEqual::new(&Local(0), &control), vec![&set(&MASKED)]),
                        &Store::new(&control, &Local(0)),
                    ],
                ),
                &Else::new(vec![&set(&UNKNOWN_UUID)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Reserves what belongs to no other device: configuration space (Linux does not use MCFG without it), and the registers of
/// power control and watchdog.
fn motherboard(ecam: &Range<u64>, sink: &mut dyn AmlSink) {
    let ecam = Space::new_memory(AddressSpaceCacheable::NotCacheable, true, ecam.start, ecam.end - 1, None);
    let power = IO::new(POWER_PORT, POWER_PORT, 1, POWER_PORTS as u8);
    let watchdog = IO::new(WATCHDOG_PORT, WATCHDOG_PORT, 1, WATCHDOG_PORTS as u8);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &power, &watchdog])),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial_port(sink: &mut dyn AmlSink) {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, u32::from(SERIAL_GSI));
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

fn power_button(sink: &mut dyn AmlSink) {
    let button = Path::new("PWRB");
    Device::new(
        button,
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)],
    )
    .to_aml_bytes(sink);
}

/// Where the guest reads which life of the machine this is (Microsoft's "Virtual Machine Generation ID"; Linux's side is
/// `drivers/virt/vmgenid.c`).
fn generation(address: u64, sink: &mut dyn AmlSink) {
    let (low, high) = (address as u32, (address >> 32) as u32);
    let names = "VM_Gen_Counter";
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &names),
            &Name::new("_DDN".into(), &names),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device: its interrupts say that the power button was pressed, and that this is another life of the
/// machine.
fn events(sink: &mut dyn AmlSink) {
    const HAPPENED: u8 = 0x80;
    let (button, generation) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    let interrupt = |gsi: u8| Interrupt::new(true, true, false, false, u32::from(gsi));
    let pressed = Notify::new(&button, &HAPPENED);
    let another = Notify::new(&generation, &HAPPENED);
    Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&interrupt(POWER_BUTTON_GSI), &interrupt(GENERATION_GSI)]),
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &If::new(&Equal::new(&Arg(0), &POWER_BUTTON_GSI), vec![&pressed]),
                    &If::new(&Equal::new(&Arg(0), &GENERATION_GSI), vec![&another]),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn panic_notifier(sink: &mut dyn AmlSink) {
    let port = IO::new(PANIC_PORT, PANIC_PORT, 1, PANIC_PORTS as u8);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(sink);
}

/// Without an interrupt.
fn clock_chip(sink: &mut dyn AmlSink) {
    let ports = IO::new(RTC_PORT, RTC_PORT, 1, RTC_PORTS as u8);
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    )
    .to_aml_bytes(sink);
}

fn processor(id: u32, sink: &mut dyn AmlSink) {
    Device::new(
        Path::new(&format!("C{id:03X}")),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    )
    .to_aml_bytes(sink);
}
