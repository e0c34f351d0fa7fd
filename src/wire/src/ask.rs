//! What a keep asks of a machine that runs, and what it is told.

use serde::{Deserialize, Serialize};

use crate::{Assigned, Counters, Disk, Net, Slot};

/// Processors and devices that [`Statistics`] tell of at most.
pub const COUNTED_MOST: usize = 64;

/// Something that a machine is asked while it runs. Each is answered once, by the number that it came with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Hold all processors. Answered when the last of them stands; devices finish what they were asked.
    Pause,
    /// Let the processors go on.
    Resume,
    /// Tell what was counted.
    Statistics,
    /// Have the guest give up so much of its memory, in whole pages; it does as far as it can, in its own time.
    Balloon {
        /// A multiple of 4 KiB, at least 64 MiB below all of its memory.
        target_bytes: u64,
    },
    /// The terminal has another size from now on.
    TerminalSize {
        /// Characters across.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// A disk has another size from now on.
    ResizeDisk {
        /// Which.
        disk: Which,
        /// A multiple of 512, not 0.
        size_bytes: u64,
    },
    /// Limit what a disk or a network card does from now on; what is `None` is not limited.
    Limit {
        /// [`DeviceKind::Disk`] or [`DeviceKind::Net`].
        kind: DeviceKind,
        /// Which of those.
        device: Which,
        /// Its limits.
        limits: Limits,
    },
    /// Put a card into an empty slot. Answered when it sits there; when the guest uses it is the guest's business.
    Add {
        /// Which slot, from 0.
        slot: u8,
        /// What.
        card: Card,
    },
    /// Have the guest let the card in a slot go, and take it out. Answered when its descriptors are closed.
    Remove {
        /// Which slot, from 0.
        slot: u8,
        /// How long the guest may take.
        patience_ms: u32,
        /// Whether it is taken out when the guest has not let it go in time.
        force: bool,
    },
    /// Have the guest name all memory that it has free, and give that back to the host. Answered when it has.
    Reclaim,
}

/// An emulated device among those of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Which {
    /// Of those that the machine started with, from 0.
    Number(u16),
    /// What is in a slot, from 0.
    Slot(u8),
}

/// What can be put into a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Card {
    /// A disk.
    Disk(Disk),
    /// A network card.
    Net(Net),
    /// Functions of the host's, which become those of one card.
    Assigned(AssignedCard),
}

/// Physical functions that come while the guest runs, in a container of their own: it has the groups and an IOMMU, and maps nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AssignedCard {
    /// The VFIO container.
    pub container: Slot,
    /// The VFIO groups in it.
    pub groups: Vec<Slot>,
    /// 1 to 8 functions, in the order of their numbers.
    pub functions: Vec<Assigned>,
}

/// How much a device may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes, of both directions together.
    pub bytes: Option<Rate>,
    /// Requests, or frames of both directions together.
    pub operations: Option<Rate>,
}

/// A rate, and how much may be done at once by who has done nothing for a while; both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// A second.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

/// What an [`Ask`] is answered with when it was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done, and there is nothing to tell of it.
    Done,
    /// To [`Ask::Statistics`].
    Statistics(Box<Statistics>),
    /// To [`Ask::Remove`].
    Removed {
        /// The guest had not let it go.
        forced: bool,
    },
    /// To [`Ask::Reclaim`].
    Reclaimed {
        /// What the guest named, by its word.
        bytes: u64,
    },
}

/// Why an [`Ask`] was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Kebab-case code.
    pub code: String,
    /// For a person; at most [`crate::TEXT_BYTES`].
    pub message: String,
}

/// What a cell tells unasked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The guest's kernel says that it has panicked. It may still write to its console.
    Panicked,
}

/// What a machine has counted since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Exits to user space, a processor after the other.
    pub vcpus: Vec<Counters>,
    /// Emulated devices, in the order in which they sit on the bus.
    pub devices: Vec<DeviceStatistics>,
    /// The balloon, where there is one.
    pub balloon: Option<BalloonStatistics>,
}

impl Statistics {
    /// Whether it tells of no more than there can be.
    pub fn is_bounded(&self) -> bool {
        self.vcpus.len() <= COUNTED_MOST && self.devices.len() <= COUNTED_MOST
    }
}

/// What an emulated device has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatistics {
    /// What it is.
    pub kind: DeviceKind,
    /// Its number among those of its kind that the machine started with, from 0; 0 for what is in a slot.
    pub number: u16,
    /// The slot that it is in, from 1; `None` for what the machine started with.
    pub slot: Option<u8>,
    /// Requests that were answered: for a network card, frames of both directions.
    pub requests: u64,
    /// Bytes that the guest was given, with the headers that the device puts before or behind them.
    pub bytes_to_guest: u64,
    /// Bytes that the guest gave, with its headers.
    pub bytes_from_guest: u64,
    /// Requests that failed, and stops because the driver broke a rule.
    pub errors: u64,
}

/// How a balloon stands. All but the target is the guest's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// How much memory the guest is to give up.
    pub target_bytes: u64,
    /// How much it has given up.
    pub actual_bytes: u64,
    /// Memory of the guest's that is used for nothing. This and the following are `None` where the guest does not tell.
    pub free_bytes: Option<u64>,
    /// All memory that the guest has, less what it gave up.
    pub total_bytes: Option<u64>,
    /// What new programs could have without swapping.
    pub available_bytes: Option<u64>,
    /// Caches that can be dropped.
    pub caches_bytes: Option<u64>,
    /// Swapped in since its start.
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out since its start.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: Option<u64>,
}

/// The kinds of emulated devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// Source of entropy.
    Entropy,
    /// Disk.
    Disk,
    /// Network card.
    Net,
    /// Memory balloon.
    Balloon,
    /// Sockets between guest and host.
    Vsock,
    /// A terminal, or ports with names.
    Console,
}
