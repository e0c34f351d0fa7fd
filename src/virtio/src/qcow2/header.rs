//! The header of a qcow2 image.

/// Bytes that are read of it.
pub const HEADER_BYTES: usize = 112;

const MAGIC: u32 = 0x5146_49fb;
/// 4 KiB to 2 MiB; what lies in clusters is cached by pages of 4 KiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=21;
/// Most bytes of the first-level table, and of the table of refcount blocks: both stay in memory.
pub(super) const TABLE_MAX_BYTES: u64 = 1 << 20;
/// As the kernel's offsets.
const OFFSET_MAX: u64 = 1 << 55;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// Why an image can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are others.
    #[error("this is no qcow2 image")]
    Magic,
    /// A version that is not known.
    #[error("this is version {0} of qcow2, and 2 and 3 are known")]
    Version(u32),
    /// A feature that is refused.
    #[error("the image {0}")]
    Refused(&'static str),
    /// It contradicts itself.
    #[error("the image is damaged: {0}; `qemu-img check -r all` may repair it")]
    Damaged(&'static str),
    /// The disk is not of the size that was said.
    #[error("the image holds a disk of {0} bytes, and not of {1}")]
    Size(u64, u64),
    /// Reading it.
    #[error("the image cannot be read: {0}")]
    Io(#[from] std::io::Error),
}

/// What a header says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bits of a cluster's size, 12 to 21.
    pub cluster_bits: u32,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Entries of the first-level table that the disk needs.
    pub l1_entries: u32,
    /// Where that is, on a cluster.
    pub l1_offset: u64,
    /// Where the table of refcount blocks is, on a cluster.
    pub refcount_table_offset: u64,
    /// Entries of that.
    pub refcount_table_entries: u32,
    /// Features that are to be forgotten by who writes and does not know them.
    pub autoclear: u64,
    /// Whether it names an image under it.
    pub has_backing: bool,
}

impl Header {
    /// Reads a header. Numbers are big-endian; the places are those of `docs/interop/qcow2.txt` of QEMU's.
    ///
    /// # Errors
    /// [`FormatError`] for what is not qcow2, or a kind of it that is refused.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FormatError> {
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk());
            u32::from_be_bytes(*bytes.unwrap_or(&[0; 4]))
        };
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at.saturating_add(4)));
        if word(0) != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = word(4);
        let is_3 = match version {
            2 => false,
            3 => true,
            _ => return Err(FormatError::Version(version)),
        };
        let incompatible = if is_3 { long(72) } else { 0 };
        let refcount_order = if is_3 { word(96) } else { 4 };
        refuse(&[
            (word(32) != 0, "is encrypted"),
            (word(60) != 0, "has snapshots of its own; remove them: qemu-img snapshot -d NAME FILE"),
            (incompatible & INCOMPATIBLE_DATA_FILE != 0, "keeps its data in another file"),
            (incompatible & INCOMPATIBLE_EXTENDED_L2 != 0, "has subclusters (extended_l2)"),
            (incompatible & INCOMPATIBLE_COMPRESSION != 0, "is compressed, and not by zlib"),
            (incompatible & INCOMPATIBLE_CORRUPT != 0, "is marked as corrupt: qemu-img check -r all FILE"),
            (
                incompatible & INCOMPATIBLE_DIRTY != 0,
                "was not closed (lazy_refcounts): qemu-img check -r all FILE",
            ),
            (incompatible >> 5 != 0, "has a feature that is not known"),
            (refcount_order != 4, "counts its clusters by other than 16 bits"),
            (!CLUSTER_BITS.contains(&word(20)), "has clusters of less than 4 KiB or more than 2 MiB"),
            (is_3 && word(100) < 104, "has a header that is too short"),
        ])?;
        let cluster_bits = word(20);
        let header = Self {
            version,
            cluster_bits,
            size_bytes: long(24),
            l1_entries: 0,
            l1_offset: long(40),
            refcount_table_offset: long(48),
            refcount_table_entries: 0,
            autoclear: if is_3 { long(88) } else { 0 },
            has_backing: long(8) != 0,
        };
        header.with_tables(word(36), word(56))
    }

    /// With the tables' sizes: entries of the first, clusters of the second.
    fn with_tables(self, l1_entries: u32, refcount_clusters: u32) -> Result<Self, FormatError> {
        let cluster = self.cluster_bytes();
        let needed = self.size_bytes.div_ceil(self.bytes_of_l2());
        let table_bytes = u64::from(refcount_clusters) * cluster;
        let aligned = |offset: u64| offset != 0 && offset.is_multiple_of(cluster) && offset < OFFSET_MAX;
        refuse(&[
            (needed * 8 > TABLE_MAX_BYTES, "is too large for the size of its clusters"),
            (table_bytes > TABLE_MAX_BYTES, "has a table of refcounts of more than 1 MiB"),
        ])?;
        for (wrong, what) in [
            (self.size_bytes == 0 || !self.size_bytes.is_multiple_of(512), "its size is not in sectors"),
            (u64::from(l1_entries) < needed, "its first-level table is too short"),
            (!aligned(self.l1_offset), "its first-level table is not on a cluster"),
            (!aligned(self.refcount_table_offset), "its table of refcounts is not on a cluster"),
            (table_bytes == 0, "it has no table of refcounts"),
        ] {
            if wrong {
                return Err(FormatError::Damaged(what));
            }
        }
        // Both are below the bound on the tables.
        let l1_entries = u32::try_from(needed).unwrap_or(u32::MAX);
        let refcount_table_entries = u32::try_from(table_bytes / 8).unwrap_or(u32::MAX);
        Ok(Self { l1_entries, refcount_table_entries, ..self })
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the disk that one second-level table describes.
    pub fn bytes_of_l2(&self) -> u64 {
        self.cluster_bytes() / 8 * self.cluster_bytes()
    }
}

fn refuse(cases: &[(bool, &'static str)]) -> Result<(), FormatError> {
    match cases.iter().find(|(is_so, _)| *is_so) {
        Some((_, what)) => Err(FormatError::Refused(what)),
        None => Ok(()),
    }
}
