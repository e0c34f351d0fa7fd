//! VFIO's group and device ioctls (linux/vfio.h), type1 container. Every result is read.

use std::{
    ffi::CString,
    fs::OpenOptions,
    io,
    mem::{size_of, size_of_val},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use rustix::io::{pread, pwrite};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DEVICE_FLAGS_RESET, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX, VFIO_TYPE,
    VFIO_TYPE1v2_IOMMU, vfio_device_info, vfio_group_status, vfio_region_info,
};
use vmm_sys_util::ioctl_io_nr;

use super::{ioctl_in, ioctl_in_out, ioctl_none, ioctl_value};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE as u32, VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE as u32, VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE as u32, VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE as u32, VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE as u32, VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE as u32, VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);

/// The front of a `vfio_irq_set` that carries no data.
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

fn size<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    // std opens with O_CLOEXEC.
    OpenOptions::new().read(true).write(true).open(path).map(OwnedFd::from)
}

/// A new container at `path` (`/dev/vfio/vfio`), seen to speak the known version and to have the type1 v2 IOMMU.
pub(crate) fn open_container(path: &Path) -> io::Result<OwnedFd> {
    let container = open(path)?;
    // SAFETY: VFIO_GET_API_VERSION takes no argument.
    let version = unsafe { ioctl_none(&container, VFIO_GET_API_VERSION())? };
    if u32::try_from(version) != Ok(VFIO_API_VERSION) {
        return Err(io::Error::other(format!("VFIO speaks version {version}, not {VFIO_API_VERSION}")));
    }
    // SAFETY: VFIO_CHECK_EXTENSION takes the extension's number.
    let has = unsafe { ioctl_value(&container, VFIO_CHECK_EXTENSION(), VFIO_TYPE1v2_IOMMU.into())? };
    if has != 1 {
        return Err(io::Error::other(
            "VFIO has no type1 v2 IOMMU here (is the module vfio_iommu_type1 loaded?)",
        ));
    }
    Ok(container)
}

/// The group at `path` (`/dev/vfio/GROUP`). `EBUSY` while another open of it, or of one of its devices, lives.
pub(crate) fn open_group(path: &Path) -> io::Result<OwnedFd> {
    open(path)
}

/// Whether all functions of the group are bound to VFIO or to nothing that uses DMA.
pub(crate) fn group_is_viable(group: impl AsFd) -> io::Result<bool> {
    let mut status = vfio_group_status { argsz: size::<vfio_group_status>(), flags: 0 };
    // SAFETY: VFIO_GROUP_GET_STATUS fills a vfio_group_status whose size stands in argsz.
    unsafe { ioctl_in_out(group, VFIO_GROUP_GET_STATUS(), &mut status)? };
    Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
}

/// Puts the group into the container.
pub(crate) fn set_container(group: impl AsFd, container: impl AsFd) -> io::Result<()> {
    let container: i32 = container.as_fd().as_raw_fd();
    // SAFETY: VFIO_GROUP_SET_CONTAINER reads one int, a descriptor, and takes a reference of its own to the file.
    unsafe { ioctl_in(group, VFIO_GROUP_SET_CONTAINER(), &container).map(drop) }
}

/// Makes the container a type1 v2 one; it must have a group.
pub(crate) fn set_iommu(container: impl AsFd) -> io::Result<()> {
    // SAFETY: VFIO_SET_IOMMU takes the type's number.
    unsafe { ioctl_value(container, VFIO_SET_IOMMU(), VFIO_TYPE1v2_IOMMU.into()).map(drop) }
}

/// The kernel's answer to `VFIO_IOMMU_GET_INFO`, whole: a `vfio_iommu_type1_info` and its capabilities.
pub(crate) fn iommu_info(container: impl AsFd) -> io::Result<Vec<u8>> {
    // The front and capabilities of a kernel with hundreds of ranges; `u64`s, for alignment.
    let mut room = [0u64; 1024];
    let bytes = u32::try_from(size_of_val(&room)).unwrap_or(0);
    if let Some(first) = room.first_mut() {
        *first = u64::from_ne_bytes([bytes.to_ne_bytes(), [0; 4]].concat().try_into().unwrap_or_default());
    }
    // SAFETY: VFIO_IOMMU_GET_INFO fills a vfio_iommu_type1_info with as much behind it as argsz, the first 32 bits, says
    // that there is room for: the size of `room`. All bytes of it are valid numbers.
    unsafe { ioctl_in_out(container, VFIO_IOMMU_GET_INFO(), &mut room)? };
    Ok(room.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

/// The first bytes of the device's option ROM, at most `bytes_max`; empty when it has none that can be read.
pub(crate) fn option_rom(device: impl AsFd, bytes_max: u64) -> io::Result<Vec<u8>> {
    let region = region(&device, VFIO_PCI_ROM_REGION_INDEX)?;
    if region.size > bytes_max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("a ROM of {} bytes", region.size)));
    }
    let size = usize::try_from(region.size).map_err(io::Error::other)?;
    let mut rom = vec![0; size];
    let mut done = 0;
    while let Some(rest) = rom.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = region.offset.checked_add(done as u64).ok_or(io::ErrorKind::InvalidData)?;
        match pread(&device, rest, at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(rom)
}

fn region(device: impl AsFd, index: u32) -> io::Result<vfio_region_info> {
    let mut region =
        vfio_region_info { argsz: size::<vfio_region_info>(), index, ..vfio_region_info::default() };
    // SAFETY: VFIO_DEVICE_GET_REGION_INFO fills a vfio_region_info whose size stands in argsz.
    unsafe { ioctl_in_out(&device, VFIO_DEVICE_GET_REGION_INFO(), &mut region)? };
    Ok(region)
}

/// Opens the device with this name (`0000:03:00.0`) of the group. The kernel enables it, with bus mastering off.
pub(crate) fn device_fd(group: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    let Some(first) = name.as_bytes_with_nul().first() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: VFIO_GROUP_GET_DEVICE_FD reads a NUL-terminated string from the address of its first byte; `name` is one
    // and lives through the call.
    let fd = unsafe { ioctl_in(group, VFIO_GROUP_GET_DEVICE_FD(), first)? };
    // SAFETY: the ioctl returned a descriptor (close-on-exec) that nobody else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the kernel's reset of the device, when it was opened, succeeded: `vfio_pci_core_enable` resets it, keeps the result,
/// and tells it as `VFIO_DEVICE_FLAGS_RESET` (drivers/vfio/pci/vfio_pci_core.c, `reset_works`).
pub(crate) fn was_reset(device: impl AsFd) -> io::Result<bool> {
    let mut info = vfio_device_info { argsz: size::<vfio_device_info>(), ..vfio_device_info::default() };
    // SAFETY: VFIO_DEVICE_GET_INFO fills a vfio_device_info whose size stands in argsz.
    unsafe { ioctl_in_out(device, VFIO_DEVICE_GET_INFO(), &mut info)? };
    Ok(info.flags & VFIO_DEVICE_FLAGS_RESET != 0)
}

/// Resets the device by the first of its methods that works, and tells the result. The kernel saves config space before
/// and restores it after; when the device does not come back it waits up to 60 s.
pub(crate) fn reset(device: impl AsFd) -> io::Result<()> {
    // SAFETY: VFIO_DEVICE_RESET takes no argument.
    unsafe { ioctl_none(device, VFIO_DEVICE_RESET()).map(drop) }
}

/// Groups of one hot reset: more than one card's functions have.
const HOT_RESET_GROUPS_MAX: usize = 64;

/// A `vfio_pci_hot_reset` with its groups' descriptors.
#[repr(C)]
struct HotReset {
    argsz: u32,
    flags: u32,
    count: u32,
    group_fds: [i32; HOT_RESET_GROUPS_MAX],
}

/// Resets everything on the device's slot or bus at once. All functions there must be bound to VFIO, and of these groups.
pub(crate) fn hot_reset(device: impl AsFd, groups: &[&OwnedFd]) -> io::Result<()> {
    let mut argument =
        HotReset { argsz: size::<HotReset>(), flags: 0, count: 0, group_fds: [-1; HOT_RESET_GROUPS_MAX] };
    if groups.len() > HOT_RESET_GROUPS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (slot, group) in argument.group_fds.iter_mut().zip(groups) {
        *slot = group.as_raw_fd();
        argument.count += 1;
    }
    // SAFETY: VFIO_DEVICE_PCI_HOT_RESET reads a vfio_pci_hot_reset and `count` descriptors behind it, within argsz; the
    // descriptors are open through the call.
    unsafe { ioctl_in(device, VFIO_DEVICE_PCI_HOT_RESET(), &argument).map(drop) }
}

/// Takes down whichever of INTx, MSI and MSI-X is up. A kind that the device lacks, or that is not up, is no error.
pub(crate) fn disable_interrupts(device: impl AsFd) {
    for index in [VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX] {
        let flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
        let set = IrqSet { argsz: size::<IrqSet>(), flags, index, start: 0, count: 0 };
        // SAFETY: VFIO_DEVICE_SET_IRQS reads a vfio_irq_set of argsz bytes; with DATA_NONE no data follows its front.
        // What it did is seen in config space afterwards.
        let _ = unsafe { ioctl_in(&device, VFIO_DEVICE_SET_IRQS(), &set) };
    }
}

/// A `vfio_irq_set` with one eventfd behind its front.
#[repr(C)]
struct IrqEvent {
    front: IrqSet,
    event: i32,
}

/// Has the kernel write to `event` when somebody wants the device back: at once, and every ten seconds until it is closed.
pub(crate) fn tell_requests(device: impl AsFd, event: impl AsFd) -> io::Result<()> {
    tell(device, event, VFIO_PCI_REQ_IRQ_INDEX)
}

/// Has the kernel write to `event` when the device reports an error that was not corrected. `EINVAL` or `ENOTTY`: it is no
/// PCIe function.
pub(crate) fn tell_errors(device: impl AsFd, event: impl AsFd) -> io::Result<()> {
    tell(device, event, VFIO_PCI_ERR_IRQ_INDEX)
}

fn tell(device: impl AsFd, event: impl AsFd, index: u32) -> io::Result<()> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    let front = IrqSet { argsz: size::<IrqEvent>(), flags, index, start: 0, count: 1 };
    let set = IrqEvent { front, event: event.as_fd().as_raw_fd() };
    // SAFETY: VFIO_DEVICE_SET_IRQS reads a vfio_irq_set of argsz bytes with `count` descriptors behind its front, and takes a
    // reference of its own to the file.
    unsafe { ioctl_in(device, VFIO_DEVICE_SET_IRQS(), &set).map(drop) }
}

/// A device's BAR, read and written 32 bits at once.
pub(crate) struct Registers<'a> {
    device: &'a OwnedFd,
    region: vfio_region_info,
}

impl<'a> Registers<'a> {
    /// Those of the BAR of this number.
    pub(crate) fn of(device: &'a OwnedFd, bar: u32) -> io::Result<Self> {
        Ok(Self { device, region: region(device, bar)? })
    }

    /// The register at an offset.
    pub(crate) fn read(&self, register: u64) -> io::Result<u32> {
        let mut value = [0; 4];
        match pread(self.device, &mut value, self.place(register)?)? {
            4 => Ok(u32::from_le_bytes(value)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Sets it.
    pub(crate) fn write(&self, register: u64, value: u32) -> io::Result<()> {
        match pwrite(self.device, &value.to_le_bytes(), self.place(register)?)? {
            4 => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn place(&self, register: u64) -> io::Result<u64> {
        let end = register.checked_add(4).filter(|end| *end <= self.region.size);
        end.and_then(|_| self.region.offset.checked_add(register)).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("the BAR has {} bytes", self.region.size))
        })
    }
}

/// Clears `bits` of the 16-bit config register at `register`, through VFIO.
pub(crate) fn clear_config_bits(device: impl AsFd, register: u64, bits: u16) -> io::Result<()> {
    change_config(device, register, |value| value & !bits)
}

/// Sets `bits` of the 16-bit config register at `register`, through VFIO.
pub(crate) fn set_config_bits(device: impl AsFd, register: u64, bits: u16) -> io::Result<()> {
    change_config(device, register, |value| value | bits)
}

fn change_config(device: impl AsFd, register: u64, change: impl Fn(u16) -> u16) -> io::Result<()> {
    let region = region(&device, VFIO_PCI_CONFIG_REGION_INDEX)?;
    let offset = region.offset.checked_add(register).ok_or(io::ErrorKind::InvalidData)?;
    let mut value = [0u8; 2];
    if pread(&device, &mut value, offset)? != value.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let value = change(u16::from_le_bytes(value)).to_le_bytes();
    if pwrite(&device, &value, offset)? != value.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_vfio_device_does_not_pass_for_one_that_was_reset() {
        let null = open(Path::new("/dev/null")).unwrap();
        assert!(was_reset(&null).is_err());
        assert!(reset(&null).is_err());
    }
}
