/// Vendor ID, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command, 16 bits.
pub const COMMAND: u16 = 0x04;
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
/// The first of six base address registers of 32 bits.
pub const BASE_ADDRESS_0: u16 = 0x10;
/// Subsystem vendor ID, 16 bits.
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID, 16 bits.
pub const SUBSYSTEM_ID: u16 = 0x2e;
/// Offset of the first capability, 8 bits.
pub const CAPABILITY_LIST: u16 = 0x34;
/// Interrupt line, 8 bits; the function itself takes no notice of it.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// First byte behind the header, where capabilities may stand.
pub const CAPABILITIES_START: u8 = 0x40;
/// Capability: Power Management.
pub const CAP_ID_PM: u8 = 0x01;
/// Capability: vendor specific; virtio uses it.
pub const CAP_ID_VNDR: u8 = 0x09;
/// Capability: PCI Express.
pub const CAP_ID_EXP: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_ID_MSIX: u8 = 0x11;
