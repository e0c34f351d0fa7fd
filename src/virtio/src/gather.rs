//! Requests that are filled together, as a long frame takes several.

use std::collections::VecDeque;

use vm_memory::VolatileSlice;

use crate::{
    device::Fault,
    request::{read, write},
    ring::Ring,
    vectored::PARTS_USUAL,
};

/// What became of one call of who fills them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// So many bytes were written, from the first request on.
    Bytes(usize),
    /// Nothing is there to be written, or no room for it: the driver will tell.
    Nothing,
    /// There is more to do, at another turn.
    Later,
}

/// Whether there is as much room as was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Enough,
    /// The driver has not offered as much, and will tell of more.
    Short,
    /// It was looked at often enough for this turn.
    Later,
}

/// Requests of one queue, taken from it as far as they are needed. They are filled one behind the other, as if they were one.
pub(crate) struct Gathering<'a> {
    ring: Ring<'a>,
    held: VecDeque<Held>,
    /// What can be written to, of all of them, none of it empty.
    parts: Vec<VolatileSlice<'a>>,
    /// Bytes that can be written to those.
    room: usize,
    /// How often the queue may still be looked at in vain: an index that runs to and fro must not hold the thread.
    looks: usize,
}

/// A request that was taken.
struct Held {
    head: u16,
    /// Of all that can be written to, how many are its.
    parts: usize,
    bytes: usize,
}

impl<'a> Gathering<'a> {
    /// For up to `budget` times of filling.
    pub(crate) fn new(mut ring: Ring<'a>, budget: usize) -> Result<Self, Fault> {
        ring.rest()?;
        let (held, parts) = (VecDeque::with_capacity(PARTS_USUAL), Vec::with_capacity(PARTS_USUAL));
        Ok(Self { ring, held, parts, room: 0, looks: budget })
    }

    /// Takes requests until there is room for so many bytes, no more of them than the queue holds.
    pub(crate) fn gather(&mut self, room_bytes: usize) -> Result<Room, Fault> {
        while self.room < room_bytes {
            if self.held.len() >= usize::from(self.ring.size()) {
                return Ok(Room::Short);
            }
            let before = self.parts.len();
            if let Some((head, bytes)) = self.ring.take_writable(&mut self.parts)? {
                self.room = self.room.saturating_add(bytes);
                let parts = self.parts.len().saturating_sub(before);
                self.held.push_back(Held { head, parts, bytes });
                continue;
            }
            if !self.ring.listen()? {
                return Ok(Room::Short);
            }
            self.ring.rest()?;
            let Some(less) = self.looks.checked_sub(1) else { return Ok(Room::Later) };
            self.looks = less;
        }
        Ok(Room::Enough)
    }

    /// Whether at least half of the queue is on offer, taken or not.
    pub(crate) fn is_half_full(&mut self) -> Result<bool, Fault> {
        let offered = usize::from(self.ring.waiting()?).saturating_add(self.held.len());
        Ok(offered >= usize::from(self.ring.size() / 2).max(1))
    }

    /// Whether something was taken, and each of it has room for more than so many bytes.
    pub(crate) fn have_each_more_than(&self, bytes: usize) -> bool {
        !self.held.is_empty() && self.held.iter().all(|held| held.bytes > bytes)
    }

    /// What can be written to, in order.
    pub(crate) fn parts(&self) -> impl Iterator<Item = VolatileSlice<'a>> + Clone + '_ {
        self.parts.iter().cloned()
    }

    /// Copies the first bytes there are; false when there are too few.
    #[must_use]
    pub(crate) fn read(&self, into: &mut [u8]) -> bool {
        read(self.parts(), into)
    }

    /// Copies to what is behind the first `parts` parts; false when that is too little.
    #[must_use]
    pub(crate) fn write_behind(&self, parts: usize, from: &[u8]) -> bool {
        write(self.parts().skip(parts), from)
    }

    /// Bytes that can be written to those.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// How many of them so many bytes fill, or begin to.
    pub(crate) fn filled_by(&self, bytes: usize) -> usize {
        let mut left = bytes;
        let filled = self.held.iter().take_while(|held| {
            let is_used = left > 0;
            left = left.saturating_sub(held.bytes);
            is_used
        });
        filled.count()
    }

    /// Gives those back that `written` bytes fill.
    pub(crate) fn give_back(&mut self, written: usize) -> Result<(), Fault> {
        let (mut left, filled) = (written, self.filled_by(written));
        let mut parts = 0usize;
        let chains = self.held.drain(..filled).map(|held| {
            let share = left.min(held.bytes);
            left -= share;
            self.room = self.room.saturating_sub(held.bytes);
            parts = parts.saturating_add(held.parts);
            (held.head, u32::try_from(share).unwrap_or(0))
        });
        self.ring.give_back(chains)?;
        self.parts.drain(..parts.min(self.parts.len()));
        Ok(())
    }

    /// Leaves the others in the queue.
    pub(crate) fn end(mut self) -> Ring<'a> {
        for _ in self.held {
            self.ring.leave();
        }
        self.ring
    }
}
