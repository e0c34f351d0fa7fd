//! A write that can be abandoned.

use std::{
    ffi::CString,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Looks this often whether the child has ended.
const POLL: Duration = Duration::from_millis(2);

/// Writes `bytes` with one write(2) to the existing file at `path`, in a child process, within `deadline`.
///
/// A driver that does not let go of its device sleeps in the kernel where SIGKILL does not reach it, and holds whoever
/// wrote to its `unbind`. So that is a child without any descriptor of ours: it holds nothing up but itself.
///
/// # Errors
/// What open(2) or write(2) said, or `TimedOut`: the child was abandoned and may finish later.
pub(crate) fn write(path: &Path, bytes: &[u8], deadline: Duration) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let parent = std::process::id().cast_signed();
    // SAFETY: the child of a process with threads may call async-signal-safe functions only; `write_and_exit`, its one
    // call, does, on memory that is complete before the fork.
    let pid = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: this is the child.
        0 => unsafe { write_and_exit(parent, &path, bytes) },
        pid => pid,
    };
    let until = Instant::now() + deadline;
    loop {
        if let Some(result) = reap(pid, libc::WNOHANG) {
            return result;
        }
        if Instant::now() >= until {
            // Ends it when it can be ended; whoever waits for it then is not us.
            // SAFETY: kill(2) touches no memory, and `pid` is our child, not yet waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            thread::spawn(move || reap(pid, 0));
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(POLL);
    }
}

/// The child's end: `None` while it runs.
fn reap(pid: libc::pid_t, flags: libc::c_int) -> Option<io::Result<()>> {
    let mut status = 0;
    loop {
        // SAFETY: waitpid writes one int, `status`, which is borrowed through the call.
        match unsafe { libc::waitpid(pid, &mut status, flags) } {
            0 => return None,
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Some(Err(io::Error::last_os_error())),
            _ if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 => return Some(Ok(())),
            _ if libc::WIFEXITED(status) => {
                return Some(Err(io::Error::from_raw_os_error(libc::WEXITSTATUS(status))));
            }
            _ => return Some(Err(io::Error::other("the helper was killed"))),
        }
    }
}

/// The child's whole life. Exits with the errno of what failed, or 0.
///
/// # Safety
/// For the child of a fork only: it closes every descriptor of the process.
unsafe fn write_and_exit(parent: libc::pid_t, path: &CString, bytes: &[u8]) -> ! {
    // SAFETY: all of these are plain system calls (async-signal-safe) on a path that ends in NUL, on `bytes.len()`
    // readable bytes, and on this thread's errno. Descriptors are closed since an abandoned child must hold open
    // neither a device nor somebody's pipe. A new session keeps the terminal's Ctrl-C from it. It dies with its parent
    // (the signal comes when the parent's thread ends, which waits for us; who was orphaned before asked in vain):
    // whoever undoes the parent's work must not meet a write that begins later.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != parent {
            libc::_exit(libc::ECHILD);
        }
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_TRUNC | libc::O_CLOEXEC);
        let done = fd >= 0 && libc::write(fd, bytes.as_ptr().cast(), bytes.len()) >= 0;
        libc::_exit(if done { 0 } else { (*libc::__errno_location()).clamp(1, 255) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn writes_and_tells_what_failed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("attribute");
        let write = |path: &Path| write(path, b"0000:03:00.0", Duration::from_secs(5));
        assert_eq!(write(&file).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(&file, "").unwrap();
        write(&file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "0000:03:00.0");
    }

    #[test]
    fn a_write_that_hangs_is_abandoned() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        let path = CString::new(fifo.as_os_str().as_bytes()).unwrap();
        // SAFETY: mkfifo reads a NUL-terminated path.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        // Nobody reads it: open(2) waits.
        let start = Instant::now();
        let result = write(&fifo, b"x", Duration::from_millis(100));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
