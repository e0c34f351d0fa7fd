//! Where a disk's bytes are kept when they are moved one request after the other: a raw file, or a qcow2 image that may lie
//! over another.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    ops::Range,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::{Errno, preadv, pwritev},
};

use super::{Failure, command::Clear};
use crate::{
    qcow2::{self, Expected, Extent, FormatError, NewCluster, Place, Qcow2, Storage, Target},
    request::Buffers,
    vectored::{read_at, read_at_most, write_at},
};

/// What an image is written in.
#[derive(Debug)]
pub enum Format {
    /// The disk's bytes, from the first to the last.
    Raw,
    /// qcow2.
    Qcow2 {
        /// The file may become so long, which the process must be allowed.
        file_bytes_max: u64,
        /// The image under it, which is only read.
        below: Option<Box<Below>>,
    },
}

/// An image under another.
#[derive(Debug)]
pub struct Below {
    /// The file, open for reading.
    pub file: OwnedFd,
    /// Size of the disk in it.
    pub size_bytes: u64,
    /// Its format.
    pub format: Format,
}

/// Images under an image, at most; a longer chain is made shorter by `qemu-img commit`.
const DEPTH_MAX: u32 = 8;

/// An open image.
pub(super) enum Store {
    Raw(File),
    Qcow2(Box<Layered>),
}

pub(super) struct Layered {
    image: Qcow2<ImageFile>,
    below: Option<(Store, u64)>,
    /// Trouble with the image was told.
    told: bool,
}

impl Store {
    /// Opens an image.
    pub(super) fn open(
        file: OwnedFd,
        format: Format,
        size_bytes: u64,
        read_only: bool,
    ) -> Result<Self, FormatError> {
        Self::open_at(0, file, format, size_bytes, read_only)
    }

    fn open_at(
        depth: u32,
        file: OwnedFd,
        format: Format,
        size_bytes: u64,
        read_only: bool,
    ) -> Result<Self, FormatError> {
        let file = File::from(file);
        let Format::Qcow2 { file_bytes_max, below } = format else { return Ok(Self::Raw(file)) };
        if depth > DEPTH_MAX {
            return Err(FormatError::Refused("lies over more than 8 others"));
        }
        let expected = Expected {
            size_bytes,
            // Of a block device too.
            file_bytes: seek(&file, SeekFrom::End(0)).map_err(io::Error::from)?,
            file_bytes_max,
            has_below: below.is_some(),
            read_only,
        };
        let file_bytes_max = file_bytes_max.max(expected.file_bytes);
        let image = Qcow2::open(ImageFile { file, file_bytes_max }, expected)?;
        let below = below.map(|below| -> Result<_, FormatError> {
            let store = Self::open_at(depth + 1, below.file, below.format, below.size_bytes, true)?;
            Ok((store, below.size_bytes))
        });
        Ok(Self::Qcow2(Box::new(Layered { image, below: below.transpose()?, told: false })))
    }

    /// Fills bytes `range` of `buffers` from byte `offset` of the disk on.
    pub(super) fn read(
        &mut self,
        buffers: &Buffers<'_>,
        range: Range<usize>,
        offset: u64,
    ) -> Result<(), Failure> {
        match self {
            Self::Raw(file) => Ok(read_at(file.as_fd(), buffers, range, offset)?),
            Self::Qcow2(image) => {
                let result = image.read(buffers, range, offset);
                image.tell(result)
            }
        }
    }

    /// Stores bytes `range` of `buffers` from byte `offset` of the disk on.
    pub(super) fn write(
        &mut self,
        buffers: &Buffers<'_>,
        range: Range<usize>,
        offset: u64,
    ) -> Result<(), Failure> {
        match self {
            Self::Raw(file) => Ok(write_at(file.as_fd(), buffers, range, offset)?),
            Self::Qcow2(image) => {
                let result = image.write(buffers, range, offset);
                image.tell(result)
            }
        }
    }

    /// Makes a range read as zeros.
    pub(super) fn clear(&mut self, range: Clear) -> Result<(), Failure> {
        match self {
            Self::Raw(file) => Ok(fallocate(file, range.mode(), range.offset, range.length)?),
            Self::Qcow2(image) => {
                let result = image.clear(range);
                image.tell(result)
            }
        }
    }

    /// Makes what was written survive a loss of power.
    pub(super) fn flush(&mut self) -> Result<(), Failure> {
        match self {
            Self::Raw(file) => Ok(file.sync_data()?),
            Self::Qcow2(image) => {
                let result = image.image.flush();
                image.tell(result)
            }
        }
    }

    /// Whether some of what was written is only in this process's memory until it is flushed.
    pub(super) fn holds_back(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }
}

impl Layered {
    /// The first trouble with an image goes to the log: the guest learns only that something is wrong.
    fn tell(&mut self, result: Result<(), qcow2::Error>) -> Result<(), Failure> {
        result.map_err(|error| {
            if !std::mem::replace(&mut self.told, true) {
                eprintln!("casemate-vmm: a qcow2 disk: {error}");
            }
            Failure::Io
        })
    }

    fn read(&mut self, buffers: &Buffers<'_>, range: Range<usize>, offset: u64) -> Result<(), qcow2::Error> {
        let Range { mut start, end } = range;
        let mut offset = offset;
        while start < end {
            let Extent { place, length } = self.image.look_up(offset, (end - start) as u64)?;
            let next = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX)).min(end);
            match place {
                Place::Zeros => zero(buffers, start..next)?,
                Place::At(at) => read_or_zero(&self.image.storage().file, buffers, start..next, at)?,
                Place::Below => self.read_below(buffers, start..next, offset)?,
            }
            (start, offset) = (next, offset.saturating_add(length));
        }
        Ok(())
    }

    /// What is behind the end of the image below is zeros.
    fn read_below(
        &mut self,
        buffers: &Buffers<'_>,
        range: Range<usize>,
        offset: u64,
    ) -> Result<(), qcow2::Error> {
        let Some((below, size_bytes)) = &mut self.below else { return zero(buffers, range) };
        let there = usize::try_from(size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let end = range.start.saturating_add(there).min(range.end);
        if range.start < end {
            below.read(buffers, range.start..end, offset).map_err(|_| below_failed())?;
        }
        zero(buffers, end..range.end)
    }

    fn write(&mut self, buffers: &Buffers<'_>, range: Range<usize>, offset: u64) -> Result<(), qcow2::Error> {
        let Range { mut start, end } = range;
        let mut offset = offset;
        while start < end {
            let left = (end - start) as u64;
            let length = match self.image.target(offset, left)? {
                Target::Ready { at, length } => {
                    let next = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX)).min(end);
                    self.image.storage().allowed(at, length)?;
                    write_at(self.image.storage().file.as_fd(), buffers, start..next, at)?;
                    length
                }
                Target::New(cluster) => {
                    let within = offset - cluster.disk_at;
                    let length = left.min(self.image.cluster_bytes() - within);
                    // At most a cluster.
                    let next = start.saturating_add(length as usize).min(end);
                    self.image.storage().allowed(cluster.at, self.image.cluster_bytes())?;
                    self.fill(cluster, 0..within)?;
                    let at = cluster.at.saturating_add(within);
                    write_at(self.image.storage().file.as_fd(), buffers, start..next, at)?;
                    self.fill(cluster, within + length..self.image.cluster_bytes())?;
                    self.image.give(cluster)?;
                    length
                }
            };
            start = start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
            offset = offset.saturating_add(length);
        }
        Ok(())
    }

    /// Puts what the disk holds there so far into bytes `range` of a new cluster.
    fn fill(&mut self, cluster: NewCluster, range: Range<u64>) -> Result<(), qcow2::Error> {
        let length = range.end.saturating_sub(range.start);
        let at = cluster.at.saturating_add(range.start);
        if length == 0 {
            return Ok(());
        }
        if cluster.old != Place::Below {
            return if cluster.is_zeros { Ok(()) } else { Ok(self.image.storage().zero(at, length)?) };
        }
        // A cluster, so at most 2 MiB.
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        if let Some((below, size_bytes)) = &mut self.below {
            let from = cluster.disk_at.saturating_add(range.start);
            let there = usize::try_from(size_bytes.saturating_sub(from)).unwrap_or(usize::MAX);
            let there = there.min(bytes.len());
            below.read_bytes(bytes.get_mut(..there).unwrap_or(&mut []), from)?;
        }
        Ok(self.image.storage().write(at, &bytes)?)
    }

    fn clear(&mut self, range: Clear) -> Result<(), qcow2::Error> {
        let cluster_bytes = self.image.cluster_bytes();
        let (mut offset, mut left) = (range.offset, range.length);
        while left > 0 {
            let within = offset % cluster_bytes;
            let length = left.min(cluster_bytes - within);
            // The last cluster of a disk may be shorter, and what is behind its end nobody sees.
            let whole = length == cluster_bytes;
            if !(whole && range.gives_back && self.image.discard(offset)?) {
                self.write_zeros(offset, length)?;
            }
            (offset, left) = (offset.saturating_add(length), left - length);
        }
        Ok(())
    }

    /// Zeros within a cluster.
    fn write_zeros(&mut self, offset: u64, length: u64) -> Result<(), qcow2::Error> {
        if self.image.look_up(offset, length)? == (Extent { place: Place::Zeros, length }) {
            return Ok(());
        }
        match self.image.target(offset, length)? {
            Target::Ready { at, length } => Ok(self.image.storage().zero(at, length)?),
            Target::New(cluster) => {
                let within = offset - cluster.disk_at;
                self.image.storage().allowed(cluster.at, self.image.cluster_bytes())?;
                self.fill(cluster, 0..within)?;
                if !cluster.is_zeros {
                    self.image.storage().zero(cluster.at.saturating_add(within), length)?;
                }
                self.fill(cluster, within + length..self.image.cluster_bytes())?;
                self.image.give(cluster)
            }
        }
    }
}

impl Store {
    /// As [`Store::read`], into memory of this process.
    fn read_bytes(&mut self, into: &mut [u8], offset: u64) -> Result<(), qcow2::Error> {
        let layered = match self {
            Self::Raw(file) => return Ok(read_file(file, into, offset)?),
            Self::Qcow2(layered) => layered,
        };
        let (mut rest, mut offset) = (into, offset);
        while !rest.is_empty() {
            let Extent { place, length } = layered.image.look_up(offset, rest.len() as u64)?;
            let length_here = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let (part, tail) = rest.split_at_mut(length_here);
            part.fill(0);
            match (place, &mut layered.below) {
                (Place::At(at), _) => layered.image.storage().read(at, part)?,
                (Place::Below, Some((below, size_bytes))) => {
                    let there = usize::try_from(size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
                    let there = there.min(part.len());
                    below.read_bytes(part.get_mut(..there).unwrap_or(&mut []), offset)?;
                }
                _ => {}
            }
            (rest, offset) = (tail, offset.saturating_add(length));
        }
        Ok(())
    }
}

fn below_failed() -> qcow2::Error {
    qcow2::Error::Io(io::Error::other("the image under it cannot be read"))
}

fn zero(buffers: &Buffers<'_>, range: Range<usize>) -> Result<(), qcow2::Error> {
    if buffers.zero(range) { Ok(()) } else { Err(io::Error::from(io::ErrorKind::InvalidInput).into()) }
}

/// As [`read_at`], but what is behind the file's end is zeros.
fn read_or_zero(
    file: &File,
    buffers: &Buffers<'_>,
    range: Range<usize>,
    at: u64,
) -> Result<(), qcow2::Error> {
    let read = read_at_most(file.as_fd(), buffers, range.clone(), at)?;
    zero(buffers, range.start.saturating_add(read)..range.end)
}

/// Fills `into`; what is behind the file's end is zeros.
fn read_file(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    let (mut rest, mut at) = (into, at);
    while !rest.is_empty() {
        match preadv(file, &mut [IoSliceMut::new(rest)], at) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(read) => {
                rest = rest.get_mut(read..).unwrap_or_default();
                at = at.saturating_add(read as u64);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// An image's file.
#[derive(Debug)]
pub(super) struct ImageFile {
    file: File,
    file_bytes_max: u64,
}

impl ImageFile {
    /// What an image says must not make its file longer than it may be: the process would be ended for it.
    fn allowed(&self, at: u64, length: u64) -> io::Result<()> {
        let end = at.checked_add(length).filter(|end| *end <= self.file_bytes_max);
        end.map(drop).ok_or_else(|| Errno::FBIG.into())
    }
}

impl Storage for ImageFile {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        if i64::try_from(at).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        read_file(&self.file, into, at)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.allowed(at, from.len() as u64)?;
        let (mut rest, mut at) = (from, at);
        while !rest.is_empty() {
            match pwritev(&self.file, &[IoSlice::new(rest)], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    at = at.saturating_add(written as u64);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        self.allowed(at, length)?;
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length) {
            Err(Errno::OPNOTSUPP | Errno::INVAL) => {}
            result => return Ok(result?),
        }
        static ZEROS: [u8; 65536] = [0; 65536];
        let mut done = 0;
        while done < length {
            let part = (length - done).min(ZEROS.len() as u64);
            self.write(at + done, ZEROS.get(..part as usize).unwrap_or(&ZEROS))?;
            done += part;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
