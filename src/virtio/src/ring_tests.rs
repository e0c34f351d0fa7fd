//! The ring beside virtio-queue's, which has been looked at by many.

use proptest::prelude::*;
use virtio_queue::{Queue as TheirQueue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::*;
use crate::testing::{Ring as Driver, bytes, descriptor, fill, memory};

const SIZE: u16 = 16;

fn theirs(driver: &Driver, event_index: bool) -> TheirQueue {
    let mut queue = TheirQueue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(driver.base)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(driver.base + 0x1000)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(driver.base + 0x2000)).unwrap();
    queue.set_event_idx(event_index);
    queue.set_ready(true);
    queue
}

/// A queue of ours that was served up to these indices.
fn ours(driver: &Driver, available: u16, used: u16, event_index: bool) -> Queue {
    Queue { next_available: available, next_used: used, told: used, event_index, ..driver.queue() }
}

#[test]
fn a_driver_without_event_index_says_by_a_flag_whether_it_listens() {
    let memory = memory();
    let mut queue = ours(&Driver::new(&memory, 0x1000, SIZE), 0, 0, false);
    let mut ring = queue.ring(&memory).unwrap();
    assert!(!ring.wants_word().unwrap(), "there is nothing to hear");
    for (flags, listens) in [(0u16, true), (1, false), (0, true)] {
        fill(&memory, 0x2000, &flags.to_le_bytes());
        ring.give_back([(3, 8)]).unwrap();
        assert_eq!(ring.wants_word().unwrap(), listens);
        assert!(!ring.wants_word().unwrap(), "once for each");
    }
    ring.rest().unwrap();
    assert_eq!(bytes(&memory, 0x3000, 2), [1, 0]);
    assert!(!ring.listen().unwrap());
    assert_eq!(bytes(&memory, 0x3000, 2), [0, 0]);
}

#[test]
fn a_head_outside_the_ring_is_not_given_back() {
    let memory = memory();
    let mut queue = ours(&Driver::new(&memory, 0x1000, SIZE), 0, 0, true);
    assert!(queue.ring(&memory).unwrap().give_back([(3, 8), (16, 8)]).is_err());
    assert_eq!(bytes(&memory, 0x3002, 2), [0, 0]);
}

#[test]
fn a_queue_has_a_size_and_a_place() {
    let memory = memory();
    let good = RingPlace { size: 16, descriptors: 0x1000, available: 0x2000, used: 0x3000 };
    let is_one = |place| Queue::new(place, true, &memory).is_some();
    assert!(is_one(good) && is_one(RingPlace { size: 4096, available: 0x2_0000, used: 0x3_0000, ..good }));
    let end = crate::testing::MEMORY_BYTES as u64;
    for wrong in [
        RingPlace { size: 0, ..good },
        RingPlace { size: 24, ..good },
        RingPlace { descriptors: 0x1008, ..good },
        RingPlace { available: 0x2001, ..good },
        RingPlace { used: 0x3002, ..good },
        RingPlace { descriptors: end - 16 * 16 + 16, ..good },
        RingPlace { available: end - 6 - 32 + 2, ..good },
        RingPlace { used: end - 6 - 128 + 2, ..good },
        RingPlace { used: u64::MAX - 3, ..good },
        // Half of it in another piece of memory.
        RingPlace { descriptors: end / 2 - 16, ..good },
    ] {
        assert!(!is_one(wrong), "{wrong:x?}");
    }
}

/// What a chain is: buffers, and whether the device writes them; `None` when it isn't whole. By virtio-queue's walk.
fn chain_by_theirs(queue: &mut TheirQueue, memory: &Memory) -> Option<Vec<(u64, u32, bool)>> {
    let chain = queue.iter(&**memory).ok()?.next()?;
    let (mut parts, mut is_whole) = (Vec::new(), false);
    for descriptor in chain {
        let (address, length) = (descriptor.addr().0, descriptor.len());
        let is_known = memory.check_range(GuestAddress(address), length as usize);
        let writes_before = parts.iter().any(|(_, length, writes)| *writes && *length > 0);
        if !is_known && length > 0
            || writes_before && !descriptor.is_write_only()
            || parts.len() == usize::from(SIZE)
        {
            return None;
        }
        parts.push((address, length, descriptor.is_write_only()));
        is_whole = !descriptor.has_next();
    }
    is_whole.then_some(parts)
}

proptest! {
    /// As virtio-queue does it one by one.
    #[test]
    fn gives_back_and_tells(
        start: u16, wanted: u16, near in -3i16..20, is_near: bool, listens: bool,
        heads in prop::collection::vec((0u16..16, any::<u32>()), 0..16),
    ) {
        let memories = [memory(), memory()];
        let drivers = memories.each_ref().map(|memory| Driver::new(memory, 0x1000, SIZE));
        let wanted = if is_near { start.wrapping_add_signed(near) } else { wanted };
        for memory in &memories {
            fill(memory, 0x2000 + 4 + 32, &wanted.to_le_bytes());
            fill(memory, 0x2002, &start.wrapping_add(3).to_le_bytes());
        }
        let mut queue = ours(&drivers[0], start, start, true);
        let mut ring = queue.ring(&memories[0]).unwrap();
        let mut other = theirs(&drivers[1], true);
        other.set_next_used(start);
        other.set_next_avail(start);
        ring.give_back(heads.iter().copied()).unwrap();
        for (head, written) in &heads {
            other.add_used(&*memories[1], *head, *written).unwrap();
        }
        let told = other.needs_notification(&*memories[1]).unwrap() && !heads.is_empty();
        prop_assert_eq!(ring.wants_word().unwrap(), told);
        if listens {
            prop_assert_eq!(ring.listen().unwrap(), other.enable_notification(&*memories[1]).unwrap());
        }
        if !heads.is_empty() {
            let ring = |memory| bytes(memory, 0x3000, 6 + 8 * 16);
            prop_assert_eq!(ring(&memories[0]), ring(&memories[1]));
        }
    }

    /// A chain is what virtio-queue makes of it, or refused by both; but for a descriptor that has an indirect table and goes on, which
    /// virtio-queue takes for the last (2.7.5.3.1 forbids it), and tables in two pieces of memory.
    #[test]
    fn takes_the_same_chains(
        table in prop::collection::vec(descriptor(), 16),
        indirect in prop::collection::vec(descriptor(), 8),
        count in 0u32..9, head in 0u16..18, start: u16,
    ) {
        let memory = memory();
        let driver = Driver::new(&memory, 0x1000, SIZE);
        for (index, (address, length, flags, next)) in (0..).zip(&table) {
            // Some of the indirect ones lead to what is a table.
            let is_table = flags & 4 != 0 && count < 8;
            let (address, length) = if is_table { (0x8000, count * 16 + 16) } else { (*address, *length) };
            driver.describe(driver.base, index, (address, length), *flags, *next);
        }
        for (index, (address, length, flags, next)) in (0..).zip(&indirect) {
            driver.describe(0x8000, index, (*address, *length), *flags & 3, *next % 9);
        }
        fill(&memory, 0x2004 + 2 * u64::from(start % SIZE), &head.to_le_bytes());
        fill(&memory, 0x2002, &start.wrapping_add(1).to_le_bytes());
        let mut other = theirs(&driver, true);
        other.set_next_avail(start);
        let expected = chain_by_theirs(&mut other, &memory);
        let mut queue = ours(&driver, start, 0, true);
        let taken = queue.ring(&memory).unwrap().take();
        match (&taken, expected) {
            (Ok(Some(request)), Some(parts)) => {
                let of = |buffers: &crate::Buffers<'_>| -> Vec<(usize, usize)> {
                    buffers.range(0..buffers.bytes()).map(|part| (part.ptr_guard().as_ptr() as usize, part.len())).collect()
                };
                let wanted = |writes: bool| -> Vec<(usize, usize)> {
                    let parts = parts.iter().filter(|part| part.2 == writes && part.1 > 0);
                    let slices = parts.flat_map(|part| {
                        let slices = GuestMemoryBackend::get_slices(&*memory, GuestAddress(part.0), part.1 as usize);
                        slices.map(|slice| slice.unwrap()).collect::<Vec<_>>()
                    });
                    slices.map(|slice| (slice.ptr_guard().as_ptr() as usize, slice.len())).collect()
                };
                prop_assert_eq!(request.head(), head);
                prop_assert_eq!(of(&request.readable), wanted(false));
                prop_assert_eq!(of(&request.writable), wanted(true));
            }
            (Ok(None), _) => prop_assert!(false, "one is offered"),
            (Ok(Some(_)), None) => prop_assert!(false, "only ours takes it"),
            (Err(fault), Some(_)) => {
                let text = fault.to_string();
                prop_assert!(text.contains("goes on behind") || text.contains("not in memory"), "{}", text);
            }
            (Err(_), None) => {}
        }
    }
}
