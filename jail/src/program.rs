//! The executable of a cell: one sealed copy in memory.

use std::{
    ffi::{CStr, CString},
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
        let running = label(name, &file).ok().and_then(|label| executed(&label, cgroups).find(is_sealed));
        match running {
            Some(copy) => Ok(Self { name, copy: Arc::new(copy.into()) }),
            None => Self::seal_as(name, file),
        }
    }

    /// Copies and seals the executable, from where the file stands. Its name is told to itself; in /proc, what is shown behind it says
    /// of which file this is the copy.
    ///
    /// # Errors
    /// `cell-program` when it is not an ELF file for x86-64, asks for a loader (there is none in a cell), can't be copied, or is changed
    /// meanwhile.
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
        let label_of = |file: &File| label(name, file).map_err(|error| failed("looking at it", &error));
        let label = label_of(&file)?;
        let copy = executable_memfd(&label).map_err(|error| failed("memfd_create", &error))?;
        let mut copy = File::from(copy);
        // The kernel copies it, once.
        io::copy(&mut file, &mut copy).map_err(|error| failed("copying it", &error))?;
        if label_of(&file)? != label {
            return Err(refuse("it was changed while it was copied".into(), "try again when that has ended"));
        }
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

/// What a copy is called: a file that was written or replaced since has another name, so that a copy is known without being read.
fn label(name: &CStr, file: &File) -> io::Result<CString> {
    let is = file.metadata()?;
    let (device, inode, bytes) = (is.dev(), is.ino(), is.len());
    let name = name.to_string_lossy();
    let label = format!("{name}@{device:x}.{inode:x}.{bytes:x}.{:x}.{:x}", is.ctime(), is.ctime_nsec());
    Ok(CString::new(label)?)
}

/// What processes in the cgroups below `cgroups` execute that is called so. Whoever may make a file in memory calls it as he likes, and
/// a process's number may be another's by now: what is found has to be looked at.
fn executed(label: &CStr, cgroups: &Path) -> impl Iterator<Item = File> {
    let link = format!("/memfd:{} (deleted)", label.to_string_lossy());
    let entries = fs::read_dir(cgroups).into_iter().flatten().flatten();
    // Beside the cgroups' folders there are some 60 files of the one that they are in.
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let processes =
        directories.filter_map(|entry| fs::read_to_string(entry.path().join("cgroup.procs")).ok());
    processes
        .flat_map(|text| text.lines().map(|pid| format!("/proc/{pid}/exe")).collect::<Vec<_>>())
        .filter(move |path| fs::read_link(path).is_ok_and(|target| target.as_os_str() == link.as_str()))
        .filter_map(|path| File::open(path).ok())
}

/// Whether it was sealed here: by the user who this process is, who alone may make such a file his, so that nobody else can change it.
fn is_sealed(copy: &File) -> bool {
    let owner = rustix::process::geteuid().as_raw();
    let is_ours = |is: fs::Metadata| (is.uid(), is.mode() & 0o7777) == (owner, MODE);
    copy.metadata().is_ok_and(is_ours) && fcntl_get_seals(copy).is_ok_and(|seals| seals.contains(SEALS))
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

    fn itself() -> File {
        File::open("/proc/self/exe").unwrap()
    }

    /// What the next test executes.
    #[test]
    fn waits_if_it_is_asked_to() {
        if std::env::var_os("CASEMATE_TEST_WAITS").is_some() {
            io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
        }
    }

    #[test]
    fn a_copy_that_is_executed_is_shared() {
        let inode = |program: &Program| rustix::fs::fstat(program).unwrap().st_ino;
        let program = Program::seal(itself()).unwrap();
        let link = format!("/proc/self/fd/{}", program.as_fd().as_raw_fd());
        let mut child = std::process::Command::new(link)
            .args(["--exact", "program::tests::waits_if_it_is_asked_to"])
            .env("CASEMATE_TEST_WAITS", "1")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let cgroups = tempfile::tempdir().unwrap();
        fs::create_dir(cgroups.path().join("guest")).unwrap();
        fs::write(cgroups.path().join("guest/cgroup.procs"), format!("{}\n", child.id())).unwrap();
        let shared = |name| Program::shared(name, itself(), cgroups.path()).unwrap();
        assert_eq!(inode(&shared(c"casemate-vmm")), inode(&program));
        assert_ne!(inode(&shared(c"casemate-other")), inode(&program));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_ne!(inode(&shared(c"casemate-vmm")), inode(&program), "nobody executes it");
    }

    #[test]
    fn a_copy_is_known_by_its_file_and_its_seals() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one").unwrap();
        let one = label(c"name", &file).unwrap();
        assert_eq!(label(c"name", &file).unwrap(), one);
        // Time goes on in the file system.
        std::thread::sleep(std::time::Duration::from_millis(50));
        file.write_all_at(b"two", 0).unwrap();
        assert_ne!(label(c"name", &file).unwrap(), one);

        let made = |seals, mode| {
            let copy = File::from(executable_memfd(c"casemate-vmm").unwrap());
            fcntl_add_seals(&copy, seals).unwrap();
            fchmod(&copy, Mode::from_raw_mode(mode)).unwrap();
            copy
        };
        assert!(is_sealed(&made(SEALS, MODE)));
        assert!(!is_sealed(&made(SealFlags::SHRINK, MODE)) && !is_sealed(&made(SEALS, 0o555)));
        assert!(!is_sealed(&itself()));
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
