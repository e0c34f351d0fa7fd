//! A captured casemate-vmm: makes one attempt to get out of its cell. See the crate's front.

use std::{
    io::{self, IoSliceMut, Write},
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    process::exit,
    thread::park,
};

use casemate_filters::{Role, install};
use casemate_victims::{Attempt, REACHED, STOPPED, Stopped, THROUGH, allocate_as_the_vmm, attempt};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, accept_with, recvmsg};

fn main() {
    allocate_as_the_vmm();
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let role = arguments.next().unwrap_or_default();
    let role = if role == "-" { None } else { Some(Role::from_name(&role).unwrap_or_else(|| usage())) };
    if name == "stay" {
        stay();
    }
    if name == "time" {
        time(role);
        exit(0);
    }
    let attempt = attempt(&name).unwrap_or_else(|| usage());
    match run(attempt, role) {
        Ok(Ok(())) => say(THROUGH),
        Ok(Err(Stopped { call, error })) => say(&format!("{STOPPED} {call} {error}")),
        Err(error) => {
            say(&format!("failed: {error}"));
            exit(1);
        }
    }
}

fn usage() -> ! {
    let roles = Role::ALL.map(Role::name).join("|");
    say(&format!("usage: casemate-victim ATTEMPT {roles}|-, or: casemate-victim stay|time -"));
    exit(2)
}

fn say(line: &str) {
    // One write, so that no other call stands between the attempt and its report.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

fn run(attempt: &Attempt, role: Option<Role>) -> io::Result<Result<(), Stopped>> {
    // The VMM takes descriptors under its first filter.
    let first = role.and_then(Role::first).or(role);
    if first == Some(Role::Build) {
        install(Role::Build)?;
    }
    let kvm = if attempt.needs_kvm { Some(receive_descriptor()?) } else { None };
    if let Some(first) = first.filter(|first| *first != Role::Build) {
        install(first)?;
    }
    if let Some(role) = role.filter(|role| Some(*role) != first) {
        install(role)?;
    }
    say(REACHED);
    Ok((attempt.run)(kvm.as_ref().map_or(-1, |kvm| kvm.as_raw_fd())))
}

/// Tells how long an ioctl takes that the filters of a vCPU's thread let through and the kernel then refuses, in
/// nanoseconds: the cost of a call that is as an exit's, without the exit.
fn time(role: Option<Role>) {
    const CALLS: u32 = 200_000;
    const KVM_RUN: u64 = 0xae80;
    let filters = [Some(Role::Build), role].into_iter().flatten().filter(|_| role.is_some());
    for filter in filters {
        if let Err(error) = install(filter) {
            return say(&format!("failed: {error}"));
        }
    }
    let begun = std::time::Instant::now();
    for _ in 0..CALLS {
        // SAFETY: a request that means nothing to a pipe; its argument is no address.
        #[allow(unsafe_code, reason = "a raw call")]
        unsafe {
            libc::ioctl(2, KVM_RUN, 0)
        };
    }
    say(&(begun.elapsed().as_nanos() / u128::from(CALLS)).to_string());
}

/// Stays in the cell with a thread of each role, to be looked at.
fn stay() -> ! {
    let told = |result: io::Result<()>| result.unwrap_or_else(|error| say(&format!("failed: {error}")));
    told(install(Role::Build));
    let threads = Role::NARROW.map(|role| {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(role.name().into());
        let thread = thread.spawn(move || {
            let result = install(role);
            let _ = ready.send(());
            let _ = result.map(|()| {
                loop {
                    park()
                }
            });
        });
        let _ = is_ready.recv();
        thread
    });
    say(REACHED);
    let _ = threads;
    loop {
        park();
    }
}

/// Takes the descriptor that the first peer of the control socket sends.
fn receive_descriptor() -> io::Result<OwnedFd> {
    // SAFETY: descriptor 3 is the control socket of the cell for as long as the process lives; nothing here closes it.
    #[allow(unsafe_code, reason = "a number that the cell fixes becomes a descriptor")]
    let control = unsafe { BorrowedFd::borrow_raw(3) };
    let peer = accept_with(control, SocketFlags::CLOEXEC)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&peer, &mut [IoSliceMut::new(&mut [0; 16])], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
            && let Some(descriptor) = descriptors.next()
        {
            return Ok(descriptor);
        }
    }
    Err(io::Error::other("no descriptor came"))
}
