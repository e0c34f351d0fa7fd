//! Small writes that a disk's thread makes itself.
//!
//! A file system that can't promise to write into its cache without waiting (ext4 and tmpfs can't, XFS, btrfs and block devices can) has
//! io_uring hand every write to a thread of the kernel's, which makes them one after the other. Being woken, going to sleep and being told
//! then take longer than the copy that it's about. Here they are made in place, as long as that is quick: where one had to wait,
//! as for memory that must be written back first, the ring takes them, so that reads don't wait as well.

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use super::Failure;
use crate::{request::Buffers, uring::Operation, vectored::write_at};

/// The longest that is made in place: copied in some microseconds, and more than databases write at a time.
const BYTES_MAX: usize = 64 << 10;
/// One that takes longer has waited for something, or for its turn on a processor.
const QUICK: Duration = Duration::from_millis(1);
/// How many the ring takes after one that wasn't quick.
const REST: u32 = 256;

/// Who makes small writes, and the file that they are made to.
pub(super) struct OwnWrites {
    file: File,
    maker: Maker,
    /// In the ring.
    in_flight: u32,
}

enum Maker {
    /// The ring, and so many of them before what it does is looked at.
    Ring { left: u32 },
    /// The thread.
    Thread,
}

impl OwnWrites {
    /// To a file that is not open for O_DIRECT: then each would wait for the disk.
    pub(super) fn new(file: OwnedFd) -> Self {
        Self { file: File::from(file), maker: Maker::Ring { left: 0 }, in_flight: 0 }
    }

    /// Whether a write of so many bytes is to be made here.
    pub(super) fn take(&self, bytes: usize) -> bool {
        matches!(self.maker, Maker::Thread) && bytes <= BYTES_MAX
    }

    /// Makes one: bytes `range` of `buffers`, from byte `offset` of the file on.
    pub(super) fn write(
        &mut self,
        buffers: &Buffers<'_>,
        range: Range<usize>,
        offset: u64,
    ) -> Result<(), Failure> {
        let begun = Instant::now();
        let result = write_at(self.file.as_fd(), buffers, range, offset);
        self.took(begun.elapsed());
        Ok(result?)
    }

    fn took(&mut self, time: Duration) {
        if time > QUICK {
            self.maker = Maker::Ring { left: REST };
        }
    }

    /// An operation goes into the ring.
    pub(super) fn begins(&mut self, operation: &Operation) {
        if is_small(operation) {
            self.one_begins();
        }
    }

    /// It has ended.
    pub(super) fn ends(&mut self, operation: &Operation) {
        if is_small(operation) {
            self.one_ends();
        }
    }

    fn one_begins(&mut self) {
        self.in_flight = self.in_flight.saturating_add(1);
        if let Maker::Ring { left } = &mut self.maker {
            *left = left.saturating_sub(1);
        }
    }

    fn one_ends(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// The kernel was called, and what has ended was taken: what hasn't is in the hands of a thread of the kernel's.
    pub(super) fn look(&mut self) {
        if self.in_flight > 0 && matches!(self.maker, Maker::Ring { left: 0 }) {
            self.maker = Maker::Thread;
        }
    }

    /// The ring is empty.
    pub(super) fn quiesce(&mut self) {
        self.in_flight = 0;
    }
}

/// Those that are to survive a loss of power wait for the disk anyway.
fn is_small(operation: &Operation) -> bool {
    matches!(operation, Operation::Write { transfer, durable: false, .. } if transfer.bytes() <= BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_hands_over_is_made_here_until_one_is_slow() {
        let mut own = OwnWrites::new(tempfile::tempfile().unwrap().into());
        let ring_has_one = |own: &mut OwnWrites, at_once: bool| {
            own.one_begins();
            if at_once {
                own.one_ends();
            }
            own.look();
            if !at_once {
                own.one_ends();
            }
            own.take(BYTES_MAX)
        };
        assert!(!own.take(512), "at first the ring has them");
        assert!(!ring_has_one(&mut own, true), "it made one at once");
        assert!(ring_has_one(&mut own, false), "it handed one over");
        assert!(!own.take(BYTES_MAX + 1));
        own.took(QUICK);
        assert!(own.take(512));
        own.took(QUICK * 2);
        assert!((1..REST).all(|_| !ring_has_one(&mut own, false)));
        assert!(ring_has_one(&mut own, false), "it is tried again");
    }
}
