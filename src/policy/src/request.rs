//! The question, in types of ours: what the contract's records are to a plugin, these are to the rest of Casemate. They
//! go to the audit log as JSON.

use std::collections::BTreeMap;

use casemate_spec::PciAddress;
use serde::{Deserialize, Serialize};

/// What is known besides, by name. `docs/policies.md` lists the names.
pub type Attrs = BTreeMap<String, String>;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// A new guest is to start.
    Create,
    /// A running guest's spec is to change.
    Update,
    /// A device, disk or network card is to be added to, or taken from, a running guest.
    HotPlug,
    /// A paused or saved guest is to run again.
    Resume,
    /// A guest is to come from another host.
    Migrate,
}

/// May this be done, on this host, now?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// What is asked for.
    pub operation: Operation,
    /// The guest as it would be.
    pub guest: GuestSpec,
    /// The guest as it is, for [`Operation::Update`] and [`Operation::HotPlug`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<GuestSpec>,
    /// Who asks.
    pub tenant: Tenant,
    /// The host, as it is now.
    pub host: HostState,
    /// The other guests on this host.
    #[serde(default)]
    pub beside: Vec<Neighbour>,
    /// When it's asked, in seconds since 1970-01-01T00:00:00Z.
    pub now_seconds: u64,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// A guest, as its file describes it and the host has looked it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// Its name.
    pub name: String,
    /// Its processors.
    pub vcpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its kernel.
    pub kernel: File,
    /// Its initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<File>,
    /// Its kernel's command line.
    #[serde(default)]
    pub command_line: String,
    /// Physical PCI functions, in the order of its file.
    #[serde(default)]
    pub devices: Vec<Device>,
    /// Emulated disks, in the order of its file.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// Emulated network cards, in the order of its file.
    #[serde(default)]
    pub nets: Vec<Net>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// A file that the guest boots from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Absolute, on the host.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// 64 lower-case hexadecimal digits, where the host computed them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// A physical PCI function that is to be assigned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where it sits.
    pub address: PciAddress,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem_device: u16,
    /// Base class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// IOMMU group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// The driver that holds it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// An emulated disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Absolute, on the host.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// 64 lower-case hexadecimal digits, where the host computed them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// An emulated network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The host's interface behind it.
    pub tap: String,
    /// `02:00:00:00:00:01`, when it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// The tenant's name.
    pub name: String,
    /// The most that the tenant may have at once, where the host sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Amounts>,
    /// What the tenant's guests have now, without the guest in question, where the host counts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Amounts>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// Amounts of what a host has to give.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Amounts {
    /// Guests.
    pub guests: u32,
    /// Processors of them all.
    pub vcpus: u32,
    /// Memory of them all.
    pub memory_bytes: u64,
    /// Physical PCI functions of them all.
    pub devices: u32,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// The host, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostState {
    /// Its name.
    pub name: String,
    /// Logical processors on which guests may run.
    pub cpus: u32,
    /// All its memory.
    pub memory_bytes: u64,
    /// What the kernel says can be had without swapping (`MemAvailable`).
    pub memory_free_bytes: u64,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// Another guest on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub tenant: String,
    /// Its processors.
    pub vcpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its physical PCI functions.
    #[serde(default)]
    pub devices: Vec<PciAddress>,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}
