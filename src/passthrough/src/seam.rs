//! What is asked of the kernel about one function.

use std::{io, ops::Range, sync::Arc};

use vfio_bindings::bindings::vfio::VFIO_IRQ_INFO_NORESIZE;
use vmm_sys_util::eventfd::EventFd;

/// A region of a VFIO device: a BAR, the ROM, or configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 when the device doesn't have it.
    pub size: u64,
    /// Where it begins in the device's file.
    pub offset: u64,
    /// The kernel lets it be read.
    pub readable: bool,
    /// The kernel lets it be written.
    pub writable: bool,
    /// The parts that can be mapped, as offsets within the region; empty when none can.
    pub mappable: Vec<Range<u64>>,
}

/// A kind of interrupt of a VFIO device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many the device has.
    pub count: u32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
}

impl IrqInfo {
    /// Whether vectors can be added while others are on (Linux 6.5, for MSI-X).
    pub fn is_dynamic(self) -> bool {
        self.flags & VFIO_IRQ_INFO_NORESIZE == 0
    }
}

/// What the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// An ioctl failed.
    #[error("{request} failed: {source}")]
    Ioctl {
        /// Its name in `linux/vfio.h`.
        request: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// A region could not be read or written.
    #[error("{bytes} bytes at {offset:#x} of region {index} could not be accessed: {source}")]
    Access {
        /// Region index.
        index: u32,
        /// Offset within the region.
        offset: u64,
        /// Bytes wanted.
        bytes: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// There is no such region, or the access leaves it.
    #[error("there is nothing at {offset:#x} of region {index}")]
    OutOfRange {
        /// Region index.
        index: u32,
        /// Offset within the region.
        offset: u64,
    },
    /// The host has fewer interrupt vectors left than the device wants.
    #[error("the device wants {wanted} interrupt vectors, and the host has {available} left")]
    Vectors {
        /// Asked for.
        wanted: usize,
        /// What the kernel offers.
        available: usize,
    },
    /// The kernel speaks another VFIO than this, or describes itself in a way that can't be.
    #[error("{0}")]
    Unexpected(String),
}

/// Interrupts that are messages. VFIO takes one kind at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VectorKind {
    /// Address and data in configuration space.
    Msi,
    /// Address and data in a table.
    Msix,
}

/// One function's device file. An error here is told to nobody else: who implements this decides whether it stops the
/// guest; the guest reads all ones.
pub trait Vfio: Send {
    /// Region `index` (`VFIO_PCI_*_REGION_INDEX`).
    ///
    /// # Errors
    /// When the kernel doesn't know the index.
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError>;
    /// Reads from a region; all of `data` or an error.
    ///
    /// # Errors
    /// When the kernel refuses or the region ends before.
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError>;
    /// Writes to a region; all of `data` or an error.
    ///
    /// # Errors
    /// When the kernel refuses or the region ends before.
    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError>;
    /// Interrupts of kind `index` (`VFIO_PCI_*_IRQ_INDEX`).
    ///
    /// # Errors
    /// When the kernel doesn't know the index.
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError>;
    /// Turns the first `count` vectors on at the device, and no others: vector `n` triggers the `n`th eventfd. With a count
    /// of 0, turns them off, if they are on.
    ///
    /// # Errors
    /// When the kernel refuses, or has fewer vectors or eventfds than that; they are off then.
    fn set_vectors(
        &mut self,
        kind: VectorKind,
        triggers: &Arc<[EventFd]>,
        count: u16,
    ) -> Result<(), VfioError>;
    /// Turns one more vector of MSI-X on, which is on already, where the kernel can (`VFIO_IRQ_INFO_NORESIZE` is clear).
    ///
    /// # Errors
    /// When the kernel refuses or has no vector left; the others are as they were.
    fn add_vector(&mut self, vector: u16, triggers: &Arc<[EventFd]>) -> Result<(), VfioError>;
    /// Resets the function by the best method that the kernel has for it.
    ///
    /// # Errors
    /// When the kernel's reset did not succeed, or there is no method.
    fn reset(&mut self) -> Result<(), VfioError>;
}

impl<T: Vfio + ?Sized> Vfio for Box<T> {
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError> {
        (**self).region_info(index)
    }
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        (**self).region_read(index, offset, data)
    }
    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        (**self).region_write(index, offset, data)
    }
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError> {
        (**self).irq_info(index)
    }
    fn set_vectors(
        &mut self,
        kind: VectorKind,
        triggers: &Arc<[EventFd]>,
        count: u16,
    ) -> Result<(), VfioError> {
        (**self).set_vectors(kind, triggers, count)
    }
    fn add_vector(&mut self, vector: u16, triggers: &Arc<[EventFd]>) -> Result<(), VfioError> {
        (**self).add_vector(vector, triggers)
    }
    fn reset(&mut self) -> Result<(), VfioError> {
        (**self).reset()
    }
}
