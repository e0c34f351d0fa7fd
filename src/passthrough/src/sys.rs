//! The ioctls themselves, and the one argument form that VFIO uses: bytes that begin with their own length.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_info_cap_header, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use crate::seam::VfioError;

/// More than any kernel says about a region or an IOMMU.
const ARGUMENT_BYTES_MAX: usize = 64 << 10;

/// A request whose argument, if any, is an [`Argument`]. The kernel touches no memory of the process but that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    name: &'static str,
    number: u32,
}

impl Request {
    pub(crate) const GET_API_VERSION: Self = Self { name: "VFIO_GET_API_VERSION", number: 0 };
    pub(crate) const DEVICE_GET_INFO: Self = Self { name: "VFIO_DEVICE_GET_INFO", number: 7 };
    pub(crate) const DEVICE_GET_REGION_INFO: Self = Self { name: "VFIO_DEVICE_GET_REGION_INFO", number: 8 };
    pub(crate) const DEVICE_GET_IRQ_INFO: Self = Self { name: "VFIO_DEVICE_GET_IRQ_INFO", number: 9 };
    pub(crate) const DEVICE_SET_IRQS: Self = Self { name: "VFIO_DEVICE_SET_IRQS", number: 10 };
    pub(crate) const DEVICE_RESET: Self = Self { name: "VFIO_DEVICE_RESET", number: 11 };
    pub(crate) const IOMMU_GET_INFO: Self = Self { name: "VFIO_IOMMU_GET_INFO", number: 12 };
    /// Not for [`argument`]: the kernel pins memory that the argument names.
    const IOMMU_MAP_DMA: Self = Self { name: "VFIO_IOMMU_MAP_DMA", number: 13 };
    const IOMMU_UNMAP_DMA: Self = Self { name: "VFIO_IOMMU_UNMAP_DMA", number: 14 };

    /// `_IO(VFIO_TYPE, VFIO_BASE + number)`: VFIO's requests say neither direction nor size.
    fn code(self) -> libc::Ioctl {
        // Below 65536; the C library says of what type it is.
        (u32::from(VFIO_TYPE) << 8 | (VFIO_BASE + self.number)) as libc::Ioctl
    }

    fn result(self, returned: libc::c_int) -> Result<u32, VfioError> {
        u32::try_from(returned)
            .map_err(|_| VfioError::Ioctl { request: self.name, source: io::Error::last_os_error() })
    }
}

/// The bytes of a request: `argsz`, which is their number, then the request's own fields in the machine's byte order.
#[derive(Clone, Debug)]
pub(crate) struct Argument(Vec<u8>);

impl Argument {
    /// All zero but for `argsz`. `size` is at least 4 and at most [`ARGUMENT_BYTES_MAX`] in every use.
    pub(crate) fn new(size: usize) -> Self {
        let mut argument = Self(vec![0; size]);
        argument.set_u32(0, u32::try_from(size).unwrap_or(0));
        argument
    }

    #[cfg(test)]
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Stores at byte `at`; what lies past the end is left out.
    pub(crate) fn set_u32(&mut self, at: usize, value: u32) {
        if let Some(bytes) = self.0.get_mut(at..at.saturating_add(4)) {
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
    }

    /// The 32 bits at byte `at`; `None` past the end.
    pub(crate) fn u32(&self, at: usize) -> Option<u32> {
        self.0.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// The 64 bits at byte `at`; `None` past the end.
    pub(crate) fn u64(&self, at: usize) -> Option<u64> {
        self.0.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_ne_bytes)
    }

    /// Where the capability `id` of an answer begins, its chain beginning at byte `first` (0: there is none). Links
    /// that don't go forward end the walk.
    pub(crate) fn capability(&self, first: u32, id: u32) -> Option<usize> {
        let mut at = usize::try_from(first).ok().filter(|first| *first != 0)?;
        loop {
            // id and version are halves of the first 32 bits.
            if self.u32(at)? & 0xffff == id {
                return Some(at);
            }
            let next =
                usize::try_from(self.u32(at + std::mem::offset_of!(vfio_info_cap_header, next))?).ok()?;
            if next <= at {
                return None;
            }
            at = next;
        }
    }
}

/// Issues a request that takes no argument.
pub(crate) fn plain(fd: BorrowedFd<'_>, request: Request) -> Result<u32, VfioError> {
    // SAFETY: the descriptor is open for the length of the call (it is borrowed), and the requests used without an
    // argument (GET_API_VERSION, RESET) read and write no memory of the process.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request.code(), 0) };
    request.result(returned)
}

/// Issues a request on `argument`, which the kernel may change, but for mapping memory.
pub(crate) fn argument(
    fd: BorrowedFd<'_>,
    request: Request,
    argument: &mut Argument,
) -> Result<u32, VfioError> {
    debug_assert_ne!(request.number, Request::IOMMU_MAP_DMA.number);
    // SAFETY: the descriptor is open for the length of the call (it is borrowed). The pointer is to bytes that this
    // call alone may touch (`&mut`), and their number is in `argsz`, which `Argument::new` has set and beyond which
    // VFIO doesn't read or write; each request fails with EINVAL when that is less than it needs. No request given
    // here names other memory. With another kind of descriptor, an ioctl of VFIO's type fails with ENOTTY.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request.code(), argument.0.as_mut_ptr()) };
    request.result(returned)
}

/// Issues a request that answers into an argument of at least `size` bytes with `fields` set (byte and value), once
/// more with as much room as the kernel then asks for.
pub(crate) fn query(
    fd: BorrowedFd<'_>,
    request: Request,
    size: usize,
    fields: &[(usize, u32)],
) -> Result<Argument, VfioError> {
    let mut room = size;
    loop {
        let mut answer = Argument::new(room);
        for (at, value) in fields {
            answer.set_u32(*at, *value);
        }
        argument(fd, request, &mut answer)?;
        let wanted = answer.u32(0).and_then(|wanted| usize::try_from(wanted).ok()).unwrap_or(0);
        if wanted <= room {
            return Ok(answer);
        }
        if room != size || wanted > ARGUMENT_BYTES_MAX {
            let problem = format!("{} wants {wanted} bytes after {room}", request.name);
            return Err(VfioError::Unexpected(problem));
        }
        room = wanted;
    }
}

/// Lets devices of a container reach memory of the process.
///
/// # Safety
/// `map.vaddr` to `map.vaddr + map.size` must be memory that devices may read (and, with the flag, write) at any time
/// until it is unmapped from the IOMMU: no reference of Rust's to it may exist in that time, and it may not be
/// unmapped from the process and used for something else.
pub(crate) unsafe fn map_dma(fd: BorrowedFd<'_>, map: &vfio_iommu_type1_dma_map) -> Result<(), VfioError> {
    let request = Request::IOMMU_MAP_DMA;
    // SAFETY: the descriptor is open for the length of the call, the pointer is to a whole structure that the kernel
    // only reads, and the caller vouches for the memory that it names.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request.code(), std::ptr::from_ref(map)) };
    request.result(returned).map(drop)
}

/// Takes back what was mapped between two addresses of the devices'; `unmap.size` says then how much it was.
pub(crate) fn unmap_dma(fd: BorrowedFd<'_>, unmap: &mut vfio_iommu_type1_dma_unmap) -> Result<(), VfioError> {
    let request = Request::IOMMU_UNMAP_DMA;
    // SAFETY: the descriptor is open for the length of the call, and the pointer is to a whole structure that this
    // call alone may touch. Without the dirty bitmap flag, which no caller sets, no data follows it.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request.code(), std::ptr::from_mut(unmap)) };
    request.result(returned).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        // linux/vfio.h: VFIO_DEVICE_RESET is _IO(';', 100 + 11).
        assert_eq!(Request::DEVICE_RESET.code(), 0x3b6f);
        assert_eq!(Request::IOMMU_MAP_DMA.code(), 0x3b71);
    }

    #[test]
    fn another_descriptor_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let refused = plain(std::os::fd::AsFd::as_fd(&null), Request::DEVICE_RESET).unwrap_err();
        assert!(refused.to_string().starts_with("VFIO_DEVICE_RESET failed: "), "{refused}");
    }

    proptest! {
        #[test]
        fn a_chain_of_anything_ends(bytes in proptest::collection::vec(0u8..40, 0..64), first in 0u32..80, id in 0u32..40) {
            let argument = Argument::from_bytes(bytes);
            if let Some(at) = argument.capability(first, id) {
                prop_assert_eq!(argument.u32(at).unwrap() & 0xffff, id);
            }
        }
    }
}
