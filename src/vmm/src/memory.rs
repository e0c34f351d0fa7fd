//! The guest's memory: private anonymous pages, given to KVM and, with assigned devices, to the IOMMU.

use std::{io, ptr, sync::Arc};

use casemate_wire::{Pages, Ram};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

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
    /// Writes are exits.
    pub(crate) read_only: bool,
}

/// Where the guest's memory begins in this process, so that large pages of the host's are large pages of the guest's too:
/// its pieces begin at whole GiB.
const ALIGNMENT: usize = 2 << 20;
/// At the guest's address 0: a firmware's tables, where processors start, and little else. One large page would be cleared for it.
const LOW_BYTES: usize = 2 << 20;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Makes the guest's RAM and names it, so that who looks at the process can tell it from the VMM's own memory. It is
/// there until the process ends.
pub(crate) fn allocate(memory_bytes: u64, ram: Ram) -> Result<Arc<GuestMemoryMmap>, Error> {
    let refuse =
        |cause: &dyn std::fmt::Display| Error::Layout(format!("{memory_bytes} bytes of memory: {cause}"));
    let mut regions = Vec::new();
    for piece in layout::ram(memory_bytes) {
        let size = usize::try_from(piece.size).map_err(|error| refuse(&error))?;
        let start = map(size, ram.pages).map_err(|error| refuse(&error))?;
        name(start, size);
        let low_bytes = if piece.start == 0 { LOW_BYTES.min(size) } else { 0 };
        advise(start, size, low_bytes, ram).map_err(|error| refuse(&error))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: `map` has just made these bytes, readable and writable, and nobody unmaps them.
        let region = unsafe { MmapRegion::build_raw(start, size, READ_WRITE, flags) };
        let region = region.map_err(|error| refuse(&error))?;
        let placed = GuestRegionMmap::new(region, GuestAddress(piece.start));
        regions.push(placed.ok_or_else(|| refuse(&"it reaches past the last address"))?);
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|error| refuse(&error))?;
    Ok(Arc::new(memory))
}

/// Maps fresh memory at a multiple of [`ALIGNMENT`], or of its own pages' size. What isn't of pages that are set aside has
/// bytes on both sides that nobody may touch: what runs past its end faults, and from outside it is told from the VMM's own memory.
fn map(size: usize, pages: Pages) -> io::Result<*mut u8> {
    let (around, protection, kind) = match pages {
        // The kernel aligns them, and keeps as many for this mapping.
        Pages::Huge2Mib => (0, READ_WRITE, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB),
        Pages::Huge1Gib => (0, READ_WRITE, libc::MAP_HUGETLB | libc::MAP_HUGE_1GB),
        Pages::Transparent | Pages::Small => (2 * ALIGNMENT, libc::PROT_NONE, libc::MAP_NORESERVE),
    };
    let length = size.checked_add(around).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | kind;
    // SAFETY: a fresh mapping at a place of the kernel's choosing touches nothing that is there.
    let whole = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, -1, 0) };
    if whole == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let whole = whole.cast::<u8>();
    if around == 0 {
        return Ok(whole);
    }
    let before = match whole.align_offset(ALIGNMENT) {
        0 => ALIGNMENT,
        before => before,
    };
    // SAFETY: `before` is at most ALIGNMENT, so that the bytes lie within the mapping made above, of which nobody knows yet.
    unsafe {
        let start = whole.add(before);
        match libc::mprotect(start.cast(), size, READ_WRITE) {
            0 => Ok(start),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Says where the pages come from and what they are to be, small ones for the first of them, and takes them if wanted.
fn advise(start: *mut u8, size: usize, low_bytes: usize, ram: Ram) -> io::Result<()> {
    let told = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    if let Some(node) = ram.numa_node {
        let mut nodes = [0u64; NODES / 64];
        let word = nodes.get_mut(usize::from(node) / 64).ok_or(io::ErrorKind::InvalidInput)?;
        *word = 1 << (node % 64);
        // Each as wide as a register: of a narrower one, the sixth goes by the stack with whatever stood beside it, and the
        // filter compares all 64 bits.
        let (mode, flags) = (libc::MPOL_BIND as libc::c_ulong, 0 as libc::c_ulong);
        // SAFETY: the range is the fresh mapping; the kernel reads as many bits of `nodes` as it has.
        told(unsafe { libc::syscall(libc::SYS_mbind, start, size, mode, nodes.as_ptr(), NODES, flags) })?;
    }
    let madvise = |size, advice| {
        // SAFETY: advice on a fresh mapping that holds nothing yet, or on its beginning.
        told(unsafe { libc::madvise(start.cast(), size, advice) }.into())
    };
    match ram.pages {
        // A kernel without large pages refuses, and does as well as it can.
        Pages::Transparent => {
            drop(madvise(size, libc::MADV_HUGEPAGE));
            drop(madvise(low_bytes, libc::MADV_NOHUGEPAGE));
        }
        Pages::Small => drop(madvise(size, libc::MADV_NOHUGEPAGE)),
        Pages::Huge2Mib | Pages::Huge1Gib => {}
    }
    // The kernel keeps pages that are set aside for a mapping, but not by node: a guest of one node would be killed
    // for a page that is not there. So they are taken while there is somebody to tell.
    let by_node = ram.numa_node.is_some() && !matches!(ram.pages, Pages::Transparent | Pages::Small);
    if ram.prefault || by_node { madvise(size, libc::MADV_POPULATE_WRITE) } else { Ok(()) }
}

/// Nodes that a set of them is for: Linux's most on x86-64.
const NODES: usize = 1024;

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
        unsafe { set_slot(vm, slot) }.during("giving the guest's memory to KVM")?;
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
        read_only: false,
    })
}

/// Makes, moves or (with size 0) deletes a memory slot.
///
/// # Safety
/// `slot.host_address` must be the start of a mapping of at least `slot.size_bytes` that outlives the slot: the guest
/// reads and writes it.
pub(crate) unsafe fn set_slot(vm: &VmFd, slot: MemorySlot) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.slot,
        flags: if slot.read_only { kvm_bindings::KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: slot.guest_address,
        memory_size: slot.size_bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the caller vouches for the mapping; KVM checks alignment and overlap.
    unsafe { vm.set_user_memory_region(region) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// Memory for tests, of which a page is taken where one is written.
    pub(crate) fn small(memory_bytes: u64) -> Arc<GuestMemoryMmap> {
        allocate(memory_bytes, Ram { pages: Pages::Small, prefault: false, numa_node: None }).unwrap()
    }

    #[test]
    fn pieces_are_aligned_and_hold_what_is_written() {
        for pages in [Pages::Small, Pages::Transparent] {
            let ram = Ram { pages, prefault: false, numa_node: None };
            let memory = allocate((3 << 30) + (64 << 20), ram).unwrap();
            assert_eq!(pieces(&memory).count(), 2);
            for piece in pieces(&memory) {
                assert!(piece.host_address.is_multiple_of(ALIGNMENT as u64), "{piece:x?}");
                let last = GuestAddress(piece.guest_address + piece.size_bytes - 8);
                memory.write_obj(7u64, last).unwrap();
                assert_eq!(memory.read_obj::<u64>(last).unwrap(), 7);
            }
        }
    }

    /// The lines of /proc/self/smaps of what lies between these addresses, with a line more on both sides.
    fn mappings(start: u64, end: u64) -> Vec<(u64, u64, String)> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut found: Vec<(u64, u64, String)> = Vec::new();
        for line in smaps.lines() {
            let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
            let number = |text| u64::from_str_radix(text, 16).ok();
            if let Some((from, to)) = range.and_then(|(from, to)| Some((number(from)?, number(to)?))) {
                found.push((from, to, line.to_owned()));
            } else if let (Some(flags), Some(last)) = (line.strip_prefix("VmFlags:"), found.last_mut()) {
                last.2.push_str(flags);
            }
        }
        found.retain(|(from, to, _)| *to >= start && *from <= end);
        found
    }

    #[test]
    fn nobody_may_touch_what_is_around_it_and_its_first_pages_are_small() {
        let ram = Ram { pages: Pages::Transparent, prefault: false, numa_node: None };
        let memory = allocate(64 << 20, ram).unwrap();
        let piece = pieces(&memory).next().unwrap();
        let (start, end) = (piece.host_address, piece.host_address + piece.size_bytes);
        let [before, low, rest, after] = mappings(start, end).try_into().unwrap();
        assert!(before.2.contains(" ---p ") && after.2.contains(" ---p "), "{before:?} {after:?}");
        assert_eq!((low.0, low.1), (start, start + LOW_BYTES as u64));
        assert!(low.2.contains(" nh") && rest.2.contains(" hg"), "{low:?} {rest:?}");
    }

    #[test]
    fn all_of_it_is_taken_when_asked_for() {
        let memory = allocate(2 << 20, Ram { pages: Pages::Small, prefault: true, numa_node: None }).unwrap();
        let start = pieces(&memory).next().unwrap().host_address;
        let mut present = [0u8; 512];
        // SAFETY: the range is mapped, and `present` has a byte for each of its pages.
        let result = unsafe { libc::mincore(start as *mut _, 2 << 20, present.as_mut_ptr()) };
        assert!(result == 0 && present.iter().all(|page| page & 1 == 1));
    }

    #[test]
    fn a_node_that_is_not_there_is_refused() {
        let ram = Ram { pages: Pages::Small, prefault: false, numa_node: Some(1000) };
        assert!(matches!(allocate(2 << 20, ram), Err(Error::Layout(_))));
        assert!(allocate(2 << 20, Ram { numa_node: Some(5000), ..ram }).is_err());
    }
}
