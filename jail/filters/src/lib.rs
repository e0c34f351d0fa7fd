//! The seccomp filters of cells: which system calls casemate-vmm may make, thread by thread, and casemate-policy-compiler,
//! and why.
//!
//! The rules are data: `build.toml`, `vcpu.toml`, `rest.toml` and `compiler.toml` beside this crate's manifest, each rule with its reason
//! and with its arguments compared wherever a number or a flag decides. They are compiled into BPF while the crate is
//! built, so a program that links this crate carries arrays and two system calls, and depends on libc alone. What no
//! rule allows kills the process. The same filters stand in every build profile.
//!
//! Filters stack, and a thread may do what all of its filters allow. So a thread only ever becomes narrower:
//! [`Role::Build`] comes first, for the whole process, and allows what its own file says and what the other two say;
//! before the first guest instruction each thread puts on [`Role::Vcpu`] or [`Role::Rest`].
//!
//! A filter sees numbers and not what pointers point at: paths, structs and io_uring entries are beyond it. That is why
//! no call is allowed that takes a path or a ring, and why memory slots and DMA maps are left to one thread.
// Installing a filter is one raw system call, which libc gives as an unsafe function.
#![allow(unsafe_code)]

mod calls;
#[cfg(test)]
#[path = "../compile/mod.rs"]
#[allow(dead_code, reason = "the tests use the reader and the compiler, not the writer of source text")]
mod compile;
#[cfg(test)]
mod tests;

use std::{fmt, io};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Every thread, from the first line of `main` on, while the machine is built.
    Build,
    /// A thread that runs a virtual CPU, from before its first guest instruction.
    Vcpu,
    /// Every other thread (control, I/O), from before the first guest instruction.
    Rest,
    /// The one thread of casemate-policy-compiler, from before it reads a byte. It stands alone: no VMM puts it on.
    Compiler,
}

impl Role {
    /// All roles; those of the VMM in the order in which their filters are put on.
    pub const ALL: [Self; 4] = [Self::Build, Self::Vcpu, Self::Rest, Self::Compiler];

    /// The role's name, which is also the name of its file without `.toml`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Vcpu => "vcpu",
            Self::Rest => "rest",
            Self::Compiler => "compiler",
        }
    }

    /// The role of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// The BPF program that [`install`] hands to the kernel.
    pub fn program(self) -> &'static [libc::sock_filter] {
        match self {
            Self::Build => &BUILD_PROGRAM,
            Self::Vcpu => &VCPU_PROGRAM,
            Self::Rest => &REST_PROGRAM,
            Self::Compiler => &COMPILER_PROGRAM,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One use of one call that a role may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The call.
    pub call: &'static str,
    /// Comparisons of arguments that must all hold, as the filter's file writes them. None: whatever the arguments are.
    pub when: &'static [&'static str],
    /// The error that the call gives at once; `None`: the call runs.
    pub fails_with: Option<&'static str>,
    /// What the use is needed for.
    pub why: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The rules of a role. Those of [`Role::Build`] include the other two roles'.
pub fn rules(role: Role) -> &'static [Rule] {
    match role {
        Role::Build => BUILD_RULES,
        Role::Vcpu => VCPU_RULES,
        Role::Rest => REST_RULES,
        Role::Compiler => COMPILER_RULES,
    }
}

/// The name of a system call of x86-64: 257 is `openat`.
pub fn call_name(number: u32) -> Option<&'static str> {
    calls::CALLS.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// All system calls of x86-64: number and name.
pub fn calls() -> &'static [(u32, &'static str)] {
    calls::CALLS
}

/// Puts a role's filter on the calling thread, over those it has. Threads that it makes later inherit all of them.
///
/// no_new_privs must be set, as it is in a cell. The kernel logs the calls that kill without being asked
/// (`SECCOMP_FILTER_FLAG_LOG` would add a line for each call that is answered with an error).
///
/// # Errors
/// Those of seccomp(2): EACCES without no_new_privs, ENOMEM for too many filters, ENOSYS and EINVAL where the kernel
/// has no filters.
pub fn install(role: Role) -> io::Result<()> {
    let program = role.program();
    let program = libc::sock_fprog {
        // The kernel takes at most 4096 instructions, and the compiler of the filters refuses more.
        len: u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: seccomp(2) reads `len` instructions at `filter`, which are those of a static array, and writes to neither;
    // `program` lives until the call returns.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
