//! The words of Casemate's TOML files as types.
//!
//! Everything a person writes down for Casemate is read here, once: bounded, checked, and turned into types that
//! cannot hold a wrong value. No I/O happens in this crate; callers bring the text and the name of the file.
//!
//! What is refused anywhere in Casemate is refused with a [`Refusal`]: a stable code, the subject (a device, or the
//! file, line and key), the cause, and what to do about it.

mod address;
mod cell_rules;
mod console;
mod cpu;
mod device;
mod disk;
mod dma;
mod guest;
mod host_file;
mod hotplug;
mod limit;
mod locate;
mod net;
mod platform;
mod ram;
mod refusal;
mod resources;
mod size;
mod vsock;

pub use address::{PciAddress, PciAddressError};
pub use cell_rules::{CellPart, CellRules, CellUids, IoRules};
pub use console::{ConsoleDevice, Port};
pub use cpu::{Cpu, CpuList, CpuListError, CpuModel};
pub use device::{DevicePin, PciId, PciIdError};
pub use disk::{Backing, DISK_QUEUES_MAX, Disk, DiskFormat};
pub use dma::Dma;
pub use guest::{Assigned, Boot, Guest, LIMITS, Limits, Located, Name, Pooled, Rom, parse_guest};
pub use host_file::{
    ClassPrefix, Firmware, HostFile, NumaPolicy, Pool, ScrubStep, VirtualFunctions, parse_host,
};
pub use hotplug::Hotplug;
pub use limit::{IoLimits, Rate};
pub use net::{NET_QUEUES_MAX, Net};
pub use platform::Platform;
pub use ram::{Pages, Ram};
pub use refusal::{Location, Refusal};
pub use resources::{HostResources, ResourceBounds, TenantBounds};
pub use size::{ByteSize, ByteSizeError};
pub use vsock::Vsock;
