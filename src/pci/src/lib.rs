//! PCI configuration space, BARs, MSI-X and capabilities as state machines.
//!
//! Everything here is driven by two parties who are not trusted: a guest, by configuration and BAR accesses of any
//! width at any offset, and a physical device, by what its configuration space says. So this crate does no I/O, holds
//! no unsafe code, allocates nothing in answer to a guest, and cannot panic on what either of them brings.
//!
//! What a function answers to is state that can be asked for ([`Function::decoded`]), not an event that can be missed:
//! the PCI root compares it around each configuration write and moves the maps. In the same way [`Msix`] compares what
//! each vector delivers, and tells a [`VectorSink`] of changes only.
//!
//! There is no firmware in Casemate's guests: the VMM places every BAR ([`Function::place_bar`]) before the guest
//! starts. Register layouts follow the PCI Express Base Specification 5.0, chapter 7, and the names those of Linux's
//! `include/uapi/linux/pci_regs.h`.

mod bar;
mod capability;
mod config;
mod ecam;
mod function;
mod host_bridge;
mod msi;
mod msix;
mod root_port;

/// Registers and bits by their offsets, as in Linux's `pci_regs.h` without the `PCI_` before each name.
pub mod regs;

pub use bar::{BAR_COUNT, BarKind, BarRequest, DecodedBar, DecodedBars, ROM_INDEX, Space};
pub use capability::{CapabilityError, FoundCapability, capabilities};
pub use config::{CONFIG_SPACE_BYTES, Capability, Config, ConfigError, Identity};
pub use ecam::{ECAM_BYTES_PER_BUS, EcamAddress};
pub use function::Function;
pub use host_bridge::HostBridge;
pub use msi::{MSI_VECTORS_MAX, Msi, MsiLayout, MsiTransition};
pub use msix::{BarOffset, MSIX_VECTORS_MAX, MsiMessage, Msix, MsixLayout, MsixTransition, VectorSink};
pub use root_port::{BRIDGE_WINDOW_BYTES, Forwarding, RootPort};
