//! One request: the buffers that a chain of descriptors names, checked.

use std::ops::Range;

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, VolatileSlice,
};

use crate::{active::Memory, device::Fault};

/// Buffers in guest memory, one behind the other. The guest can change their bytes at any time, so what is read is
/// read once; it cannot change where they lie.
#[derive(Debug)]
pub struct Buffers<'m> {
    memory: &'m Memory,
    /// Parts of `memory`, and of no other: most requests have one.
    first: Option<VolatileSlice<'m>>,
    others: Vec<VolatileSlice<'m>>,
    bytes: usize,
    last: GuestAddress,
}

impl<'m> Buffers<'m> {
    fn new(memory: &'m Memory) -> Self {
        Self { memory, first: None, others: Vec::new(), bytes: 0, last: GuestAddress(0) }
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
        read(self.range(offset..offset.saturating_add(into.len())), into)
    }

    /// Copies to them, from byte `offset` on; false, with an unknown part written, when they are too short.
    #[must_use]
    pub fn write(&self, offset: usize, from: &[u8]) -> bool {
        write(self.range(offset..offset.saturating_add(from.len())), from)
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
        self.first.iter().chain(&self.others).filter_map(move |slice| {
            let start = range.start.saturating_sub(at).min(slice.len());
            let end = range.end.saturating_sub(at).min(slice.len());
            at = at.saturating_add(slice.len());
            slice.subslice(start, end.saturating_sub(start)).ok().filter(|part| !part.is_empty())
        })
    }

    /// All of it, none of them empty.
    pub(crate) fn slices(&self) -> impl Iterator<Item = VolatileSlice<'m>> + Clone + '_ {
        self.first.iter().chain(&self.others).cloned()
    }

    fn push(&mut self, finder: &mut Finder<'m>, address: u64, length_bytes: u32) -> Result<(), Fault> {
        let Some(to_last) = u64::from(length_bytes).checked_sub(1) else { return Ok(()) };
        finder.each_slice(address, length_bytes as usize, |slice| self.add(slice))?;
        // In memory, so the sum exists.
        self.last = GuestAddress(address).unchecked_add(to_last);
        Ok(())
    }

    fn add(&mut self, slice: VolatileSlice<'m>) {
        // A request's buffers have less than 4 GiB together.
        self.bytes = self.bytes.saturating_add(slice.len());
        if self.first.is_none() {
            self.first = Some(slice);
        } else {
            self.others.push(slice);
        }
    }
}

/// Looks at the next buffer of a chain, of which so many bytes are readable and writable so far.
///
/// # Errors
/// When it's readable and stands behind one that is writable, or all would be 4 GiB or more (virtio 1.3, 2.7.4.2 and 2.7.5.2).
pub(crate) fn check_order(
    readable: usize,
    writable: usize,
    length_bytes: u32,
    is_writable: bool,
) -> Result<(), Fault> {
    if readable.saturating_add(writable) as u64 + u64::from(length_bytes) > u64::from(u32::MAX) {
        return Err(Fault::Chain("is longer than 4 GiB"));
    }
    if !is_writable && writable > 0 {
        return Err(Fault::Chain("has a readable descriptor behind a writable one"));
    }
    Ok(())
}

/// Finds buffers in memory. Nearly all are in the region in which the last one was.
#[derive(Debug)]
pub(crate) struct Finder<'m> {
    memory: &'m Memory,
    near: Option<&'m GuestRegionMmap>,
}

impl<'m> Finder<'m> {
    pub(crate) fn new(memory: &'m Memory) -> Self {
        Self { memory, near: None }
    }

    /// Hands the pieces of memory that a buffer is to `add`: nearly always it's one. None of them is empty.
    ///
    /// # Errors
    /// When it is not all in memory.
    pub(crate) fn each_slice(
        &mut self,
        address: u64,
        length: usize,
        mut add: impl FnMut(VolatileSlice<'m>),
    ) -> Result<(), Fault> {
        if length == 0 {
            return Ok(());
        }
        let address = GuestAddress(address);
        let in_region =
            |region: &'m GuestRegionMmap| region.get_slice(region.to_region_addr(address)?, length).ok();
        let found = self.near.and_then(in_region).or_else(|| {
            self.near = self.memory.find_region(address);
            self.near.and_then(in_region)
        });
        if let Some(slice) = found {
            add(slice);
            return Ok(());
        }
        for slice in GuestMemoryBackend::get_slices(&**self.memory, address, length) {
            add(slice?);
        }
        Ok(())
    }
}

/// Copies from slices, one after the other, until `into` is full; false when it isn't then.
#[must_use]
pub(crate) fn read<'m>(slices: impl Iterator<Item = VolatileSlice<'m>>, into: &mut [u8]) -> bool {
    let mut rest = into;
    for slice in slices {
        let (part, tail) = rest.split_at_mut(slice.len().min(rest.len()));
        if slice.read_slice(part, 0).is_err() {
            return false;
        }
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

/// Copies to slices, one after the other, until nothing is left of `from`; false when something is.
#[must_use]
pub(crate) fn write<'m>(slices: impl Iterator<Item = VolatileSlice<'m>>, from: &[u8]) -> bool {
    let mut rest = from;
    for slice in slices {
        let (part, tail) = rest.split_at(slice.len().min(rest.len()));
        if slice.write_slice(part, 0).is_err() {
            return false;
        }
        rest = tail;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
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
    /// One without buffers, whose chain begins at `head`.
    pub(crate) fn new(head: u16, memory: &'m Memory) -> Self {
        Self { head, readable: Buffers::new(memory), writable: Buffers::new(memory) }
    }

    /// Adds the next buffer.
    ///
    /// # Errors
    /// When it is not in memory, is to be read and stands behind one that is to be written, or all would be 4 GiB or more (virtio 1.3,
    /// 2.7.4.2 and 2.7.5.2).
    pub(crate) fn push(
        &mut self,
        finder: &mut Finder<'m>,
        address: u64,
        length_bytes: u32,
        is_writable: bool,
    ) -> Result<(), Fault> {
        check_order(self.readable.bytes, self.writable.bytes, length_bytes, is_writable)?;
        let buffers = if is_writable { &mut self.writable } else { &mut self.readable };
        buffers.push(finder, address, length_bytes)
    }

    /// The chain's first descriptor, by which it is given back.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }
}
