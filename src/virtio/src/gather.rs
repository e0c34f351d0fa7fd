//! Requests that are filled together, as a long frame takes several.

use crate::{device::Fault, request::Request, ring::Ring, vectored::PARTS_USUAL};

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

/// Requests of one queue, taken from it as far as they are needed.
pub(crate) struct Gathering<'a> {
    ring: Ring<'a>,
    held: Vec<Request<'a>>,
    /// Bytes that can be written to those.
    room: usize,
    /// How often the queue may still be looked at in vain: an index that runs to and fro must not hold the thread.
    looks: usize,
}

impl<'a> Gathering<'a> {
    /// For up to `budget` times of filling.
    pub(crate) fn new(mut ring: Ring<'a>, budget: usize) -> Result<Self, Fault> {
        ring.rest()?;
        Ok(Self { ring, held: Vec::with_capacity(PARTS_USUAL), room: 0, looks: budget })
    }

    /// Takes requests until there is room for so many bytes, no more of them than the queue holds.
    pub(crate) fn gather(&mut self, room_bytes: usize) -> Result<Room, Fault> {
        while self.room < room_bytes {
            if self.held.len() >= usize::from(self.ring.size()) {
                return Ok(Room::Short);
            }
            if let Some(request) = self.ring.take()? {
                self.room = self.room.saturating_add(request.writable.bytes());
                self.held.push(request);
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
    pub(crate) fn is_half_full(&self) -> Result<bool, Fault> {
        let offered = usize::from(self.ring.waiting()?).saturating_add(self.held.len());
        Ok(offered >= usize::from(self.ring.size() / 2).max(1))
    }

    /// What was taken, in order.
    pub(crate) fn requests(&self) -> &[Request<'a>] {
        &self.held
    }

    /// Bytes that can be written to those.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// How many of them so many bytes fill, or begin to.
    pub(crate) fn filled_by(&self, bytes: usize) -> usize {
        let mut left = bytes;
        let filled = self.held.iter().take_while(|request| {
            let is_used = left > 0;
            left = left.saturating_sub(request.writable.bytes());
            is_used
        });
        filled.count()
    }

    /// Gives those back that `written` bytes fill.
    pub(crate) fn give_back(&mut self, written: usize) -> Result<(), Fault> {
        let (mut left, filled) = (written, self.filled_by(written));
        let chains = self.held.drain(..filled).map(|request| {
            let share = left.min(request.writable.bytes());
            left -= share;
            self.room = self.room.saturating_sub(request.writable.bytes());
            (request.head(), u32::try_from(share).unwrap_or(0))
        });
        self.ring.give_back(chains)
    }

    /// Leaves the others in the queue.
    pub(crate) fn end(mut self) -> Ring<'a> {
        for _ in self.held {
            self.ring.leave();
        }
        self.ring
    }
}
