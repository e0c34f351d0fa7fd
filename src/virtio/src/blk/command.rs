//! What a driver asks of a disk (virtio 1.3, 5.2.6): read once, and checked before anything is done.

use std::ops::Range;

use rustix::fs::FallocateFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use super::{Disk, Failure, RANGE_MAX_SECTORS, RANGES_MAX, REQUEST_MAX_BYTES, SECTOR_BYTES};
use crate::{device::Fault, request::Request};

/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;
const HEADER_BYTES: usize = 16;

/// A request, within the disk's bounds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Fill the first `bytes` of the writable buffers from byte `offset` of the disk on.
    Read { offset: u64, bytes: usize },
    /// Store bytes `data` of the readable buffers from byte `offset` of the disk on.
    Write { offset: u64, data: Range<usize> },
    /// Make what was written survive a loss of power.
    Flush,
    /// Make these ranges zeros.
    Clear(Vec<Clear>),
    /// Tell the serial number, in so many bytes at most.
    Identify { bytes: usize },
}

/// A range that is to read as zeros. Its length is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clear {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Whether its room on the host is to be given back (or may be), rather than kept.
    pub(super) gives_back: bool,
}

impl Clear {
    pub(super) fn mode(self) -> FallocateFlags {
        let how = if self.gives_back { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        how | FallocateFlags::KEEP_SIZE
    }
}

/// Where the status of `request` goes: the last byte that the device may write.
///
/// # Errors
/// When there is none.
pub(super) fn status_place(request: &Request<'_>) -> Result<GuestAddress, Fault> {
    request.writable.last().ok_or(Fault::Request("has no room for its status"))
}

impl Command {
    /// Reads `request`.
    ///
    /// # Errors
    /// A fault when it has no header or no room for its status; a failure, which is its status, when it can't be done.
    pub(super) fn read(request: &Request<'_>, disk: &Disk) -> Result<Result<Self, Failure>, Fault> {
        let Some(room) = request.writable.bytes().checked_sub(1) else {
            return Err(Fault::Request("has no room for its status"));
        };
        let mut header = [0; HEADER_BYTES];
        if !request.readable.read(0, &mut header) {
            return Err(Fault::Request("has no header"));
        }
        Ok(Self::parse(&header, request, room, disk))
    }

    fn parse(
        header: &[u8; HEADER_BYTES],
        request: &Request<'_>,
        room: usize,
        disk: &Disk,
    ) -> Result<Self, Failure> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Ok(Self::Read { offset: offset(disk, sector, room)?, bytes: room }),
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
                Err(Failure::Io)
            }
            VIRTIO_BLK_T_OUT => {
                let data = HEADER_BYTES..request.readable.bytes();
                Ok(Self::Write { offset: offset(disk, sector, data.len())?, data })
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                ranges(disk, request, kind == VIRTIO_BLK_T_DISCARD).map(Self::Clear)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Identify { bytes: room }),
            _ => Err(Failure::Unsupported),
        }
    }
}

/// The ranges that the request names (5.2.6). All are good, or none is.
fn ranges(disk: &Disk, request: &Request<'_>, discard: bool) -> Result<Vec<Clear>, Failure> {
    let length = request.readable.bytes().checked_sub(HEADER_BYTES).ok_or(Failure::Io)?;
    let mut data = [0; RANGES_MAX * RANGE_BYTES];
    let data = data.get_mut(..length).filter(|data| !data.is_empty()).ok_or(Failure::Io)?;
    if !length.is_multiple_of(RANGE_BYTES) || !request.readable.read(HEADER_BYTES, data) {
        return Err(Failure::Io);
    }
    let (ranges, _) = data.as_chunks::<RANGE_BYTES>();
    let mut ranges = ranges.iter().map(|one| range(disk, one, discard)).collect::<Result<Vec<_>, _>>()?;
    ranges.retain(|range| range.length > 0);
    Ok(ranges)
}

fn range(disk: &Disk, range: &[u8; RANGE_BYTES], discard: bool) -> Result<Clear, Failure> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *range;
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
    let gives_back = match (discard, flags) {
        (true, 0) | (false, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => true,
        (false, 0) => false,
        // 5.2.6.2: a flag that does not belong to the request, or that nobody knows.
        _ => return Err(Failure::Unsupported),
    };
    let length = u64::from(sectors) * SECTOR_BYTES;
    let start = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_mul(SECTOR_BYTES);
    let start = start.filter(|start| {
        start.checked_add(length).is_some_and(|end| end <= disk.size_bytes && sectors <= RANGE_MAX_SECTORS)
    });
    Ok(Clear { offset: start.ok_or(Failure::Io)?, length, gives_back })
}

/// Where on the disk `length` bytes from `sector` on are.
fn offset(disk: &Disk, sector: u64, length: usize) -> Result<u64, Failure> {
    let bytes = length as u64;
    let start = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
    let end = start.checked_add(bytes).ok_or(Failure::Io)?;
    let fits = end <= disk.size_bytes && bytes.is_multiple_of(SECTOR_BYTES) && length <= REQUEST_MAX_BYTES;
    if fits { Ok(start) } else { Err(Failure::Io) }
}
