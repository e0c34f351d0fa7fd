//! A running cell.

use std::{
    collections::BTreeSet,
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use casemate_spec::{CellPart, Refusal};
use rustix::{
    io::Errno,
    process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid},
};

use crate::{
    Landlock, MemoryUse,
    audit::{self, StoppedCall},
    cgroup::Cgroup,
    memory,
};

/// A cell that was started. It is killed, and its cgroup removed, when this is dropped.
#[derive(Debug)]
pub struct Cell {
    parts: Parts,
    end: Option<End>,
}

/// What [`start`](crate::start) made.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) cgroup: Cgroup,
    pub(crate) landlock: Landlock,
    pub(crate) weakened: BTreeSet<CellPart>,
    pub(crate) log_of_kernel: Option<File>,
}

/// How a cell's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It exited with this status.
    Exited(i32),
    /// A signal ended it.
    Signalled(i32),
    /// A seccomp filter stopped a call that it does not allow.
    StoppedBySeccomp {
        /// The call's number, when the kernel's log told it.
        call: Option<u32>,
        /// The name of the thread that made it, likewise.
        thread: Option<String>,
    },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signalled(signal) => write!(f, "killed by signal {signal}"),
            Self::StoppedBySeccomp { call: None, .. } => {
                f.write_str("stopped by seccomp: a call that its filter does not allow; the kernel's log has no line of it")
            }
            Self::StoppedBySeccomp { call: Some(number), thread } => {
                let name = casemate_filters::call_name(*number).unwrap_or("unknown");
                write!(f, "stopped by seccomp: call {number} ({name})")?;
                thread.as_ref().map_or(Ok(()), |thread| write!(f, " on thread {thread:?}"))
            }
        }
    }
}

impl Cell {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts, end: None }
    }

    /// The process's pid as the host sees it. After [`wait`](Self::wait) it may be another's.
    pub fn pid(&self) -> u32 {
        self.parts.pid
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.parts.pidfd.as_fd()
    }

    /// The parts that it is without, since the host can't give them and the plan let them be lacking.
    pub fn weakened(&self) -> &BTreeSet<CellPart> {
        &self.parts.weakened
    }

    /// What the cell's Landlock ruleset denies.
    pub fn landlock(&self) -> Landlock {
        self.parts.landlock
    }

    /// Waits for the end of the process. It can be called again.
    ///
    /// # Errors
    /// Those of waitid(2); ECHILD when someone else has waited for the process.
    pub fn wait(&mut self) -> io::Result<End> {
        loop {
            if let Some(end) = self.wait_with(WaitIdOptions::EXITED)? {
                return Ok(end);
            }
        }
    }

    /// How the process ended; `None` while it runs.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn try_wait(&mut self) -> io::Result<Option<End>> {
        self.wait_with(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    fn wait_with(&mut self, options: WaitIdOptions) -> io::Result<Option<End>> {
        if self.end.is_none() {
            let status = loop {
                match waitid(WaitId::PidFd(self.parts.pidfd.as_fd()), options) {
                    Err(Errno::INTR) => {}
                    result => break result?,
                }
            };
            self.end = status.map(|status| self.end_of(&status));
        }
        Ok(self.end.clone())
    }

    fn end_of(&mut self, status: &WaitIdStatus) -> End {
        match status.terminating_signal() {
            None => End::Exited(status.exit_status().unwrap_or(-1)),
            Some(libc::SIGSYS) => {
                let stopped =
                    self.parts.log_of_kernel.as_mut().and_then(|log| audit::find(log, self.parts.pid));
                let (call, thread) = stopped.map(|StoppedCall { call, thread }| (call, thread)).unzip();
                End::StoppedBySeccomp { call, thread }
            }
            Some(signal) => End::Signalled(signal),
        }
    }

    /// Kills the process. One that has ended already is no error.
    ///
    /// # Errors
    /// Those of pidfd_send_signal(2).
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.parts.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The process's memory, from /proc/PID/smaps. The guest's memory is told from the VMM's by the name `guest-ram` of its
    /// mappings, or, where the kernel keeps no names, by their size: the largest that have `guest_memory_bytes` together.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn memory(&self, guest_memory_bytes: u64) -> io::Result<MemoryUse> {
        memory::read(self.parts.pid, guest_memory_bytes)
    }

    /// Processor time that the cell has taken, from the making of its process on: the guest's and the VMM's. `None` when the
    /// cgroup is gone.
    pub fn cpu_time(&self) -> Option<Duration> {
        self.parts.cgroup.cpu_time()
    }

    /// Kills what still runs, waits for it, and removes the cgroup.
    ///
    /// # Errors
    /// `cell-cgroup` when the cgroup does not become empty in half a minute.
    pub fn close(mut self) -> Result<(), Refusal> {
        self.end_and_remove()
    }

    fn end_and_remove(&mut self) -> Result<(), Refusal> {
        // Removing the cgroup kills as well, and tells when that came to nothing.
        let _ = self.kill().and_then(|()| self.wait());
        self.parts.cgroup.remove()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        // After close() there is nothing to do, and this sees that at once.
        let _ = self.end_and_remove();
    }
}
