//! Disks, kernels and initrds: opened here, handed over as descriptors.

use std::{
    fmt::Display,
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use casemate_spec::Refusal;
use rustix::fs::{FlockOperation, OFlags, fcntl_getfl, fcntl_setfl, flock};

/// The unit of a virtio disk (virtio 1.x, 5.2).
const SECTOR_BYTES: u64 = 512;

/// An open image.
#[derive(Debug)]
pub struct Image {
    /// Carries the lock, if any: it is free when the last copy is closed.
    pub fd: OwnedFd,
    /// Size of what is in it: of the disk, or of the file.
    pub size_bytes: u64,
    /// Size of the file or block device itself.
    pub file_bytes: u64,
    /// The file that was opened, as the kernel names it: absolute, without links. What the caller's path leads to by now
    /// may be another.
    pub path: PathBuf,
}

/// The kernel's name for an open file.
fn path_of(file: &File) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Opens a raw disk: a regular file or a block device, of whole sectors. One guest may write to it, or several may
/// read: a lock (flock) on the file holds that, which other programs heed only if they lock too.
///
/// # Errors
/// `disk-unreadable`, `disk-not-a-disk`, `disk-empty`, `disk-size`, `disk-in-use`.
pub fn open_image(path: &Path, read_only: bool) -> Result<Image, Refusal> {
    let (file, size_bytes) = open_disk(path, read_only)?;
    if size_bytes == 0 {
        return Err(Refusal::new(
            "disk-empty",
            path.display(),
            "this disk has no bytes",
            "make it larger: truncate -s 1G FILE",
        ));
    }
    if size_bytes % SECTOR_BYTES != 0 {
        let cause = format!("its size, {size_bytes} bytes, is not a multiple of {SECTOR_BYTES}");
        let remedy = "say what it is, if it is not raw (format = \"qcow2\"), or pad the file";
        return Err(Refusal::new("disk-size", path.display(), cause, remedy));
    }
    lock_disk(file, path, read_only, size_bytes)
}

/// Opens a qcow2 disk, as [`open_image`] does a raw one. Of its content no more is looked at than the magic number and the
/// size of the disk, for nobody outside the guest's cell parses what the guest may have written.
///
/// # Errors
/// `disk-unreadable`, `disk-not-a-disk`, `disk-format`, `disk-size`, `disk-in-use`.
pub fn open_qcow2(path: &Path, read_only: bool) -> Result<Image, Refusal> {
    const MAGIC: [u8; 4] = *b"QFI\xfb";
    let (file, _) = open_disk(path, read_only)?;
    let mut start = [0; 32];
    let what = What { name: "disk", writes: !read_only };
    read_start(&file, &mut start).map_err(|error| what.unreadable(path, error))?;
    let [m0, m1, m2, m3, .., s0, s1, s2, s3, s4, s5, s6, s7] = start;
    if [m0, m1, m2, m3] != MAGIC {
        let remedy = "take format = \"qcow2\" out, or make such an image: qemu-img convert -O qcow2";
        return Err(Refusal::new("disk-format", path.display(), "this is no qcow2 image", remedy));
    }
    let size_bytes = u64::from_be_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    if size_bytes == 0 || size_bytes % SECTOR_BYTES != 0 || size_bytes > QCOW2_DISK_MAX_BYTES {
        let cause = format!("it says that it holds a disk of {size_bytes} bytes");
        let remedy = "use an image of whole sectors of 512 bytes, up to 64 TiB";
        return Err(Refusal::new("disk-size", path.display(), cause, remedy));
    }
    lock_disk(file, path, read_only, size_bytes)
}

/// What a first-level table of 1 MiB can map with clusters of 64 KiB.
const QCOW2_DISK_MAX_BYTES: u64 = 64 << 40;

/// A file or block device, and its size.
fn open_disk(path: &Path, read_only: bool) -> Result<(File, u64), Refusal> {
    let what = What { name: "disk", writes: !read_only };
    let (file, kind) = what.open(path)?;
    if kind == Kind::Other {
        let remedy = "name an image file or a block device";
        return Err(Refusal::new(
            "disk-not-a-disk",
            path.display(),
            "this is neither a file nor a block device",
            remedy,
        ));
    }
    let size_bytes = size(&file).map_err(|error| what.unreadable(path, error))?;
    Ok((file, size_bytes))
}

fn lock_disk(file: File, path: &Path, read_only: bool, size_bytes: u64) -> Result<Image, Refusal> {
    let what = What { name: "disk", writes: !read_only };
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    flock(&file, lock).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => in_use(path, error),
        _ => what.unreadable(path, format!("it cannot be locked: {error}")),
    })?;
    let opened = path_of(&file).map_err(|error| what.unreadable(path, error))?;
    let file_bytes = size(&file).map_err(|error| what.unreadable(path, error))?;
    Ok(Image { fd: file.into(), size_bytes, file_bytes, path: opened })
}

/// Opens a guest kernel: an ELF file for x86-64 (`vmlinux`), or a bzImage (`vmlinuz`).
///
/// # Errors
/// `kernel-unreadable`, `kernel-format`.
pub fn open_kernel(path: &Path) -> Result<Image, Refusal> {
    let image = open_file("kernel", path)?;
    let mut start = [0u8; 1024];
    let file = File::from(image.fd);
    let read = read_start(&file, &mut start)
        .map_err(|error| What { name: "kernel", writes: false }.unreadable(path, error))?;
    if let Some(found) = not_a_kernel(start.get(..read).unwrap_or_default()) {
        return Err(Refusal::new(
            "kernel-format",
            path.display(),
            format!("this is {found}, not a kernel for x86-64"),
            "name a distribution's vmlinuz (a bzImage), or an uncompressed ELF vmlinux",
        ));
    }
    Ok(Image { fd: file.into(), ..image })
}

/// Opens an initial RAM disk: any file that is not empty.
///
/// # Errors
/// `initrd-unreadable`, `initrd-empty`.
pub fn open_initrd(path: &Path) -> Result<Image, Refusal> {
    let image = open_file("initrd", path)?;
    if image.size_bytes == 0 {
        return Err(Refusal::new(
            "initrd-empty",
            path.display(),
            "this file has no bytes",
            "name the initrd that belongs to the kernel",
        ));
    }
    Ok(image)
}

/// The largest option ROM: the register has bits for no larger one.
pub const ROM_BYTES_MAX: u64 = 16 << 20;

/// Opens an option ROM (PCI Firmware 3.0, 5.1).
///
/// # Errors
/// `rom-unreadable`, `rom-format`.
pub fn open_rom(path: &Path) -> Result<Image, Refusal> {
    let image = open_file("rom", path)?;
    let wrong = |cause: &str| {
        let remedy =
            "name the device's ROM as its vendor gives it, or as `cat /sys/bus/pci/devices/ADDRESS/rom` does";
        Refusal::new("rom-format", path.display(), cause, remedy)
    };
    if image.size_bytes > ROM_BYTES_MAX {
        return Err(wrong("an option ROM has at most 16 MiB"));
    }
    let file = File::from(image.fd);
    let mut start = [0u8; 2];
    let read = read_start(&file, &mut start)
        .map_err(|error| What { name: "rom", writes: false }.unreadable(path, error))?;
    if start.get(..read) != Some(&[0x55, 0xaa]) {
        return Err(wrong("an option ROM begins with the bytes 55 aa, and this does not"));
    }
    Ok(Image { fd: file.into(), ..image })
}

fn open_file(name: &'static str, path: &Path) -> Result<Image, Refusal> {
    let what = What { name, writes: false };
    let (file, kind) = what.open(path)?;
    if kind != Kind::File {
        return Err(what.unreadable(path, "it is not a regular file"));
    }
    let size_bytes = size(&file).map_err(|error| what.unreadable(path, error))?;
    let opened = path_of(&file).map_err(|error| what.unreadable(path, error))?;
    Ok(Image { fd: file.into(), size_bytes, file_bytes: size_bytes, path: opened })
}

/// What is opened, for messages.
struct What {
    name: &'static str,
    writes: bool,
}

#[derive(PartialEq, Eq)]
enum Kind {
    File,
    Block,
    Other,
}

impl What {
    fn open(&self, path: &Path) -> Result<(File, Kind), Refusal> {
        // Without O_NONBLOCK a FIFO would hold us until somebody opens its other end. O_EXCL (on a block device, and
        // without O_CREAT) fails when the host has it mounted or in a volume.
        let is_block = path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
        let exclusive = if is_block && self.writes { libc::O_EXCL } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(self.writes)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | exclusive)
            .open(path)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBUSY) => in_use(path, error),
                Some(libc::EISDIR) => self.unreadable(path, "it is a directory"),
                _ => self.unreadable(path, error),
            })?;
        let kind = file.metadata().map_err(|error| self.unreadable(path, error))?.file_type();
        let kind = if kind.is_file() {
            Kind::File
        } else if kind.is_block_device() {
            Kind::Block
        } else {
            Kind::Other
        };
        // io_uring would take O_NONBLOCK for a wish to fail instead of wait.
        fcntl_getfl(&file)
            .and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK))
            .map_err(|error| self.unreadable(path, error))?;
        Ok((file, kind))
    }

    fn unreadable(&self, path: &Path, cause: impl Display) -> Refusal {
        let (code, access) = match self.name {
            "kernel" => ("kernel-unreadable", "read"),
            "initrd" => ("initrd-unreadable", "read"),
            "rom" => ("rom-unreadable", "read"),
            _ if self.writes => ("disk-unreadable", "read and written"),
            _ => ("disk-unreadable", "read"),
        };
        let remedy = format!("name a {} that can be {access} by the user who starts the guest", self.name);
        Refusal::new(code, path.display(), format!("the {} cannot be opened: {cause}", self.name), remedy)
    }
}

fn in_use(path: &Path, error: impl Display) -> Refusal {
    Refusal::new(
        "disk-in-use",
        path.display(),
        format!("a guest or the host uses this disk ({error})"),
        "stop what uses it (fuser -v FILE; umount), or let all its guests only read it (read_only = true)",
    )
}

/// By seeking, which tells a block device's size too.
fn size(mut file: &File) -> io::Result<u64> {
    let size_bytes = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(size_bytes)
}

fn read_start(file: &File, start: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = start.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, u64::try_from(filled).unwrap_or(u64::MAX))? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// What the file is instead of a 64-bit x86 ELF executable or a bzImage; `None` when it is one.
fn not_a_kernel(start: &[u8]) -> Option<String> {
    /// Where a bzImage's setup header has its magic (`Documentation/arch/x86/boot.rst`).
    const BZ_IMAGE: (usize, &[u8]) = (0x202, b"HdrS");
    const ELF_64_LITTLE: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
    const EM_X86_64: [u8; 2] = [62, 0];
    if start.starts_with(&ELF_64_LITTLE) {
        let machine = start.get(18..20)?;
        return (machine != EM_X86_64).then(|| format!("an ELF file for machine {machine:?}"));
    }
    let magic = |offset: usize, magic: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    if magic(BZ_IMAGE.0, BZ_IMAGE.1) {
        return None;
    }
    let known = [
        (0, b"\x7fELF".as_slice(), "an ELF file of 32 bits or big-endian"),
        (4, b"zimg", "a compressed EFI kernel of another architecture"),
        (0, b"\x1f\x8b", "gzip-compressed"),
        (0, b"\x28\xb5\x2f\xfd", "zstd-compressed"),
        (0, b"\xfd7zXZ", "xz-compressed"),
        (0, b"070701", "a cpio archive (an initrd?)"),
        (0, b"MZ", "an EFI program"),
        (0, b"QFI\xfb", "a qcow2 disk"),
        (510, b"\x55\xaa", "a disk with a boot sector"),
    ];
    let text = |bytes: &[u8]| bytes.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace());
    Some(match known.into_iter().find(|(offset, bytes, _)| magic(*offset, bytes)) {
        Some((_, _, name)) => name.to_owned(),
        None if start.is_empty() => "empty".to_owned(),
        None if text(start) => "text".to_owned(),
        None => "of no known format".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs, path::PathBuf};

    fn file(directory: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
        let path = directory.path().join("file");
        fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn disks_of_whole_sectors() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory, &[0; 1024]);
        let image = open_image(&path, false).unwrap();
        assert_eq!(image.size_bytes, 1024);
        assert!(!fcntl_getfl(&image.fd).unwrap().contains(OFlags::NONBLOCK));
        drop(image);
        for (bytes, code) in [(0, "disk-empty"), (511, "disk-size"), (513, "disk-size")] {
            let path = file(&directory, &vec![0; bytes]);
            assert_eq!(open_image(&path, true).unwrap_err().code, code);
        }
        assert_eq!(open_image(&directory.path().join("none"), true).unwrap_err().code, "disk-unreadable");
        assert_eq!(open_image(directory.path(), true).unwrap_err().code, "disk-not-a-disk");
        assert_eq!(open_image(Path::new("/dev/null"), true).unwrap_err().code, "disk-not-a-disk");
    }

    #[test]
    fn qcow2_is_opened_by_its_magic_and_size() {
        let directory = tempfile::tempdir().unwrap();
        let image = |magic: &[u8], size: u64| {
            let bytes = [magic, &[0; 20], &size.to_be_bytes(), &[0; 7]].concat();
            open_qcow2(&file(&directory, &bytes), false)
        };
        let opened = image(b"QFI\xfb", 1 << 40).unwrap();
        assert_eq!((opened.size_bytes, opened.file_bytes), (1 << 40, 39));
        drop(opened);
        assert_eq!(image(b"QFI\xfc", 512).unwrap_err().code, "disk-format");
        for size in [0, 100, u64::MAX] {
            assert_eq!(image(b"QFI\xfb", size).unwrap_err().code, "disk-size");
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let directory = tempfile::tempdir().unwrap();
        let path = file(&directory, &[0; 512]);
        let code = |read_only| open_image(&path, read_only).map(|_| ()).map_err(|refusal| refusal.code);
        let writer = open_image(&path, false).unwrap();
        let copy = writer.fd.try_clone().unwrap();
        drop(writer);
        assert_eq!(
            (code(false), code(true)),
            (Err("disk-in-use"), Err("disk-in-use")),
            "a copy holds the lock"
        );
        drop(copy);
        let _reader = open_image(&path, true).unwrap();
        assert_eq!((code(false), code(true)), (Err("disk-in-use"), Ok(())));
    }

    #[test]
    fn kernels_and_what_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let mut elf = vec![0u8; 64];
        elf[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        elf[18] = 62;
        assert_eq!(open_kernel(&file(&directory, &elf)).unwrap().size_bytes, 64);
        let mut bz_image = vec![0u8; 1024];
        bz_image[..2].copy_from_slice(b"MZ");
        bz_image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(open_kernel(&file(&directory, &bz_image)).unwrap().size_bytes, 1024);
        elf[18] = 183;
        for (bytes, found) in [
            (&bz_image[..0x200], "an EFI program"),
            (b"MZ\0\0zimg", "another architecture"),
            (elf.as_slice(), "machine [183, 0]"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"kernel = 1\n", "text"),
            (b"", "empty"),
            (b"\x00\x01", "no known format"),
        ] {
            let refusal = open_kernel(&file(&directory, bytes)).unwrap_err();
            assert_eq!(refusal.code, "kernel-format");
            assert!(refusal.cause.contains(found), "{refusal}");
        }
        assert_eq!(open_kernel(directory.path()).unwrap_err().code, "kernel-unreadable");
        assert_eq!(open_kernel(Path::new("/nowhere")).unwrap_err().code, "kernel-unreadable");
    }

    #[test]
    fn initrds() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(open_initrd(&file(&directory, b"")).unwrap_err().code, "initrd-empty");
        assert_eq!(open_initrd(&file(&directory, b"x")).unwrap().size_bytes, 1);
    }

    proptest! {
        #[test]
        fn any_start_is_judged(start in prop::collection::vec(any::<u8>(), 0..600)) {
            let elf = start.starts_with(b"\x7fELF\x02\x01");
            let bz_image = start.get(0x202..0x206) == Some(b"HdrS");
            prop_assert!(elf || bz_image || not_a_kernel(&start).is_some());
        }
    }
}
