//! What a device holds while, and only while, its driver has it active.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::{
    counters::Counters,
    device::{Fault, Progress},
    interrupt::Interrupt,
    request::Request,
};

/// Guest memory, as the VMM shares it with each device.
pub type Memory = Arc<GuestMemoryMmap>;

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

    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What the device has done, to be counted on.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Number of queues, enabled or not.
    pub(crate) fn queue_count(&self) -> usize {
        self.queues.len()
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
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
        let memory = &*self.memory;
        let Some(Some(queue)) = self.queues.get_mut(index) else { return Ok(Progress::Idle) };
        let mut left = budget;
        loop {
            queue.disable_notification(memory)?;
            loop {
                // Also spent on a look in vain, so that an index that runs to and fro cannot hold the thread.
                let Some(less) = left.checked_sub(1) else { return Ok(Progress::More) };
                left = less;
                let Some(chain) = queue.iter(memory)?.next() else { break };
                let request = Request::read(chain, memory, queue.size())?;
                let Some(written) = handle(&request)? else {
                    queue.go_to_previous_position();
                    return Ok(Progress::Idle);
                };
                self.counters.request(request.readable.bytes() as u64, written.into());
                queue.add_used(memory, request.head(), written)?;
                if queue.needs_notification(memory)? {
                    self.interrupt.signal_queue(index);
                }
            }
            if !queue.enable_notification(memory)? {
                return Ok(Progress::Idle);
            }
        }
    }
}
