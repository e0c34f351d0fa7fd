//! The policy compiler in a cell: it reads what a stranger wrote, with a compiler.
//!
//! The cell is that of a guest's VMM, with less: no control socket, one process, no thread. Its filter is its own
//! (`jail/filters/compiler.toml`); it puts it on before it reads a byte.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use casemate_jail::{Cell, CellPlan, CgroupPlan, End, IoPlan, Program, Rlimits, start};
use casemate_policy::{Compiler, Ended, HOST_LIMITS, Launch, Plain, Streams};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{Paths, cell::reserve_uid};

/// What the compiler allows itself of address space, and what the kernel keeps for it. The files in memory that it writes
/// are counted here as well.
const MEMORY_BYTES: u64 = (2 << 30) + (64 << 20);

impl Paths {
    /// The policy compiler as this user runs it: root in a cell, anybody else as a process of their own, which still
    /// confines itself.
    pub fn compiler(&self) -> Compiler<'_> {
        let launch: &dyn Launch = if rustix::process::geteuid().is_root() { self } else { &Plain::DEFAULT };
        Compiler { program: &self.policy_compiler, launch }
    }
}

/// In a cell below these paths.
impl Launch for Paths {
    fn launch(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        let file =
            File::open(program).map_err(|error| format!("{} can't be opened: {error}", program.display()))?;
        let in_words = |refusal: casemate_spec::Refusal| refusal.to_string();
        let program = Program::seal_as(c"casemate-policy-compiler", file).map_err(in_words)?;
        self.make_runtime().map_err(in_words)?;
        let (uid, _uid_lock) = reserve_uid(self, "the policy compiler").map_err(in_words)?;
        let Streams { input, output, complaint } = streams;
        let mut cell = start(CellPlan {
            guest: name(),
            uid,
            gid: uid,
            program,
            arguments: Vec::new(),
            input: Some(OwnedFd::from(input)),
            output: Some(OwnedFd::from(output)),
            log: OwnedFd::from(complaint),
            control: None,
            rlimits: Rlimits {
                memlock_bytes: 0,
                descriptors_max: 16,
                threads_max: 1,
                file_size_bytes_max: HOST_LIMITS.compiled_bytes as u64,
            },
            cgroup: CgroupPlan {
                parent: self.cgroup.clone(),
                memory_bytes_max: MEMORY_BYTES,
                pids_max: 1,
                cpus_max: 1,
                io: IoPlan::default(),
            },
            may_lack: self.read_host_file().map_err(in_words)?.cell.may_lack,
            tied_to_parent: true,
        })
        .map_err(in_words)?;
        let ended = wait(&mut cell, Duration::from_millis(HOST_LIMITS.compile_ms))?;
        cell.close().map_err(in_words)?;
        Ok(ended)
    }
}

/// A name for its cgroup, which no guest has: theirs begin with a letter.
fn name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("-compiler-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits for its end; when that has not come in time, dropping the cell ends it.
fn wait(cell: &mut Cell, most: Duration) -> Result<Ended, String> {
    let deadline = Instant::now() + most;
    loop {
        match cell.try_wait().map_err(|error| format!("the compiler can't be waited for: {error}"))? {
            Some(End::Exited(code)) => return Ok(Ended::Exited(code)),
            Some(end) => return Ok(Ended::Otherwise(end.to_string())),
            None => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("the compiler did not end within {} s", most.as_secs()));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let pidfd = cell.pidfd();
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(format!("the compiler can't be waited for: {error}")),
        }
    }
}
