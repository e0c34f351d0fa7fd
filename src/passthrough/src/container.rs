//! A VFIO container of type 1: the memory that the devices of one guest reach.

use std::{
    mem::{offset_of, size_of},
    ops::RangeInclusive,
    os::fd::{AsFd, OwnedFd},
};

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
    vfio_iommu_type1_info_cap_iova_range, vfio_iommu_type1_info_dma_avail, vfio_iova_range,
};

use crate::{
    seam::VfioError,
    sys::{self, Argument, Request},
};

/// Memory of the process that devices are to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingRequest {
    /// The first address as the devices say it: guest-physical.
    pub iova: u64,
    /// The first address of the process. Like `iova` and `size_bytes`, a multiple of the IOMMU's smallest page.
    pub host_address: usize,
    /// How much.
    pub size_bytes: u64,
    /// Devices may read it.
    pub readable: bool,
    /// Devices may write it.
    pub writable: bool,
}

/// What the container's IOMMU can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IommuInfo {
    /// A bit for each size of page, in bytes.
    pub page_sizes: u64,
    /// The addresses that devices can use. Empty when the kernel doesn't say (before 5.4).
    pub iova_ranges: Vec<RangeInclusive<u64>>,
    /// How many more mappings the kernel allows; `None` when it doesn't say (before 5.10).
    pub mappings_available: Option<u32>,
}

/// A container to which groups were added and an IOMMU of type 1 was set, by whoever opened them.
#[derive(Debug)]
pub struct Container {
    fd: OwnedFd,
}

impl Container {
    /// Takes the descriptor of `/dev/vfio/vfio`.
    ///
    /// # Errors
    /// When it is not one, or speaks another version of VFIO.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, VfioError> {
        match sys::plain(fd.as_fd(), Request::GET_API_VERSION)? {
            VFIO_API_VERSION => Ok(Self { fd }),
            other => Err(VfioError::Unexpected(format!("the kernel speaks version {other} of VFIO"))),
        }
    }

    /// Lets the devices reach memory. It is pinned by this, and counts against the process's `RLIMIT_MEMLOCK`; the
    /// time it takes grows with the size.
    ///
    /// # Errors
    /// When the kernel refuses: no rights to so much locked memory (`ENOMEM`), addresses that are taken (`EEXIST`) or
    /// that the IOMMU can't translate (`EINVAL`), too many mappings (`ENOSPC`).
    ///
    /// # Safety
    /// The memory from `request.host_address` on, `request.size_bytes` of it, must be a mapping that stays until
    /// [`Container::unmap_dma`] or the end of the process, and that no reference of Rust's covers: devices read and
    /// write it at any time.
    pub unsafe fn map_dma(&self, request: &MappingRequest) -> Result<(), VfioError> {
        let flag = |wanted, flag| if wanted { flag } else { 0 };
        let map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: flag(request.readable, VFIO_DMA_MAP_FLAG_READ)
                | flag(request.writable, VFIO_DMA_MAP_FLAG_WRITE),
            vaddr: request.host_address as u64,
            iova: request.iova,
            size: request.size_bytes,
        };
        // SAFETY: the caller vouches for the memory, in the same words.
        unsafe { sys::map_dma(self.fd.as_fd(), &map) }
    }

    /// Takes back what was mapped at `iova`; ranges that were mapped by one call go by one call.
    ///
    /// # Errors
    /// When the kernel refuses, or less than `size_bytes` was mapped there.
    pub fn unmap_dma(&self, iova: u64, size_bytes: u64) -> Result<(), VfioError> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            iova,
            size: size_bytes,
            ..Default::default()
        };
        sys::unmap_dma(self.fd.as_fd(), &mut unmap)?;
        if unmap.size != size_bytes {
            let problem = format!("{:#x} of {size_bytes:#x} bytes were mapped at IOVA {iova:#x}", unmap.size);
            return Err(VfioError::Unexpected(problem));
        }
        Ok(())
    }

    /// What the IOMMU can do. There must be a group in the container.
    ///
    /// # Errors
    /// When the kernel doesn't say it.
    pub fn info(&self) -> Result<IommuInfo, VfioError> {
        let answer =
            sys::query(self.fd.as_fd(), Request::IOMMU_GET_INFO, size_of::<vfio_iommu_type1_info>(), &[])?;
        parse_info(&answer)
            .ok_or_else(|| VfioError::Unexpected("the kernel's description of the IOMMU is cut off".into()))
    }
}

/// The IOMMU from the kernel's answer; `None` when it is cut off.
fn parse_info(answer: &Argument) -> Option<IommuInfo> {
    let flags = answer.u32(offset_of!(vfio_iommu_type1_info, flags))?;
    let mut info = IommuInfo::default();
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0 {
        info.page_sizes = answer.u64(offset_of!(vfio_iommu_type1_info, iova_pgsizes))?;
    }
    if flags & VFIO_IOMMU_INFO_CAPS == 0 {
        return Some(info);
    }
    let first = answer.u32(offset_of!(vfio_iommu_type1_info, cap_offset))?;
    if let Some(at) = answer.capability(first, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
        let count = answer.u32(at + offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas))?;
        let first = at + offset_of!(vfio_iommu_type1_info_cap_iova_range, iova_ranges);
        for at in (first..).step_by(size_of::<vfio_iova_range>()).take(usize::try_from(count).ok()?) {
            let start = answer.u64(at + offset_of!(vfio_iova_range, start))?;
            let end = answer.u64(at + offset_of!(vfio_iova_range, end))?;
            info.iova_ranges.push(start..=end);
        }
    }
    if let Some(at) = answer.capability(first, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL) {
        info.mappings_available = Some(answer.u32(at + offset_of!(vfio_iommu_type1_info_dma_avail, avail))?);
    }
    Some(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_ranges_and_what_is_left() {
        let words = [
            100u32,
            3,
            0x20_1000,
            0,
            24,
            0, // flags: page sizes, caps
            1 << 16 | 3,
            36,
            65535, // mappings available
            1 << 16 | 1,
            0,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            u32::MAX,
            0x1ff,
        ];
        let answer = Argument::from_bytes(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
        let info = parse_info(&answer).unwrap();
        assert_eq!(info.page_sizes, 0x20_1000);
        assert_eq!(info.iova_ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x1ff_ffff_ffff]);
        assert_eq!(info.mappings_available, Some(65535));
    }

    #[test]
    fn what_is_no_container_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Container::from_fd(null.into()), Err(VfioError::Ioctl { .. })));
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in proptest::collection::vec(prop_oneof![0u8..64, any::<u8>()], 0..128)) {
            let _ = parse_info(&Argument::from_bytes(bytes));
        }
    }
}
