//! The board around the processors: serial port, IOAPIC, tables of ACPI, MP and SMBIOS, power control and button, panic notifier, watchdog,
//! clock chip.
//!
//! Principles:
//! - Each device is a state machine over plain reads and writes. It does no I/O of its own: where a device must
//!   reach out, its owner hands it a [`std::io::Write`], a closure or a trait, and decides what that may block on.
//! - What the guest sends is never trusted and never refused with an error: an access that means nothing reads as
//!   zeros and writes to nowhere, as on a real board. Nothing here grows with what a guest does.
//! - Nothing is known of KVM, VFIO or virtio. The IOAPIC speaks in messages ([`Msi`]), so any interrupt
//!   controller that takes MSIs can stand behind it.
//!
//! Absent on purpose: PIC, PIT and i8042. The ACPI tables say so (hardware-reduced, and the FADT's boot flags). The clock
//! chip is there for guests that want one: Linux takes its time from kvmclock. There is no BIOS either, but for the few bytes that a guest
//! finds where it would jump to for a reset ([`RESET_CODE`]).

mod acpi;
mod ioapic;
mod mp;
mod panic;
mod power;
mod rtc;
mod serial;
mod smbios;
mod watchdog;

pub use acpi::{AcpiError, AcpiSpec, GENERATION_GSI, PciHost, Tables, tables};
pub use ioapic::{IOAPIC_ADDRESS, IOAPIC_PINS, IOAPIC_SIZE_BYTES, IoApic, Msi, MsiSink, intx_gsi};
pub use panic::{PANIC_PORT, PANIC_PORTS, panic_read, panic_write};
pub use power::{POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, Power, PowerEvent, RESET_CODE, RESET_VECTOR};
pub use rtc::{RTC_PORT, RTC_PORTS, Rtc};
pub use serial::{SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, Serial};
pub use smbios::{Identity, SMBIOS_ADDRESS, smbios};
pub use watchdog::{WATCHDOG_PORT, WATCHDOG_PORTS, Watchdog};
