//! What a governor is told of a host's guests and what it answers, in types of ours. Actions go to the log of events as JSON.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{request::Attrs, rule::Rule, verdict::Reason};

/// A look at the host. Amounts are those of one interval; levels are as they are at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Samples {
    /// In seconds since 1970-01-01T00:00:00Z.
    pub now_seconds: u64,
    /// Over which amounts are counted; 0 at the first look.
    pub interval_ms: u32,
    /// The host.
    pub host: HostSample,
    /// All guests that run here.
    pub guests: Vec<GuestSample>,
    /// What is known besides.
    pub attrs: Attrs,
}

/// Time of the interval in which somebody waited (pressure stall information).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pressure {
    /// At least one task did.
    pub some_us: u64,
    /// All did.
    pub full_us: u64,
}

/// The host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostSample {
    /// Its name.
    pub name: String,
    /// Logical processors.
    pub cpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// What can be had without swapping.
    pub memory_free_bytes: u64,
    /// Waiting for processors.
    pub cpu: Pressure,
    /// For memory.
    pub memory: Pressure,
    /// For disks.
    pub io: Pressure,
    /// What is known besides.
    pub attrs: Attrs,
}

/// A guest that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestSample {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub tenant: String,
    /// Whether what is said of it is done by whoever asks.
    pub governed: bool,
    /// Whether its vCPUs are paused.
    pub paused: bool,
    /// Whether a physical device reaches all of its memory.
    pub pinned: bool,
    /// Its processors.
    pub vcpus: u32,
    /// Its memory, as its file says.
    pub memory_bytes: u64,
    /// Its use of processors.
    pub cpu: CpuSample,
    /// Of memory.
    pub memory: MemorySample,
    /// Of disks.
    pub disk: DiskSample,
    /// Of the network.
    pub net: NetSample,
    /// Exits to the VMM.
    pub exits: u64,
    /// Interrupts of its physical devices.
    pub interrupts: u64,
    /// What is in force.
    pub knobs: Knobs,
    /// How far it may go.
    pub bounds: Bounds,
    /// What is known besides.
    pub attrs: Attrs,
}

/// Processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuSample {
    /// Time of its whole cell.
    pub used_us: u64,
    /// Its vCPUs were ready and got no processor.
    pub waited_us: u64,
    /// Its limit held it back.
    pub throttled_us: u64,
    /// Waiting.
    pub pressure: Pressure,
}

/// Memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemorySample {
    /// Of the host's, that its cell has.
    pub used_bytes: u64,
    /// What the balloon leaves it.
    pub given_bytes: u64,
    /// By the guest's word.
    pub free_bytes: Option<u64>,
    /// Without swapping, by the guest's word.
    pub available_bytes: Option<u64>,
    /// Major faults and pages swapped in, by the guest's word.
    pub faults: Option<u64>,
    /// Waiting.
    pub pressure: Pressure,
}

/// Disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct DiskSample {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub requests: u64,
    pub pressure: Pressure,
}

/// Network cards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct NetSample {
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub packets: u64,
}

/// What a governor can turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Knobs {
    /// As cgroup v2 has it: 1 to 10,000.
    pub cpu_weight: u32,
    /// Thousandths of one processor.
    pub cpu_limit: Option<u32>,
    /// What the balloon is asked to leave the guest.
    pub balloon_bytes: u64,
    /// Of all disks together.
    pub disk_limit: Rate,
    /// Of all cards together, each way.
    pub net_limit: Rate,
    /// What is known besides.
    pub attrs: Attrs,
}

impl Default for Knobs {
    fn default() -> Self {
        let (disk_limit, net_limit) = Default::default();
        Self {
            cpu_weight: 100,
            cpu_limit: None,
            balloon_bytes: 0,
            disk_limit,
            net_limit,
            attrs: Attrs::new(),
        }
    }
}

/// None is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Rate {
    pub bytes_a_second: Option<u64>,
    pub requests_a_second: Option<u64>,
}

/// How far a guest's knobs may be turned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bounds {
    /// From here,
    pub cpu_weight_least: u32,
    /// to here.
    pub cpu_weight_most: u32,
    /// Thousandths of one processor.
    pub cpu_limit_least: u32,
    /// The balloon leaves at least this.
    pub memory_least_bytes: u64,
    /// Whether it may be paused.
    pub may_pause: bool,
    /// Whether it may be stopped.
    pub may_stop: bool,
    /// What is known besides.
    pub attrs: Attrs,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            cpu_weight_least: 1,
            cpu_weight_most: 10_000,
            cpu_limit_least: 100,
            memory_least_bytes: 0,
            may_pause: false,
            may_stop: false,
            attrs: Attrs::new(),
        }
    }
}

/// What a plugin may do, where the bundle permits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the names are those of the contract's deeds")]
pub enum Knob {
    CpuWeight,
    CpuLimit,
    Balloon,
    DiskLimit,
    NetLimit,
    /// Pause and resume are one: a guest is paused, or it isn't.
    Run,
    Stop,
    Alert,
}

/// What is to be done to a guest. Prints as `cpu-weight 200`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "deed", content = "to", rename_all = "kebab-case")]
pub enum Deed {
    /// 1 to 10,000.
    CpuWeight(u32),
    /// Thousandths of one processor; none is no limit.
    CpuLimit(Option<u32>),
    /// What the guest is left, in bytes.
    Balloon(u64),
    /// Of all disks together.
    DiskLimit(Rate),
    /// Of all cards together, each way.
    NetLimit(Rate),
    /// Its vCPUs stand still.
    Pause,
    /// They go on.
    Resume,
    /// Its power button is pressed; then it's stopped.
    Stop,
    /// Somebody should know.
    Alert,
}

impl Deed {
    /// All that a bundle can permit, by the names in the contract.
    pub const NAMES: [&'static str; 8] =
        ["cpu-weight", "cpu-limit", "balloon", "disk-limit", "net-limit", "pause", "resume", "stop"];

    /// Its name in the contract.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::CpuWeight(_) => "cpu-weight",
            Self::CpuLimit(_) => "cpu-limit",
            Self::Balloon(_) => "balloon",
            Self::DiskLimit(_) => "disk-limit",
            Self::NetLimit(_) => "net-limit",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop => "stop",
            Self::Alert => "alert",
        }
    }

    /// What of a guest it turns: two deeds that turn one thing to two values contradict each other.
    pub const fn knob(&self) -> Knob {
        match self {
            Self::CpuWeight(_) => Knob::CpuWeight,
            Self::CpuLimit(_) => Knob::CpuLimit,
            Self::Balloon(_) => Knob::Balloon,
            Self::DiskLimit(_) => Knob::DiskLimit,
            Self::NetLimit(_) => Knob::NetLimit,
            Self::Pause | Self::Resume => Knob::Run,
            Self::Stop => Knob::Stop,
            Self::Alert => Knob::Alert,
        }
    }
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::CpuWeight(weight) => write!(f, " {weight}"),
            Self::CpuLimit(None) => f.write_str(" none"),
            Self::CpuLimit(Some(limit)) => write!(f, " {limit}"),
            Self::Balloon(bytes) => write!(f, " {bytes}"),
            Self::DiskLimit(rate) | Self::NetLimit(rate) => {
                let part =
                    |amount: Option<u64>| amount.map_or("none".to_owned(), |amount| amount.to_string());
                write!(f, " {} {}", part(rate.bytes_a_second), part(rate.requests_a_second))
            }
            Self::Pause | Self::Resume | Self::Stop | Self::Alert => Ok(()),
        }
    }
}

/// Something that a plugin wants done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// To whom.
    pub guest: String,
    /// What.
    #[serde(flatten)]
    pub deed: Deed,
    /// Why; it names the plugin.
    pub why: Reason,
    /// What its word counts for, by the guest's tenant.
    pub rule: Rule,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}/{}: {})",
            self.guest, self.deed, self.why.plugin, self.why.code, self.why.message
        )
    }
}
