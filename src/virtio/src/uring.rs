//! An io_uring for one file: a few operations on guest memory, many at once, of which a single system call starts all and
//! takes the results of those that have ended.
//!
//! A seccomp filter cannot see what a ring is asked for, so the ring itself is bound before it can be used
//! (io_uring_register(2), IORING_REGISTER_RESTRICTIONS): to read and to write, to or from one part of memory or several, to sync and to
//! allocate, on the one file that was registered, and no more
//! registering. A ring that waits for a disk which comes later, a [`SpareRing`], may be told of another file, and of nothing
//! else.
#![allow(unsafe_code)]

use std::{
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::mpsc::{self, Receiver, Sender},
};

use io_uring::{
    IoUring,
    opcode::{Fallocate, Fsync, Read, Readv, Write, Writev},
    register::Restriction,
    squeue::{Entry, Flags},
    types::{Fixed, FsyncFlags},
};
use rustix::fs::FallocateFlags;

use crate::vectored::{Left, Transfer};

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

/// A ring for one disk after the other, made before any of them has come.
pub struct SpareRing {
    /// It is there while no disk has it.
    stand: Receiver<IoUring>,
    home: Sender<IoUring>,
}

impl SpareRing {
    /// A ring without a file.
    ///
    /// # Errors
    /// As for [`Ring::new`].
    pub fn new() -> io::Result<Self> {
        let ring = bound(NO_FILE, true)?;
        let (home, stand) = mpsc::channel();
        // Both ends are here.
        let _ = home.send(ring);
        Ok(Self { stand, home })
    }

    /// The ring, for `file` alone. It comes back when what it's given to is dropped.
    ///
    /// # Errors
    /// What the kernel says; EBUSY while another disk has it.
    pub(crate) fn lend<T>(&self, file: BorrowedFd<'_>) -> io::Result<Ring<T>> {
        let ring = self.stand.try_recv().map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        // Dropped by an error, it is at home again.
        let ring = Ring::of(ring, Some(self.home.clone()));
        ring.knows(file.as_raw_fd())?;
        Ok(ring)
    }

    /// Has the ring forget its file, so that nothing holds that open; to be called when the disk is gone.
    pub fn forget_file(&self) {
        if let Ok(ring) = self.stand.try_recv() {
            // A file that the kernel would keep is one that it has been told of.
            if let Err(error) = ring.submitter().register_files_update(0, &[NO_FILE]) {
                eprintln!("casemate-vmm: a ring does not let a disk's file go: {error}");
            }
            let _ = self.home.send(ring);
        }
    }
}

/// An empty place in a ring's table of files.
const NO_FILE: i32 = -1;

/// Operations at once, a power of two. What is more waits in the guest's queues.
const ENTRIES: u16 = 128;

/// A ring that works on `file` alone, and on at most [`ENTRIES`] operations at once; `may_change` says whether
/// it may be told of another file.
fn bound(file: i32, may_change: bool) -> io::Result<IoUring> {
    /// io_uring_register(2), IORING_REGISTER_FILES_UPDATE.
    const FILES_UPDATE: u8 = 6;
    let ring = IoUring::builder()
        .setup_r_disabled()
        // Results are looked for after each call into the kernel anyway; no need to be interrupted for them.
        .setup_coop_taskrun()
        .build(ENTRIES.into())?;
    // Otherwise the kernel would read a list of parts after the call that names it.
    if !ring.params().is_feature_submit_stable() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let submitter = ring.submitter();
    submitter.register_files(&[file])?;
    submitter.register_iowq_max_workers(&mut { HELPERS })?;
    let fixed = Flags::FIXED_FILE.bits();
    let mut restrictions = vec![
        Restriction::sqe_op(Read::CODE),
        Restriction::sqe_op(Readv::CODE),
        Restriction::sqe_op(Write::CODE),
        Restriction::sqe_op(Writev::CODE),
        Restriction::sqe_op(Fsync::CODE),
        Restriction::sqe_op(Fallocate::CODE),
        Restriction::sqe_flags_allowed(fixed),
        Restriction::sqe_flags_required(fixed),
    ];
    restrictions.extend(may_change.then(|| Restriction::register_op(FILES_UPDATE)));
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

/// The ring. `T` comes back with each operation's result.
pub(crate) struct Ring<T> {
    ring: ManuallyDrop<IoUring>,
    /// Where the ring goes in the end, if it was lent.
    home: Option<Sender<IoUring>>,
    /// What the kernel works on, by the number that it was given with.
    slots: Vec<Option<(Operation, T)>>,
    free: Vec<usize>,
    /// Pushed, and not yet told to the kernel.
    pushed: usize,
}

impl<T> Ring<T> {
    /// A ring that works on `file` alone, and on at most [`ENTRIES`] operations at once.
    ///
    /// # Errors
    /// What the kernel says: EPERM where `kernel.io_uring_disabled` forbids it, ENOSYS or EINVAL before Linux 5.19.
    pub(crate) fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self::of(bound(file.as_raw_fd(), false)?, None))
    }

    fn of(ring: IoUring, home: Option<Sender<IoUring>>) -> Self {
        let slots = std::iter::repeat_with(|| None).take(ENTRIES.into()).collect();
        let free = (0..ENTRIES.into()).rev().collect();
        Self { ring: ManuallyDrop::new(ring), home, slots, free, pushed: 0 }
    }

    /// Tells the kernel of the one file.
    fn knows(&self, file: i32) -> io::Result<()> {
        self.ring.submitter().register_files_update(0, &[file]).map(drop)
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
        // SAFETY: the entry points to the one part of a transfer, or to its list of parts, which the slot owns, as it owns what keeps
        // the parts mapped, until the kernel has told the operation's end; and `drop` waits for that.
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
        Operation::Read { transfer, offset } => match transfer.left() {
            Left::One(part) => Read::new(FILE, part.iov_base.cast(), length_of(part)).offset(*offset).build(),
            Left::Several(parts) => {
                Readv::new(FILE, parts.as_ptr(), parts.len() as u32).offset(*offset).build()
            }
        },
        Operation::Write { transfer, offset, durable } => {
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            match transfer.left() {
                Left::One(part) => Write::new(FILE, part.iov_base.cast(), length_of(part))
                    .offset(*offset)
                    .rw_flags(flags)
                    .build(),
                Left::Several(parts) => Writev::new(FILE, parts.as_ptr(), parts.len() as u32)
                    .offset(*offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        Operation::Sync => Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        Operation::Allocate { mode, offset, length } => {
            Fallocate::new(FILE, *length).offset(*offset).mode(mode.bits().cast_signed()).build()
        }
    };
    entry.flags(Flags::FIXED_FILE)
}

/// A request has less than 4 GiB.
fn length_of(part: libc::iovec) -> u32 {
    u32::try_from(part.iov_len).unwrap_or(0)
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
        // SAFETY: it is taken here alone, and nothing uses it afterwards.
        let ring = unsafe { ManuallyDrop::take(&mut self.ring) };
        if let Some(home) = &self.home {
            // With nobody there it ends here.
            let _ = home.send(ring);
        }
    }
}
