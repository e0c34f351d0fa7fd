//! Direct boot of a kernel: the kernel, its command line and initrd in memory, and the structure that names them.
//!
//! An ELF kernel starts by PVH (Xen's `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`; Linux's side is
//! `arch/x86/platform/pvh`). A bzImage unpacks itself and starts by Linux's 32-bit boot protocol
//! (`Documentation/arch/x86/boot.rst`). Both begin in the same state of the processor and differ in one register.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use linux_loader::loader::{
    BzImage, Elf, KernelLoader,
    bootparam::{boot_e820_entry, boot_params, setup_header},
    elf::PvhBootCapability,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::{error::Error, layout};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// E820 types in the memory map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
const PAGE: u64 = 4096;
/// `boot.rst`: the version whose header tells how much memory the kernel needs until it has read the memory map.
const BOOT_PROTOCOL: u16 = 0x020a;
/// `boot.rst`, `type_of_loader`: one without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;

/// What the guest boots.
pub(crate) struct Images {
    /// An ELF kernel or a bzImage.
    pub(crate) kernel: OwnedFd,
    /// An initial RAM disk.
    pub(crate) initrd: Option<OwnedFd>,
    /// The kernel's command line.
    pub(crate) command_line: String,
}

/// How the first processor starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its first instruction.
    pub(crate) address: u64,
    /// PVH: where the start info is.
    pub(crate) ebx: u64,
    /// Linux's boot protocol: where the boot parameters are.
    pub(crate) esi: u64,
}

/// A kernel in memory.
enum Kernel {
    Pvh { entry: u64, end: u64 },
    // The header is large, and there is one.
    Linux(Box<setup_header>),
}

/// Loads everything and returns where the first processor starts.
pub(crate) fn load(memory: &GuestMemoryMmap, images: Images, rsdp: u64) -> Result<Entry, Error> {
    let kernel = load_kernel(memory, &mut File::from(images.kernel))?;
    let room = kernel.room_for_initrd(memory)?;
    let initrd = images.initrd.map(|initrd| load_initrd(memory, File::from(initrd), room)).transpose()?;
    let mut command_line = images.command_line.into_bytes();
    command_line.push(0);
    put(memory, layout::COMMAND_LINE, &command_line)?;
    let map = memory_map(memory);
    match kernel {
        Kernel::Pvh { entry, .. } => {
            write_start_info(memory, &map, initrd, rsdp)?;
            Ok(Entry { address: entry, ebx: layout::START_INFO, esi: 0 })
        }
        Kernel::Linux(header) => {
            let parameters = boot_parameters(*header, &map, initrd, rsdp);
            put(memory, layout::BOOT_PARAMETERS, parameters.as_slice())?;
            Ok(Entry { address: u64::from(header.code32_start), ebx: 0, esi: layout::BOOT_PARAMETERS })
        }
    }
}

fn load_kernel(memory: &GuestMemoryMmap, image: &mut File) -> Result<Kernel, Error> {
    let refuse = |cause: &dyn std::fmt::Display| Error::KernelImage(cause.to_string());
    let mut magic = [0; 4];
    let is_elf = image.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF";
    if is_elf {
        let loaded = Elf::load(memory, None, image, None).map_err(|error| refuse(&error))?;
        return match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => {
                Ok(Kernel::Pvh { entry: entry.0, end: loaded.kernel_end })
            }
            _ => Err(refuse(&"it has no PVH entry (a kernel built with CONFIG_PVH has)")),
        };
    }
    let loaded = BzImage::load(memory, None, image, Some(GuestAddress(layout::HIGH_RAM)))
        .map_err(|error| refuse(&error))?;
    let header = loaded.setup_header.ok_or_else(|| refuse(&"it has no setup header"))?;
    let version = header.version;
    if version < BOOT_PROTOCOL {
        return Err(refuse(&format_args!("its boot protocol, {version:#06x}, is older than 2.10")));
    }
    Ok(Kernel::Linux(Box::new(header)))
}

impl Kernel {
    /// Where an initrd may lie: above what the kernel takes to unpack itself, within what it can reach, below 4 GiB.
    fn room_for_initrd(&self, memory: &GuestMemoryMmap) -> Result<layout::Range, Error> {
        let low_end = memory.iter().next().map_or(0, |region| {
            use vm_memory::GuestMemoryRegion;
            region.len()
        });
        let (start, end) = match self {
            Self::Pvh { end, .. } => (*end, low_end),
            Self::Linux(header) => {
                let (loaded, preferred) = (u64::from(header.code32_start), header.pref_address);
                let unpacked = loaded.max(preferred).checked_add(u64::from(header.init_size));
                (unpacked.unwrap_or(u64::MAX), low_end.min(u64::from(header.initrd_addr_max) + 1))
            }
        };
        if start > low_end {
            let cause = format!("it needs {} MiB of memory to unpack itself", start.div_ceil(1 << 20));
            return Err(Error::KernelImage(cause));
        }
        let start = start.max(layout::HIGH_RAM);
        Ok(layout::Range { start, size: end.saturating_sub(start) })
    }
}

/// Puts the initrd at the end of the room.
fn load_initrd(memory: &GuestMemoryMmap, mut initrd: File, room: layout::Range) -> Result<(u64, u64), Error> {
    let refuse = |cause: &dyn std::fmt::Display| Error::Initrd(cause.to_string());
    let size = initrd.seek(SeekFrom::End(0)).map_err(|error| refuse(&error))?;
    initrd.rewind().map_err(|error| refuse(&error))?;
    let start = room.end().checked_sub(size).map(|start| start / PAGE * PAGE);
    let start = start.filter(|start| *start >= room.start).ok_or_else(|| {
        refuse(&format_args!("{size} bytes do not fit into the guest's memory beside the kernel"))
    })?;
    let length = usize::try_from(size).map_err(|error| refuse(&error))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut initrd, length)
        .map_err(|error| refuse(&error))?;
    Ok((start, size))
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    initrd: Option<(u64, u64)>,
    rsdp: u64,
) -> Result<(), Error> {
    let map_bytes: Vec<u8> = map.iter().flat_map(|entry| entry.bytes()).collect();
    put(memory, layout::MEMORY_MAP, &map_bytes)?;
    if let Some((address, size)) = initrd {
        let module: Vec<u8> = [address, size, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        put(memory, layout::MODULES, &module)?;
    }
    put(memory, layout::START_INFO, &start_info(initrd.is_some(), map.len(), rsdp))
}

/// `struct boot_params`: the image's own header, filled in, and what a boot loader tells beside it.
fn boot_parameters(
    header: setup_header,
    map: &[MapEntry],
    initrd: Option<(u64, u64)>,
    rsdp: u64,
) -> Box<boot_params> {
    let mut parameters = Box::new(boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() });
    parameters.hdr.type_of_loader = LOADER_UNDEFINED;
    parameters.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    // Both are below 4 GiB: see `room_for_initrd`.
    let (address, size) = initrd.unwrap_or_default();
    (parameters.hdr.ramdisk_image, parameters.hdr.ramdisk_size) = (address as u32, size as u32);
    parameters.e820_entries = map.len() as u8;
    for (place, entry) in parameters.e820_table.iter_mut().zip(map) {
        *place = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind };
    }
    parameters
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
    use proptest::prelude::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> OwnedFd {
        let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file.into()
    }

    /// A bzImage of protocol `version` whose code is one sector and that unpacks itself within `init_size` bytes.
    fn bz_image(version: u16, init_size: u32) -> Vec<u8> {
        let mut image = vec![0; 0x600];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        set(0x1f1, &[1]);
        set(0x202, b"HdrS");
        set(0x206, &version.to_le_bytes());
        set(0x211, &[1]);
        set(0x214, &0x10_0000u32.to_le_bytes());
        set(0x22c, &0x7fff_ffffu32.to_le_bytes());
        set(0x258, &0x100_0000u64.to_le_bytes());
        set(0x260, &init_size.to_le_bytes());
        set(0x400, b"first instruction");
        image
    }

    fn images(kernel: &[u8], initrd: Option<&[u8]>) -> Images {
        Images { kernel: file(kernel), initrd: initrd.map(file), command_line: "quiet".into() }
    }

    const ROOM: layout::Range = layout::Range { start: layout::HIGH_RAM, size: 63 << 20 };

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = crate::memory::tests::small(64 << 20);
        let old = bz_image(0x0209, 0x1000);
        let mut low = bz_image(0x020f, 0x1000);
        low[0x214..0x218].copy_from_slice(&0x1000u32.to_le_bytes());
        let headless = &bz_image(0x020f, 0)[..0x204];
        let broken = [b"".as_slice(), b"MZ no kernel", &[0x7f; 4096], b"\x7fELF\x02\x01\x01"];
        for bytes in broken.into_iter().chain([old.as_slice(), &low, headless]) {
            let refused = load(&memory, images(bytes, None), 0);
            assert!(matches!(refused, Err(Error::KernelImage(_))), "{refused:?}");
        }
    }

    #[test]
    fn a_bzimage_starts_by_linux_own_protocol() {
        let memory = crate::memory::tests::small(64 << 20);
        let entry = load(&memory, images(&bz_image(0x020f, 8 << 20), Some(&[7; 5000])), 0xE_0000).unwrap();
        assert_eq!(entry, Entry { address: 0x10_0000, ebx: 0, esi: layout::BOOT_PARAMETERS });
        let parameters: boot_params = memory.read_obj(GuestAddress(entry.esi)).unwrap();
        let (magic, rsdp, header) = (parameters.hdr.header, parameters.acpi_rsdp_addr, parameters.hdr);
        assert_eq!((magic, rsdp), (0x5372_6448, 0xE_0000));
        let (initrd, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!((initrd, size, header.type_of_loader), ((64 << 20) - 8192, 5000, 0xFF));
        assert_eq!(usize::from(parameters.e820_entries), memory_map(&memory).len());
        let mut code = [0; 17];
        memory.read_slice(&mut code, GuestAddress(entry.address)).unwrap();
        assert_eq!(&code, b"first instruction");
        let mut line = [0; 6];
        memory.read_slice(&mut line, GuestAddress(u64::from(header.cmd_line_ptr))).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn a_bzimage_that_cannot_unpack_itself_is_refused() {
        let memory = crate::memory::tests::small(64 << 20);
        let refused = load(&memory, images(&bz_image(0x020f, 49 << 20), None), 0).unwrap_err();
        assert!(refused.to_string().contains("it needs 65 MiB"), "{refused}");
        let crowded = load(&memory, images(&bz_image(0x020f, 48 << 20), Some(b"initrd")), 0);
        assert!(matches!(crowded, Err(Error::Initrd(_))), "{crowded:?}");
    }

    #[test]
    fn an_initrd_goes_to_the_end_of_its_room_or_is_refused() {
        let memory = crate::memory::tests::small(64 << 20);
        let (start, size) = load_initrd(&memory, File::from(file(&[7; 5000])), ROOM).unwrap();
        assert_eq!((start, size), ((64 << 20) - 8192, 5000));
        let large = File::from(file(&[]));
        large.set_len(64 << 20).unwrap();
        assert!(matches!(load_initrd(&memory, large, ROOM), Err(Error::Initrd(_))));
    }

    #[test]
    fn start_info_has_its_size() {
        assert_eq!(start_info(true, 5, 0xE0000).len(), 56);
    }

    proptest! {
        /// Whatever a bzImage's header says, it is refused or lies in memory; nothing panics.
        #[test]
        fn any_header_is_loaded_or_refused(header in proptest::collection::vec(any::<u8>(), 0x7b), magic: bool) {
            let memory = crate::memory::tests::small(64 << 20);
            let mut image = bz_image(0x020f, 8 << 20);
            image[0x1f1..0x1f1 + 0x7b].copy_from_slice(&header);
            if magic {
                image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
            }
            if let Ok(entry) = load(&memory, images(&image, Some(b"initrd")), 0) {
                prop_assert!((layout::HIGH_RAM..64 << 20).contains(&entry.address));
            }
        }
    }
}
