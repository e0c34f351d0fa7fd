//! Which clusters of the file are taken: refcounts.

use super::{Error, Qcow2, Storage, cache::Dirt};

/// Clusters that one allocation looks at; a table that lets it go further is not an honest one.
const LOOKS_MAX: u32 = 1 << 22;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

impl<S: Storage> Qcow2<S> {
    fn counts_in_block(&self) -> u64 {
        self.header.cluster_bytes() / 2
    }

    /// Where the count of a cluster is; `None` when no block of the table has it.
    fn count_place(&self, cluster: u64) -> Result<Option<u64>, Error> {
        let entry = self.refcount_block(cluster / self.counts_in_block())?;
        let within = cluster % self.counts_in_block() * 2;
        Ok((entry != 0).then(|| entry.saturating_add(within)))
    }

    /// Where a block is; 0 when there is none.
    fn refcount_block(&self, block: u64) -> Result<u64, Error> {
        let entry = usize::try_from(block).ok().and_then(|block| self.refcount_table.get(block));
        let entry = *entry.ok_or(Error::Full)?;
        if entry & !OFFSET_MASK != 0 || !entry.is_multiple_of(self.header.cluster_bytes()) {
            return Err(Error::Damaged("an entry of the refcount table"));
        }
        Ok(entry)
    }

    /// How often a cluster is used, as the image counts.
    pub(super) fn count(&mut self, cluster: u64) -> Result<u16, Error> {
        match self.count_place(cluster)? {
            Some(place) => Ok(u16::from_be_bytes(self.cache.read(&self.storage, place)?)),
            None => Ok(0),
        }
    }

    fn set_count(&mut self, cluster: u64, count: u16) -> Result<(), Error> {
        let place = self.count_place(cluster)?.ok_or(Error::Damaged("the refcount table"))?;
        Ok(self.cache.write(&self.storage, place, count.to_be_bytes(), Dirt::Refcounts)?)
    }

    /// Takes a cluster that nobody uses, and returns where it begins. What is in it is anything, unless it is
    /// [fresh](Self::is_fresh).
    pub(super) fn allocate(&mut self) -> Result<u64, Error> {
        for _ in 0..LOOKS_MAX {
            let cluster = self.next_cluster;
            if cluster >= self.clusters_max {
                return Err(Error::Full);
            }
            let block = cluster / self.counts_in_block();
            if self.refcount_block(block)? == 0 {
                self.add_refcount_block(block, cluster)?;
                continue;
            }
            self.next_cluster = cluster + 1;
            if self.count(cluster)? == 0 {
                self.set_count(cluster, 1)?;
                return Ok(cluster << self.header.cluster_bits);
            }
        }
        Err(Error::Full)
    }

    /// Makes `cluster` the block that counts itself and those around it.
    fn add_refcount_block(&mut self, block: u64, cluster: u64) -> Result<(), Error> {
        let at = cluster << self.header.cluster_bits;
        self.make_empty_table(at)?;
        let index = usize::try_from(block).map_err(|_| Error::Full)?;
        *self.refcount_table.get_mut(index).ok_or(Error::Full)? = at;
        self.refcount_table_dirty.insert(index);
        self.set_count(cluster, 1)
    }

    /// Fills a cluster that is to be a table with zeros, on the disk too.
    pub(super) fn make_empty_table(&mut self, at: u64) -> Result<(), Error> {
        let bytes = self.header.cluster_bytes();
        self.cache.forget(at, bytes);
        const ZEROS: [u8; 4096] = [0; 4096];
        for page in (0..bytes).step_by(ZEROS.len()) {
            self.storage.write(at.saturating_add(page), &ZEROS)?;
        }
        self.used_up_to = self.used_up_to.max(at.saturating_add(bytes));
        Ok(())
    }

    /// Whether nothing was ever written to this cluster and behind it, so that it is zeros. It no longer is from now on.
    pub(super) fn is_fresh(&mut self, at: u64) -> bool {
        let fresh = at >= self.used_up_to;
        self.used_up_to = self.used_up_to.max(at.saturating_add(self.header.cluster_bytes()));
        fresh
    }

    /// Frees the clusters that no table names any more, on the disk neither.
    pub(super) fn free_unused(&mut self) -> Result<(), Error> {
        let mut unused = std::mem::take(&mut self.unused);
        unused.sort_unstable();
        let bytes = self.header.cluster_bytes();
        let mut hole: Option<(u64, u64)> = None;
        for at in unused {
            if self.cache.is_crowded() {
                self.cache.write_back(&self.storage, Dirt::Refcounts)?;
            }
            let cluster = at >> self.header.cluster_bits;
            match self.count(cluster)? {
                0 => continue,
                count => self.set_count(cluster, count - 1)?,
            }
            if self.count(cluster)? > 0 {
                continue;
            }
            self.next_cluster = self.next_cluster.min(cluster);
            hole = match hole {
                Some((start, end)) if end == at => Some((start, at.saturating_add(bytes))),
                other => {
                    other.map(|(start, end)| self.storage.zero(start, end - start)).transpose()?;
                    Some((at, at.saturating_add(bytes)))
                }
            };
        }
        hole.map(|(start, end)| self.storage.zero(start, end - start)).transpose()?;
        Ok(())
    }
}
