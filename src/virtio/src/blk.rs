//! The block device (virtio 1.3, 5.2) over a raw file or block device.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::{
    active::Active,
    counters::Counters,
    device::{Device, DeviceError, Fault, Kind, Progress},
    request::Request,
    vectored::{read_at, write_at},
};

const SECTOR_BYTES: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data descriptors of one request: the queue's, less header and status.
const SEGMENTS_MAX: u16 = QUEUE_SIZE - 2;
/// Bytes of one data descriptor, which the driver is told.
const SEGMENT_MAX_BYTES: u32 = 1 << 20;
/// So the most that one request can ask, and the driver cannot reach past it honestly.
const REQUEST_MAX_BYTES: usize = SEGMENTS_MAX as usize * SEGMENT_MAX_BYTES as usize;
/// Ranges of one discard or write-zeroes request.
const RANGES_MAX: usize = 32;
/// `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;
/// Sectors of one range, 2 GiB: what a file system gives back at once without holding up the disk for long.
const RANGE_MAX_SECTORS: u32 = 4 << 20;
const HEADER_BYTES: usize = 16;
const SERIAL_BYTES: usize = 20;
/// Requests handled before the worker looks for other events.
const BUDGET: usize = 16;

/// What a [`Blk`] stores to.
#[derive(Debug)]
pub struct BlkBackend {
    /// A regular file or block device, open for reading, and for writing unless `read_only`.
    pub file: OwnedFd,
    /// Size of the disk, which the file must have: a multiple of 512, not 0.
    pub size_bytes: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest knows the disk by, cut to 20 bytes.
    pub serial: String,
}

/// A disk. Requests are done one after the other, straight between file and guest memory.
#[derive(Debug)]
pub struct Blk {
    disk: Disk,
    config: Vec<u8>,
}

#[derive(Debug)]
struct Disk {
    file: File,
    size_bytes: u64,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
}

/// How a request ended, other than well.
enum Failure {
    Io,
    Unsupported,
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        // The driver then does without: it zeroes by writing, and no longer discards. A block device of larger sectors
        // says EINVAL to ranges that are in bounds and not whole ones.
        if matches!(error, Errno::OPNOTSUPP | Errno::INVAL) { Self::Unsupported } else { Self::Io }
    }
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl Blk {
    /// A disk over `backend`.
    ///
    /// # Errors
    /// [`DeviceError::DiskSize`] when the size is not a multiple of 512 or is 0.
    pub fn new(backend: BlkBackend) -> Result<Self, DeviceError> {
        let size_bytes = backend.size_bytes;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DeviceError::DiskSize(size_bytes));
        }
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(backend.serial.bytes()) {
            *to = from;
        }
        // struct virtio_blk_config up to write_zeroes_may_unmap: capacity, size_max, seg_max, geometry, blk_size,
        // topology to num_queues (not offered), what a discard may have, what a write-zeroes may have.
        let config = [
            &(size_bytes / SECTOR_BYTES).to_le_bytes()[..],
            &SEGMENT_MAX_BYTES.to_le_bytes(),
            &u32::from(SEGMENTS_MAX).to_le_bytes(),
            &[0; 4],
            &(SECTOR_BYTES as u32).to_le_bytes(),
            &[0; 12],
            &RANGE_MAX_SECTORS.to_le_bytes(),
            &(RANGES_MAX as u32).to_le_bytes(),
            &1u32.to_le_bytes(),
            &RANGE_MAX_SECTORS.to_le_bytes(),
            &(RANGES_MAX as u32).to_le_bytes(),
            &[1, 0, 0, 0],
        ]
        .concat();
        let disk = Disk { file: backend.file.into(), size_bytes, read_only: backend.read_only, serial };
        Ok(Self { disk, config })
    }
}

impl Device for Blk {
    fn kind(&self) -> Kind {
        Kind::Block
    }
    fn features(&self) -> u64 {
        let clearing = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        let kind = if self.disk.read_only { 1 << VIRTIO_BLK_F_RO } else { clearing };
        kind | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn resize(&mut self, size_bytes: u64) {
        self.disk.size_bytes = size_bytes;
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        // A driver that cannot flush is promised that what is written is kept (5.2.6.2).
        let write_through = !active.has_feature(VIRTIO_BLK_F_FLUSH);
        let counters = Arc::clone(active.counters());
        active.serve(index, BUDGET, |request| self.disk.answer(request, write_through, &counters).map(Some))
    }
}

impl Disk {
    /// Does `request`, writes its status, and returns the number of bytes written.
    fn answer(&self, request: &Request<'_>, write_through: bool, counters: &Counters) -> Result<u32, Fault> {
        let Some(status_at) = request.writable.bytes().checked_sub(1) else {
            return Err(Fault::Request("has no room for its status"));
        };
        let mut header = [0; HEADER_BYTES];
        if !request.readable.read(0, &mut header) {
            return Err(Fault::Request("has no header"));
        }
        let (status, written) = match self.execute(&header, request, status_at, write_through) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        if status != VIRTIO_BLK_S_OK {
            counters.error();
        }
        if !request.writable.write(status_at, &[status as u8]) {
            return Err(Fault::Request("has no room for its status"));
        }
        Ok(u32::try_from(written).unwrap_or(0).saturating_add(1))
    }

    /// Returns the number of bytes written to the request's data buffers, which are `room` bytes.
    fn execute(
        &self,
        header: &[u8; HEADER_BYTES],
        request: &Request<'_>,
        room: usize,
        write_through: bool,
    ) -> Result<usize, Failure> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                let offset = self.offset(sector, room)?;
                read_at(self.file.as_fd(), &request.writable, 0..room, offset)?;
                Ok(room)
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => {
                Err(Failure::Io)
            }
            VIRTIO_BLK_T_OUT => {
                let data = HEADER_BYTES..request.readable.bytes();
                let offset = self.offset(sector, data.len())?;
                write_at(self.file.as_fd(), &request.readable, data, offset)?;
                if write_through {
                    self.file.sync_data()?;
                }
                Ok(0)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                self.clear(request, kind == VIRTIO_BLK_T_DISCARD)?;
                if write_through {
                    self.file.sync_data()?;
                }
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.file.sync_data()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let serial = self.serial.get(..room.min(SERIAL_BYTES)).unwrap_or(&[]);
                if request.writable.write(0, serial) { Ok(serial.len()) } else { Err(Failure::Io) }
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Discards, or fills with zeros, the ranges that the request names (virtio 1.3, 5.2.6). All are checked before the
    /// first is touched.
    fn clear(&self, request: &Request<'_>, discard: bool) -> Result<(), Failure> {
        let length = request.readable.bytes().checked_sub(HEADER_BYTES).ok_or(Failure::Io)?;
        let mut data = [0; RANGES_MAX * RANGE_BYTES];
        let data = data.get_mut(..length).filter(|data| !data.is_empty()).ok_or(Failure::Io)?;
        if !length.is_multiple_of(RANGE_BYTES) || !request.readable.read(HEADER_BYTES, data) {
            return Err(Failure::Io);
        }
        let (ranges, _) = data.as_chunks::<RANGE_BYTES>();
        let ranges = ranges.iter().map(|range| self.range(range, discard));
        for (offset, length, mode) in ranges.collect::<Result<Vec<_>, _>>()? {
            if length > 0 {
                fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, length)?;
            }
        }
        Ok(())
    }

    /// Offset and length in the file of one range, and how it is cleared.
    fn range(&self, range: &[u8; RANGE_BYTES], discard: bool) -> Result<(u64, u64, FallocateFlags), Failure> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *range;
        let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
        let mode = match (discard, flags) {
            (true, 0) | (false, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => FallocateFlags::PUNCH_HOLE,
            (false, 0) => FallocateFlags::ZERO_RANGE,
            // 5.2.6.2: a flag that does not belong to the request, or that nobody knows.
            _ => return Err(Failure::Unsupported),
        };
        let length = u64::from(sectors) * SECTOR_BYTES;
        let start = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]).checked_mul(SECTOR_BYTES);
        let start = start.filter(|start| {
            start
                .checked_add(length)
                .is_some_and(|end| end <= self.size_bytes && sectors <= RANGE_MAX_SECTORS)
        });
        Ok((start.ok_or(Failure::Io)?, length, mode))
    }

    /// Where in the file `length` bytes from `sector` on are.
    fn offset(&self, sector: u64, length: usize) -> Result<u64, Failure> {
        let bytes = length as u64;
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let end = start.checked_add(bytes).ok_or(Failure::Io)?;
        let fits =
            end <= self.size_bytes && bytes.is_multiple_of(SECTOR_BYTES) && length <= REQUEST_MAX_BYTES;
        if fits { Ok(start) } else { Err(Failure::Io) }
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
