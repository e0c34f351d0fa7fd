//! Serial port, IOAPIC, ACPI tables and power control.
