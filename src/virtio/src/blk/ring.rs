//! A disk's requests by io_uring: those of a turn are started together, and told to the driver together as they end.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::io::Errno;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;
use vm_memory::{Bytes, GuestAddress};

use super::{
    Disk, Failure,
    command::{Command, status_place},
    own::OwnWrites,
    patience::{Lesson, Patience},
};
use crate::{
    active::{Active, Handled},
    bits::{bits, is_in},
    counters::Counters,
    device::{Fault, Progress},
    request::Request,
    uring::{Operation, Ring, SpareRing},
    vectored::Transfer,
};

/// Requests taken from one queue before the others have their turn, and the driver is told of what has ended.
const BUDGET: usize = 64;

/// The ring, and what waits for it.
pub(super) struct RingEngine {
    ring: Ring<Ticket>,
    own: OwnWrites,
    patience: Patience,
    /// Queues, a bit each, that may hold requests which found the ring full.
    waiting: u64,
    /// What has ended and is to be given back; empty but for a moment.
    ended: Vec<Ended>,
}

/// The kernel has none for it.
pub(super) struct NoRing {
    pub(super) file: OwnedFd,
    pub(super) error: io::Error,
}

/// A request that was taken.
struct Ticket {
    queue: usize,
    head: u16,
    status_at: GuestAddress,
    /// Bytes of the request.
    read: u64,
    /// Bytes of data that the driver is told of when all goes well.
    bytes: u32,
    /// What is to be done after the present operation, the last first.
    rest: Vec<Operation>,
}

/// A request that has ended.
struct Ended {
    queue: usize,
    head: u16,
    read: u64,
    written: u32,
}

impl RingEngine {
    /// A ring on `file`.
    ///
    /// # Errors
    /// As for [`Ring::new`].
    pub(super) fn new(file: OwnedFd) -> Result<Self, NoRing> {
        Self::with(Ring::new(file.as_fd()), file)
    }

    /// The ring that waits for such disks, on `file`.
    ///
    /// # Errors
    /// As for [`SpareRing::lend`].
    pub(super) fn lent(spare: &SpareRing, file: OwnedFd) -> Result<Self, NoRing> {
        Self::with(spare.lend(file.as_fd()), file)
    }

    fn with(ring: io::Result<Ring<Ticket>>, file: OwnedFd) -> Result<Self, NoRing> {
        match ring {
            Ok(ring) => Ok(Self {
                ring,
                own: OwnWrites::new(file),
                patience: Patience::default(),
                waiting: 0,
                ended: Vec::with_capacity(BUDGET),
            }),
            Err(error) => Err(NoRing { file, error }),
        }
    }

    /// Becomes readable when something ends.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Takes what is in the queues, `queues` having a bit for each to look into, and tells what has ended.
    ///
    /// What the kernel did at once, as it does with a file in its cache, has ended before the driver is asked to ring again: what
    /// it puts into the queue meanwhile needs no ringing, and one interrupt tells of all.
    pub(super) fn turn(
        &mut self,
        disk: &Disk,
        active: &mut Active,
        queues: u64,
        write_through: bool,
    ) -> Result<Progress, Fault> {
        let mut given_back = self.settle(active)?;
        let counters = Arc::clone(active.counters());
        // Those to look into, each in its turn, and what may still be spent on that: a look in vain costs as much as a request.
        let due = self.waiting | queues;
        let mut look = due;
        let mut left = BUDGET;
        let (is_patient, mut lesson) = (queues != 0 && self.patience.begins(), Lesson::default());
        while look != 0 && left > 0 {
            let mut found = 0;
            for index in bits(look) {
                self.waiting &= !(1 << index);
                let count = active.hand_out(index, BUDGET, |request| {
                    self.take(index, request, disk, write_through, &counters)
                })?;
                let is_empty = count == 0 && (is_in(self.waiting, index) || !active.listen(index)?);
                look &= !(u64::from(is_empty) << index);
                left = left.saturating_sub(count.max(1));
                found += count;
            }
            lesson.finds(found);
            given_back |= self.settle(active)?;
            // The driver isn't asked to ring meanwhile.
            if is_patient && found > 0 && left > 0 {
                lesson.yields();
            }
        }
        self.patience.ends(&lesson);
        for queue in bits(due | given_back) {
            active.tell(queue)?;
        }
        // Who calls comes again for a queue that was asked for, as its limits let it.
        self.waiting |= look & !queues;
        // With a full ring, the end of an operation is the next event.
        let again = look & queues != 0 || self.waiting != 0 && !self.ring.is_full() || self.ring.has_pushed();
        Ok(if again { Progress::More } else { Progress::Idle })
    }

    /// Waits for all that was taken, and tells nobody.
    pub(super) fn quiesce(&mut self) {
        self.ring.drain();
        self.own.quiesce();
        self.waiting = 0;
        // What a broken ring did not take back.
        self.ended.clear();
    }

    fn take(
        &mut self,
        queue: usize,
        request: &Request<'_>,
        disk: &Disk,
        write_through: bool,
        counters: &Counters,
    ) -> Result<Handled, Fault> {
        if self.ring.is_full() {
            self.waiting |= 1 << queue;
            return Ok(Handled::Left);
        }
        let status_at = status_place(request)?;
        let read = request.readable.bytes() as u64;
        let mut ticket = Ticket { queue, head: request.head(), status_at, read, bytes: 0, rest: Vec::new() };
        let failure = match Command::read(request, disk)? {
            Ok(Command::Identify { bytes }) => match disk.identify(request, bytes) {
                Ok(bytes) => return answer(request, VIRTIO_BLK_S_OK as u8, bytes),
                Err(failure) => failure,
            },
            Ok(Command::Write { offset, data }) if !write_through && self.own.take(data.len()) => {
                match self.own.write(&request.readable, data, offset) {
                    Ok(()) => return answer(request, VIRTIO_BLK_S_OK as u8, 0),
                    Err(failure) => failure,
                }
            }
            Ok(command) => {
                let Some(first) = ticket.plan(command, request, write_through) else {
                    return answer(request, VIRTIO_BLK_S_OK as u8, 0);
                };
                self.start(first, ticket);
                return Ok(Handled::Taken);
            }
            Err(failure) => failure,
        };
        counters.error();
        answer(request, failure.status(), 0)
    }

    /// Puts an operation into the ring, which is not full: that was looked at, or a place was just given back.
    fn start(&mut self, operation: Operation, ticket: Ticket) {
        self.own.begins(&operation);
        let _ = self.ring.start(operation, ticket);
    }

    /// Starts what was taken and gives back what has ended, until nothing more has. Returns the queues whose drivers are to be told, a
    /// bit each.
    fn settle(&mut self, active: &mut Active) -> Result<u64, Fault> {
        loop {
            self.ring.submit().map_err(Fault::Host)?;
            let mut continued = false;
            while let Some((operation, ticket, result)) = self.ring.ended() {
                let (queue, head, read) = (ticket.queue, ticket.head, ticket.read);
                self.own.ends(&operation);
                match go_on(operation, ticket, result) {
                    Next::Start(operation, ticket) => {
                        self.start(operation, ticket);
                        continued = true;
                    }
                    Next::Tell { status_at, status, written } => {
                        active.memory().write_obj(status, status_at)?;
                        if status != VIRTIO_BLK_S_OK as u8 {
                            active.counters().error();
                        }
                        self.ended.push(Ended { queue, head, read, written });
                    }
                }
            }
            if !continued {
                self.own.look();
                return self.give_back(active);
            }
        }
    }

    /// Gives back what has ended. Returns the queues whose drivers are to be told, a bit each.
    fn give_back(&mut self, active: &mut Active) -> Result<u64, Fault> {
        let mut given_back = 0u64;
        for of_queue in self.ended.chunk_by(|one, next| one.queue == next.queue) {
            let Some(Ended { queue, .. }) = of_queue.first() else { continue };
            active.finish(*queue, of_queue.iter().map(|ended| (ended.head, ended.read, ended.written)))?;
            given_back |= 1 << queue;
        }
        self.ended.clear();
        Ok(given_back)
    }
}

impl Ticket {
    /// Plans what is to be done for `command`, and returns the first of it: nearly all have no more.
    fn plan(&mut self, command: Command, request: &Request<'_>, write_through: bool) -> Option<Operation> {
        match command {
            Command::Read { offset, bytes } => {
                self.bytes = u32::try_from(bytes).unwrap_or(0);
                (bytes > 0)
                    .then(|| Operation::Read { transfer: Transfer::new(&request.writable, 0..bytes), offset })
            }
            Command::Write { offset, data } => (!data.is_empty()).then(|| Operation::Write {
                transfer: Transfer::new(&request.readable, data),
                offset,
                durable: write_through,
            }),
            Command::Flush => Some(Operation::Sync),
            Command::Clear(ranges) => {
                if write_through {
                    self.rest.push(Operation::Sync);
                }
                self.rest.extend(ranges.into_iter().rev().map(|range| Operation::Allocate {
                    mode: range.mode(),
                    offset: range.offset,
                    length: range.length,
                }));
                self.rest.pop()
            }
            Command::Identify { .. } => None,
        }
    }
}

/// What follows the end of an operation.
enum Next {
    Start(Operation, Ticket),
    Tell { status_at: GuestAddress, status: u8, written: u32 },
}

fn go_on(operation: Operation, mut ticket: Ticket, result: io::Result<usize>) -> Next {
    let end = match result {
        Ok(moved) => rest_of(operation, moved),
        // Where room can't be given back, or not in such parts, the driver is to do without.
        Err(error) if matches!(operation, Operation::Allocate { .. }) => {
            Err(Errno::from_io_error(&error).map_or(Failure::Io, Failure::from))
        }
        Err(error) => Err(error.into()),
    };
    let status_at = ticket.status_at;
    match end {
        Ok(Some(operation)) => Next::Start(operation, ticket),
        Ok(None) => match ticket.rest.pop() {
            Some(operation) => Next::Start(operation, ticket),
            None => {
                let written = ticket.bytes.saturating_add(1);
                Next::Tell { status_at, status: VIRTIO_BLK_S_OK as u8, written }
            }
        },
        Err(failure) => {
            let failure: Failure = failure;
            Next::Tell { status_at, status: failure.status(), written: 1 }
        }
    }
}

/// What is left of `operation` after `moved` bytes of a transfer.
fn rest_of(operation: Operation, moved: usize) -> Result<Option<Operation>, Failure> {
    let left = |mut transfer: Transfer, offset: u64| {
        // The end of the file, or a device that takes nothing: it would go on for ever.
        if moved == 0 {
            return Err(Failure::Io);
        }
        transfer.advance(moved);
        Ok((transfer.bytes() > 0).then(|| (transfer, offset.saturating_add(moved as u64))))
    };
    Ok(match operation {
        Operation::Read { transfer, offset } => {
            left(transfer, offset)?.map(|(transfer, offset)| Operation::Read { transfer, offset })
        }
        Operation::Write { transfer, offset, durable } => {
            left(transfer, offset)?.map(|(transfer, offset)| Operation::Write { transfer, offset, durable })
        }
        Operation::Sync | Operation::Allocate { .. } => None,
    })
}

/// Answers a request at once; `bytes` of data were written.
fn answer(request: &Request<'_>, status: u8, bytes: usize) -> Result<Handled, Fault> {
    let at = request.writable.bytes().saturating_sub(1);
    if !request.writable.write(at, &[status]) {
        return Err(Fault::Request("has no room for its status"));
    }
    Ok(Handled::Done(u32::try_from(bytes).unwrap_or(0).saturating_add(1)))
}
