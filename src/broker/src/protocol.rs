//! What a keep may ask of its broker, and what comes back.

use std::{
    collections::BTreeSet,
    fmt,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use casemate_host::{DmaNeeds, IommuLimits, Returned, TapRequest};
use casemate_jail::{End, Rlimits};
use casemate_spec::{
    CellPart, CellUids, HostFile, IoRules, Location, Name, PciAddress, Pool, Pooled, Refusal,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::journal::Log;

/// Where things are on this host, by the word of whoever started the keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// The ledger, and the logs of decisions and events.
    pub state: PathBuf,
    /// Compiled policies.
    pub cache: PathBuf,
    /// Sockets and locks.
    pub runtime: PathBuf,
    /// The cgroup of all cells.
    pub cgroup: PathBuf,
    /// `casemate-vmm`.
    pub vmm: PathBuf,
    /// `casemate-policy-compiler`.
    pub policy_compiler: PathBuf,
    /// `casemate-policy-engine`.
    pub policy_engine: PathBuf,
}

/// What the host file says that a broker heeds. The keep reads the file, and tells it before a guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// The pools of devices.
    pub pools: Vec<Pool>,
    /// What of a cell may be lacking here.
    pub may_lack: BTreeSet<CellPart>,
    /// Users of cells.
    pub uids: CellUids,
}

impl Rules {
    /// Of a host file.
    pub fn of(file: &HostFile) -> Self {
        Self { pools: file.pools.clone(), may_lack: file.cell.may_lack.clone(), uids: file.cell.uids }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self::of(&HostFile::default())
    }
}

/// What a keep tells others of its guest: `NAME.account` and so on beside the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kept {
    /// What the guest has, for policies.
    Account,
    /// What the guest was given, for `casemate ps` and an auditor.
    Record,
    /// How the guest is, for governors.
    Sample,
}

impl Kept {
    /// The end of the file's name.
    pub(crate) fn extension(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Record => "json",
            Self::Sample => "sample",
        }
    }
}

/// Such a file of some guest's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The guest, by the file's name.
    pub guest: String,
    /// What is in it.
    pub text: String,
    /// How long ago it was written.
    pub age_ms: u64,
}

/// A file that a guest is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A kernel.
    Kernel,
    /// An initial RAM disk.
    Initrd,
    /// An option ROM.
    Rom,
    /// A raw disk.
    Raw {
        /// Whether it is only read.
        read_only: bool,
    },
    /// A qcow2 image.
    Qcow2 {
        /// Whether it is only read.
        read_only: bool,
    },
}

/// A device node that a guest's VMM uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node {
    /// `/dev/kvm`.
    Kvm,
    /// `/dev/vhost-net`.
    VhostNet,
}

/// A limit of the cell's process that a keep changes while its guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Limit {
    /// `RLIMIT_FSIZE`.
    FileSize,
    /// `RLIMIT_MEMLOCK`.
    LockedMemory,
    /// `RLIMIT_NOFILE`.
    Descriptors,
}

/// What governors turn at the cell's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Knob {
    /// `cpu.weight`, 1 to 10000.
    CpuWeight(u32),
    /// `cpu.max`: of each 100 ms, in microseconds.
    CpuQuota(u64),
}

/// Something to be put into a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Attachment {
    /// A disk.
    Disk {
        /// A raw image or block device: an absolute path.
        path: PathBuf,
        /// Whether the guest may only read it.
        #[serde(default)]
        read_only: bool,
    },
    /// A network card on a tap of its own.
    Net {
        /// Name of the tap.
        tap: String,
        /// The host's address on it and the length of its prefix.
        host_address: Option<(Ipv4Addr, u8)>,
    },
    /// Devices of the host's, which become the functions of one card.
    Devices {
        /// By their addresses, in the order of their numbers.
        #[serde(default)]
        addresses: Vec<PciAddress>,
        /// And one of this pool.
        #[serde(default)]
        pool: Option<String>,
    },
}

/// Devices that a guest is to have: from its start, or in a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claiming {
    /// The slot, from 1; none for what the guest starts with.
    pub slot: Option<u8>,
    /// Whose guest it is.
    pub tenant: Name,
    /// Which.
    pub addresses: Vec<PciAddress>,
    /// Whether policies judge what comes back.
    pub judged: bool,
    /// What the guest's memory and devices ask of the host.
    pub needs: DmaNeeds,
    /// A MAC address for each, which virtual functions of network cards get.
    pub macs: Vec<[u8; 6]>,
}

/// A device as it was claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClaimedThere {
    pub(crate) address: PciAddress,
    pub(crate) group: u32,
    pub(crate) reset_method: String,
    pub(crate) former_driver: Option<String>,
}

/// A claim, as it is told. Descriptors come beside it: container, groups, devices, and one on which notices are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClaimThere {
    pub(crate) groups: usize,
    pub(crate) devices: Vec<ClaimedThere>,
    pub(crate) limits: IommuLimits,
    pub(crate) scrubbed: Vec<PciAddress>,
}

/// What a claim that failed on the way has left.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Claimed {
    Done(ClaimThere),
    /// It was undone after the devices had been taken: what became of them.
    Undone {
        returned: Vec<Returned>,
        refusal: Refused,
    },
}

/// A cell to be closed around the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellWanted {
    /// `RLIMIT_MEMLOCK`, `RLIMIT_NOFILE`, `RLIMIT_NPROC`, `RLIMIT_FSIZE`.
    pub rlimits: [u64; 4],
    /// `memory.max`.
    pub memory_bytes_max: u64,
    /// `pids.max`.
    pub pids_max: u64,
    /// Processors that it can keep busy.
    pub cpus_max: u32,
    /// What it may do to disks.
    pub io: IoRules,
    /// The disks, by major and minor number.
    pub disks: Vec<(u32, u32)>,
    /// Files that lie on no disk of their own.
    pub without_device: Vec<String>,
    /// What of its memory is the guest's.
    pub guest_memory_bytes: u64,
}

impl CellWanted {
    pub(crate) fn rlimits(&self) -> Rlimits {
        let [memlock_bytes, descriptors_max, threads_max, file_size_bytes_max] = self.rlimits;
        Rlimits { memlock_bytes, descriptors_max, threads_max, file_size_bytes_max }
    }
}

/// A cell that was closed. Beside it come its process's pidfd, and the way to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CellThere {
    pub(crate) pid: u32,
    pub(crate) abi: u32,
    pub(crate) filesystem: u64,
    pub(crate) network: u64,
    pub(crate) scopes: u64,
    pub(crate) weakened: BTreeSet<CellPart>,
}

/// How its process ended: [`End`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ended {
    Exited(i32),
    Signalled(i32),
    Stopped { call: Option<u32>, thread: Option<String> },
}

impl From<End> for Ended {
    fn from(end: End) -> Self {
        match end {
            End::Exited(status) => Self::Exited(status),
            End::Signalled(signal) => Self::Signalled(signal),
            End::StoppedBySeccomp { call, thread } => Self::Stopped { call, thread },
        }
    }
}

impl From<Ended> for End {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Exited(status) => Self::Exited(status),
            Ended::Signalled(signal) => Self::Signalled(signal),
            Ended::Stopped { call, thread } => Self::StoppedBySeccomp { call, thread },
        }
    }
}

/// What is asked. What each needs is said at the function of [`Broker`](crate::Broker)'s.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Connect,
    Recover,
    Reserve {
        guest: Name,
    },
    Rules(Rules),
    Put {
        kind: Kept,
        text: String,
    },
    Remove {
        kind: Kept,
    },
    ReadAll {
        kind: Kept,
    },
    Append {
        log: Log,
        line: String,
    },
    Open {
        what: What,
        path: PathBuf,
    },
    Functions,
    Outline {
        addresses: BTreeSet<PciAddress>,
    },
    Taken,
    Lives {
        addresses: Vec<PciAddress>,
    },
    Choose {
        tenant: Name,
        named: Vec<PciAddress>,
        pooled: Vec<Pooled>,
    },
    Assignable {
        addresses: Vec<PciAddress>,
    },
    Dma {
        addresses: Vec<PciAddress>,
        needs: DmaNeeds,
    },
    MakeVirtual {
        slot: Option<u8>,
        pooled: Vec<Pooled>,
    },
    LeaveVirtual {
        slot: Option<u8>,
    },
    Choosing,
    Chosen,
    Claim(Claiming),
    Release {
        slot: Option<u8>,
        runs_on: bool,
    },
    /// A keep's word on a [`Answer::Judge`]: why the device goes to nobody.
    Ruling(Option<String>),
    Tap(TapRequest),
    Node(Node),
    Cell(CellWanted),
    Memory,
    Kill,
    Wait,
    CpuTime,
    Close,
    Limit {
        limit: Limit,
        most: u64,
    },
    Turn(Knob),
    Code {
        digest: String,
        engine: String,
        may_be_shared: bool,
    },
    Compile {
        name: String,
        engine: String,
    },
    Engine,
    EndEngine {
        engine: u32,
    },
    DropEngine {
        engine: u32,
    },
    Listen {
        path: PathBuf,
        code: String,
    },
    ListenToOperators,
    Unlisten {
        path: PathBuf,
    },
    Speak {
        path: PathBuf,
        port: u32,
    },
    ConsoleLog {
        path: PathBuf,
        file_bytes: u64,
        files: u32,
    },
}

/// What comes back.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done(Value),
    Refused(Refused),
    /// Before a release is done: what was found of a device, for the keep to rule on.
    Judge(Box<Returned>),
}

/// A refusal on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refused {
    code: String,
    location: Option<Location>,
    subject: String,
    cause: String,
    remedy: String,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, location, subject, cause, remedy } = refusal;
        Self { code: code.to_owned(), location, subject, cause, remedy }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let Refused { code, location, subject, cause, remedy } = refused;
        Self { code: known(code), location, subject, cause, remedy }
    }
}

/// A code as a text that stays. There are a few hundred of them.
fn known(code: String) -> &'static str {
    static KNOWN: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut all = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(code) = all.get(code.as_str()) {
        return code;
    }
    let code = String::leak(code);
    all.insert(code);
    code
}

/// That the broker itself can't be had, or does not answer.
pub(crate) fn gone(cause: impl fmt::Display) -> Refusal {
    let remedy = "see that casemate-broker stands beside casemate and is of its version; then try again";
    Refusal::new("broker-gone", "casemate-broker", cause, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_crosses_whole() {
        let location = Some(Location { file: "g.toml".into(), line: 3, key: "name".into() });
        let refusal = Refusal::new("guest-runs", "web", "a cause", "a remedy").at(location);
        let text = serde_json::to_string(&Refused::from(refusal.clone())).unwrap();
        let back: Refused = serde_json::from_str(&text).unwrap();
        assert_eq!(Refusal::from(back), refusal);
        assert_eq!(known("some-code".into()).as_ptr(), known("some-code".into()).as_ptr());
    }
}
