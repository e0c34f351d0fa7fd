//! Requests that are filled together, as a long frame takes several.

use crate::{device::Fault, request::Request, ring::Ring};

/// Requests of one queue, taken from it as far as they are needed.
pub(crate) struct Gathering<'a> {
    ring: Ring<'a>,
    held: Vec<Request<'a>>,
    /// Bytes that can be written to those.
    room: usize,
    /// How often the queue may still be looked at, also in vain: an index that runs to and fro must not hold the thread.
    looks: usize,
}

impl<'a> Gathering<'a> {
    /// For up to `budget` times of filling.
    pub(crate) fn new(mut ring: Ring<'a>, budget: usize) -> Result<Self, Fault> {
        ring.rest()?;
        let looks = budget.saturating_add(usize::from(ring.size()));
        Ok(Self { ring, held: Vec::new(), room: 0, looks })
    }

    /// Takes requests until there is room for so many bytes; false when the driver has not offered as much, who will then tell of more.
    pub(crate) fn gather(&mut self, room_bytes: usize) -> Result<bool, Fault> {
        while self.room < room_bytes {
            let Some(less) = self.looks.checked_sub(1) else { return Ok(false) };
            self.looks = less;
            if let Some(request) = self.ring.take()? {
                self.room = self.room.saturating_add(request.writable.bytes());
                self.held.push(request);
            } else if self.ring.listen()? {
                self.ring.rest()?;
            } else {
                return Ok(false);
            }
        }
        Ok(true)
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
