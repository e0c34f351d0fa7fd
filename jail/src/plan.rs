//! What the caller says about a cell.

use std::{ffi::CString, os::fd::OwnedFd, path::PathBuf};

use casemate_spec::Refusal;

use crate::Program;

/// Everything that [`start`](crate::start) needs.
#[derive(Debug)]
pub struct CellPlan {
    /// The guest's name: lower-case letters, digits and `-`, at most 64. It names the cgroup.
    pub guest: String,
    /// The uid of this cell and of nothing else on the host; not 0.
    pub uid: u32,
    /// The gid of this cell and of nothing else on the host; not 0.
    pub gid: u32,
    /// What runs in the cell.
    pub program: Program,
    /// Its arguments after `argv[0]`, which is the program's name.
    pub arguments: Vec<CString>,
    /// Becomes descriptor 0; /dev/null without one.
    pub input: Option<OwnedFd>,
    /// Becomes descriptor 1; /dev/null without one.
    pub output: Option<OwnedFd>,
    /// Becomes descriptor 2: the write end of a pipe, or a file in memory.
    pub log: OwnedFd,
    /// Becomes descriptor 3, which is closed without one: for the VMM, a listening `AF_UNIX` `SOCK_SEQPACKET` socket.
    pub control: Option<OwnedFd>,
    /// Limits of the process.
    pub rlimits: Rlimits,
    /// Limits of the cell.
    pub cgroup: CgroupPlan,
    /// Whether the cell is killed when the thread that called `start` ends (the thread, not the process: prctl(2),
    /// `PR_SET_PDEATHSIG`).
    pub tied_to_parent: bool,
}

/// Resource limits, soft and hard. Core dumps, POSIX message queues and real-time priorities are always 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimits {
    /// `RLIMIT_MEMLOCK`: what VFIO may pin, so the guest's memory and its BARs where functions are assigned.
    pub memlock_bytes: u64,
    /// `RLIMIT_NOFILE`.
    pub descriptors_max: u64,
    /// `RLIMIT_NPROC`: threads of this uid.
    pub threads_max: u64,
    /// `RLIMIT_FSIZE`: the largest file that may be written, so at least the largest disk image.
    pub file_size_bytes_max: u64,
}

/// Where the cell's cgroup is and what it limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupPlan {
    /// A directory of the cgroup v2 hierarchy, as in `/sys/fs/cgroup/casemate`. It is made if it is missing. It may not hold
    /// processes itself.
    pub parent: PathBuf,
    /// `memory.max`: guest memory, the VMM, and what the kernel keeps for both.
    pub memory_bytes_max: u64,
    /// `pids.max`: threads.
    pub pids_max: u64,
    /// `cpu.max`: processors that it can keep busy, averaged over a tenth of a second.
    pub cpus_max: u32,
}

impl CellPlan {
    /// Refuses what could not become a cell.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let refuse = |subject: String, cause: &str, remedy: &str| {
            Err(Refusal::new("cell-plan", subject, cause, remedy))
        };
        let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if self.guest.is_empty() || self.guest.len() > 64 || !self.guest.bytes().all(is_plain) {
            let cause = "the name can't name a cgroup";
            return refuse(format!("{:?}", self.guest), cause, "use at most 64 of a-z, 0-9 and -");
        }
        for (what, id) in [("uid", self.uid), ("gid", self.gid)] {
            // u32::MAX means "leave it as it is" to the kernel.
            if id == 0 || id == u32::MAX {
                return refuse(
                    format!("{what} {id}"),
                    "a cell runs under an id of its own",
                    "choose one from 1 to 4294967294",
                );
            }
        }
        // Fewer, and the cell could not be set up: its descriptors are moved about above this number.
        if self.rlimits.descriptors_max < 16 {
            let subject = format!("{} descriptors", self.rlimits.descriptors_max);
            return refuse(subject, "a guest needs more", "allow at least 16");
        }
        Ok(())
    }
}
