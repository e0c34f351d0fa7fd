//! Configuration space that the guest reads without an exit: a page of this process's memory a function, which KVM maps, for
//! reading alone, where ECAM has the function. A write is an exit as ever, and the page follows it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use casemate_pci::{CONFIG_SPACE_BYTES, regs};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::Place;
use crate::{error::Error, layout, memory::MemorySlot};

/// The page of one function. Who changes it holds the function's lock.
pub(super) struct Mirror {
    /// That of all functions.
    pages: Arc<MmapRegion>,
    /// Where in it this one's is.
    start: usize,
    slot: MemorySlot,
    is_mapped: AtomicBool,
}

impl Mirror {
    /// A page for each of the functions at `places`, all on the root bus, to be mapped by slots from `first_slot` on.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub(super) fn make(places: Vec<Place>, first_slot: u32) -> Result<Vec<(Place, Self)>, Error> {
        let refuse = |error: vm_memory::mmap::MmapRegionError| {
            Error::Layout(format!("memory for configuration space: {error}"))
        };
        let pages = MmapRegion::new(places.len().saturating_mul(CONFIG_SPACE_BYTES)).map_err(refuse)?;
        let pages = Arc::new(pages);
        let starts = (0..).step_by(CONFIG_SPACE_BYTES);
        let made = places.into_iter().zip(starts).zip(first_slot..).map(|((place, start), slot)| {
            let host_address = (pages.as_ptr() as u64).saturating_add(start as u64);
            let ecam = u64::from(place.device) << 15 | u64::from(place.function) << 12;
            let slot = MemorySlot {
                slot,
                guest_address: layout::ECAM.start + ecam,
                size_bytes: CONFIG_SPACE_BYTES as u64,
                host_address,
                read_only: true,
            };
            (place, Self { pages: Arc::clone(&pages), start, slot, is_mapped: AtomicBool::new(true) })
        });
        Ok(made.collect())
    }

    /// How KVM maps it, unless it was told to forget it.
    pub(super) fn slot(&self) -> Option<MemorySlot> {
        self.is_mapped.load(Ordering::Relaxed).then_some(self.slot)
    }

    /// KVM maps it no longer.
    pub(super) fn forget(&self) {
        self.is_mapped.store(false, Ordering::Relaxed);
    }

    /// Shows `image`; `has_several` is what a function does not know of itself, whether others are beside it.
    pub(super) fn show(&self, image: &[u8; CONFIG_SPACE_BYTES], has_several: bool) {
        const HEADER: usize = regs::CACHE_LINE_SIZE as usize;
        // As make() cut it.
        let Ok(page) = self.pages.get_slice(self.start, CONFIG_SPACE_BYTES) else { return };
        let (registers, _) = image.as_chunks::<4>();
        for (at, register) in (0..).step_by(4).zip(registers) {
            let mut register = *register;
            if at == HEADER && has_several {
                register[2] |= regs::HEADER_TYPE_MULTIFUNCTION;
            }
            // One at a time, as processors read them meanwhile. The place is within the page, and aligned.
            let new = u32::from_ne_bytes(register);
            if page.load::<u32>(at, Ordering::Relaxed).is_ok_and(|shown| shown != new) {
                let _ = page.store(new, at, Ordering::Relaxed);
            }
        }
    }

    /// A guest's processor, which reads all of it.
    #[cfg(test)]
    pub(super) fn reader(&self) -> impl Fn() -> Vec<u8> + Send + 'static {
        let (pages, start) = (Arc::clone(&self.pages), self.start);
        move || {
            let mut bytes = vec![0; CONFIG_SPACE_BYTES];
            pages.get_slice(start, CONFIG_SPACE_BYTES).unwrap().copy_to(&mut bytes);
            bytes
        }
    }
}
