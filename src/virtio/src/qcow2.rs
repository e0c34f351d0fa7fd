//! qcow2 images, versions 2 and 3 (QEMU's `docs/interop/qcow2.txt`): where the bytes of a disk are in a file.
//!
//! An image is not trusted: it may have been written by the guest, or by who wants to break out of one. So nothing in it is
//! followed out of the file, no number of it sizes an allocation of more than 1 MiB, and what it says twice and differently
//! ends in an error and not in a panic. What is refused has a name: encryption, snapshots, data in another file,
//! compression, subclusters, an image under it that the guest's file does not name.
//!
//! # What is on the disk, and when
//! The tables that map the disk to the file, and the refcounts, are changed in memory and written by [`Qcow2::flush`] (or
//! when too many have changed), in an order in which a loss of power at any moment leaves an image that is whole:
//!
//! 1. refcounts of new clusters (and the guest's data, which was written when it came), then the entries of new refcount
//!    blocks;
//! 2. second-level tables, which name the new clusters, then the entries of new tables in the first level;
//! 3. refcounts of clusters that no table names any more.
//!
//! Between these the file is synced. So a cluster that a table names is always counted, and nobody else gets it. What a
//! loss of power can leave are clusters that are counted and not used (`qemu-img check` calls them leaks), and what the
//! guest did not flush.

mod cache;
mod clusters;
mod header;

use std::{collections::BTreeSet, io};

use cache::{Cache, Dirt};
pub use header::{FormatError, HEADER_BYTES, Header};

/// The file.
pub trait Storage {
    /// Fills `into`; what is behind the file's end is zeros.
    ///
    /// # Errors
    /// What the host says.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;
    /// Stores `from`, and makes the file longer for it.
    ///
    /// # Errors
    /// What the host says.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeros, and gives its room back if that can be done.
    ///
    /// # Errors
    /// What the host says.
    fn zero(&self, at: u64, length: u64) -> io::Result<()>;
    /// Makes what was written survive a loss of power.
    ///
    /// # Errors
    /// What the host says.
    fn sync(&self) -> io::Result<()>;
}

/// Why the image cannot do what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It contradicts itself.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
    /// It has no more room, or may not have.
    #[error("the image is full")]
    Full,
    /// A kind of cluster that is not read here.
    #[error("the image has compressed clusters")]
    Compressed,
}

/// Where bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they are zeros.
    Zeros,
    /// In the image under this one.
    Below,
    /// In the file, from here on.
    At(u64),
}

/// Bytes of the disk that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub place: Place,
    /// How many, from 1.
    pub length: u64,
}

/// Where bytes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// They have their place.
    Ready {
        /// In the file.
        at: u64,
        /// How many.
        length: u64,
    },
    /// A cluster was taken for them. When all of it was written, it is to be [given](Qcow2::give) to the disk.
    New(NewCluster),
}

/// A cluster that is not the disk's yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewCluster {
    /// Where it begins in the file.
    pub at: u64,
    /// Where it is to begin on the disk.
    pub disk_at: u64,
    /// What its place on the disk holds so far; never [`Place::At`].
    pub old: Place,
    /// It is zeros already.
    pub is_zeros: bool,
}

/// Bits of entries.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZEROS: u64 = 1;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Clusters that wait to be freed, at most.
const UNUSED_MAX: usize = 8192;

/// An open image. It knows where bytes are; who has it moves them.
#[derive(Debug)]
pub struct Qcow2<S> {
    storage: S,
    header: Header,
    has_below: bool,
    l1: Vec<u64>,
    l1_dirty: BTreeSet<usize>,
    refcount_table: Vec<u64>,
    refcount_table_dirty: BTreeSet<usize>,
    cache: Cache,
    /// The cluster with which the search for a free one goes on; those before it are taken.
    next_cluster: u64,
    /// The file has no more.
    clusters_max: u64,
    /// Behind this nothing was ever written.
    used_up_to: u64,
    /// Clusters that a table on the disk may still name, though none in memory does.
    unused: Vec<u64>,
}

/// What is known of an image before it is opened.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Size of the file.
    pub file_bytes: u64,
    /// The file may become so long.
    pub file_bytes_max: u64,
    /// Whether there is an image under it.
    pub has_below: bool,
    /// Whether it is only read.
    pub read_only: bool,
}

impl<S: Storage> Qcow2<S> {
    /// Opens an image.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn open(storage: S, expected: Expected) -> Result<Self, FormatError> {
        let mut start = [0; HEADER_BYTES];
        storage.read(0, &mut start)?;
        let header = Header::parse(&start)?;
        if header.has_backing && !expected.has_below {
            let what = "names another image under it, which only the guest's file may do: backing = \"FILE\"";
            return Err(FormatError::Refused(what));
        }
        if header.size_bytes != expected.size_bytes {
            return Err(FormatError::Size(header.size_bytes, expected.size_bytes));
        }
        let l1 = table(&storage, header.l1_offset, header.l1_entries)?;
        let refcount_table = table(&storage, header.refcount_table_offset, header.refcount_table_entries)?;
        let clusters_max = expected.file_bytes_max.max(expected.file_bytes) >> header.cluster_bits;
        let counted = u64::from(header.refcount_table_entries) * (header.cluster_bytes() / 2);
        if !expected.read_only && counted < clusters_max {
            let what = "has too short a table of refcounts to be written; larger clusters help: qemu-img convert -O qcow2";
            return Err(FormatError::Refused(what));
        }
        let used_up_to = expected.file_bytes.next_multiple_of(header.cluster_bytes());
        let mut image = Self {
            storage,
            has_below: expected.has_below,
            l1,
            l1_dirty: BTreeSet::new(),
            refcount_table,
            refcount_table_dirty: BTreeSet::new(),
            cache: Cache::default(),
            next_cluster: 0,
            clusters_max,
            used_up_to,
            unused: Vec::new(),
            header,
        };
        for at in [0, image.header.l1_offset, image.header.refcount_table_offset] {
            let cluster = at >> image.header.cluster_bits;
            if image.count(cluster).map_err(|_| FormatError::Damaged("its refcounts"))? == 0 {
                return Err(FormatError::Damaged("its own tables are not counted"));
            }
        }
        if !expected.read_only && image.header.autoclear != 0 {
            // Who writes without knowing such a feature says so by clearing it.
            const AUTOCLEAR: u64 = 88;
            image.storage.write(AUTOCLEAR, &[0; 8])?;
        }
        Ok(image)
    }

    /// The file.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes()
    }

    /// Where the first of `length` bytes from `offset` of the disk on are; `length` is not 0, and all are on the disk.
    ///
    /// # Errors
    /// [`Error`], but not [`Error::Full`].
    pub fn look_up(&mut self, offset: u64, length: u64) -> Result<Extent, Error> {
        let mut extent = self.look_up_one(offset, length)?;
        while extent.length < length {
            let next = self.look_up_one(offset + extent.length, length - extent.length)?;
            let goes_on = match (extent.place, next.place) {
                (Place::At(at), Place::At(next)) => at.checked_add(extent.length) == Some(next),
                (one, other) => one == other,
            };
            if !goes_on {
                break;
            }
            extent.length += next.length;
        }
        Ok(extent)
    }

    fn look_up_one(&mut self, offset: u64, length: u64) -> Result<Extent, Error> {
        let within = offset % self.cluster_bytes();
        let length = length.min(self.cluster_bytes() - within);
        let entry = match self.entry_place(offset)? {
            Some(place) => self.entry(place)?,
            None => 0,
        };
        let place = match self.place(entry)? {
            Place::At(at) => Place::At(at.saturating_add(within)),
            other => other,
        };
        Ok(Extent { place, length })
    }

    /// What an entry of the second level says.
    fn place(&self, entry: u64) -> Result<Place, Error> {
        if entry & COMPRESSED != 0 {
            return Err(Error::Compressed);
        }
        let at = entry & OFFSET_MASK;
        let known = COPIED | OFFSET_MASK | if self.header.version >= 3 { ZEROS } else { 0 };
        if entry & !known != 0 || !at.is_multiple_of(self.cluster_bytes()) {
            return Err(Error::Damaged("an entry of a second-level table"));
        }
        Ok(match (entry & ZEROS, at) {
            (0, 0) if self.has_below => Place::Below,
            (0, 1..) => Place::At(at),
            _ => Place::Zeros,
        })
    }

    fn entry(&mut self, place: u64) -> Result<u64, Error> {
        Ok(u64::from_be_bytes(self.cache.read(&self.storage, place)?))
    }

    fn set_entry(&mut self, place: u64, entry: u64) -> Result<(), Error> {
        Ok(self.cache.write(&self.storage, place, entry.to_be_bytes(), Dirt::Tables)?)
    }

    /// Where the entry of the second level for `offset` is; `None` when there is no table for it.
    fn entry_place(&mut self, offset: u64) -> Result<Option<u64>, Error> {
        let table = self.l1_entry(offset)? & OFFSET_MASK;
        if table == 0 {
            return Ok(None);
        }
        let index = offset / self.cluster_bytes() % (self.cluster_bytes() / 8);
        Ok(Some(table.saturating_add(index * 8)))
    }

    fn l1_entry(&self, offset: u64) -> Result<u64, Error> {
        let entry = *self.l1.get(self.l1_index(offset)).ok_or(Error::Damaged("its size"))?;
        if entry & !(COPIED | OFFSET_MASK) != 0 || !(entry & OFFSET_MASK).is_multiple_of(self.cluster_bytes())
        {
            return Err(Error::Damaged("an entry of the first-level table"));
        }
        Ok(entry)
    }

    fn l1_index(&self, offset: u64) -> usize {
        usize::try_from(offset / self.header.bytes_of_l2()).unwrap_or(usize::MAX)
    }

    /// As [`Self::entry_place`], and makes the table when there is none.
    fn writable_entry_place(&mut self, offset: u64) -> Result<u64, Error> {
        if self.cache.is_crowded() || self.unused.len() >= UNUSED_MAX {
            self.flush()?;
        }
        let entry = self.l1_entry(offset)?;
        if entry != 0 && entry & COPIED == 0 {
            return Err(Error::Damaged("a second-level table that is used twice"));
        }
        if entry == 0 {
            let at = self.allocate()?;
            self.make_empty_table(at)?;
            let index = self.l1_index(offset);
            *self.l1.get_mut(index).ok_or(Error::Damaged("its size"))? = at | COPIED;
            self.l1_dirty.insert(index);
        }
        self.entry_place(offset)?.ok_or(Error::Damaged("its first-level table"))
    }

    /// Where the first of `length` bytes from `offset` of the disk on are to be written; `length` is not 0, and all are on
    /// the disk.
    ///
    /// # Errors
    /// [`Error`].
    pub fn target(&mut self, offset: u64, length: u64) -> Result<Target, Error> {
        let first = self.target_in_cluster(offset)?;
        let Target::Ready { at, .. } = first else { return Ok(first) };
        let mut ready = length.min(self.cluster_bytes() - offset % self.cluster_bytes());
        while ready < length {
            // What is taken here and is not needed would be lost, so it is only looked at.
            let next = match self.entry_place(offset + ready)? {
                Some(place) => self.entry(place)?,
                None => 0,
            };
            let follows =
                matches!(self.place(next), Ok(Place::At(next)) if at.checked_add(ready) == Some(next));
            if !follows || next & COPIED == 0 {
                break;
            }
            ready += (length - ready).min(self.cluster_bytes());
        }
        Ok(Target::Ready { at, length: ready })
    }

    fn target_in_cluster(&mut self, offset: u64) -> Result<Target, Error> {
        let within = offset % self.cluster_bytes();
        let place = self.writable_entry_place(offset)?;
        let entry = self.entry(place)?;
        let (old, at) = (self.place(entry)?, entry & OFFSET_MASK);
        if at != 0 && entry & COPIED == 0 {
            return Err(Error::Damaged("a cluster that is used twice"));
        }
        if let Place::At(at) = old {
            return Ok(Target::Ready { at: at.saturating_add(within), length: 0 });
        }
        // A cluster that is to read as zeros may have kept its room.
        let (at, is_zeros) = match at {
            0 => {
                let at = self.allocate()?;
                (at, self.is_fresh(at))
            }
            kept => (kept, false),
        };
        Ok(Target::New(NewCluster { at, disk_at: offset - within, old, is_zeros }))
    }

    /// Gives a new cluster, which was filled, to the disk.
    ///
    /// # Errors
    /// [`Error`]; the cluster is then nobody's.
    pub fn give(&mut self, cluster: NewCluster) -> Result<(), Error> {
        let place = self.entry_place(cluster.disk_at)?.ok_or(Error::Damaged("its first-level table"))?;
        self.set_entry(place, cluster.at | COPIED)
    }

    /// Makes a whole cluster of the disk read as zeros, and gives its room back. False when that can't be said in this
    /// version of the format, and the zeros are to be written.
    ///
    /// # Errors
    /// [`Error`].
    pub fn discard(&mut self, disk_at: u64) -> Result<bool, Error> {
        let entry = match self.entry_place(disk_at)? {
            Some(place) => self.entry(place)?,
            None => 0,
        };
        let place = self.place(entry)?;
        let at = entry & OFFSET_MASK;
        if place == Place::Zeros && at == 0 {
            return Ok(true);
        }
        if self.has_below && self.header.version < 3 {
            return Ok(false);
        }
        if at != 0 && entry & COPIED == 0 {
            return Err(Error::Damaged("a cluster that is used twice"));
        }
        let place = self.writable_entry_place(disk_at)?;
        self.set_entry(place, if self.has_below { ZEROS } else { 0 })?;
        if at != 0 {
            self.unused.push(at);
        }
        Ok(true)
    }

    /// Makes all that was written survive a loss of power. See the module for the order.
    ///
    /// # Errors
    /// [`Error`]; what was not written stays to be written.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.cache.write_back(&self.storage, Dirt::Refcounts)?;
        if !self.refcount_table_dirty.is_empty() {
            self.storage.sync()?;
            let at = self.header.refcount_table_offset;
            write_entries(&self.storage, at, &self.refcount_table, &mut self.refcount_table_dirty)?;
        }
        if self.cache.has(Dirt::Tables) || !self.l1_dirty.is_empty() {
            self.storage.sync()?;
            self.cache.write_back(&self.storage, Dirt::Tables)?;
        }
        if !self.l1_dirty.is_empty() {
            self.storage.sync()?;
            write_entries(&self.storage, self.header.l1_offset, &self.l1, &mut self.l1_dirty)?;
        }
        self.storage.sync()?;
        self.free_unused()
    }
}

/// A table of the header's, as many entries as it said.
fn table(storage: &impl Storage, at: u64, entries: u32) -> Result<Vec<u64>, FormatError> {
    let mut bytes = vec![0; (entries as usize).saturating_mul(8)];
    storage.read(at, &mut bytes)?;
    let (entries, _) = bytes.as_chunks();
    Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn write_entries(
    storage: &impl Storage,
    at: u64,
    table: &[u64],
    dirty: &mut BTreeSet<usize>,
) -> Result<(), Error> {
    while let Some(index) = dirty.first().copied() {
        let entry = table.get(index).copied().unwrap_or(0);
        storage.write(at.saturating_add(index as u64 * 8), &entry.to_be_bytes())?;
        dirty.remove(&index);
    }
    Ok(())
}

#[cfg(test)]
#[path = "qcow2_tests.rs"]
pub(crate) mod tests;
