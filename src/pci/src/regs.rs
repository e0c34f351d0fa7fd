/// Vendor ID, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command, 16 bits.
pub const COMMAND: u16 = 0x04;
/// Command: the function answers to its I/O BARs.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: the function answers to its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may start transactions (DMA and MSI).
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: parity error response.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: system error enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: the function must not assert INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status, 16 bits.
pub const STATUS: u16 = 0x06;
/// Status: there is a capability list.
pub const STATUS_CAP_LIST: u16 = 1 << 4;
/// Status: the error bits, which software clears by writing ones.
pub const STATUS_ERRORS: u16 = 0xf900;
/// Revision, 8 bits.
pub const REVISION_ID: u16 = 0x08;
/// Class code, 24 bits: interface, subclass, class.
pub const CLASS_CODE: u16 = 0x09;
/// Cache line size, 8 bits.
pub const CACHE_LINE_SIZE: u16 = 0x0c;
/// Header type, 8 bits; the uppermost bit says that the device has more than one function.
pub const HEADER_TYPE: u16 = 0x0e;
/// Header type: a bridge between PCI buses.
pub const HEADER_TYPE_BRIDGE: u8 = 1;
/// Header type: the device has more than one function.
pub const HEADER_TYPE_MULTIFUNCTION: u8 = 1 << 7;
/// The first of six base address registers of 32 bits.
pub const BASE_ADDRESS_0: u16 = 0x10;
/// Bridge: number of the bus that it sits on, 8 bits.
pub const PRIMARY_BUS: u16 = 0x18;
/// Bridge: number of the bus behind it, 8 bits.
pub const SECONDARY_BUS: u16 = 0x19;
/// Bridge: the highest number of a bus behind it, 8 bits.
pub const SUBORDINATE_BUS: u16 = 0x1a;
/// Bridge: status of the bus behind it, 16 bits; its errors are those of [`STATUS`].
pub const SECONDARY_STATUS: u16 = 0x1e;
/// Bridge: address bits 31 to 20 where its memory window begins, in the upper 12 of 16 bits.
pub const MEMORY_BASE: u16 = 0x20;
/// Bridge: address bits 31 to 20 of the window's last MiB, in the upper 12 of 16 bits.
pub const MEMORY_LIMIT: u16 = 0x22;
/// Bridge: where its prefetchable window begins, as [`MEMORY_BASE`].
pub const PREF_MEMORY_BASE: u16 = 0x24;
/// Bridge: the prefetchable window's last MiB, as [`MEMORY_LIMIT`].
pub const PREF_MEMORY_LIMIT: u16 = 0x26;
/// Bridge: address bits 63 to 32 of the prefetchable window's base.
pub const PREF_BASE_UPPER32: u16 = 0x28;
/// Bridge: address bits 63 to 32 of the prefetchable window's limit.
pub const PREF_LIMIT_UPPER32: u16 = 0x2c;
/// Bridge: control, 16 bits.
pub const BRIDGE_CONTROL: u16 = 0x3e;
/// Bridge control: parity error response behind it.
pub const BRIDGE_CONTROL_PARITY: u16 = 1 << 0;
/// Bridge control: system error enable behind it.
pub const BRIDGE_CONTROL_SERR: u16 = 1 << 1;
/// Bridge control: the bus behind it is held in reset.
pub const BRIDGE_CONTROL_BUS_RESET: u16 = 1 << 6;
/// Subsystem vendor ID, 16 bits.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID, 16 bits.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Where the option ROM is decoded, 32 bits: address bits 31 to 11, and whether it is (PCI 3.0, 6.2.5.2).
pub const EXPANSION_ROM: u16 = 0x30;
/// Expansion ROM: it is decoded, where memory is.
pub const EXPANSION_ROM_ENABLE: u32 = 1;
/// Offset of the first capability, 8 bits.
pub const CAPABILITY_LIST: u16 = 0x34;
/// Interrupt line, 8 bits; the function itself takes no notice of it.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// First byte behind the header, where capabilities may stand.
pub const CAPABILITIES_START: u8 = 0x40;
/// Capability: Power Management.
pub const CAP_ID_PM: u8 = 0x01;
/// Capability: Message Signalled Interrupts.
pub const CAP_ID_MSI: u8 = 0x05;
/// Capability: vendor specific; virtio uses it.
pub const CAP_ID_VNDR: u8 = 0x09;
/// Capability: PCI Express.
pub const CAP_ID_EXP: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_ID_MSIX: u8 = 0x11;
