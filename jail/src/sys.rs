//! The system calls that rustix does not wrap, or not in a way that may be used between clone and exec.
//!
//! Nothing here allocates or takes a lock: in the child of a process with threads, a lock may be held by a thread that does
//! not exist there.
// Raw system calls and the clone of a process are unsafe by nature; this is the one module that makes them.
#![allow(unsafe_code)]

use std::{
    ffi::{c_char, c_int, c_long},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use rustix::io::{Errno, Result};

/// Turns libc's -1 into the error.
fn checked(result: c_long) -> Result<c_long> {
    if result == -1 {
        // SAFETY: __errno_location gives the calling thread's own cell, which is always readable.
        Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
    } else {
        Ok(result)
    }
}

/// `struct landlock_ruleset_attr`. Kernels that know less of it take it as long as what they don't know is 0.
#[repr(C)]
pub(crate) struct LandlockAttributes {
    pub(crate) filesystem: u64,
    pub(crate) network: u64,
    pub(crate) scopes: u64,
}

/// The kernel's Landlock ABI.
pub(crate) fn landlock_abi() -> Result<u32> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    // SAFETY: with this flag the kernel reads no attributes, and wants a null pointer of length 0.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    checked(result).map(|abi| u32::try_from(abi).unwrap_or(0))
}

/// Makes a ruleset that handles these rights.
pub(crate) fn landlock_ruleset(attributes: &LandlockAttributes) -> Result<OwnedFd> {
    let size = size_of::<LandlockAttributes>();
    // SAFETY: the kernel reads `size` bytes of the struct, which is plain data and lives through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::from_ref(attributes), size, 0u32) };
    let descriptor = checked(result)?;
    // SAFETY: the call made this descriptor just now, so nothing else owns it; it is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(descriptor).map_err(|_| Errno::BADF)?) })
}

/// `struct landlock_path_beneath_attr`, which is packed.
#[repr(C, packed)]
struct LandlockBeneath {
    allowed: u64,
    parent: RawFd,
}

/// Has a ruleset allow these of its rights below a directory.
pub(crate) fn landlock_allow_beneath(ruleset: &OwnedFd, parent: &OwnedFd, allowed: u64) -> Result<()> {
    const LANDLOCK_RULE_PATH_BENEATH: c_int = 1;
    let rule = LandlockBeneath { allowed, parent: parent.as_raw_fd() };
    // SAFETY: the kernel reads the struct, which has its layout and lives through the call; both descriptors are open as long as
    // they are borrowed.
    checked(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            LANDLOCK_RULE_PATH_BENEATH,
            ptr::from_ref(&rule),
            0u32,
        )
    })
    .map(drop)
}

/// Puts a ruleset on the calling thread.
pub(crate) fn landlock_restrict_self(ruleset: RawFd, flags: u32) -> Result<()> {
    // SAFETY: takes numbers only.
    checked(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, flags) }).map(drop)
}

/// Whether the kernel's seccomp has filters and kills the whole process.
pub(crate) fn seccomp_kills_process() -> Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: reads one u32, which lives through the call.
    checked(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0u32, ptr::from_ref(&action))
    })
    .map(drop)
}

/// A new process, as its parent sees it.
pub(crate) struct Cloned {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
}

/// Clones the process, without sharing memory, into new namespaces (`CLONE_NEW*`) and into the cgroup of this directory, and
/// runs `child(prepared)` there. Signal handlers are back to their defaults in the child.
///
/// `child` may only do what is safe in a signal handler: no allocation, no lock, no panic. The caller's other threads don't
/// exist in it, and what they held stays locked; that would hang the child and nothing else.
pub(crate) fn clone_into<T>(
    cgroup: BorrowedFd<'_>,
    namespaces: c_int,
    child: fn(&T) -> !,
    prepared: &T,
) -> Result<Cloned> {
    // libc's two of these are of a type that is too narrow for them.
    const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let mut pidfd: RawFd = -1;
    let flags = (namespaces | libc::CLONE_PIDFD).cast_unsigned();
    // SAFETY: clone_args is plain numbers, for which zero means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags) | CLONE_CLEAR_SIGHAND | CLONE_INTO_CGROUP;
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    // SAFETY: without CLONE_VM the child runs on a copy of this stack and of all memory, as after fork, and never leaves this
    // function: `child` does not return. The kernel writes the pidfd into `pidfd` alone, which lives through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match checked(result)? {
        0 => child(prepared),
        pid => Ok(Cloned {
            pid: u32::try_from(pid).map_err(|_| Errno::RANGE)?,
            // SAFETY: the call made this descriptor just now, so nothing else owns it; it is close-on-exec.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// A duplicate at `at_least` or above, close-on-exec.
pub(crate) fn duplicate_above(descriptor: RawFd, at_least: RawFd) -> Result<RawFd> {
    // SAFETY: takes numbers only.
    let result = unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, at_least) };
    checked(result.into()).map(|_| result)
}

/// Makes `to` a duplicate of `from`, which must be another number.
pub(crate) fn duplicate_to(from: RawFd, to: RawFd, close_on_exec: bool) -> Result<()> {
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: takes numbers only. Whoever owned `to` in this process is the caller's business: the child owns nothing.
    checked(unsafe { libc::dup3(from, to, flags) }.into()).map(drop)
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> Result<()> {
    // SAFETY: takes numbers only; as for `duplicate_to`.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0u32) }).map(drop)
}

/// No signal ignored, none blocked.
pub(crate) fn fresh_signals() -> Result<()> {
    for signal in 1..=64 {
        // SAFETY: the default action needs no handler. It fails for SIGKILL, SIGSTOP and glibc's own two, which are at their
        // defaults: those can't be ignored or are handled, and CLONE_CLEAR_SIGHAND reset what was handled.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let none = 0u64;
    // SAFETY: the kernel reads 8 bytes, the size of its signal set, and writes nothing where the old set is null. The raw call
    // is used since glibc's would leave its own two signals as they were.
    checked(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    })
    .map(drop)
}

/// The plain personality: randomised addresses, and no readable page made executable.
pub(crate) fn plain_personality() -> Result<()> {
    // SAFETY: takes a number only.
    checked(unsafe { libc::personality(0) }.into()).map(drop)
}

/// A new, empty session key ring in place of the parent's. Kernels without keys have none to lose.
pub(crate) fn empty_key_ring() -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: a null name means an anonymous ring; nothing is read.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, ptr::null::<c_char>()) };
    match checked(result) {
        Ok(_) | Err(Errno::NOSYS) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes every capability out of the bounding set.
pub(crate) fn empty_bounding_set() -> Result<()> {
    for capability in 0..64 {
        // SAFETY: takes numbers only.
        match checked(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into()) {
            Ok(_) => {}
            // Past the last one that the kernel knows.
            Err(Errno::INVAL) if capability > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Strings for execveat, made before the clone.
pub(crate) struct Arguments {
    /// Keeps what `pointers` point at.
    _strings: Vec<std::ffi::CString>,
    pointers: Vec<*const c_char>,
}

impl Arguments {
    /// These strings, as an array of pointers with a null at its end.
    pub(crate) fn new(strings: Vec<std::ffi::CString>) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { _strings: strings, pointers }
    }
}

/// All that a program in a cell has of an environment: its threads don't register restartable sequences (rseq(2)), which nothing
/// there uses. The kernel would look after those each time that a thread gets a processor, which is twice for a request.
pub(crate) const ENVIRONMENT: &std::ffi::CStr = c"GLIBC_TUNABLES=glibc.pthread.rseq=0";

/// Executes the file of this descriptor with [`ENVIRONMENT`]; returns only when it failed.
pub(crate) fn execute(program: RawFd, arguments: &Arguments) -> Errno {
    let environment = [ENVIRONMENT.as_ptr(), ptr::null::<c_char>()];
    // SAFETY: the path is empty and ends with a null byte; both arrays end with a null pointer, and their strings live as long
    // as `arguments`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program,
            c"".as_ptr(),
            arguments.pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    checked(result).err().unwrap_or(Errno::NOEXEC)
}

/// Kinds of ids for `PR_SCHED_CORE` (`include/linux/pid_types.h`).
const PIDTYPE_PID: c_int = 0;
const PIDTYPE_TGID: c_int = 1;

/// A core-scheduling cookie of the process's own: no core runs it beside another process at the same moment. Where there is
/// nothing to tell apart (no SMT), or the kernel was built without it, it stays as it is, and the audit tells.
pub(crate) fn own_core_cookie() -> Result<()> {
    // SAFETY: takes numbers only; 0 is the caller itself, and nothing is written for this command.
    let result = unsafe { libc::prctl(libc::PR_SCHED_CORE, libc::PR_SCHED_CORE_CREATE, 0, PIDTYPE_TGID, 0) };
    match checked(result.into()) {
        Ok(_) | Err(Errno::NODEV | Errno::INVAL) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the kernel schedules cores apart, or has none that run two threads.
pub(crate) fn has_core_scheduling() -> bool {
    let mut cookie = 0u64;
    // SAFETY: for this command and this kind of id the kernel writes one u64, which lives through the call; 0 is the caller.
    let result =
        unsafe { libc::prctl(libc::PR_SCHED_CORE, libc::PR_SCHED_CORE_GET, 0, PIDTYPE_PID, &raw mut cookie) };
    matches!(checked(result.into()), Ok(_) | Err(Errno::NODEV))
}

/// The core-scheduling cookie of a thread, 0 without one; `None` where the kernel does not tell.
pub fn core_cookie(tid: u32) -> Option<u64> {
    let mut cookie = 0u64;
    let tid = c_int::try_from(tid).ok()?;
    // SAFETY: for this command and this kind of id the kernel writes one u64, which lives through the call.
    let result = unsafe {
        libc::prctl(libc::PR_SCHED_CORE, libc::PR_SCHED_CORE_GET, tid, PIDTYPE_PID, &raw mut cookie)
    };
    checked(result.into()).ok().map(|_| cookie)
}

/// Leaves the parent's cgroup namespace; the process's own cgroup is the root of the new one.
pub(crate) fn own_cgroup_namespace() -> Result<()> {
    // SAFETY: takes a number only, and what it parts from is shared with no other thread: descriptors are not concerned.
    checked(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into()).map(drop)
}

/// Writes to a descriptor.
pub(crate) fn write(descriptor: RawFd, bytes: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads `bytes.len()` bytes at `bytes`, which lives through the call.
    checked(unsafe { libc::write(descriptor, bytes.as_ptr().cast(), bytes.len()) } as c_long).map(drop)
}

/// Whether the pipe of this write end has lost all its readers.
pub(crate) fn has_no_reader(pipe: RawFd) -> Result<bool> {
    let mut poll = libc::pollfd { fd: pipe, events: 0, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    checked(unsafe { libc::poll(&raw mut poll, 1, 0) }.into())?;
    Ok(poll.revents & libc::POLLERR != 0)
}

/// Ends the process at once: no destructor, no handler.
pub(crate) fn exit_now(status: c_int) -> ! {
    // SAFETY: _exit runs nothing of this process.
    unsafe { libc::_exit(status) }
}
