//! Why a function is in use.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One reason why the host needs a function, the gravest first. Prints as a sentence without its full stop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "use")]
pub enum Use {
    /// A filesystem that the host runs from is on it.
    BootDisk {
        /// Name of the block device, as in /sys/class/block.
        block: String,
        /// Where it is mounted.
        mount_point: String,
    },
    /// A filesystem on it is mounted.
    Mounted {
        /// Name of the block device.
        block: String,
        /// Where it is mounted.
        mount_point: String,
    },
    /// The host swaps to it.
    Swap {
        /// Name of the block device.
        block: String,
    },
    /// It is part of a volume (device mapper, RAID).
    Member {
        /// Name of the block device.
        block: String,
        /// Name of the volume.
        of: String,
    },
    /// Something holds its device node open.
    HeldOpen {
        /// The device node.
        node: String,
        /// Who: a process, or the kernel.
        by: String,
    },
    /// Without it the host has no network card, or none that is up.
    OnlyNetwork {
        /// Name of the network interface.
        interface: String,
    },
    /// The host reaches the world through it.
    DefaultRoute {
        /// Name of the network interface.
        interface: String,
    },
    /// It shares a folder of an outer machine (9p, virtiofs) with this one.
    SharedFolder {
        /// The tag that is mounted.
        tag: String,
    },
    /// It has virtual functions, which would go with it.
    VirtualFunctions {
        /// How many.
        count: u32,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BootDisk { block, mount_point } => {
                write!(f, "the host runs from it: {block} is mounted on {mount_point}")
            }
            Self::Mounted { block, mount_point } => write!(f, "{block} is mounted on {mount_point}"),
            Self::Swap { block } => write!(f, "the host swaps to {block}"),
            Self::Member { block, of } => write!(f, "{block} is part of {of}"),
            Self::HeldOpen { node, by } => write!(f, "{by} holds {node} open"),
            Self::DefaultRoute { interface } => write!(f, "{interface} has the default route"),
            Self::OnlyNetwork { interface } => {
                write!(f, "{interface} is the host's only network card that can carry traffic")
            }
            Self::SharedFolder { tag } => write!(f, "its shared folder {tag:?} may be mounted"),
            Self::VirtualFunctions { count } => write!(f, "it has {count} virtual functions"),
        }
    }
}

impl Use {
    /// What frees the function from this use.
    pub(crate) fn remedy(&self) -> String {
        match self {
            Self::BootDisk { .. } => {
                "name another disk: this one cannot be given away while the host runs".into()
            }
            Self::Mounted { mount_point, .. } => format!("unmount it first: umount {mount_point}"),
            Self::Swap { block } => format!("stop swapping to it first: swapoff /dev/{block}"),
            Self::Member { of, .. } => {
                format!("stop {of} first (vgchange -an, mdadm --stop, cryptsetup close)")
            }
            Self::HeldOpen { .. } => "end what holds it first".into(),
            Self::DefaultRoute { .. } => {
                "move the default route to another card first, or name another card".into()
            }
            Self::OnlyNetwork { .. } => {
                "bring up another network card first; if this host needs none, unbind this one from its driver".into()
            }
            Self::SharedFolder { .. } => "unmount the folder and unbind its virtio driver first".into(),
            Self::VirtualFunctions { .. } => "remove them first: write 0 to its sriov_numvfs".into(),
        }
    }
}
