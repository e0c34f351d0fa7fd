//! A bounded number of pages of an image's tables.

use std::io;

use super::Storage;

/// What is read and written at once, and lies in one cluster.
pub(super) const PAGE_BYTES: u64 = 4096;
/// 1 MiB: with clusters of 64 KiB, the tables of 8 GiB of the disk.
const PAGES: usize = 256;

/// Whether a page is to be written, and in which order (see [`super::Qcow2::flush`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Dirt {
    Clean,
    Refcounts,
    Tables,
}

#[derive(Debug)]
struct Page {
    at: u64,
    bytes: Box<[u8; PAGE_BYTES as usize]>,
    dirt: Dirt,
    used: u64,
}

/// The pages. More than half of them are clean whenever [`Cache::is_crowded`] was heeded.
#[derive(Debug, Default)]
pub(super) struct Cache {
    pages: Vec<Page>,
    clock: u64,
    dirty: usize,
}

impl Cache {
    /// Whether the dirty pages should be written before more become so.
    pub(super) fn is_crowded(&self) -> bool {
        self.dirty > PAGES / 2
    }

    pub(super) fn has(&self, dirt: Dirt) -> bool {
        self.dirty > 0 && self.pages.iter().any(|page| page.dirt == dirt)
    }

    /// `N` bytes at `at`, which do not cross a page.
    pub(super) fn read<const N: usize>(&mut self, storage: &impl Storage, at: u64) -> io::Result<[u8; N]> {
        let (page, within) = self.page(storage, at)?;
        let bytes = page.bytes.get(within..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Changes `N` bytes at `at`, which do not cross a page.
    pub(super) fn write<const N: usize>(
        &mut self,
        storage: &impl Storage,
        at: u64,
        value: [u8; N],
        dirt: Dirt,
    ) -> io::Result<()> {
        let (page, within) = self.page(storage, at)?;
        let place = page.bytes.get_mut(within..).and_then(|rest| rest.first_chunk_mut());
        *place.ok_or(io::ErrorKind::InvalidInput)? = value;
        let was_clean = page.dirt == Dirt::Clean;
        page.dirt = page.dirt.max(dirt);
        self.dirty += usize::from(was_clean);
        Ok(())
    }

    /// Writes the pages of this kind.
    pub(super) fn write_back(&mut self, storage: &impl Storage, dirt: Dirt) -> io::Result<()> {
        for page in self.pages.iter_mut().filter(|page| page.dirt == dirt) {
            storage.write(page.at, page.bytes.as_slice())?;
            page.dirt = Dirt::Clean;
            self.dirty = self.dirty.saturating_sub(1);
        }
        Ok(())
    }

    /// Forgets what lies in `length` bytes from `at` on, which are to be something else from now on.
    pub(super) fn forget(&mut self, at: u64, length: u64) {
        self.pages.retain(|page| page.at < at || page.at - at >= length);
        self.dirty = self.pages.iter().filter(|page| page.dirt != Dirt::Clean).count();
    }

    fn page(&mut self, storage: &impl Storage, at: u64) -> io::Result<(&mut Page, usize)> {
        let within = (at % PAGE_BYTES) as usize;
        let at = at - at % PAGE_BYTES;
        self.clock += 1;
        let index = match self.pages.iter().position(|page| page.at == at) {
            Some(index) => index,
            None => self.load(storage, at)?,
        };
        let page = self.pages.get_mut(index).ok_or(io::ErrorKind::OutOfMemory)?;
        page.used = self.clock;
        Ok((page, within))
    }

    fn load(&mut self, storage: &impl Storage, at: u64) -> io::Result<usize> {
        let mut bytes = Box::new([0; PAGE_BYTES as usize]);
        storage.read(at, bytes.as_mut_slice())?;
        let page = Page { at, bytes, dirt: Dirt::Clean, used: 0 };
        if self.pages.len() < PAGES {
            self.pages.push(page);
            return Ok(self.pages.len() - 1);
        }
        let clean = self.pages.iter().enumerate().filter(|(_, page)| page.dirt == Dirt::Clean);
        let (index, _) = clean.min_by_key(|(_, page)| page.used).ok_or(io::ErrorKind::OutOfMemory)?;
        if let Some(place) = self.pages.get_mut(index) {
            *place = page;
        }
        Ok(index)
    }
}
