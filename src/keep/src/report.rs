//! What a run tells: steps while it goes, and a report at its end.

use std::{collections::BTreeMap, time::Duration};

use casemate_host::{Recovered, Returned};
use casemate_spec::PciAddress;
use casemate_wire::Event;
use serde::{Deserialize, Serialize, Serializer};

/// Something that a user waits for or wants to know of, as it happens.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// Devices of a guest whose keep was killed were given back.
    Recovered {
        /// The guest that had them.
        guest: String,
        /// Its devices.
        devices: Vec<DeviceReport>,
        /// What could not be done.
        error: Option<String>,
    },
    /// The policy allowed the guest.
    Admitted {
        /// How the verdict came about.
        policy: PolicyReport,
    },
    /// Devices leave their drivers; it takes a moment.
    Claiming {
        /// Which.
        devices: Vec<PciAddress>,
    },
    /// They are the guest's now.
    Claimed {
        /// Address, former driver, reset method.
        devices: Vec<(PciAddress, Option<String>, String)>,
    },
    /// The cell is closed around the VMM.
    CellClosed {
        /// Its process, as the host sees it.
        pid: u32,
        /// Its user.
        uid: u32,
        /// The Landlock ABI in force.
        landlock_abi: u32,
        /// The parts of a cell that it is without, by the host file's leave.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        weakened: Vec<String>,
    },
    /// The first guest instruction runs next.
    Running {
        /// Since the VMM was started.
        #[serde(rename = "elapsed_ms", serialize_with = "milliseconds")]
        elapsed: Duration,
    },
    /// What the VMM wrote to its log.
    Log {
        /// A line.
        line: String,
    },
    /// Its processors stand, as an operator wished.
    Paused,
    /// They go on.
    Resumed,
    /// Something that the cell tells of its guest, by its word.
    Event {
        /// What.
        event: Event,
    },
    /// The host wants a device back that the guest has: it is taken out of its slot in order, or the guest comes to its end in
    /// order when it started with it.
    DeviceWanted {
        /// Which.
        device: PciAddress,
        /// The slot, from 1.
        #[serde(skip_serializing_if = "Option::is_none")]
        slot: Option<u8>,
    },
    /// Somebody has reset the physical function of a virtual one that the guest has: it is taken out of its slot in order, or the
    /// guest comes to its end in order when it started with it.
    ParentReset {
        /// The virtual function.
        device: PciAddress,
        /// The slot, from 1.
        #[serde(skip_serializing_if = "Option::is_none")]
        slot: Option<u8>,
    },
    /// Devices of the host's are in one of its slots now.
    Attached {
        /// Those.
        devices: Vec<PciAddress>,
        /// The slot, from 1.
        slot: u8,
    },
    /// A device asked for memory that the guest doesn't have, and the IOMMU stopped it. Of many such times the first, the second,
    /// the fourth and so on are told.
    DmaStopped {
        /// Which.
        device: PciAddress,
        /// How often the kernel has told so by now; it leaves out most where there are many.
        count: u64,
    },
    /// A device has reported an error that was not corrected, and its guest is stopped.
    DeviceFailed {
        /// Which.
        device: PciAddress,
    },
    /// The guest's power button was pressed.
    AskedToPowerOff {
        /// How long it may take before it is stopped.
        #[serde(rename = "grace_ms", serialize_with = "milliseconds")]
        grace: Duration,
    },
    /// The guest has ended; its devices are reset and given back next.
    Ended {
        /// How.
        ending: Ending,
    },
    /// What the guest has stored on these is erased first, which may take minutes.
    Scrubbing {
        /// Those.
        devices: Vec<PciAddress>,
    },
    /// They were.
    Returned {
        /// Each of them.
        devices: Vec<DeviceReport>,
    },
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "ending", rename_all = "kebab-case")]
pub enum Ending {
    /// It switched itself off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel told that it had panicked.
    Panic,
    /// A processor fell into a triple fault.
    TripleFault,
    /// It started its watchdog and was not heard of in time.
    Watchdog,
    /// It was stopped from outside.
    Stopped,
    /// One of its devices reported an error that was not corrected (PCIe's advanced error reporting), and it was stopped.
    DeviceFailed {
        /// Which.
        device: PciAddress,
    },
    /// The VMM could not go on: its word.
    Fault {
        /// Why.
        why: String,
    },
    /// The VMM's process ended without a word.
    CellDied {
        /// How, as the kernel tells it.
        how: String,
    },
}

impl Ending {
    /// Whether the guest came to its end as a guest should.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::PowerOff | Self::Stopped)
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("powered off"),
            Self::Reset => f.write_str("asked for a reset, and was stopped"),
            Self::Panic => f.write_str("its kernel panicked; its console tells why"),
            Self::TripleFault => f.write_str("triple fault: a processor could not go on"),
            Self::Watchdog => f.write_str("its watchdog was not kept quiet, and it was stopped"),
            Self::Stopped => f.write_str("stopped"),
            Self::DeviceFailed { device } => {
                write!(f, "{device} reported an error that was not corrected, and the guest was stopped")
            }
            Self::Fault { why } => write!(f, "the machine could not go on: {why}"),
            Self::CellDied { how } => write!(f, "the VMM's process died: {how}"),
        }
    }
}

/// The verdict, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct PolicyReport {
    /// The decision's name in the log: `casemate policy explain` takes it.
    pub decision: String,
    /// Plugins in order: name and digest.
    pub plugins: Vec<(String, String)>,
    /// What policies have changed, each a line: `memory: 8 GiB -> 4 GiB (small: enough)`.
    pub changes: Vec<String>,
    /// Refusals that were overridden, as `plugin/code`.
    pub overridden: Vec<String>,
    /// Warnings, each a line.
    pub warnings: Vec<String>,
    /// Why the verdict may not be the one that root would get; of a trial alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub caveats: Vec<String>,
    /// Loading the bundle.
    #[serde(rename = "load_us", serialize_with = "microseconds")]
    pub load: Duration,
    /// Asking it.
    #[serde(rename = "ask_us", serialize_with = "microseconds")]
    pub ask: Duration,
}

/// A device that was given back, or was not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Everything the host knows of it.
    #[serde(flatten)]
    pub returned: Returned,
    /// Reset with result 0, bus master off, configuration space as first seen (or no guest had it), and given back.
    pub clean: bool,
}

impl From<Returned> for DeviceReport {
    fn from(returned: Returned) -> Self {
        let proven = returned.reset.is_ok() && returned.bus_master_off && returned.config_as_first_seen;
        let clean = (proven || returned.untouched.is_some())
            && returned.quarantined.is_none()
            && returned.error.is_none();
        Self { returned, clean }
    }
}

impl From<Recovered> for Step {
    fn from(recovered: Recovered) -> Self {
        Self::Recovered {
            guest: recovered.owner.guest,
            devices: recovered.devices.into_iter().map(DeviceReport::from).collect(),
            error: recovered.error,
        }
    }
}

/// What the cell was, measured while it ran.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CellReport {
    /// The VMM's own memory (Pss) beyond the guest's, when last seen.
    pub memory_bytes: Option<u64>,
    /// Processor time that it took from its making to its end: the guest's and the VMM's.
    #[serde(rename = "cpu_us", serialize_with = "maybe_microseconds")]
    pub cpu: Option<Duration>,
    /// System calls that each filter allows, by the role of the threads that have it.
    pub calls: BTreeMap<&'static str, usize>,
}

/// What the machine did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MachineReport {
    /// From the VMM's start to the line on the console that was waited for.
    #[serde(rename = "line_ms", serialize_with = "maybe_milliseconds")]
    pub line: Option<Duration>,
    /// Exits to user space for ports, exact, by the VMM's word.
    pub pio_exits: u64,
    /// For memory-mapped registers.
    pub mmio_exits: u64,
    /// For everything else.
    pub other_exits: u64,
    /// How often a processor was held back for locking the host's memory bus.
    pub bus_locks: u64,
}

/// A run from the first question to the last device.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The guest.
    pub guest: String,
    /// How it ended.
    pub ending: Ending,
    /// The verdict it ran under.
    pub policy: PolicyReport,
    /// Its cell.
    pub cell: CellReport,
    /// Its machine.
    pub machine: MachineReport,
    /// Its devices.
    pub devices: Vec<DeviceReport>,
}

fn milliseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn maybe_milliseconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)).serialize(serializer)
}

fn maybe_microseconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)).serialize(serializer)
}

fn microseconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}
