//! What a virtio device is to its transport and to its worker.

use std::{os::fd::BorrowedFd, sync::Arc};

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_RNG, VIRTIO_ID_VSOCK,
};
use vm_memory::GuestMemoryError;
use vmm_sys_util::eventfd::EventFd;

use crate::{active::Active, device_config::DeviceConfig};

/// The kinds of devices (virtio 1.3, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Network card.
    Net,
    /// Block device.
    Block,
    /// Entropy source.
    Entropy,
    /// Memory balloon.
    Balloon,
    /// Sockets.
    Vsock,
    /// Console.
    Console,
}

impl Kind {
    /// The virtio device id.
    pub fn id(self) -> u16 {
        let id = match self {
            Self::Net => VIRTIO_ID_NET,
            Self::Block => VIRTIO_ID_BLOCK,
            Self::Entropy => VIRTIO_ID_RNG,
            Self::Balloon => VIRTIO_ID_BALLOON,
            Self::Vsock => VIRTIO_ID_VSOCK,
            Self::Console => VIRTIO_ID_CONSOLE,
        };
        // All ids are small.
        id as u16
    }

    /// The PCI class code: class, subclass, interface.
    pub(crate) fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Entropy | Self::Balloon => 0xff_00_00,
            // As QEMU has it: another kind of communication.
            Self::Vsock | Self::Console => 0x07_80_00,
        }
    }

    /// Name of the device and of its worker's thread.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "virtio-net",
            Self::Block => "virtio-blk",
            Self::Entropy => "virtio-rng",
            Self::Balloon => "virtio-balloon",
            Self::Vsock => "virtio-vsock",
            Self::Console => "virtio-console",
        }
    }
}

/// A virtio device. The first four methods describe it and are asked once, before its thread starts; the others
/// run on that thread, and only while the driver has the device active.
pub trait Device: Send {
    /// What it is.
    fn kind(&self) -> Kind;
    /// The device's own feature bits (0 to 23); those of queues and transport are the transport's to offer.
    fn features(&self) -> u64;
    /// The largest size of each queue: powers of two, 1 to 32768.
    fn queue_sizes(&self) -> &[u16];
    /// The device-specific configuration, which no driver can write.
    fn config(&self) -> &[u8];
    /// The same for a device whose configuration changes while it runs, or that lets the driver write to it: shared with the
    /// transport.
    fn changing_config(&self) -> Option<Arc<DeviceConfig>> {
        None
    }
    /// Descriptors whose readiness to be read is a [`Device::backend_ready`]: always the same.
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Descriptors whose readiness to be written to is a [`Device::backend_ready`], numbered behind the backends: always the same.
    fn sinks(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// What it stores to has so many bytes from now on. Runs on the device's thread, active or not; the driver is told
    /// afterwards.
    fn resize(&mut self, _size_bytes: u64) {}

    /// Takes the doorbells, one a queue, when somebody else is to hear them as well. Asked once, before its thread starts.
    fn take_doorbells(&mut self, _doorbells: &Arc<[EventFd]>) {}

    /// Whether the doorbell of a queue is a [`Device::queue_ready`]. Asked once, before its thread starts.
    fn hears(&self, _index: usize) -> bool {
        true
    }

    /// The driver has made the device active.
    ///
    /// # Errors
    /// When the device cannot be what was negotiated.
    fn activate(&mut self, _active: &mut Active) -> Result<(), Fault> {
        Ok(())
    }

    /// The driver made buffers available in queue `index`, perhaps.
    ///
    /// # Errors
    /// When the driver broke the rules; the device is then stopped until reset.
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault>;

    /// Whether some of what the driver was told is done is only in this process's memory, until [`Device::finish`].
    fn holds_back(&self) -> bool {
        false
    }

    /// Writes what it holds back.
    fn finish(&mut self) {}

    /// Ends, one way or the other, all that the device still does with the driver's memory; returns when that is so.
    /// Called before the memory is taken away.
    fn quiesce(&mut self) {}

    /// The backend of this number has something to read, perhaps.
    ///
    /// # Errors
    /// As for [`Device::queue_ready`].
    fn backend_ready(&mut self, _active: &mut Active, _backend: usize) -> Result<Progress, Fault> {
        Ok(Progress::Idle)
    }
}

/// How a turn of work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing to do until the next event.
    Idle,
    /// Its share is used up and there may be more; to be called again after the others had their turn.
    More,
}

/// A rule that the driver broke; the device needs a reset.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The ring itself.
    #[error("the ring is broken: {0}")]
    Ring(&'static str),
    /// A chain of descriptors.
    #[error("a descriptor chain {0}")]
    Chain(&'static str),
    /// A buffer that is not in memory.
    #[error("a buffer is not in memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// A request that cannot even be answered with an error.
    #[error("a request {0}")]
    Request(&'static str),
    /// A queue that was enabled with a size or addresses that cannot be.
    #[error("queue {0} lies outside memory, or is not aligned")]
    Queue(usize),
    /// The host's part of the device.
    #[error("the host cannot go on with the device: {0}")]
    Host(std::io::Error),
    /// The worker's thread is not there.
    #[error("the device's thread has ended")]
    Worker,
}

/// Why a device cannot be made of what it was given.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk that cannot be told in sectors.
    #[error("a disk of {0} bytes; the size must be a multiple of 512 and not 0")]
    DiskSize(u64),
    /// More or fewer queues than a disk can have.
    #[error("a disk with {0} queues; it has 1 to {most}", most = crate::blk::QUEUES_MAX)]
    DiskQueues(u16),
    /// More or fewer queues than a network card can have, or not as many of the kernel's.
    #[error("a network card with {0} pairs of queues; it has 1 to {most}", most = crate::net::PAIRS_MAX)]
    NetQueues(usize),
    /// The kernel does not serve queues of a network card.
    #[error("the kernel cannot serve the card: {0}")]
    Vhost(std::io::Error),
    /// An image that cannot be a disk.
    #[error(transparent)]
    DiskFormat(#[from] crate::qcow2::FormatError),
}
