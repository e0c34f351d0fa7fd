//! The executable of a cell: one sealed copy in memory.

use std::{
    collections::BTreeSet,
    ffi::CStr,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
    sync::Arc,
};

use casemate_spec::Refusal;
use rustix::{
    fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, memfd_create},
    io::Errno,
};

/// What a copy cannot be changed without.
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);
/// The mode of a copy: it can be executed and nothing else.
const MODE: u32 = 0o111;
/// How much of a program its ELF headers may take: linkers put them at its beginning.
const HEADERS_BYTES_MAX: usize = 4096;
/// How much of two programs is compared at once.
const COMPARED_BYTES: usize = 64 << 10;

/// A static executable, copied into memory and sealed: nobody can change what runs, and a cell needs no file system to run
/// it (the copy lies on a mount of the kernel's own, which Landlock leaves alone). Clones share the copy, and so do cells
/// whose program was [`shared`](Self::shared).
///
/// The copy can be executed and not be read by the cell's uid, so the kernel makes the process non-dumpable at exec.
#[derive(Clone, Debug)]
pub struct Program {
    name: &'static CStr,
    copy: Arc<OwnedFd>,
}

impl Program {
    /// Copies and seals the executable `casemate-vmm`, from where the file stands.
    ///
    /// # Errors
    /// As [`seal_as`](Self::seal_as).
    pub fn seal(file: File) -> Result<Self, Refusal> {
        Self::seal_as(c"casemate-vmm", file)
    }

    /// The copy of the executable that a cell with a cgroup in `cgroups` runs, or else a new one: there is one copy a host, as long as a
    /// cell lives.
    ///
    /// # Errors
    /// As [`seal_as`](Self::seal_as).
    pub fn shared(name: &'static CStr, file: File, cgroups: &Path) -> Result<Self, Refusal> {
        match first_copy(&file, executed(name, cgroups)) {
            Some(copy) => Ok(Self { name, copy: Arc::new(copy.into()) }),
            None => Self::seal_as(name, file),
        }
    }

    /// Copies and seals the executable, from where the file stands. Its name is told to itself and shown in /proc.
    ///
    /// # Errors
    /// `cell-program` when it is not an ELF file for x86-64, asks for a loader (there is none in a cell), or can't be
    /// copied.
    pub fn seal_as(name: &'static CStr, mut file: File) -> Result<Self, Refusal> {
        let refuse = |cause: String, remedy: &str| {
            Refusal::new("cell-program", "the program of the cell", cause, remedy)
        };
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            refuse(
                format!("{what}: {error}"),
                "free memory, or see `sysctl vm.memfd_noexec`, which must not be 2",
            )
        };
        let copy = executable_memfd(name).map_err(|error| failed("memfd_create", &error))?;
        let mut copy = File::from(copy);
        // The kernel copies it, once.
        io::copy(&mut file, &mut copy).map_err(|error| failed("copying it", &error))?;
        fchmod(&copy, Mode::from_raw_mode(MODE)).map_err(|error| failed("fchmod", &error))?;
        // F_SEAL_EXEC keeps the mode as it is; kernels before 6.3 don't know it.
        let seal_exec = SealFlags::from_bits_retain(0x20);
        match fcntl_add_seals(&copy, SEALS | seal_exec) {
            Err(Errno::INVAL) => fcntl_add_seals(&copy, SEALS),
            result => result,
        }
        .map_err(|error| failed("sealing it", &error))?;
        let mut headers = vec![0; HEADERS_BYTES_MAX];
        let read = copy.read_at(&mut headers, 0).map_err(|error| failed("reading it", &error))?;
        headers.truncate(read);
        is_static_elf(&headers)
            .map_err(|cause| refuse(cause.into(), "build it as a static program for x86-64"))?;
        Ok(Self { name, copy: Arc::new(copy.into()) })
    }

    /// Its name.
    pub fn name(&self) -> &'static CStr {
        self.name
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.copy.as_fd()
    }
}

/// What processes in the cgroups below `cgroups` execute that was sealed under this name. A process may have ended since, and its number
/// may be another's: what is found has to be looked at.
fn executed(name: &CStr, cgroups: &Path) -> impl Iterator<Item = File> {
    let link = format!("/memfd:{} (deleted)", name.to_string_lossy());
    let directories = fs::read_dir(cgroups).into_iter().flatten().flatten();
    let processes =
        directories.filter_map(|entry| fs::read_to_string(entry.path().join("cgroup.procs")).ok());
    processes
        .flat_map(|text| text.lines().map(|pid| format!("/proc/{pid}/exe")).collect::<Vec<_>>())
        .filter(move |path| fs::read_link(path).is_ok_and(|target| target.as_os_str() == link.as_str()))
        .filter_map(|path| File::open(path).ok())
}

/// The first of `copies` that is as a copy of `file` has to be; each is looked at once, however many execute it.
fn first_copy(file: &File, mut copies: impl Iterator<Item = File>) -> Option<File> {
    let mut others = BTreeSet::new();
    copies.find(|copy| {
        let is_new = copy.metadata().is_ok_and(|metadata| others.insert(metadata.ino()));
        is_new && is_copy(copy, file).unwrap_or(false)
    })
}

/// Whether `copy` has the bytes of `file`, and can be changed by nobody and executed only.
fn is_copy(copy: &File, file: &File) -> io::Result<bool> {
    let (ours, theirs) = (copy.metadata()?, file.metadata()?);
    let owner = rustix::process::geteuid().as_raw();
    if !fcntl_get_seals(copy)?.contains(SEALS)
        || (ours.uid(), ours.mode() & 0o7777) != (owner, MODE)
        || ours.len() != theirs.len()
    {
        return Ok(false);
    }
    let (mut ours, mut theirs) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
    let mut at = 0;
    loop {
        let read = copy.read_at(&mut ours, at)?;
        let Some((ours, theirs)) = ours.get(..read).zip(theirs.get_mut(..read)) else { return Ok(false) };
        if read == 0 {
            return Ok(true);
        }
        file.read_exact_at(theirs, at)?;
        if ours != theirs {
            return Ok(false);
        }
        at = at.saturating_add(read as u64);
    }
}

fn executable_memfd(name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::EXEC) {
        // Before 6.3 there was no flag for it, and all were executable.
        Err(Errno::INVAL) => memfd_create(name, flags),
        result => result,
    }
}

/// Checks the ELF header and looks for a loader among the program headers (System V ABI, "Program Loading").
fn is_static_elf(image: &[u8]) -> Result<(), &'static str> {
    const SHORT: &str = "it ends within its ELF headers";
    const EM_X86_64: u16 = 62;
    const PT_INTERP: u32 = 3;
    if !image.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is not a 64-bit ELF file");
    }
    let u16_at = |at: usize| Some(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?));
    if u16_at(18).ok_or(SHORT)? != EM_X86_64 {
        return Err("it is not for x86-64");
    }
    let offset = u64_at(32).and_then(|offset| usize::try_from(offset).ok()).ok_or(SHORT)?;
    let size = usize::from(u16_at(54).ok_or(SHORT)?);
    for index in 0..usize::from(u16_at(56).ok_or(SHORT)?) {
        let at = size.checked_mul(index).and_then(|distance| distance.checked_add(offset));
        if at.and_then(u32_at).ok_or(SHORT)? == PT_INTERP {
            return Err("it asks for a loader, and a cell has none");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::fcntl_get_seals;
    use std::{
        io::{Seek, Write},
        os::fd::AsRawFd,
    };

    fn sealed(image: &[u8]) -> Result<Program, Refusal> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        file.rewind().unwrap();
        Program::seal(file)
    }

    #[test]
    fn a_static_program_is_sealed_and_can_be_executed_only() {
        let program = Program::seal(File::open("/proc/self/exe").unwrap()).unwrap();
        assert!(
            fcntl_get_seals(&program).unwrap().contains(SealFlags::WRITE | SealFlags::SEAL | SealFlags::GROW)
        );
        let mut copy = File::from(program.as_fd().try_clone_to_owned().unwrap());
        assert!(copy.write_all(b"x").is_err());
        assert_eq!(
            copy.metadata()
                .map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o777)
                .unwrap(),
            0o111
        );
        let link = format!("/proc/self/fd/{}", program.as_fd().as_raw_fd());
        let listed = std::process::Command::new(link).arg("--list").output().unwrap();
        assert!(String::from_utf8(listed.stdout).unwrap().contains("a_static_program_is_sealed"));
    }

    #[test]
    fn a_copy_is_shared_if_it_is_one() {
        let file = || File::open("/proc/self/exe").unwrap();
        let inode = |copy: &File| copy.metadata().unwrap().ino();
        let sealed = || File::from(Program::seal(file()).unwrap().as_fd().try_clone_to_owned().unwrap());
        let (one, other) = (sealed(), sealed());
        let again = || one.try_clone().unwrap();
        let found = first_copy(&file(), [again(), again(), other].into_iter()).unwrap();
        assert_eq!(inode(&found), inode(&one));

        // Another program; one that is shorter; one that is not sealed; and what is no copy at all.
        let different = |change: &dyn Fn(&File)| {
            let mut copy = File::from(executable_memfd(c"casemate-vmm").unwrap());
            io::copy(&mut file(), &mut copy).unwrap();
            change(&copy);
            fchmod(&copy, Mode::from_raw_mode(MODE)).unwrap();
            copy
        };
        let is_shared = |copy: File| first_copy(&file(), [copy].into_iter()).is_some();
        let seal = |copy: &File| fcntl_add_seals(copy, SEALS).unwrap();
        assert!(is_shared(different(&seal)));
        assert!(!is_shared(different(&|_| {})));
        assert!(!is_shared(different(&|copy| {
            copy.write_all_at(b"x", copy.metadata().unwrap().len() - 1).unwrap();
            seal(copy);
        })));
        assert!(!is_shared(different(&|copy| {
            copy.set_len(copy.metadata().unwrap().len() - 1).unwrap();
            seal(copy);
        })));
        let readable = different(&seal);
        fchmod(&readable, Mode::from_raw_mode(0o555)).unwrap();
        assert!(!is_shared(readable));
        assert!(!is_shared(file()));
    }

    #[test]
    fn what_is_not_a_static_program_is_refused() {
        assert!(sealed(b"#!/bin/sh\n").unwrap_err().cause.contains("not a 64-bit ELF"));
        assert!(sealed(b"\x7fELF\x02\x01").unwrap_err().cause.contains("ends within"));
        let shell = Program::seal(File::open("/bin/sh").unwrap()).unwrap_err();
        assert!(shell.cause.contains("a loader"), "{shell}");
    }

    proptest! {
        #[test]
        fn headers_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = is_static_elf(&[b"\x7fELF\x02\x01".as_slice(), &tail].concat());
        }
    }
}
