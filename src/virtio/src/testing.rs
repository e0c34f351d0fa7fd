//! A driver's side of queues, for tests.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    active::{Active, Memory},
    device::{Device, Fault, Progress},
    interrupt::Interrupt,
    ring::{Queue, RingPlace},
};

pub(crate) const MEMORY_BYTES: usize = 1 << 20;
pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Two regions that touch, so that buffers may lie in both; nothing behind them.
pub(crate) fn memory() -> Memory {
    let half = MEMORY_BYTES / 2;
    let regions = [(GuestAddress(0), half), (GuestAddress(half as u64), half)];
    Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}

pub(crate) fn fill(memory: &Memory, at: u64, bytes: &[u8]) {
    memory.write_slice(bytes, GuestAddress(at)).unwrap();
}

pub(crate) fn bytes(memory: &Memory, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

/// A buffer: address, length, whether the device writes it.
pub(crate) type Part = (u64, u32, bool);

/// A queue as its driver has it: descriptors at `base`, available ring 4 KiB on, used ring 8 KiB on.
pub(crate) struct Ring {
    pub(crate) memory: Memory,
    pub(crate) base: u64,
    pub(crate) size: u16,
    next: u16,
    offered: u16,
    taken: u16,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, base: u64, size: u16) -> Self {
        Self { memory: memory.clone(), base, size, next: 0, offered: 0, taken: 0 }
    }

    pub(crate) fn queue(&self) -> Queue {
        let (descriptors, available, used) = (self.base, self.base + 0x1000, self.base + 0x2000);
        Queue::new(RingPlace { size: self.size, descriptors, available, used }, true, &self.memory).unwrap()
    }

    /// Writes a descriptor of any kind.
    pub(crate) fn describe(
        &self,
        table: u64,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let raw =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        fill(&self.memory, table + 16 * u64::from(index), &raw.concat());
    }

    /// Makes a chain available that begins at `head`, whatever it is.
    pub(crate) fn make_available(&mut self, head: u16) {
        let ring = self.base + 0x1000;
        fill(&self.memory, ring + 4 + 2 * u64::from(self.offered % self.size), &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        fill(&self.memory, ring + 2, &self.offered.to_le_bytes());
    }

    /// Offers a sound chain and returns its head.
    pub(crate) fn offer(&mut self, parts: &[Part]) -> u16 {
        let head = self.next % self.size;
        for (count, (address, length, write)) in (1..).zip(parts) {
            let index = self.next % self.size;
            self.next = self.next.wrapping_add(1);
            let last = count == parts.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.describe(self.base, index, (*address, *length), flags, self.next % self.size);
        }
        self.make_available(head);
        head
    }

    /// What the device gave back next: head and number of bytes written.
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        let ring = self.base + 0x2000;
        let at = |offset: u64, length: usize| bytes(&self.memory, ring + offset, length);
        if at(2, 2) == self.taken.to_le_bytes() {
            return None;
        }
        let element = at(4 + 8 * u64::from(self.taken % self.size), 8);
        self.taken = self.taken.wrapping_add(1);
        // Each used buffer is to interrupt: used_event is the next one.
        fill(&self.memory, self.base + 0x1000 + 4 + 2 * u64::from(self.size), &self.taken.to_le_bytes());
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((u16::try_from(word(0)).unwrap(), word(4)))
    }
}

/// An active device's state over `rings`, with vector N for queue N.
pub(crate) fn active(memory: &Memory, rings: &[&Ring], features: u64) -> (Active, Vec<EventFd>) {
    let events: Vec<EventFd> = rings.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let ours = events.iter().map(|event| event.try_clone().unwrap()).collect();
    let interrupt = Interrupt::new(events, rings.len());
    for index in 0..rings.len() {
        interrupt.set_queue_vector(index, index as u16);
    }
    let queues = rings.iter().map(|ring| Some(ring.queue())).collect();
    (Active::new(memory.clone(), queues, interrupt, features, Arc::default()), ours)
}

/// Gives `device` turns for queue `index` until it is idle.
pub(crate) fn run(device: &mut dyn Device, active: &mut Active, index: usize) -> Result<(), Fault> {
    while device.queue_ready(active, index)? == Progress::More {}
    Ok(())
}

/// How often the event was signalled since it was last asked.
pub(crate) fn signals(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

/// A descriptor that is wrong in some way, or not.
pub(crate) fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let edge = MEMORY_BYTES as u64;
    let address = prop_oneof![
        4 => 0x4000..edge,
        1 => edge / 2 - 600..edge / 2,
        1 => edge - 600..edge + 600,
        1 => 0x1000u64..0x4000,
        1 => any::<u64>()
    ];
    let length =
        prop_oneof![3 => 1u32..64, 2 => Just(512u32), 1 => Just(16), 1 => 0u32..70_000, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => 0u16..8];
    let next = prop_oneof![6 => 0u16..16, 1 => any::<u16>()];
    (address, length, flags, next)
}

/// A hostile driver: 16 descriptors as `descriptor` makes them, any of them made available, request headers of
/// `types` everywhere. The device may do what it likes except panic, hang, or hold on beyond its turn.
pub(crate) fn attack(device: &mut dyn Device, table: &[(u64, u32, u16, u16)], heads: &[u16], types: u32) {
    attack_with(device, table, heads, types, 0);
}

/// The same with features negotiated.
pub(crate) fn attack_with(
    device: &mut dyn Device,
    table: &[(u64, u32, u16, u16)],
    heads: &[u16],
    types: u32,
    features: u64,
) {
    let memory = memory();
    let header = [&types.to_le_bytes()[..], &[0; 12]].concat();
    for at in (0x4000..MEMORY_BYTES as u64).step_by(4096) {
        fill(&memory, at, &header);
    }
    let mut rings: Vec<Ring> =
        (0..device.queue_sizes().len()).map(|i| Ring::new(&memory, 0x1000 + 0x8000 * i as u64, 16)).collect();
    for ring in &mut rings {
        for (index, (address, length, flags, next)) in (0..).zip(table) {
            ring.describe(ring.base, index, (*address, *length), *flags, *next);
        }
        for head in heads {
            ring.make_available(*head);
        }
    }
    let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), features);
    for index in 0..rings.len() {
        // An attack may feed itself by writing into the rings, so only each turn is promised to end.
        for _ in 0..100 {
            let turns = [device.queue_ready(&mut active, index), device.backend_ready(&mut active, 0)];
            if turns.iter().any(Result::is_err) {
                break;
            }
        }
    }
}
