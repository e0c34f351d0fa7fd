//! The executable of a cell: one sealed copy in memory.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
};

use casemate_spec::Refusal;
use rustix::{
    fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create},
    io::Errno,
};

/// How much of a program its ELF headers may take: linkers put them at its beginning.
const HEADERS_BYTES_MAX: usize = 4096;

/// A static executable, copied into memory and sealed: nobody can change what runs, and a cell needs no file system to run
/// it (the copy lies on a mount of the kernel's own, which Landlock leaves alone). Clones share the copy; one for each host
/// is enough.
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
        fchmod(&copy, Mode::from_raw_mode(0o111)).map_err(|error| failed("fchmod", &error))?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        // F_SEAL_EXEC keeps the mode as it is; kernels before 6.3 don't know it.
        let seal_exec = SealFlags::from_bits_retain(0x20);
        match fcntl_add_seals(&copy, seals | seal_exec) {
            Err(Errno::INVAL) => fcntl_add_seals(&copy, seals),
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
