//! Requests that are filled together, as a long frame takes several.

use std::sync::atomic::Ordering;

use virtio_queue::{QueueOwnedT, QueueT};

use crate::{active::Memory, device::Fault, place::Place, request::Request};

/// Requests of one queue, taken from it as far as they are needed.
pub(crate) struct Gathering<'a> {
    place: &'a mut Place,
    memory: &'a Memory,
    held: Vec<Request<'a>>,
    /// Bytes that can be written to those.
    room: usize,
    /// How often the queue may still be looked at, also in vain: an index that runs to and fro must not hold the thread.
    looks: usize,
}

impl<'a> Gathering<'a> {
    /// For up to `budget` times of filling.
    pub(crate) fn new(place: &'a mut Place, memory: &'a Memory, budget: usize) -> Result<Self, Fault> {
        place.queue.disable_notification(&**memory)?;
        let looks = budget.saturating_add(usize::from(place.queue.size()));
        Ok(Self { place, memory, held: Vec::new(), room: 0, looks })
    }

    /// Takes requests until there is room for so many bytes; false when the driver has not offered as much, who will then tell of more.
    pub(crate) fn gather(&mut self, room_bytes: usize) -> Result<bool, Fault> {
        let (memory, size) = (self.memory, self.place.queue.size());
        while self.room < room_bytes {
            for chain in self.place.queue.iter(&**memory)?.take(self.looks) {
                let request = Request::read(chain, memory, size)?;
                self.looks = self.looks.saturating_sub(1);
                self.room = self.room.saturating_add(request.writable.bytes());
                self.held.push(request);
                if self.room >= room_bytes {
                    return Ok(true);
                }
            }
            let Some(less) = self.looks.checked_sub(1) else { return Ok(false) };
            self.looks = less;
            if !self.place.queue.enable_notification(&**memory)? {
                return Ok(false);
            }
            self.place.queue.disable_notification(&**memory)?;
        }
        Ok(true)
    }

    /// Whether at least half of the queue is on offer, taken or not.
    pub(crate) fn is_half_full(&self) -> Result<bool, Fault> {
        let queue = &self.place.queue;
        let offered = queue.avail_idx(&**self.memory, Ordering::Acquire)?.0;
        let waiting = usize::from(offered.wrapping_sub(queue.next_avail()));
        Ok(waiting.saturating_add(self.held.len()) >= usize::from(queue.size() / 2).max(1))
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
        self.place.give_back(self.memory, chains)
    }

    /// Leaves the others in the queue.
    pub(crate) fn end(self) {
        for _ in self.held {
            self.place.queue.go_to_previous_position();
        }
    }
}
