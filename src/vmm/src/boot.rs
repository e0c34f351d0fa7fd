//! Direct boot of an ELF kernel by PVH: the kernel, its command line and initrd in memory, and the start info that names
//! them.
//!
//! Follows Xen's `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`; Linux's side is
//! `arch/x86/platform/pvh`.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::fd::OwnedFd,
};

use linux_loader::loader::{Elf, KernelLoader, elf::PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::{error::Error, layout};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// E820 types in the memory map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// The kernel unpacks itself below this; an initrd goes as high as it can.
const PAGE: u64 = 4096;

/// What the guest boots.
pub(crate) struct Images {
    /// An ELF kernel.
    pub(crate) kernel: OwnedFd,
    /// An initial RAM disk.
    pub(crate) initrd: Option<OwnedFd>,
    /// The kernel's command line.
    pub(crate) command_line: String,
}

/// Loads everything and returns the address at which the first processor starts.
pub(crate) fn load(memory: &GuestMemoryMmap, images: Images, rsdp: u64) -> Result<u64, Error> {
    let entry = load_kernel(memory, &mut File::from(images.kernel))?;
    let initrd = images.initrd.map(|initrd| load_initrd(memory, File::from(initrd))).transpose()?;
    let mut command_line = images.command_line.into_bytes();
    command_line.push(0);
    put(memory, layout::COMMAND_LINE, &command_line)?;
    let map = memory_map(memory);
    let map_bytes: Vec<u8> = map.iter().flat_map(|entry| entry.bytes()).collect();
    put(memory, layout::MEMORY_MAP, &map_bytes)?;
    if let Some((address, size)) = initrd {
        let module: Vec<u8> = [address, size, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        put(memory, layout::MODULES, &module)?;
    }
    put(memory, layout::START_INFO, &start_info(initrd.is_some(), map.len(), rsdp))?;
    Ok(entry)
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<u64, Error> {
    let loaded =
        Elf::load(memory, None, kernel, None).map_err(|error| Error::KernelImage(error.to_string()))?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.0),
        _ => Err(Error::KernelImage("it has no PVH entry (a kernel built with CONFIG_PVH has)".into())),
    }
}

/// Puts the initrd at the end of the RAM below 4 GiB.
fn load_initrd(memory: &GuestMemoryMmap, mut initrd: File) -> Result<(u64, u64), Error> {
    let refuse = |cause: &dyn std::fmt::Display| Error::Initrd(cause.to_string());
    let size = initrd.seek(SeekFrom::End(0)).map_err(|error| refuse(&error))?;
    initrd.rewind().map_err(|error| refuse(&error))?;
    let low_end = memory.iter().next().map_or(0, |region| {
        use vm_memory::GuestMemoryRegion;
        region.len()
    });
    let start =
        low_end.checked_sub(size).map(|start| start / PAGE * PAGE).filter(|start| *start >= layout::HIGH_RAM);
    let start =
        start.ok_or_else(|| refuse(&format_args!("{size} bytes do not fit into the guest's memory")))?;
    let length = usize::try_from(size).map_err(|error| refuse(&error))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut initrd, length)
        .map_err(|error| refuse(&error))?;
    Ok((start, size))
}

/// `struct hvm_memmap_table_entry`.
struct MapEntry {
    start: u64,
    size: u64,
    kind: u32,
}

impl MapEntry {
    fn bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.kind.to_le_bytes());
        bytes
    }
}

fn memory_map(memory: &GuestMemoryMmap) -> Vec<MapEntry> {
    use vm_memory::GuestMemoryRegion;
    let mut map = vec![
        MapEntry { start: 0, size: layout::LOW_END, kind: RAM },
        MapEntry { start: layout::ACPI, size: layout::HIGH_RAM - layout::ACPI, kind: RESERVED },
    ];
    for region in memory.iter() {
        let (start, end) =
            (region.start_addr().0.max(layout::HIGH_RAM), region.start_addr().0 + region.len());
        map.push(MapEntry { start, size: end - start, kind: RAM });
    }
    // Linux uses ECAM only where the map, or ACPI, reserves it.
    map.push(MapEntry { start: layout::ECAM.start, size: layout::ECAM.size, kind: RESERVED });
    map
}

/// `struct hvm_start_info`, version 1.
fn start_info(initrd: bool, map_entries: usize, rsdp: u64) -> Vec<u8> {
    let words = |list: &[u32]| list.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let longs = |list: &[u64]| list.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut bytes = words(&[MAGIC, 1, 0, u32::from(initrd)]);
    bytes.extend(longs(&[layout::MODULES, layout::COMMAND_LINE, rsdp, layout::MEMORY_MAP]));
    bytes.extend(words(&[map_entries as u32, 0]));
    bytes
}

pub(crate) fn put(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| Error::Layout(format!("writing {} bytes at {address:#x}: {error}", bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> OwnedFd {
        let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file.into()
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        for bytes in [&b""[..], b"MZ not a kernel", &[0x7f; 4096], b"\x7fELF\x02\x01\x01"] {
            let images = Images { kernel: file(bytes), initrd: None, command_line: String::new() };
            assert!(matches!(load(&memory, images, 0), Err(Error::KernelImage(_))));
        }
    }

    #[test]
    fn an_initrd_goes_to_the_end_of_low_memory_or_is_refused() {
        let memory = crate::memory::allocate(64 << 20).unwrap();
        let (start, size) = load_initrd(&memory, File::from(file(&[7; 5000]))).unwrap();
        assert_eq!((start, size), ((64 << 20) - 8192, 5000));
        let large = File::from(file(&[]));
        large.set_len(64 << 20).unwrap();
        assert!(matches!(load_initrd(&memory, large), Err(Error::Initrd(_))));
    }

    #[test]
    fn start_info_has_its_size() {
        assert_eq!(start_info(true, 5, 0xE0000).len(), 56);
    }
}
