//! An io_uring for one file: a few operations on guest memory, many at once, of which a single system call starts all and
//! takes the results of those that have ended.
//!
//! A seccomp filter cannot see what a ring is asked for, so the ring itself is bound before it can be used
//! (io_uring_register(2), IORING_REGISTER_RESTRICTIONS): four operations, on the one file that was registered, and no more
//! registering.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use io_uring::{
    IoUring,
    opcode::{Fallocate, Fsync, Readv, Writev},
    register::Restriction,
    squeue::{Entry, Flags},
    types::{Fixed, FsyncFlags},
};
use rustix::fs::FallocateFlags;

use crate::vectored::Transfer;

/// Threads that the kernel may make for a ring, for what would block: so many for files and block devices, and one for
/// anything else, of which there is none.
const HELPERS: [u32; 2] = [4, 1];

/// Something to be done with the file.
#[derive(Debug)]
pub(crate) enum Operation {
    /// Fill memory from byte `offset` on.
    Read { transfer: Transfer, offset: u64 },
    /// Store memory from byte `offset` on; `durable` when it is to survive a loss of power.
    Write { transfer: Transfer, offset: u64, durable: bool },
    /// Make what was written survive a loss of power.
    Sync,
    /// fallocate(2).
    Allocate { mode: FallocateFlags, offset: u64, length: u64 },
}

/// The ring. `T` comes back with each operation's result.
pub(crate) struct Ring<T> {
    ring: IoUring,
    /// What the kernel works on, by the number that it was given with.
    slots: Vec<Option<(Operation, T)>>,
    free: Vec<usize>,
    /// Pushed, and not yet told to the kernel.
    pushed: usize,
}

impl<T> Ring<T> {
    /// A ring that works on `file` alone, and on at most `entries` operations (a power of two) at once.
    ///
    /// # Errors
    /// What the kernel says: EPERM where `kernel.io_uring_disabled` forbids it, ENOSYS or EINVAL before Linux 5.19.
    pub(crate) fn new(file: BorrowedFd<'_>, entries: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            // Results are looked for after each call into the kernel anyway; no need to be interrupted for them.
            .setup_coop_taskrun()
            .build(entries.into())?;
        // Otherwise the kernel would read a list of parts after the call that names it.
        if !ring.params().is_feature_submit_stable() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_iowq_max_workers(&mut { HELPERS })?;
        let fixed = Flags::FIXED_FILE.bits();
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(Readv::CODE),
            Restriction::sqe_op(Writev::CODE),
            Restriction::sqe_op(Fsync::CODE),
            Restriction::sqe_op(Fallocate::CODE),
            Restriction::sqe_flags_allowed(fixed),
            Restriction::sqe_flags_required(fixed),
        ])?;
        submitter.register_enable_rings()?;
        let slots = std::iter::repeat_with(|| None).take(entries.into()).collect();
        Ok(Self { ring, slots, free: (0..entries.into()).rev().collect(), pushed: 0 })
    }

    /// Whether nothing more can be started until something ends.
    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether something was added that [`Ring::submit`] could not start yet.
    pub(crate) fn has_pushed(&self) -> bool {
        self.pushed > 0
    }

    /// Operations that have not ended.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds an operation; [`Ring::submit`] starts it. False, and nothing is done, when the ring is full.
    #[must_use]
    pub(crate) fn start(&mut self, operation: Operation, tag: T) -> bool {
        let Some(number) = self.free.pop() else { return false };
        let Some(slot) = self.slots.get_mut(number) else { return false };
        let (operation, _) = slot.insert((operation, tag));
        let entry = entry(operation).user_data(number as u64);
        // SAFETY: the entry points to the list of parts of a transfer, which the slot owns, as it owns what keeps the
        // parts mapped, until the kernel has told the operation's end; and `drop` waits for that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many places as slots.
        if pushed.is_err() {
            *slot = None;
            self.free.push(number);
            return false;
        }
        self.pushed += 1;
        true
    }

    /// Starts what was added. False when the kernel has no room for it now, and is to be asked again.
    ///
    /// # Errors
    /// What the kernel says; the ring is of no use then.
    pub(crate) fn submit(&mut self) -> io::Result<bool> {
        while self.pushed > 0 {
            match self.ring.submit() {
                Ok(taken) => self.pushed = self.pushed.saturating_sub(taken),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(false),
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// Something that has ended, and how: bytes moved, for a transfer.
    pub(crate) fn ended(&mut self) -> Option<(Operation, T, io::Result<usize>)> {
        loop {
            let end = self.ring.completion().next()?;
            let result = usize::try_from(end.result())
                .map_err(|_| io::Error::from_raw_os_error(end.result().saturating_neg()));
            let number = usize::try_from(end.user_data()).unwrap_or(usize::MAX);
            if let Some((operation, tag)) = self.slots.get_mut(number).and_then(Option::take) {
                self.free.push(number);
                return Some((operation, tag, result));
            }
        }
    }

    /// Waits until all has ended, and forgets the results.
    pub(crate) fn drain(&mut self) {
        while self.in_flight() > 0 {
            while self.ended().is_some() {}
            match self.submit() {
                Ok(true) if self.in_flight() == 0 => return,
                Ok(true) => match self.ring.submit_and_wait(1) {
                    Err(error)
                        if !matches!(
                            error.raw_os_error(),
                            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                        ) =>
                    {
                        give_up(&error)
                    }
                    _ => {}
                },
                Ok(false) => std::thread::yield_now(),
                Err(error) => give_up(&error),
            }
        }
    }
}

/// The kernel does not say whether it still uses the guest's memory, so that can't be given to anybody else.
fn give_up(error: &io::Error) -> ! {
    eprintln!("casemate-vmm: a disk's ring can't be waited for: {error}");
    std::process::abort()
}

fn entry(operation: &Operation) -> Entry {
    const FILE: Fixed = Fixed(0);
    let entry = match operation {
        Operation::Read { transfer, offset } => {
            let parts = transfer.parts();
            Readv::new(FILE, parts.as_ptr(), parts.len() as u32).offset(*offset).build()
        }
        Operation::Write { transfer, offset, durable } => {
            let parts = transfer.parts();
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            Writev::new(FILE, parts.as_ptr(), parts.len() as u32).offset(*offset).rw_flags(flags).build()
        }
        Operation::Sync => Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        Operation::Allocate { mode, offset, length } => {
            Fallocate::new(FILE, *length).offset(*offset).mode(mode.bits().cast_signed()).build()
        }
    };
    entry.flags(Flags::FIXED_FILE)
}

impl<T> AsFd for Ring<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's, which lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.drain();
    }
}
