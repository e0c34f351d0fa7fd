//! What the caller says about a cell.

use std::{collections::BTreeSet, ffi::CString, os::fd::OwnedFd, path::PathBuf};

use casemate_spec::{CellPart, IoRules, Refusal};

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
    /// Parts that the cell may be without where the host can't give them.
    pub may_lack: BTreeSet<CellPart>,
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
    /// What it may do to disks.
    pub io: IoPlan,
}

/// `io.weight`, and `io.max` of each disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoPlan {
    /// The limits; they hold for each of the disks.
    pub rules: IoRules,
    /// The disks by major and minor number: whole ones, for partitions have no limits.
    pub disks: Vec<(u32, u32)>,
    /// Files that lie on no disk of their own.
    pub without_device: Vec<String>,
}

impl IoPlan {
    /// The lines of `io.max`, as the kernel shows them.
    pub fn lines(&self) -> Vec<String> {
        let IoRules {
            weight: _,
            read_bytes_per_second,
            write_bytes_per_second,
            read_ops_per_second,
            write_ops_per_second,
        } = self.rules;
        let limits = [
            ("rbps", read_bytes_per_second),
            ("wbps", write_bytes_per_second),
            ("riops", read_ops_per_second),
            ("wiops", write_ops_per_second),
        ];
        if limits.iter().all(|(_, limit)| limit.is_none()) {
            return Vec::new();
        }
        let limits =
            limits.map(|(name, limit)| format!("{name}={}", limit.map_or("max".into(), |n| n.to_string())));
        self.disks.iter().map(|(major, minor)| format!("{major}:{minor} {}", limits.join(" "))).collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_io_max_are_written_as_the_kernel_shows_them() {
        let rules = IoRules { read_bytes_per_second: Some(1 << 20), weight: Some(5), ..IoRules::default() };
        let plan = IoPlan { rules, disks: vec![(254, 0), (8, 16)], without_device: Vec::new() };
        let rest = "rbps=1048576 wbps=max riops=max wiops=max";
        assert_eq!(plan.lines(), [format!("254:0 {rest}"), format!("8:16 {rest}")]);
        let weight = IoRules { weight: Some(5), ..IoRules::default() };
        assert!(IoPlan { rules: weight, ..plan }.lines().is_empty());
    }
}
