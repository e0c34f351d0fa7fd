//! Runs policy plugins: it's asked and answers over the socket that is its standard input. One line of complaint on standard error.
//!
//! Nobody starts it by hand: `casemate` does, for each bundle that it opens, and root's in a cell. Before it takes the first byte
//! of what a stranger wrote, its first filter is on (`jail/filters/policy-load.toml`).

// Closing what was inherited is one system call, which libc gives as an unsafe function.
#![allow(unsafe_code)]

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
    process::ExitCode,
};

use casemate_filters::{Role, install};
use casemate_policy_engine::{Entered, serve};
use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit},
    stdio::stdin,
    thread::set_no_new_privs,
};

fn main() -> ExitCode {
    let served = confine().map_err(|error| format!("this process can't be confined: {error}"));
    match served.and_then(|()| serve(&Peer, enter)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            // Whoever started this reads one line; that it can't be written changes nothing.
            let _ = writeln!(io::stderr(), "{}", cause.replace('\n', ": "));
            ExitCode::FAILURE
        }
    }
}

/// What Casemate's cell has taken already, and what a plain child of an ordinary user's can give up.
fn confine() -> io::Result<()> {
    close_what_was_inherited()?;
    let limit = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    limit(Resource::Core, 0)?;
    limit(Resource::Fsize, 0)?;
    limit(Resource::Nofile, 16)?;
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    install(Role::PolicyLoad)
}

/// All but the standard streams.
fn close_what_was_inherited() -> io::Result<()> {
    // SAFETY: the process has one thread and has opened nothing yet, so nobody uses what is closed.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn enter(entered: Entered) {
    let role = match entered {
        Entered::Ticking => Role::PolicyTicker,
        Entered::Answering => Role::Policy,
    };
    if install(role).is_err() {
        // Nothing is answered by a thread without its filter. Whoever waits for an answer learns how this process ended.
        std::process::abort();
    }
}

/// Whoever asks: standard input, both ways.
struct Peer;

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        stdin()
    }
}

impl Read for &Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        rustix::io::read(stdin(), buffer).map_err(io::Error::from)
    }
}

impl Write for &Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        rustix::io::write(stdin(), bytes).map_err(io::Error::from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
