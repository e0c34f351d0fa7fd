//! A queue of an active device, and what its driver was told of it: the used ring (virtio 1.3, 2.7.8).

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::{active::Memory, device::Fault};

/// Of either ring, where its index and its elements are.
const INDEX: u64 = 2;
const ELEMENTS: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAILABLE_ELEMENT_BYTES: u64 = 2;

#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) queue: Queue,
    /// The used ring's index when the driver was last told, or did not want to be.
    told: u16,
}

impl Place {
    pub(crate) fn new(queue: Queue) -> Self {
        Self { told: queue.next_used(), queue }
    }

    /// Gives chains back to the driver, by their heads, with the number of bytes that were written to each. It sees all of them or none:
    /// of a frame in several buffers it must not find the first alone (5.1.6.3.2).
    pub(crate) fn give_back(
        &mut self,
        memory: &Memory,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), Fault> {
        let (ring, size) = (GuestAddress(self.queue.used_ring()), self.queue.size());
        let mut next = self.queue.next_used();
        for (head, written) in chains {
            if head >= size {
                return Err(virtio_queue::Error::InvalidDescriptorIndex.into());
            }
            let slot = u64::from(next.checked_rem(size).unwrap_or(0));
            let element = u64::from(head) | u64::from(written) << 32;
            memory.write_obj(element.to_le(), at(ring, ELEMENTS + slot * USED_ELEMENT_BYTES)?)?;
            next = next.wrapping_add(1);
        }
        memory.store(next.to_le(), at(ring, INDEX)?, Ordering::Release)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Whether something was given back since this was last asked, and the driver wants to hear of it (2.7.7.2 and 2.7.10).
    pub(crate) fn wants_word(&mut self, memory: &Memory) -> Result<bool, Fault> {
        let (before, now) = (self.told, self.queue.next_used());
        if before == now {
            return Ok(false);
        }
        self.told = now;
        // What the driver wants is read after it can see what was given back, or it might sleep on that.
        fence(Ordering::SeqCst);
        let ring = GuestAddress(self.queue.avail_ring());
        if !self.queue.event_idx_enabled() {
            let flags = u16::from_le(memory.load(ring, Ordering::Relaxed)?);
            return Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let behind_all = ELEMENTS + u64::from(self.queue.size()) * AVAILABLE_ELEMENT_BYTES;
        let wanted = u16::from_le(memory.load(at(ring, behind_all)?, Ordering::Relaxed)?);
        // Whether the index went past the one that is wanted.
        Ok(now.wrapping_sub(wanted).wrapping_sub(1) < now.wrapping_sub(before))
    }
}

fn at(ring: GuestAddress, offset: u64) -> Result<GuestAddress, Fault> {
    Ok(ring.checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Ring, fill, memory};

    fn place(ring: &Ring, used: u16, event_idx: bool) -> Place {
        let mut queue = ring.queue();
        queue.set_event_idx(event_idx);
        queue.set_next_used(used);
        Place::new(queue)
    }

    #[test]
    fn a_driver_without_event_index_says_by_a_flag_whether_it_listens() {
        let memory = memory();
        let mut place = place(&Ring::new(&memory, 0x1000, 16), 0, false);
        assert!(!place.wants_word(&memory).unwrap(), "there is nothing to hear");
        for (flags, listens) in [(0u16, true), (1, false), (0, true)] {
            fill(&memory, 0x2000, &flags.to_le_bytes());
            place.give_back(&memory, [(3, 8)]).unwrap();
            assert_eq!(place.wants_word(&memory).unwrap(), listens);
            assert!(!place.wants_word(&memory).unwrap(), "once for each");
        }
    }

    #[test]
    fn a_head_outside_the_ring_is_not_given_back() {
        let memory = memory();
        let mut place = place(&Ring::new(&memory, 0x1000, 16), 0, true);
        assert!(place.give_back(&memory, [(3, 8), (16, 8)]).is_err());
        assert_eq!(place.queue.used_idx(&*memory, Ordering::Relaxed).unwrap().0, 0);
    }

    proptest! {
        /// As virtio-queue does it one by one.
        #[test]
        fn gives_back_and_tells_as_the_library(
            start: u16, wanted: u16, near in -3i16..20, is_near: bool, heads in prop::collection::vec((0u16..16, any::<u32>()), 0..16),
        ) {
            let (ours, theirs) = (memory(), memory());
            let wanted = if is_near { start.wrapping_add_signed(near) } else { wanted };
            let mut place = place(&Ring::new(&ours, 0x1000, 16), start, true);
            let mut queue = Ring::new(&theirs, 0x1000, 16).queue();
            queue.set_next_used(start);
            for memory in [&ours, &theirs] {
                fill(memory, 0x2000 + 4 + 32, &wanted.to_le_bytes());
            }
            place.give_back(&ours, heads.iter().copied()).unwrap();
            for (head, written) in &heads {
                queue.add_used(&*theirs, *head, *written).unwrap();
            }
            let told = queue.needs_notification(&*theirs).unwrap() && !heads.is_empty();
            prop_assert_eq!(place.wants_word(&ours).unwrap(), told);
            if !heads.is_empty() {
                let ring = |memory| crate::testing::bytes(memory, 0x3000, 4 + 8 * 16);
                prop_assert_eq!(ring(&ours), ring(&theirs));
            }
        }
    }
}
