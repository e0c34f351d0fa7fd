//! A VFIO device over its ioctls.

use std::{
    fs::File,
    io,
    mem::{offset_of, size_of},
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_device_info,
    vfio_irq_info, vfio_irq_set, vfio_region_info, vfio_region_info_cap_sparse_mmap,
    vfio_region_sparse_mmap_area,
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    seam::{IrqInfo, Region, VectorKind, Vfio, VfioError},
    sys::{self, Argument, Request},
};

/// An open VFIO device. Regions are asked for once, so reads and writes issue no ioctl: they are one `pread` or
/// `pwrite`, and can be done from any thread.
#[derive(Debug)]
pub struct VfioDevice {
    file: File,
    /// BARs, ROM and configuration space.
    regions: Vec<Region>,
    /// The kernel knows a way to reset it.
    resettable: bool,
    /// MSI and MSI-X were turned on, by this value. The kernel refuses to turn off what is off.
    vectors_on: [AtomicBool; 2],
}

impl VfioDevice {
    /// Takes the descriptor that `VFIO_GROUP_GET_DEVICE_FD` gave, and asks the kernel for the device's regions.
    ///
    /// # Errors
    /// When it is not a VFIO device of PCI's, or the kernel doesn't describe it.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, VfioError> {
        let info = sys::query(fd.as_fd(), Request::DEVICE_GET_INFO, size_of::<vfio_device_info>(), &[])?;
        let flags = info.u32(offset_of!(vfio_device_info, flags)).unwrap_or(0);
        if flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::Unexpected("the VFIO device is not a PCI device".into()));
        }
        let mut regions = Vec::new();
        for index in 0..=VFIO_PCI_CONFIG_REGION_INDEX {
            let fields = [(offset_of!(vfio_region_info, index), index)];
            let size = size_of::<vfio_region_info>();
            let answer = sys::query(fd.as_fd(), Request::DEVICE_GET_REGION_INFO, size, &fields)?;
            let told =
                || VfioError::Unexpected(format!("the kernel's description of region {index} is cut off"));
            regions.push(parse_region(&answer).ok_or_else(told)?);
        }
        let resettable = flags & VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self { file: File::from(fd), regions, resettable, vectors_on: Default::default() })
    }

    /// Region `index`.
    ///
    /// # Errors
    /// When there is no such region.
    pub fn region_info(&self, index: u32) -> Result<Region, VfioError> {
        self.region(index).cloned().ok_or(VfioError::OutOfRange { index, offset: 0 })
    }

    fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(usize::try_from(index).ok()?)
    }

    /// Where in the device's file `len` bytes of a region lie.
    fn locate(&self, index: u32, offset: u64, len: usize) -> Result<u64, VfioError> {
        let inside = |region: &Region| {
            let end = offset.checked_add(u64::try_from(len).ok()?)?;
            (end <= region.size).then(|| region.offset.checked_add(offset)).flatten()
        };
        self.region(index).and_then(inside).ok_or(VfioError::OutOfRange { index, offset })
    }

    /// Reads from a region by one `pread`.
    ///
    /// # Errors
    /// When the kernel refuses or reads less, or the region ends before.
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        let at = self.locate(index, offset, data.len())?;
        let done = self.file.read_at(data, at);
        whole(index, offset, data.len(), done)
    }

    /// Writes to a region by one `pwrite`.
    ///
    /// # Errors
    /// When the kernel refuses or writes less, or the region ends before.
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        let at = self.locate(index, offset, data.len())?;
        let done = self.file.write_at(data, at);
        whole(index, offset, data.len(), done)
    }

    /// Interrupts of kind `index`, by an ioctl.
    ///
    /// # Errors
    /// When the kernel doesn't know the index.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, VfioError> {
        let fields = [(offset_of!(vfio_irq_info, index), index)];
        let answer =
            sys::query(self.as_fd(), Request::DEVICE_GET_IRQ_INFO, size_of::<vfio_irq_info>(), &fields)?;
        let field = |at| answer.u32(at).unwrap_or(0);
        let (count, flags) =
            (field(offset_of!(vfio_irq_info, count)), field(offset_of!(vfio_irq_info, flags)));
        Ok(IrqInfo { count, flags })
    }

    /// Turns vectors on, vector `n` triggering the `n`th eventfd, or with none off; by an ioctl, which is left out when they
    /// are off already. Calls for one device are to be made one after the other.
    ///
    /// # Errors
    /// When the kernel refuses or has fewer vectors; they are off then, unless it was turning them off that failed.
    pub fn set_vectors(&self, kind: VectorKind, triggers: &[EventFd]) -> Result<(), VfioError> {
        let on = self.on(kind);
        if triggers.is_empty() && !on.load(Ordering::Acquire) {
            return Ok(());
        }
        if on.load(Ordering::Acquire) && kind == VectorKind::Msi {
            // Another number of vectors: the kernel wants MSI off before.
            sys::argument(self.as_fd(), Request::DEVICE_SET_IRQS, &mut vectors_argument(kind, &[]))?;
            on.store(false, Ordering::Release);
        }
        let returned =
            sys::argument(self.as_fd(), Request::DEVICE_SET_IRQS, &mut vectors_argument(kind, triggers))?;
        if let Ok(available @ 1..) = usize::try_from(returned) {
            // The kernel made none, and says how many it could have made.
            return Err(VfioError::Vectors { wanted: triggers.len(), available });
        }
        on.store(!triggers.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Turns one more vector of MSI-X on. MSI-X must be on, and [`IrqInfo::is_dynamic`].
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_vector(&self, vector: u16, trigger: &EventFd) -> Result<(), VfioError> {
        let mut argument = vectors_argument(VectorKind::Msix, std::slice::from_ref(trigger));
        argument.set_u32(offset_of!(vfio_irq_set, start), vector.into());
        sys::argument(self.as_fd(), Request::DEVICE_SET_IRQS, &mut argument).map(drop)
    }

    fn on(&self, kind: VectorKind) -> &AtomicBool {
        let [msi, msix] = &self.vectors_on;
        match kind {
            VectorKind::Msi => msi,
            VectorKind::Msix => msix,
        }
    }

    /// Turns INTx on. When the device asserts it, VFIO masks it and signals `trigger`; a signal of `unmask` unmasks it,
    /// and if the device still (or again) asserts it then, `trigger` is signalled once more. MSI-X must be off, and
    /// stay off: VFIO takes one kind of interrupt at a time. By two ioctls.
    ///
    /// # Errors
    /// When the kernel refuses: the device has no INTx, or can't mask it by itself and shares its line on the host.
    pub fn set_intx(&self, trigger: &EventFd, unmask: &EventFd) -> Result<(), VfioError> {
        for (action, event) in [(VFIO_IRQ_SET_ACTION_TRIGGER, trigger), (VFIO_IRQ_SET_ACTION_UNMASK, unmask)]
        {
            let mut argument = events_argument(VFIO_PCI_INTX_IRQ_INDEX, action, std::slice::from_ref(event));
            sys::argument(self.as_fd(), Request::DEVICE_SET_IRQS, &mut argument)?;
        }
        Ok(())
    }

    /// Resets the function, by an ioctl that takes as long as the device does (up to seconds).
    ///
    /// # Errors
    /// When there is no method, or the kernel's reset did not succeed.
    pub fn reset(&self) -> Result<(), VfioError> {
        if !self.resettable {
            return Err(VfioError::Unexpected("the kernel knows no way to reset this device".into()));
        }
        sys::plain(self.as_fd(), Request::DEVICE_RESET).map(drop)
    }
}

fn too_few() -> VfioError {
    VfioError::Unexpected("there are fewer eventfds than vectors".into())
}

fn whole(index: u32, offset: u64, bytes: usize, done: io::Result<usize>) -> Result<(), VfioError> {
    let source = match done {
        Ok(count) if count == bytes => return Ok(()),
        Ok(_) => io::Error::from(io::ErrorKind::UnexpectedEof),
        Err(error) => error,
    };
    Err(VfioError::Access { index, offset, bytes, source })
}

/// A request that makes all of `triggers` the vectors, or, when there are none, turns them off.
fn vectors_argument(kind: VectorKind, triggers: &[EventFd]) -> Argument {
    let index = match kind {
        VectorKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        VectorKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
    };
    events_argument(index, VFIO_IRQ_SET_ACTION_TRIGGER, triggers)
}

/// A request that connects `events` to the interrupts of kind `index`, the first to number 0, or, when there are none,
/// turns that kind off.
fn events_argument(index: u32, action: u32, events: &[EventFd]) -> Argument {
    let data = offset_of!(vfio_irq_set, data);
    let mut argument = Argument::new(data + size_of::<i32>() * events.len());
    let kind = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    argument.set_u32(offset_of!(vfio_irq_set, flags), kind | action);
    argument.set_u32(offset_of!(vfio_irq_set, index), index);
    argument.set_u32(offset_of!(vfio_irq_set, count), u32::try_from(events.len()).unwrap_or(u32::MAX));
    for (at, event) in (data..).step_by(size_of::<i32>()).zip(events) {
        argument.set_u32(at, event.as_raw_fd().cast_unsigned());
    }
    argument
}

/// A region from the kernel's answer; `None` when it is cut off.
fn parse_region(answer: &Argument) -> Option<Region> {
    let flags = answer.u32(offset_of!(vfio_region_info, flags))?;
    let size = answer.u64(offset_of!(vfio_region_info, size))?;
    let mappable = match answer
        .capability(answer.u32(offset_of!(vfio_region_info, cap_offset))?, VFIO_REGION_INFO_CAP_SPARSE_MMAP)
    {
        _ if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 || size == 0 => Vec::new(),
        Some(at) => sparse_areas(answer, at)?,
        None => vec![Range { start: 0, end: size }],
    };
    Some(Region {
        size,
        offset: answer.u64(offset_of!(vfio_region_info, offset))?,
        readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        mappable,
    })
}

fn sparse_areas(answer: &Argument, at: usize) -> Option<Vec<Range<u64>>> {
    let count = answer.u32(at + offset_of!(vfio_region_info_cap_sparse_mmap, nr_areas))?;
    let first = at + offset_of!(vfio_region_info_cap_sparse_mmap, areas);
    let mut areas = Vec::new();
    for at in (first..).step_by(size_of::<vfio_region_sparse_mmap_area>()).take(usize::try_from(count).ok()?)
    {
        let start = answer.u64(at + offset_of!(vfio_region_sparse_mmap_area, offset))?;
        let size = answer.u64(at + offset_of!(vfio_region_sparse_mmap_area, size))?;
        areas.push(start..start.checked_add(size)?);
    }
    Some(areas)
}

impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Vfio for VfioDevice {
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError> {
        VfioDevice::region_info(self, index)
    }
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        VfioDevice::region_read(self, index, offset, data)
    }
    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        VfioDevice::region_write(self, index, offset, data)
    }
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError> {
        VfioDevice::irq_info(self, index)
    }
    fn set_vectors(
        &mut self,
        kind: VectorKind,
        triggers: &Arc<[EventFd]>,
        count: u16,
    ) -> Result<(), VfioError> {
        let first = triggers.get(..usize::from(count));
        VfioDevice::set_vectors(self, kind, first.ok_or_else(too_few)?)
    }
    fn add_vector(&mut self, vector: u16, triggers: &Arc<[EventFd]>) -> Result<(), VfioError> {
        let trigger = triggers.get(usize::from(vector)).ok_or_else(too_few)?;
        VfioDevice::add_vector(self, vector, trigger)
    }
    fn reset(&mut self) -> Result<(), VfioError> {
        VfioDevice::reset(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(words: &[u32]) -> Argument {
        Argument::from_bytes(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    #[test]
    fn reads_a_region_with_sparse_areas_behind_another_capability() {
        let answer = words(&[
            96,
            0xf,
            0,
            32,
            0x4000,
            0,
            0,
            0x100, // flags: read, write, mmap, caps; offset 1 TiB
            1 << 16 | 3,
            40, // MSI-X mappable
            1 << 16 | 1,
            0,
            2,
            0,
            0,
            0,
            0x1000,
            0,
            0x3000,
            0,
            0x1000,
            0,
        ]);
        let region = parse_region(&answer).unwrap();
        assert_eq!(region.mappable, [0..0x1000, 0x3000..0x4000]);
        assert_eq!((region.size, region.offset), (0x4000, 1 << 40));
        assert!(region.readable && region.writable);
    }

    #[test]
    fn a_region_without_areas_is_mappable_as_a_whole_or_not_at_all() {
        let region = |flags| parse_region(&words(&[32, flags, 0, 0, 0x4000, 0, 0, 0])).unwrap();
        assert_eq!(region(7).mappable, [Range { start: 0, end: 0x4000 }]);
        assert!(region(3).mappable.is_empty());
        assert!(!region(1).writable && region(1).readable);
        assert_eq!(parse_region(&words(&[8, 7])), None);
    }

    #[test]
    fn vectors_are_set_as_the_header_says() {
        let off = vectors_argument(VectorKind::Msix, &[]);
        assert_eq!(format!("{off:?}"), format!("{:?}", words(&[20, 1 | 32, 2, 0, 0])));
        let off = vectors_argument(VectorKind::Msi, &[]);
        assert_eq!(format!("{off:?}"), format!("{:?}", words(&[20, 1 | 32, 1, 0, 0])));
        let events = [EventFd::new(0).unwrap(), EventFd::new(0).unwrap()];
        let [a, b] = [events[0].as_raw_fd() as u32, events[1].as_raw_fd() as u32];
        assert_eq!(
            format!("{:?}", vectors_argument(VectorKind::Msix, &events)),
            format!("{:?}", words(&[28, 4 | 32, 2, 0, 2, a, b]))
        );
        let unmask = events_argument(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, &events[..1]);
        assert_eq!(format!("{unmask:?}"), format!("{:?}", words(&[24, 4 | 16, 0, 0, 1, a])));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(
            VfioDevice::from_fd(null.into()),
            Err(VfioError::Ioctl { request: "VFIO_DEVICE_GET_INFO", .. })
        ));
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in proptest::collection::vec(prop_oneof![0u8..64, any::<u8>()], 0..128)) {
            let _ = parse_region(&Argument::from_bytes(bytes));
        }
    }
}
