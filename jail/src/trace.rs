//! Takes the seccomp filters out of a running process's threads (ptrace(2), `PTRACE_SECCOMP_GET_FILTER`).
//!
//! Each thread stands still for the moment in which its filters are copied: it is seized and interrupted, which sends no
//! signal, and let go again. Should this program die in between, the kernel lets the thread go.
// ptrace is one raw call for everything, with pointers in it for some.
#![allow(unsafe_code)]

use std::{
    ffi::{c_int, c_uint, c_ulong},
    io, ptr,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::bpf::{Filter, Instruction};

/// For a thread to stand still. A vCPU's thread comes out of the guest at once; one that sleeps in the kernel may take
/// a moment.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// The kernel stacks no more instructions than 32 Ki, with 4 for each filter.
const FILTERS_MAX: c_ulong = 4096;
/// `BPF_MAXINSNS`.
const INSTRUCTIONS_MAX: usize = 4096;

/// The filters of one thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadFilters {
    /// The thread's id as the host sees it.
    pub tid: u32,
    /// Its filters; a call runs when all of them let it.
    pub filters: Vec<Filter>,
    /// How long it stood still.
    pub stood_still: Duration,
}

/// The filters of each of these threads. Needs CAP_SYS_ADMIN, no filter on the caller, and a kernel with
/// CONFIG_CHECKPOINT_RESTORE (Debian's has it).
///
/// # Errors
/// Those of ptrace(2): EPERM when another tracer is there or Yama's ptrace_scope is 3, EIO without that option; `TimedOut`
/// when a thread does not stand still.
pub fn filters(tids: &[u32]) -> io::Result<Vec<ThreadFilters>> {
    let mut threads = Vec::new();
    for tid in tids {
        let begun = Instant::now();
        let Some(stopped) = Stopped::stop(*tid)? else { continue };
        let filters = stopped.filters();
        drop(stopped);
        threads.push(ThreadFilters { tid: *tid, filters: filters?, stood_still: begun.elapsed() });
    }
    Ok(threads)
}

/// A thread that stands still; it goes on when this is dropped.
struct Stopped {
    tid: libc::pid_t,
    /// The signal that it had stopped for, which it is given when it goes on.
    signal: c_int,
}

impl Stopped {
    /// `None` when the thread has ended.
    fn stop(tid: u32) -> io::Result<Option<Self>> {
        let tid = libc::pid_t::try_from(tid).map_err(io::Error::other)?;
        // SAFETY: takes numbers only.
        match checked(unsafe { libc::ptrace(libc::PTRACE_SEIZE, tid, 0usize, 0usize) }) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            result => result?,
        };
        let mut stopped = Self { tid, signal: 0 };
        // SAFETY: takes numbers only.
        checked(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, tid, 0usize, 0usize) })?;
        let deadline = Instant::now() + STOP_WITHIN;
        loop {
            let mut status = 0;
            // SAFETY: writes one int, which lives through the call.
            let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            match found {
                -1 => return Err(io::Error::last_os_error()),
                0 if Instant::now() > deadline => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "a thread does not stand still"));
                }
                0 => sleep(Duration::from_micros(50)),
                _ if libc::WIFSTOPPED(status) => {
                    // A stop by PTRACE_INTERRUPT or of the group has an event; one without is for a signal.
                    stopped.signal = if status >> 16 == 0 { libc::WSTOPSIG(status) } else { 0 };
                    return Ok(Some(stopped));
                }
                _ => return Ok(None),
            }
        }
    }

    fn filters(&self) -> io::Result<Vec<Filter>> {
        let mut filters = Vec::new();
        for index in 0..FILTERS_MAX {
            // SAFETY: with a null pointer the kernel writes nothing and tells the length.
            match checked(unsafe { get_filter(self.tid, index, ptr::null_mut()) }) {
                // No filter of this number, or none at all.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => break,
                length => {
                    let length = usize::try_from(length?).unwrap_or(usize::MAX).min(INSTRUCTIONS_MAX);
                    let mut program = vec![Instruction { code: 0, jt: 0, jf: 0, k: 0 }; INSTRUCTIONS_MAX];
                    // SAFETY: the kernel writes as many instructions as it told, at most BPF_MAXINSNS, which is how many
                    // there is room for; `Instruction` is laid out as `struct sock_filter`, and any bytes are one. The
                    // thread stands still and filters don't change, so the length is the same as before.
                    checked(unsafe { get_filter(self.tid, index, program.as_mut_ptr()) })?;
                    program.truncate(length);
                    filters.push(Filter::new(program));
                }
            }
        }
        Ok(filters)
    }
}

/// # Safety
/// `program` is null or has room for `BPF_MAXINSNS` instructions.
unsafe fn get_filter(tid: libc::pid_t, index: c_ulong, program: *mut Instruction) -> libc::c_long {
    const PTRACE_SECCOMP_GET_FILTER: c_uint = 0x420c;
    // SAFETY: by this function's own condition; the thread is stopped and traced by this one.
    unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, tid, index, program) }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: takes numbers only. A thread that was killed in between is gone, which is as good.
        unsafe {
            libc::ptrace(libc::PTRACE_DETACH, self.tid, 0usize, c_ulong::from(self.signal.unsigned_abs()))
        };
    }
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_thread_without_filters_goes_on_unharmed() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        match filters(&[child.id()]) {
            Ok(threads) => {
                assert_eq!(threads.len(), 1);
                assert_eq!(threads[0].filters, []);
            }
            // Where tracing is not to be had, or not for this user.
            Err(error) => assert!(
                matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::EIO | libc::ENOSYS)),
                "{error}"
            ),
        }
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
        assert_eq!(filters(&[child.id()]).map(|threads| threads.len()).unwrap_or(0), 0);
    }
}
