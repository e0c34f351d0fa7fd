//! Assigned PCI functions: VFIO's side of them in this process.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr,
    sync::Arc,
};

use casemate_passthrough::{
    AssignedFunction, Container, IrqInfo, Mapping, MappingRequest, Parts, Probe, Region, Seat, VectorKind,
    Vfio, VfioDevice, VfioError,
};
use casemate_pci::{Function, ROM_INDEX};
use casemate_wire::End;
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    control::{Change, Requests, Vectors},
    error::{During, Error},
    maps::DirectRegion,
    memory,
};

/// What lets devices reach a piece of this process's memory, where the guest has it.
pub(crate) fn mapping_of(piece: memory::MemorySlot) -> MappingRequest {
    MappingRequest {
        iova: piece.guest_address,
        host_address: piece.host_address as usize,
        size_bytes: piece.size_bytes,
        readable: true,
        writable: true,
    }
}

/// Lets the devices reach the guest's memory: IOVA is guest physical address. The pages are pinned by this.
pub(crate) fn map_memory(container: &Container, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for piece in memory::pieces(memory) {
        let request = mapping_of(piece);
        // SAFETY: the piece is a mapping that the machine holds until the process ends, and guest memory is only ever
        // reached through vm-memory's volatile accesses.
        unsafe { container.map_dma(&request) }
            .map_err(|error| Error::device("mapping memory for devices", error))?;
    }
    Ok(())
}

/// Takes the memory from the devices again; the pages are let go of by this.
pub(crate) fn unmap_memory(container: &Container, memory: &GuestMemoryMmap) -> Result<(), Error> {
    let unmap = |piece: memory::MemorySlot| {
        let unmapped = container.unmap_dma(piece.guest_address, piece.size_bytes);
        unmapped.map_err(|error| Error::device("taking memory from devices", error))
    };
    // Each, whatever came of the others.
    memory::pieces(memory).map(unmap).fold(Ok(()), Result::and)
}

/// KVM's VFIO device, of which a machine has one: by it KVM knows of DMA that does not snoop caches.
pub(crate) struct KvmVfio(DeviceFd);

impl KvmVfio {
    /// Makes it.
    pub(crate) fn new(vm: &VmFd) -> Result<Self, Error> {
        let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        vm.create_device(&mut request).during("making KVM's VFIO device").map(Self)
    }

    /// Tells KVM that the guest has a group. KVM holds it open.
    pub(crate) fn add(&self, group: &OwnedFd) -> Result<(), Error> {
        self.tell(KVM_DEV_VFIO_FILE_ADD, group).during("telling KVM of a VFIO group")
    }

    /// Tells KVM that the guest has it no longer.
    pub(crate) fn remove(&self, group: &OwnedFd) -> Result<(), Error> {
        self.tell(KVM_DEV_VFIO_FILE_DEL, group).during("taking a VFIO group from KVM")
    }

    fn tell(&self, what: u32, group: &OwnedFd) -> Result<(), kvm_ioctls::Error> {
        let fd: i32 = group.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: u64::from(what),
            addr: &raw const fd as u64,
        };
        self.0.set_device_attr(&attribute)
    }
}

/// A function that was looked at, before it is connected to anything.
pub(crate) struct Found {
    device: Arc<VfioDevice>,
    vfio: RemoteVfio,
    /// What it is.
    pub(crate) probe: Probe,
}

/// Looks at a function; control has its device by this number.
pub(crate) fn find(
    device: &Arc<VfioDevice>,
    number: usize,
    address: &str,
    seat: Seat,
    requests: &Arc<Requests>,
) -> Result<Found, Error> {
    let device = Arc::clone(device);
    let mut vfio = RemoteVfio { device: Arc::clone(&device), number, requests: Arc::clone(requests) };
    let probe = Probe::read(&mut vfio, seat).map_err(|error| Error::device(address, error))?;
    for (bar, size) in probe.hidden_io_bars() {
        eprintln!("casemate-vmm: {address}: BAR {bar} ({size} I/O ports) is not passed on");
    }
    Ok(Found { device, vfio, probe })
}

/// An option ROM's bytes: a file that nobody changes, of a size that is a power of two and whole pages.
pub(crate) struct Rom {
    /// The file.
    pub(crate) file: OwnedFd,
    /// Its size.
    pub(crate) size_bytes: u32,
}

impl Found {
    /// Gives the function an option ROM; what of it the guest reads without an exit is added to `regions`.
    pub(crate) fn add_rom(
        self,
        rom: &Rom,
        address: &str,
        regions: &mut Vec<DirectRegion>,
    ) -> Result<Self, Error> {
        let size_bytes = u64::from(rom.size_bytes);
        if !(4096..=16 << 20).contains(&size_bytes) {
            return Err(Error::device(address, format_args!("an option ROM of {size_bytes} bytes")));
        }
        let probe = self.probe.with_rom(size_bytes).map_err(|error| Error::device(address, error))?;
        let registers = Arc::new(Registers::of_rom(rom)?);
        regions.push(DirectRegion {
            bar: ROM_INDEX,
            offset: 0,
            registers,
            read_only: true,
            reachable: false,
        });
        Ok(Self { probe, ..self })
    }

    /// The function as the guest meets it, with the registers of it that are mapped.
    pub(crate) fn connect(
        self,
        sink: Vectors,
        address: &str,
    ) -> Result<(Box<dyn Function>, Vec<DirectRegion>), Error> {
        let Self { device, vfio, probe } = self;
        let triggers = Arc::clone(&sink.events);
        let function = AssignedFunction::new(Parts { vfio, probe, sink, triggers })
            .map_err(|error| Error::device(address, error))?;
        let map = |mapping: &Mapping| {
            let registers = Arc::new(Registers::map(&device, mapping)?);
            let (bar, offset) = (mapping.bar, mapping.offset_in_bar);
            Ok(DirectRegion { bar, offset, registers, read_only: false, reachable: false })
        };
        let regions = function.mappings().iter().map(map).collect::<Result<_, Error>>()?;
        Ok((Box::new(function), regions))
    }
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

/// A device's registers, or its ROM, mapped into this process, so that KVM can map them into the guest.
pub(crate) struct Registers {
    start: *mut libc::c_void,
    size_bytes: usize,
}

// SAFETY: the pointer is never read through here; it is an address for KVM, valid in every thread.
unsafe impl Send for Registers {}
// SAFETY: as above; a shared reference gives nothing but the address.
unsafe impl Sync for Registers {}

impl Registers {
    /// Maps the piece of a BAR that `mapping` describes.
    pub(crate) fn map(device: &VfioDevice, mapping: &Mapping) -> Result<Self, Error> {
        let what = "mapping a device's registers";
        let too_large = |_| Error::Layout(format!("a BAR of {:#x} bytes", mapping.size));
        let size_bytes = usize::try_from(mapping.size).map_err(too_large)?;
        let offset = libc::off_t::try_from(mapping.file_offset).map_err(too_large)?;
        Self::of_file(device.as_fd(), libc::PROT_READ | libc::PROT_WRITE, size_bytes, offset)
            .map_err(|source| Error::Kernel { what, source })
    }

    /// Maps an option ROM.
    fn of_rom(rom: &Rom) -> Result<Self, Error> {
        Self::of_file(rom.file.as_fd(), libc::PROT_READ, rom.size_bytes as usize, 0)
            .map_err(|source| Error::Kernel { what: "mapping an option ROM", source })
    }

    fn of_file(
        file: BorrowedFd<'_>,
        protection: libc::c_int,
        size_bytes: usize,
        offset: libc::off_t,
    ) -> io::Result<Self> {
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing; the descriptor is open for the
        // call's time, and the mapping keeps its file open afterwards.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), size_bytes, protection, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
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
