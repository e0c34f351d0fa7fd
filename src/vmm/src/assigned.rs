//! Assigned PCI functions: VFIO's side of them in this process.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    ptr,
    sync::Arc,
};

use casemate_passthrough::{
    Container, IrqInfo, Mapping, MappingRequest, Region, VectorKind, Vfio, VfioDevice, VfioError,
};
use casemate_wire::End;
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    control::{Change, Requests},
    error::{During, Error},
    memory,
};

/// Lets the devices reach the guest's memory: IOVA is guest physical address. The pages are pinned by this.
pub(crate) fn map_memory(container: &Container, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for piece in memory::pieces(memory) {
        let request = MappingRequest {
            iova: piece.guest_address,
            host_address: piece.host_address as usize,
            size_bytes: piece.size_bytes,
            readable: true,
            writable: true,
        };
        // SAFETY: the piece is a mapping that the machine holds until the process ends, and guest memory is only ever
        // reached through vm-memory's volatile accesses.
        unsafe { container.map_dma(&request) }
            .map_err(|error| Error::device("mapping memory for devices", error))?;
    }
    Ok(())
}

/// Tells KVM which groups the guest has, so that it knows of DMA that does not snoop caches.
pub(crate) fn tell_kvm(vm: &VmFd, groups: &[OwnedFd]) -> Result<DeviceFd, Error> {
    let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
    let device = vm.create_device(&mut request).during("making KVM's VFIO device")?;
    for group in groups {
        let fd: i32 = group.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(KVM_DEV_VFIO_FILE_ADD),
            addr: &raw const fd as u64,
        };
        device.set_device_attr(&attribute).during("telling KVM of a VFIO group")?;
    }
    Ok(device)
}

/// A function's device as its vCPU-side half sees it: registers are read and written right here, what needs an ioctl
/// is asked of the control thread.
pub(crate) struct RemoteVfio {
    /// The device, shared with the control thread.
    pub(crate) device: Arc<VfioDevice>,
    /// Its number there.
    pub(crate) number: usize,
    /// The way there.
    pub(crate) requests: Arc<Requests>,
}

impl RemoteVfio {
    fn ask(&self, change: Change) -> Result<(), VfioError> {
        self.requests.change(change).map_err(VfioError::Unexpected)
    }

    /// Ends the guest when interrupts could not be turned on: it believes that they are. Going on would hang its driver
    /// without a word.
    fn or_end(&self, result: Result<(), VfioError>, on: bool) -> Result<(), VfioError> {
        if let (Err(error), true) = (&result, on) {
            let why = format!("an assigned device's interrupts cannot be turned on: {error}");
            self.requests.end(End::Fault(why));
        }
        result
    }
}

impl Vfio for RemoteVfio {
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError> {
        self.device.region_info(index)
    }
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        self.device.region_read(index, offset, data)
    }
    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        self.device.region_write(index, offset, data)
    }
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError> {
        self.device.irq_info(index)
    }
    fn set_vectors(
        &mut self,
        kind: VectorKind,
        triggers: &Arc<[EventFd]>,
        count: u16,
    ) -> Result<(), VfioError> {
        let events = Arc::clone(triggers);
        let result = self.ask(Change::Vectors { device: self.number, kind, events, count });
        self.or_end(result, count > 0)
    }
    fn add_vector(&mut self, vector: u16, triggers: &Arc<[EventFd]>) -> Result<(), VfioError> {
        let events = Arc::clone(triggers);
        let result = self.ask(Change::Vector { device: self.number, vector, events });
        self.or_end(result, true)
    }
    fn reset(&mut self) -> Result<(), VfioError> {
        self.ask(Change::Reset { device: self.number })
    }
}

/// A device's registers mapped into this process, so that KVM can map them into the guest.
pub(crate) struct Registers {
    start: *mut libc::c_void,
    size_bytes: usize,
}

// SAFETY: the pointer is never read through here; it is an address for KVM, valid in every thread.
unsafe impl Send for Registers {}

impl Registers {
    /// Maps the piece of a BAR that `mapping` describes.
    pub(crate) fn map(device: &VfioDevice, mapping: &Mapping) -> Result<Self, Error> {
        let what = "mapping a device's registers";
        let too_large = |_| Error::Layout(format!("a BAR of {:#x} bytes", mapping.size));
        let size_bytes = usize::try_from(mapping.size).map_err(too_large)?;
        let offset = libc::off_t::try_from(mapping.file_offset).map_err(too_large)?;
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, device.as_fd().as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing; the descriptor is open for the
        // call's time, and the mapping keeps the device open afterwards.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), size_bytes, protection, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(Error::Kernel { what, source: io::Error::last_os_error() });
        }
        Ok(Self { start, size_bytes })
    }

    /// Memory of this process in the place of a device's registers.
    #[cfg(test)]
    pub(crate) fn of_test(size_bytes: usize) -> Self {
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), size_bytes, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start, size_bytes }
    }

    /// Its size, a multiple of the page's.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes as u64
    }

    /// Where it is in this process.
    pub(crate) fn host_address(&self) -> u64 {
        self.start as u64
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, whole; memory slots that point at it are deleted first
        // (see `maps`), or the process ends.
        unsafe { libc::munmap(self.start, self.size_bytes) };
    }
}
