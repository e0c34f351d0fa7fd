//! The block device (virtio 1.3, 5.2) over a raw file or block device.
//!
//! All queues of a disk are served by its one thread: with a ring, that thread only starts what the kernel does and tells
//! what it has done, and one call does so for the requests of all queues.

mod command;
mod own;
mod patience;
mod ring;
mod store;
mod sync;

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::io::Errno;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_UNSUPP,
};

pub use self::store::{Below, Format};
use self::{
    ring::{NoRing, RingEngine},
    store::Store,
};
use crate::{
    active::Active,
    device::{Device, DeviceError, Fault, Kind, Progress},
    request::Request,
    uring::SpareRing,
};

const SECTOR_BYTES: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Queues that a disk can have.
pub const QUEUES_MAX: u16 = 8;
/// Data descriptors of one request: the queue's, less header and status.
const SEGMENTS_MAX: u16 = QUEUE_SIZE - 2;
/// Bytes of one data descriptor, which the driver is told.
const SEGMENT_MAX_BYTES: u32 = 1 << 20;
/// So the most that one request can ask, and the driver cannot reach past it honestly.
const REQUEST_MAX_BYTES: usize = SEGMENTS_MAX as usize * SEGMENT_MAX_BYTES as usize;
/// Ranges of one discard or write-zeroes request.
const RANGES_MAX: usize = 32;
/// Sectors of one range, 2 GiB: what a file system gives back at once without holding up the disk for long.
const RANGE_MAX_SECTORS: u32 = 4 << 20;
const SERIAL_BYTES: usize = 20;

/// What a [`Blk`] stores to.
#[derive(Debug)]
pub struct BlkBackend {
    /// A regular file or block device, open for reading, and for writing unless `read_only`, without O_NONBLOCK and O_DIRECT.
    pub file: OwnedFd,
    /// The format.
    pub format: Format,
    /// Size of the disk, which the file must have: a multiple of 512, not 0.
    pub size_bytes: u64,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest knows the disk by, cut to 20 bytes.
    pub serial: String,
    /// Queues, 1 to [`QUEUES_MAX`]; one a processor spares these from waiting for each other.
    pub queues: u16,
}

/// A disk.
pub struct Blk {
    disk: Disk,
    engine: Engine,
    config: Vec<u8>,
    queue_sizes: Vec<u16>,
}

/// Who does the requests.
enum Engine {
    Ring(Box<RingEngine>),
    /// With the reason, when a ring was wanted.
    Sync(Store, Option<io::Error>),
}

#[derive(Debug)]
struct Disk {
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

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Io => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

impl Blk {
    /// A disk over `backend`. It works by io_uring where the kernel has one for it, and one request after the other
    /// elsewhere.
    ///
    /// # Errors
    /// [`DeviceError::DiskSize`] when the size is not a multiple of 512 or is 0, [`DeviceError::DiskQueues`],
    /// [`DeviceError::DiskFormat`].
    pub fn new(backend: BlkBackend) -> Result<Self, DeviceError> {
        Self::with(backend, Some(RingEngine::new))
    }

    /// As [`Blk::new`], with the ring that was made for it, where there is one: for a disk that comes while the guest runs,
    /// when nothing may make rings any more.
    ///
    /// # Errors
    /// As for [`Blk::new`].
    pub fn with_spare(backend: BlkBackend, spare: Option<&SpareRing>) -> Result<Self, DeviceError> {
        Self::with(backend, spare.map(|spare| |file| RingEngine::lent(spare, file)))
    }

    fn with(
        backend: BlkBackend,
        ring: Option<impl FnOnce(OwnedFd) -> Result<RingEngine, NoRing>>,
    ) -> Result<Self, DeviceError> {
        let BlkBackend { file, format, size_bytes, read_only, serial: text, queues } = backend;
        let is_raw = matches!(format, Format::Raw);
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DeviceError::DiskSize(size_bytes));
        }
        if !(1..=QUEUES_MAX).contains(&queues) {
            return Err(DeviceError::DiskQueues(queues));
        }
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        let one_by_one = |file, error| -> Result<_, DeviceError> {
            Ok(Engine::Sync(Store::open(file, format, size_bytes, read_only)?, error))
        };
        // Where a qcow2 image has something is known only after its tables were looked at.
        let engine = match ring.filter(|_| is_raw) {
            None => one_by_one(file, None)?,
            Some(ring) => match ring(file) {
                Ok(ring) => Engine::Ring(Box::new(ring)),
                Err(NoRing { file, error }) => one_by_one(file, Some(error))?,
            },
        };
        Ok(Self {
            disk: Disk { size_bytes, read_only, serial },
            engine,
            config: config(size_bytes, queues),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
        })
    }

    /// Why a raw disk does without io_uring, if it does.
    pub fn without_ring(&self) -> Option<&io::Error> {
        match &self.engine {
            Engine::Ring(_) => None,
            Engine::Sync(_, error) => error.as_ref(),
        }
    }

    /// A turn for the queues that have a bit in `queues`.
    fn turn(&mut self, active: &mut Active, queues: u64) -> Result<Progress, Fault> {
        // A driver that cannot flush is promised that what is written is kept (5.2.6.2).
        let write_through = !active.has_feature(VIRTIO_BLK_F_FLUSH);
        match &mut self.engine {
            Engine::Ring(ring) => ring.turn(&self.disk, active, queues, write_through),
            Engine::Sync(store, _) => {
                let index = queues.trailing_zeros() as usize;
                sync::serve(store, &self.disk, active, index, write_through)
            }
        }
    }
}

/// struct virtio_blk_config up to write_zeroes_may_unmap.
fn config(size_bytes: u64, queues: u16) -> Vec<u8> {
    [
        // capacity, size_max, seg_max, geometry
        &(size_bytes / SECTOR_BYTES).to_le_bytes()[..],
        &SEGMENT_MAX_BYTES.to_le_bytes(),
        &u32::from(SEGMENTS_MAX).to_le_bytes(),
        &[0; 4],
        // blk_size; topology and writeback, which are not offered; num_queues
        &(SECTOR_BYTES as u32).to_le_bytes(),
        &[0; 10],
        &queues.to_le_bytes(),
        // what a discard may have, what a write-zeroes may have
        &RANGE_MAX_SECTORS.to_le_bytes(),
        &(RANGES_MAX as u32).to_le_bytes(),
        &1u32.to_le_bytes(),
        &RANGE_MAX_SECTORS.to_le_bytes(),
        &(RANGES_MAX as u32).to_le_bytes(),
        &[1, 0, 0, 0],
    ]
    .concat()
}

impl Device for Blk {
    fn kind(&self) -> Kind {
        Kind::Block
    }
    fn features(&self) -> u64 {
        let clearing = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        let kind = if self.disk.read_only { 1 << VIRTIO_BLK_F_RO } else { clearing };
        let queues = if self.queue_sizes.len() > 1 { 1 << VIRTIO_BLK_F_MQ } else { 0 };
        kind | queues
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn resize(&mut self, size_bytes: u64) {
        self.disk.size_bytes = size_bytes;
    }
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        match &self.engine {
            Engine::Ring(ring) => vec![ring.events()],
            Engine::Sync(..) => Vec::new(),
        }
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        self.turn(active, 1u64.checked_shl(index as u32).unwrap_or(0))
    }
    fn backend_ready(&mut self, active: &mut Active, _backend: usize) -> Result<Progress, Fault> {
        match &self.engine {
            Engine::Ring(_) => self.turn(active, 0),
            Engine::Sync(..) => Ok(Progress::Idle),
        }
    }
    fn holds_back(&self) -> bool {
        matches!(&self.engine, Engine::Sync(store, _) if store.holds_back() && !self.disk.read_only)
    }
    fn finish(&mut self) {
        if let Engine::Sync(store, _) = &mut self.engine {
            // Nobody is left to be told; the log has the image's trouble.
            let _ = store.flush();
        }
    }
    fn quiesce(&mut self) {
        if self.holds_back() {
            self.finish();
        } else if let Engine::Ring(ring) = &mut self.engine {
            ring.quiesce();
        }
    }
}

impl Disk {
    /// Writes the serial number to the request's first `bytes` bytes.
    fn identify(&self, request: &Request<'_>, bytes: usize) -> Result<usize, Failure> {
        let serial = self.serial.get(..bytes.min(SERIAL_BYTES)).unwrap_or(&[]);
        if request.writable.write(0, serial) { Ok(serial.len()) } else { Err(Failure::Io) }
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
