//! The block device (virtio 1.3, 5.2) over a raw file or block device.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::{
    active::Active,
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
        // struct virtio_blk_config up to blk_size: capacity, size_max, seg_max, geometry, blk_size.
        let config = [
            &(size_bytes / SECTOR_BYTES).to_le_bytes()[..],
            &SEGMENT_MAX_BYTES.to_le_bytes(),
            &u32::from(SEGMENTS_MAX).to_le_bytes(),
            &[0; 4],
            &(SECTOR_BYTES as u32).to_le_bytes(),
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
        let read_only = u64::from(self.disk.read_only) << VIRTIO_BLK_F_RO;
        read_only
            | 1 << VIRTIO_BLK_F_SIZE_MAX
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
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        // A driver that cannot flush is promised that what is written is kept (5.2.6.2).
        let write_through = !active.has_feature(VIRTIO_BLK_F_FLUSH);
        active.serve(index, BUDGET, |request| self.disk.answer(request, write_through).map(Some))
    }
}

impl Disk {
    /// Does `request`, writes its status, and returns the number of bytes written.
    fn answer(&self, request: &Request<'_>, write_through: bool) -> Result<u32, Fault> {
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
            VIRTIO_BLK_T_OUT if self.read_only => Err(Failure::Io),
            VIRTIO_BLK_T_OUT => {
                let data = HEADER_BYTES..request.readable.bytes();
                let offset = self.offset(sector, data.len())?;
                write_at(self.file.as_fd(), &request.readable, data, offset)?;
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
