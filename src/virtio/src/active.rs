//! What a device holds while, and only while, its driver has it active.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::{
    counters::Counters,
    device::{Fault, Progress},
    gather::{Filled, Gathering},
    interrupt::Interrupt,
    request::Request,
    ring::{Queue, Ring, RingPlace},
};

/// Guest memory, as the VMM shares it with each device.
pub type Memory = Arc<GuestMemoryMmap>;

/// What a device did with a request that it was handed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// It is done, and so many bytes were written.
    Done(u32),
    /// It is taken; [`Active::finish`] will tell.
    Taken,
    /// It stays in the queue for another time, with all that follow.
    Left,
}

/// The memory, queues and interrupts of an active device. There is none while the device is inactive.
#[derive(Debug)]
pub struct Active {
    memory: Memory,
    queues: Vec<Option<Queue>>,
    interrupt: Interrupt,
    features: u64,
    counters: Arc<Counters>,
}

impl Active {
    /// `queues` are those that the driver enabled, each in its place; they must be valid in `memory`.
    pub(crate) fn new(
        memory: Memory,
        queues: Vec<Option<Queue>>,
        interrupt: Interrupt,
        features: u64,
        counters: Arc<Counters>,
    ) -> Self {
        Self { memory, queues, interrupt, features, counters }
    }

    /// Whether feature bit `bit` was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features.checked_shr(bit).is_some_and(|features| features & 1 == 1)
    }

    /// What was negotiated.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// Where queue `index` is, for who serves it in this device's place.
    pub(crate) fn place(&self, index: usize) -> Option<RingPlace> {
        Some(self.queues.get(index)?.as_ref()?.place())
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What the device has done, to be counted on.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Hands the requests of queue `index` to `handle`, at most `budget` of them, and interrupts the driver where it
    /// wants to be. `handle` returns the number of bytes it wrote, or `None` to leave the request and all that follow
    /// for another time.
    ///
    /// # Errors
    /// When the driver broke the ring or a chain, or when `handle` says so.
    pub fn serve(
        &mut self,
        index: usize,
        budget: usize,
        mut handle: impl FnMut(&Request<'_>) -> Result<Option<u32>, Fault>,
    ) -> Result<Progress, Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(Progress::Idle) };
        let mut ring = queue.ring(&self.memory)?;
        let progress = turn(&mut ring, &self.counters, budget, &mut handle)?;
        tell(&mut ring, &self.interrupt, index)?;
        Ok(progress)
    }

    /// Hands at most `budget` of the requests that are in queue `index` to `handle`, for a device that takes some now and does them
    /// later, and returns how many those are. The driver is told of nothing, [`Active::tell`] does that, and isn't asked to ring
    /// again, which is [`Active::listen`]'s: before both, the device can look again.
    ///
    /// # Errors
    /// As for [`Active::serve`].
    pub fn hand_out(
        &mut self,
        index: usize,
        budget: usize,
        handle: impl FnMut(&Request<'_>) -> Result<Handled, Fault>,
    ) -> Result<usize, Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(0) };
        let mut ring = queue.ring(&self.memory)?;
        ring.rest()?;
        hand_out(&mut ring, &self.counters, budget, handle)
    }

    /// Asks the driver to ring when it puts more into queue `index`; true when there is more already, for which it need not ring.
    ///
    /// # Errors
    /// When the driver broke the ring.
    pub fn listen(&mut self, index: usize) -> Result<bool, Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(false) };
        queue.ring(&self.memory)?.listen()
    }

    /// As [`Active::serve`], for a device that puts something into as many requests as it takes: `handle` gathers them, and says
    /// what became of it. Those without any bytes stay in the queue. All that one call of `handle` filled are given
    /// back at once.
    ///
    /// # Errors
    /// As for [`Active::serve`].
    pub(crate) fn serve_together(
        &mut self,
        index: usize,
        budget: usize,
        mut handle: impl FnMut(&mut Gathering<'_>) -> Result<Filled, Fault>,
    ) -> Result<Progress, Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(Progress::Idle) };
        let mut gathering = Gathering::new(queue.ring(&self.memory)?, budget)?;
        let mut progress = Progress::More;
        for _ in 0..budget {
            match handle(&mut gathering)? {
                Filled::Bytes(0) => {}
                Filled::Bytes(written) => {
                    self.counters.request(0, written as u64);
                    gathering.give_back(written)?;
                }
                Filled::Nothing => {
                    progress = Progress::Idle;
                    break;
                }
                Filled::Later => break,
            }
        }
        tell(&mut gathering.end(), &self.interrupt, index)?;
        Ok(progress)
    }

    /// Gives requests that were taken from queue `index` back to the driver, who is told by [`Active::tell`]: of each its head, how many
    /// bytes were the driver's and how many are the device's.
    ///
    /// # Errors
    /// When the driver broke the ring.
    pub fn finish(
        &mut self,
        index: usize,
        ended: impl Iterator<Item = (u16, u64, u32)>,
    ) -> Result<(), Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(()) };
        let counters = &self.counters;
        queue.ring(&self.memory)?.give_back(ended.map(|(head, read, written)| {
            counters.request(read, written.into());
            (head, written)
        }))
    }

    /// Interrupts the driver if something was given back to queue `index` since it was last told, and it wants to know.
    ///
    /// # Errors
    /// When the driver broke the ring.
    pub fn tell(&mut self, index: usize) -> Result<(), Fault> {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(()) };
        tell(&mut queue.ring(&self.memory)?, &self.interrupt, index)
    }
}

fn tell(ring: &mut Ring<'_>, interrupt: &Interrupt, index: usize) -> Result<(), Fault> {
    if ring.wants_word()? {
        interrupt.signal_queue(index);
    }
    Ok(())
}

/// One turn of a queue.
fn turn(
    ring: &mut Ring<'_>,
    counters: &Counters,
    budget: usize,
    handle: &mut impl FnMut(&Request<'_>) -> Result<Option<u32>, Fault>,
) -> Result<Progress, Fault> {
    let mut left = budget;
    loop {
        ring.rest()?;
        let mut leaves = false;
        let count = hand_out(ring, counters, left, |request| {
            let written = handle(request)?;
            leaves = written.is_none();
            Ok(written.map_or(Handled::Left, Handled::Done))
        })?;
        // Also spent on a look in vain, so that an index that runs to and fro cannot hold the thread.
        match left.saturating_sub(count).checked_sub(1) {
            _ if leaves => return Ok(Progress::Idle),
            None => return Ok(Progress::More),
            Some(less) => left = less,
        }
        if !ring.listen()? {
            return Ok(Progress::Idle);
        }
    }
}

/// Hands out what is in a queue, at most `budget`, and returns how many requests did not stay there.
fn hand_out(
    ring: &mut Ring<'_>,
    counters: &Counters,
    budget: usize,
    mut handle: impl FnMut(&Request<'_>) -> Result<Handled, Fault>,
) -> Result<usize, Fault> {
    for count in 0..budget {
        let Some(request) = ring.take()? else { return Ok(count) };
        match handle(&request)? {
            Handled::Done(written) => {
                counters.request(request.readable.bytes() as u64, written.into());
                ring.give_back([(request.head(), written)])?;
            }
            Handled::Taken => {}
            Handled::Left => {
                ring.leave();
                return Ok(count);
            }
        }
    }
    Ok(budget)
}
