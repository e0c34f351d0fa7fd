//! One request: the buffers that a chain of descriptors names, checked.

use std::ops::Range;

use virtio_queue::{DescriptorChain, desc::split::Descriptor};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::{active::Memory, device::Fault};

/// Buffers in guest memory, one behind the other. The guest can change their bytes at any time, so what is read is
/// read once; it cannot change where they lie.
#[derive(Debug)]
pub struct Buffers<'m> {
    memory: &'m Memory,
    /// Parts of `memory`, and of no other.
    slices: Vec<VolatileSlice<'m>>,
    bytes: usize,
    last: GuestAddress,
}

impl<'m> Buffers<'m> {
    fn new(memory: &'m Memory) -> Self {
        Self { memory, slices: Vec::new(), bytes: 0, last: GuestAddress(0) }
    }

    /// The memory that they lie in.
    pub(crate) fn memory(&self) -> &'m Memory {
        self.memory
    }

    /// Where their last byte is; `None` when there are none.
    pub(crate) fn last(&self) -> Option<GuestAddress> {
        (self.bytes > 0).then_some(self.last)
    }

    /// Their length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies from them, from byte `offset` on; false, with nothing promised of `into`, when they are too short.
    #[must_use]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        let mut rest = into;
        for slice in self.range(offset..offset.saturating_add(rest.len())) {
            let Some((part, tail)) = rest.split_at_mut_checked(slice.len()) else { return false };
            if slice.read_slice(part, 0).is_err() {
                return false;
            }
            rest = tail;
        }
        rest.is_empty()
    }

    /// Copies to them, from byte `offset` on; false, with an unknown part written, when they are too short.
    #[must_use]
    pub fn write(&self, offset: usize, from: &[u8]) -> bool {
        let mut rest = from;
        for slice in self.range(offset..offset.saturating_add(rest.len())) {
            let Some((part, tail)) = rest.split_at_checked(slice.len()) else { return false };
            if slice.write_slice(part, 0).is_err() {
                return false;
            }
            rest = tail;
        }
        rest.is_empty()
    }

    /// Fills bytes `range` of them with zeros; false, with an unknown part written, when they are too short.
    #[must_use]
    pub fn zero(&self, range: Range<usize>) -> bool {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = range.len();
        for slice in self.range(range) {
            for at in (0..slice.len()).step_by(ZEROS.len()) {
                let part = ZEROS.get(..slice.len() - at).unwrap_or(&ZEROS);
                if slice.write_slice(part, at).is_err() {
                    return false;
                }
            }
            left = left.saturating_sub(slice.len());
        }
        left == 0
    }

    /// The parts of memory that bytes `range` are, as far as there are such bytes.
    pub fn range(&self, range: Range<usize>) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut at = 0usize;
        self.slices.iter().filter_map(move |slice| {
            let start = range.start.saturating_sub(at).min(slice.len());
            let end = range.end.saturating_sub(at).min(slice.len());
            at = at.saturating_add(slice.len());
            slice.subslice(start, end.saturating_sub(start)).ok().filter(|part| !part.is_empty())
        })
    }

    fn push(&mut self, descriptor: &Descriptor, access: Permissions) -> Result<(), Fault> {
        let length = descriptor.len() as usize;
        let Some(to_last) = u64::from(descriptor.len()).checked_sub(1) else { return Ok(()) };
        for slice in self.memory.get_slices(descriptor.addr(), length, access)? {
            self.slices.push(slice?);
        }
        // In memory, so the sum exists.
        self.last = descriptor.addr().unchecked_add(to_last);
        // The chain iterator keeps the sum below 4 GiB.
        self.bytes = self.bytes.saturating_add(length);
        Ok(())
    }
}

/// A request of the driver's.
#[derive(Debug)]
pub struct Request<'m> {
    head: u16,
    /// What the device may read: the request itself, and data out.
    pub readable: Buffers<'m>,
    /// What the device may write: data in, and the answer.
    pub writable: Buffers<'m>,
}

impl<'m> Request<'m> {
    /// Reads a chain of at most `descriptors_max` descriptors.
    ///
    /// # Errors
    /// When the chain is longer, loops, leaves its table, nests indirect tables, has a readable descriptor behind a
    /// writable one, or names anything outside memory (virtio 1.3, 2.7.4 and 2.7.5).
    pub fn read(
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        memory: &'m Memory,
        descriptors_max: u16,
    ) -> Result<Self, Fault> {
        let head = chain.head_index();
        let mut request = Self { head, readable: Buffers::new(memory), writable: Buffers::new(memory) };
        // The iterator ends without a word at a broken link, so it is complete only after a last descriptor.
        let mut complete = false;
        let mut count = 0;
        for descriptor in chain {
            count += 1;
            if count > descriptors_max {
                return Err(Fault::Chain("is longer than its queue"));
            }
            if descriptor.is_write_only() {
                request.writable.push(&descriptor, Permissions::Write)?;
            } else if request.writable.slices.is_empty() {
                request.readable.push(&descriptor, Permissions::Read)?;
            } else {
                return Err(Fault::Chain("has a readable descriptor behind a writable one"));
            }
            complete = !descriptor.has_next();
        }
        if complete { Ok(request) } else { Err(Fault::Chain("loops or leads out of its table")) }
    }

    /// The chain's first descriptor, by which it is given back.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }
}
