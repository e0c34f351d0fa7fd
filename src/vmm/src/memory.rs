//! The guest's memory: private anonymous pages, given to KVM and, with assigned devices, to the IOMMU.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::{
    error::{During, Error},
    layout,
};

/// One memory slot of KVM's: a piece of guest physical address space backed by this process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemorySlot {
    /// Its number.
    pub(crate) slot: u32,
    /// Where the guest sees it.
    pub(crate) guest_address: u64,
    /// Its size; 0 deletes the slot.
    pub(crate) size_bytes: u64,
    /// Where it is in this process.
    pub(crate) host_address: u64,
}

/// Makes the guest's RAM and names it, so that who looks at the process can tell it from the VMM's own memory.
pub(crate) fn allocate(memory_bytes: u64) -> Result<Arc<GuestMemoryMmap>, Error> {
    let refuse =
        |cause: &dyn std::fmt::Display| Error::Layout(format!("{memory_bytes} bytes of memory: {cause}"));
    let mut ranges = Vec::new();
    for piece in layout::ram(memory_bytes) {
        let size = usize::try_from(piece.size).map_err(|error| refuse(&error))?;
        ranges.push((GuestAddress(piece.start), size));
    }
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| refuse(&error))?;
    for region in memory.iter() {
        name(region.as_ptr(), region.size());
    }
    Ok(Arc::new(memory))
}

/// Names a mapping "guest-ram"; kernels without CONFIG_ANON_VMA_NAME refuse, and then it is told by its size.
fn name(start: *mut u8, size_bytes: usize) {
    // SAFETY: prctl(PR_SET_VMA) changes the name of a mapping and touches no memory; the string is NUL-terminated and
    // lives for the program's life.
    unsafe {
        libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, start, size_bytes, c"guest-ram".as_ptr());
    }
}

/// Gives the RAM to KVM, in slots from 0. Returns how many slots that took.
pub(crate) fn give_to_kvm(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<u32, Error> {
    let mut count = 0;
    for slot in pieces(memory) {
        // SAFETY: the piece is a live mapping of `memory`, which the machine holds until the process ends.
        unsafe { set_slot(vm, slot, false) }.during("giving the guest's memory to KVM")?;
        count += 1;
    }
    Ok(count)
}

/// The RAM as memory slots.
pub(crate) fn pieces(memory: &GuestMemoryMmap) -> impl Iterator<Item = MemorySlot> {
    memory.iter().zip(0..).map(|(region, slot)| MemorySlot {
        slot,
        guest_address: region.start_addr().0,
        size_bytes: region.len(),
        host_address: region.as_ptr() as u64,
    })
}

/// Makes, moves or (with size 0) deletes a memory slot.
///
/// # Safety
/// `slot.host_address` must be the start of a mapping of at least `slot.size_bytes` that outlives the slot: the guest
/// reads and writes it.
pub(crate) unsafe fn set_slot(vm: &VmFd, slot: MemorySlot, read_only: bool) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: if read_only { kvm_bindings::KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: slot.guest_address,
        memory_size: slot.size_bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the caller vouches for the mapping; KVM checks alignment and overlap.
    unsafe { vm.set_user_memory_region(region) }
}
