//! Memory of this process that a device reaches, by VFIO's type1 container (linux/vfio.h).

use std::{
    io,
    os::fd::OwnedFd,
    ptr::{self, NonNull},
    sync::atomic::{Ordering, fence},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
};
use vmm_sys_util::ioctl_io_nr;

use super::{ioctl_in, ioctl_in_out};

ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

/// `VFIO_DMA_UNMAP_FLAG_ALL`, Linux 5.12.
const UNMAP_ALL: u32 = 1 << 1;

/// Pages that are mapped for all devices of a container, until this is dropped.
pub(crate) struct DmaArea<'a> {
    container: &'a OwnedFd,
    start: NonNull<u8>,
    length: usize,
    address: u64,
}

impl<'a> DmaArea<'a> {
    /// Zeroed memory of whole pages, which devices find at `address`.
    pub(crate) fn map(container: &'a OwnedFd, address: u64, length: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        // A child that is forked meanwhile would leave this process with copies of pages, and the device with the pages.
        // SAFETY: the range is the mapping; it stays as it is in this process.
        unsafe { madvise(start.as_ptr().cast(), length, Advice::LinuxDontFork) }?;
        let area = Self { container, start, length, address };
        let map = vfio_iommu_type1_dma_map {
            argsz: u32::try_from(size_of::<vfio_iommu_type1_dma_map>()).unwrap_or(0),
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: start.as_ptr().expose_provenance() as u64,
            iova: address,
            size: length as u64,
        };
        // SAFETY: VFIO_IOMMU_MAP_DMA reads a vfio_iommu_type1_dma_map, and pins the memory that it names: this mapping, to which
        // nothing in this process refers but by the volatile accesses below.
        unsafe { ioctl_in(container, VFIO_IOMMU_MAP_DMA(), &map) }?;
        Ok(area)
    }

    /// Where devices find it.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Copies out of it, what lies in it; devices may write meanwhile.
    pub(crate) fn load(&self, at: usize, bytes: &mut [u8]) {
        fence(Ordering::Acquire);
        for (offset, byte) in bytes.iter_mut().enumerate() {
            let Some(place) = self.place(at, offset) else { return };
            // SAFETY: `place` lies within the mapping, which lives as long as this; volatile, since a device writes there too.
            *byte = unsafe { place.read_volatile() };
        }
    }

    /// Copies into it, what lies in it.
    pub(crate) fn store(&self, at: usize, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let Some(place) = self.place(at, offset) else { break };
            // SAFETY: as in `load`.
            unsafe { place.write_volatile(*byte) };
        }
        fence(Ordering::Release);
    }

    fn place(&self, at: usize, offset: usize) -> Option<*mut u8> {
        let place = at.checked_add(offset).filter(|place| *place < self.length)?;
        // SAFETY: it stays within the mapping of `length` bytes.
        Some(unsafe { self.start.as_ptr().add(place) })
    }
}

impl Drop for DmaArea<'_> {
    fn drop(&mut self) {
        // What the kernel would not unmap stays pinned, and must not be given back to the allocator: it's left mapped then.
        if unmap(self.container, 0, self.address, self.length as u64).is_ok() {
            // SAFETY: this process refers to it no more, and no device does.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        }
    }
}

/// Unmaps everything from the container's devices.
pub(crate) fn unmap_all(container: &OwnedFd) -> io::Result<()> {
    unmap(container, UNMAP_ALL, 0, 0)
}

fn unmap(container: &OwnedFd, flags: u32, iova: u64, size: u64) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: u32::try_from(size_of::<vfio_iommu_type1_dma_unmap>()).unwrap_or(0),
        flags,
        iova,
        size,
        ..vfio_iommu_type1_dma_unmap::default()
    };
    // SAFETY: VFIO_IOMMU_UNMAP_DMA reads and writes the front of a vfio_iommu_type1_dma_unmap; nothing lies behind it without
    // the flag that says so.
    unsafe { ioctl_in_out(container, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) }.map(drop)
}
