//! The split virtqueue, the device's side (virtio 1.3, 2.7). All of it lies in guest memory: what is read there is read once and
//! checked, and whatever the driver writes meanwhile, an access stays within the parts that were looked up.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use crate::{
    active::Memory,
    device::Fault,
    request::{Finder, Request, check_order},
};

/// Of either ring: flags, index, elements, and behind them the other side's wish for an event.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;
const AVAILABLE_BYTES: usize = 2;
const USED_BYTES: usize = 8;
const EVENT_BYTES: usize = 2;
const DESCRIPTOR_BYTES: usize = 16;

/// Where a queue is, as its driver set it up: addresses are the guest's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingPlace {
    /// Descriptors and elements of either ring, a power of two (2.7).
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// A queue of an active device: where it is, and how far it was served.
#[derive(Debug)]
pub(crate) struct Queue {
    place: RingPlace,
    /// Where in memory its descriptors, its available ring and its used ring are.
    spots: [Spot; 3],
    /// VIRTIO_F_EVENT_IDX was negotiated.
    event_index: bool,
    next_available: u16,
    next_used: u16,
    /// The used ring's index when the driver was last told, or did not want to be.
    told: u16,
}

impl Queue {
    /// A queue that nobody has served. `None` when its size is no power of two, or a part is misaligned or not in one piece of memory.
    pub(crate) fn new(place: RingPlace, event_index: bool, memory: &GuestMemoryMmap) -> Option<Self> {
        // 2.7: alignment of the parts.
        let aligned = [(place.descriptors, 16), (place.available, 2), (place.used, 4)];
        let is_sound = place.size.is_power_of_two()
            && aligned.iter().all(|(address, alignment)| address.is_multiple_of(*alignment));
        let spots = is_sound.then(|| place.find(memory)).flatten()?;
        Some(Self { place, spots, event_index, next_available: 0, next_used: 0, told: 0 })
    }

    /// Where it is.
    pub(crate) fn place(&self) -> RingPlace {
        self.place
    }

    /// Its parts in `memory`, to be served.
    pub(crate) fn ring<'a>(&'a mut self, memory: &'a Memory) -> Result<Ring<'a>, Fault> {
        let [descriptors, available, used] = &self.spots;
        let parts = Parts {
            descriptors: descriptors.slice(memory)?,
            available: available.slice(memory)?,
            used: used.slice(memory)?,
        };
        let offered = self.next_available;
        Ok(Ring { queue: self, memory, finder: Finder::new(memory), parts, offered })
    }
}

#[derive(Debug)]
struct Parts<'a> {
    descriptors: VolatileSlice<'a>,
    available: VolatileSlice<'a>,
    used: VolatileSlice<'a>,
}

impl RingPlace {
    /// Where in `memory` its descriptors, its available ring and its used ring are; `None` when one of them isn't in one piece of it.
    fn find(&self, memory: &GuestMemoryMmap) -> Option<[Spot; 3]> {
        let size = usize::from(self.size);
        let spot = |address, element_bytes, around| {
            Spot::find(memory, GuestAddress(address), around + size * element_bytes)
        };
        Some([
            spot(self.descriptors, DESCRIPTOR_BYTES, 0)?,
            spot(self.available, AVAILABLE_BYTES, ELEMENTS + EVENT_BYTES)?,
            spot(self.used, USED_BYTES, ELEMENTS + EVENT_BYTES)?,
        ])
    }
}

/// A piece of memory that was looked up: it's asked for several times a request.
#[derive(Clone, Copy, Debug)]
struct Spot {
    /// The number of the region that it lies in.
    region: usize,
    at: MemoryRegionAddress,
    bytes: usize,
}

impl Spot {
    fn find(memory: &GuestMemoryMmap, address: GuestAddress, bytes: usize) -> Option<Self> {
        let mut regions = memory.iter().enumerate();
        let spot =
            regions.find_map(|(region, of)| Some(Self { region, at: of.to_region_addr(address)?, bytes }));
        spot.filter(|spot| spot.slice(memory).is_ok())
    }

    /// It. `memory` is that in which it was found; in another it's refused, or another piece.
    fn slice<'a>(&self, memory: &'a GuestMemoryMmap) -> Result<VolatileSlice<'a>, Fault> {
        let region = memory.iter().nth(self.region).ok_or(Fault::Ring("is not in memory"))?;
        Ok(region.get_slice(self.at, self.bytes)?)
    }
}

/// One turn with a queue: its parts are looked up once.
#[derive(Debug)]
pub(crate) struct Ring<'a> {
    queue: &'a mut Queue,
    memory: &'a Memory,
    finder: Finder<'a>,
    parts: Parts<'a>,
    /// The driver's index when it was last read: what is before it can be taken without another look.
    offered: u16,
}

impl<'a> Ring<'a> {
    /// How many descriptors it has.
    pub(crate) fn size(&self) -> u16 {
        self.queue.place.size
    }

    /// How many chains the driver offers that were not taken.
    ///
    /// # Errors
    /// When that are more than there can be.
    pub(crate) fn waiting(&mut self) -> Result<u16, Fault> {
        // Before what the driver wrote ahead of the index is read.
        let offered = u16::from_le(load(&self.parts.available, INDEX, Ordering::Acquire)?);
        let waiting = offered.wrapping_sub(self.queue.next_available);
        if waiting > self.size() {
            return Err(Fault::Ring("more is offered than it holds"));
        }
        self.offered = offered;
        Ok(waiting)
    }

    /// Takes the next chain; `None` when there is none.
    ///
    /// # Errors
    /// When the driver broke the ring or the chain.
    pub(crate) fn take(&mut self) -> Result<Option<Request<'a>>, Fault> {
        let Some(head) = self.next()? else { return Ok(None) };
        let mut request = Request::new(head, self.memory);
        self.walk(head, |finder, buffer| {
            request.push(finder, buffer.address, buffer.length, buffer.is_writable())
        })?;
        self.queue.next_available = self.queue.next_available.wrapping_add(1);
        Ok(Some(request))
    }

    /// Takes the next chain for what the device may write alone: adds that to `parts`, and returns the chain's head and its length;
    /// `None` when there is no chain.
    ///
    /// # Errors
    /// As for [`Ring::take`]; what `parts` then has of the chain is of no use.
    pub(crate) fn take_writable(
        &mut self,
        parts: &mut Vec<VolatileSlice<'a>>,
    ) -> Result<Option<(u16, usize)>, Fault> {
        let Some(head) = self.next()? else { return Ok(None) };
        let (mut readable, mut writable) = (0usize, 0usize);
        self.walk(head, |finder, buffer| {
            check_order(readable, writable, buffer.length, buffer.is_writable())?;
            let length = buffer.length as usize;
            if buffer.is_writable() {
                writable = writable.saturating_add(length);
                return finder.each_slice(buffer.address, length, |slice| parts.push(slice));
            }
            readable = readable.saturating_add(length);
            finder.each_slice(buffer.address, length, |_| ())
        })?;
        self.queue.next_available = self.queue.next_available.wrapping_add(1);
        Ok(Some((head, writable)))
    }

    /// The head of the next chain.
    fn next(&mut self) -> Result<Option<u16>, Fault> {
        if self.offered == self.queue.next_available && self.waiting()? == 0 {
            return Ok(None);
        }
        let at = ELEMENTS + self.slot(self.queue.next_available) * AVAILABLE_BYTES;
        load(&self.parts.available, at, Ordering::Relaxed).map(|head| Some(u16::from_le(head)))
    }

    /// Leaves the chain that was taken last for another time.
    pub(crate) fn leave(&mut self) {
        self.queue.next_available = self.queue.next_available.wrapping_sub(1);
    }

    /// Gives chains back to the driver, by their heads, with the number of bytes that were written to each. It sees all of them or none:
    /// of a frame in several buffers it must not find the first alone (5.1.6.3.2).
    ///
    /// # Errors
    /// When a head is none.
    pub(crate) fn give_back(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) -> Result<(), Fault> {
        let mut next = self.queue.next_used;
        for (head, written) in chains {
            if head >= self.size() {
                return Err(Fault::Ring("a chain is given back that has no place in it"));
            }
            let element = u64::from(head) | u64::from(written) << 32;
            let at = ELEMENTS + self.slot(next) * USED_BYTES;
            self.parts.used.get_ref::<u64>(at).map_err(outside)?.store(element.to_le());
            next = next.wrapping_add(1);
        }
        // Behind the elements.
        store(&self.parts.used, INDEX, next.to_le(), Ordering::Release)?;
        self.queue.next_used = next;
        Ok(())
    }

    /// Whether something was given back since this was last asked, and the driver wants to hear of it (2.7.7.2, 2.7.10).
    pub(crate) fn wants_word(&mut self) -> Result<bool, Fault> {
        let (before, now) = (self.queue.told, self.queue.next_used);
        if before == now {
            return Ok(false);
        }
        self.queue.told = now;
        // What the driver wants is read after it can see what was given back, or it might sleep on that.
        fence(Ordering::SeqCst);
        if !self.queue.event_index {
            let flags = u16::from_le(load(&self.parts.available, FLAGS, Ordering::Relaxed)?);
            return Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let at = ELEMENTS + usize::from(self.size()) * AVAILABLE_BYTES;
        let wanted = u16::from_le(load(&self.parts.available, at, Ordering::Relaxed)?);
        // Whether the index went past the one that is wanted.
        Ok(now.wrapping_sub(wanted).wrapping_sub(1) < now.wrapping_sub(before))
    }

    /// Asks the driver to tell of more; true when there is more already, of which it need not tell.
    pub(crate) fn listen(&mut self) -> Result<bool, Fault> {
        let (at, value) = if self.queue.event_index {
            (ELEMENTS + usize::from(self.size()) * USED_BYTES, self.queue.next_available)
        } else {
            (FLAGS, 0)
        };
        store(&self.parts.used, at, value.to_le(), Ordering::Relaxed)?;
        // The driver writes its index and then reads what was just written; one of both sees the other's.
        fence(Ordering::SeqCst);
        Ok(self.waiting()? > 0)
    }

    /// Asks the driver not to tell. With event indices it tells once and no more, unless it's asked again.
    pub(crate) fn rest(&mut self) -> Result<(), Fault> {
        if self.queue.event_index {
            return Ok(());
        }
        store(&self.parts.used, FLAGS, (VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed)
    }

    /// Where in a ring an index is.
    fn slot(&self, index: u16) -> usize {
        // A power of two.
        usize::from(index & self.size().wrapping_sub(1))
    }

    /// Hands each buffer of the chain that begins at `head` to `each`: the chain has at most as many descriptors as the queue, and one of
    /// them may lead to a table elsewhere (2.7.4, 2.7.5).
    fn walk(
        &mut self,
        head: u16,
        mut each: impl FnMut(&mut Finder<'a>, &Descriptor) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        const NEXT: u16 = VRING_DESC_F_NEXT as u16;
        const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
        let (mut table, mut is_indirect, mut index) = (self.parts.descriptors, false, head);
        // One more for that which leads to the table.
        for _ in 0..=self.size() {
            let descriptor = Descriptor::read(&table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                if is_indirect || descriptor.flags & NEXT != 0 {
                    return Err(Fault::Chain("has more than one indirect table, or goes on behind it"));
                }
                table = self.indirect(&descriptor)?;
                (is_indirect, index) = (true, 0);
                continue;
            }
            each(&mut self.finder, &descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Fault::Chain("loops, or is longer than its queue"))
    }

    fn indirect(&self, descriptor: &Descriptor) -> Result<VolatileSlice<'a>, Fault> {
        let length = descriptor.length as usize;
        if length == 0 || !length.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(Fault::Chain("has an indirect table that does not hold whole descriptors"));
        }
        Ok(self.memory.get_slice(GuestAddress(descriptor.address), length)?)
    }
}

/// `struct virtq_desc` (2.7.5).
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Whether its buffer is the device's to write to.
    fn is_writable(&self) -> bool {
        self.flags & VRING_DESC_F_WRITE as u16 != 0
    }

    fn read(table: &VolatileSlice<'_>, index: u16) -> Result<Self, Fault> {
        let at = usize::from(index) * DESCRIPTOR_BYTES;
        let raw = table.get_ref::<u128>(at).map_err(|_| Fault::Chain("leads out of its table"))?;
        let raw = u128::from_le(raw.load());
        Ok(Self {
            address: raw as u64,
            length: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        })
    }
}

fn load<T: AtomicAccess>(part: &VolatileSlice<'_>, at: usize, order: Ordering) -> Result<T, Fault> {
    part.load(at, order).map_err(outside)
}

fn store<T: AtomicAccess>(
    part: &VolatileSlice<'_>,
    at: usize,
    value: T,
    order: Ordering,
) -> Result<(), Fault> {
    part.store(value, at, order).map_err(outside)
}

/// For what cannot be: indices are within the parts, and those aligned.
fn outside(_: vm_memory::VolatileMemoryError) -> Fault {
    Fault::Ring("an access went past its end")
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
