//! The seccomp filters of cells: which system calls casemate-vmm may make, thread by thread, casemate-policy-compiler and
//! casemate-policy-engine, and why.
//!
//! The rules are data: a file a role beside this crate's manifest (`vcpu.toml`, `blk.toml`, …), each rule with its reason and
//! with its arguments compared wherever a number or a flag decides. They are compiled into BPF while the crate is
//! built, so a program that links this crate carries arrays and two system calls, and depends on libc alone. What no
//! rule allows kills the process. The same filters stand in every build profile.
//!
//! Filters stack, and a thread may do what all of its filters allow. So a thread only ever becomes narrower:
//! [`Role::Build`] comes first, for the whole process, and allows what its own file says and what those of the narrow
//! roles say; before the first guest instruction each thread puts on that of its role, one of [`Role::NARROW`]. What the
//! language's run time needs on every thread (`runtime.toml`) is a part of each of them. A rule that can't be
//! seen used says why (`unseen`).
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

use std::{collections::BTreeSet, fmt, io};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Every thread, from the first line of `main` on, while the machine is built.
    Build,
    /// A thread that runs a virtual CPU, from before its first guest instruction.
    Vcpu,
    /// The control thread, `main`: it hears the keep and makes every change to the machine.
    Control,
    /// The thread of a virtio disk.
    Blk,
    /// The thread of a virtio network card.
    Net,
    /// The thread of the virtio socket device.
    Vsock,
    /// The thread of any other virtio device: entropy, balloon.
    Device,
    /// The thread of a virtio console: a terminal, or ports with names.
    Port,
    /// The thread that types at the guest's serial port.
    Console,
    /// A thread that waits for the INTx of an assigned function.
    Intx,
    /// A thread that waits for a disk or network card to be hot-plugged, and then is its.
    Spare,
    /// The thread that puts devices into slots and takes them out.
    Hotplug,
    /// The thread that lets a guest's devices reach each other's registers.
    Peers,
    /// The one thread of casemate-policy-compiler, from before it reads a byte. It stands alone: no VMM puts it on.
    Compiler,
    /// Every thread of casemate-policy-engine, from its first line on, while plugins are loaded.
    PolicyLoad,
    /// The main thread of casemate-policy-engine, from before its first answer on.
    Policy,
    /// The thread of casemate-policy-engine that counts time, from its start on.
    PolicyTicker,
}

impl Role {
    /// The roles of programs other than the VMM, which never puts them on.
    pub const ALONE: [Self; 4] = [Self::Compiler, Self::PolicyLoad, Self::Policy, Self::PolicyTicker];

    /// All roles; those of the VMM in the order in which their filters are put on.
    pub const ALL: [Self; 17] = [
        Self::Build,
        Self::Vcpu,
        Self::Control,
        Self::Blk,
        Self::Net,
        Self::Vsock,
        Self::Device,
        Self::Port,
        Self::Console,
        Self::Intx,
        Self::Spare,
        Self::Hotplug,
        Self::Peers,
        Self::Compiler,
        Self::PolicyLoad,
        Self::Policy,
        Self::PolicyTicker,
    ];

    /// The roles of a VMM's threads once its guest runs.
    pub const NARROW: [Self; 12] = [
        Self::Vcpu,
        Self::Control,
        Self::Blk,
        Self::Net,
        Self::Vsock,
        Self::Device,
        Self::Port,
        Self::Console,
        Self::Intx,
        Self::Spare,
        Self::Hotplug,
        Self::Peers,
    ];

    /// The role whose filter a thread has on before it puts on this one's, if any.
    pub const fn first(self) -> Option<Self> {
        match self {
            Self::Build | Self::Compiler | Self::PolicyLoad => None,
            Self::Policy | Self::PolicyTicker => Some(Self::PolicyLoad),
            _ => Some(Self::Build),
        }
    }

    /// The role's name, which is also the name of its file without `.toml`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Vcpu => "vcpu",
            Self::Control => "control",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Device => "device",
            Self::Port => "port",
            Self::Console => "console",
            Self::Intx => "intx",
            Self::Spare => "spare",
            Self::Hotplug => "hotplug",
            Self::Peers => "peers",
            Self::Compiler => "compiler",
            Self::PolicyLoad => "policy-load",
            Self::Policy => "policy",
            Self::PolicyTicker => "policy-ticker",
        }
    }

    /// The role of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// The BPF program that [`install`] hands to the kernel.
    pub fn program(self) -> &'static [libc::sock_filter] {
        self.compiled().0
    }

    /// What its file was compiled to.
    fn compiled(self) -> (&'static [libc::sock_filter], &'static [Rule]) {
        match self {
            Self::Build => (&BUILD_PROGRAM, BUILD_RULES),
            Self::Vcpu => (&VCPU_PROGRAM, VCPU_RULES),
            Self::Control => (&CONTROL_PROGRAM, CONTROL_RULES),
            Self::Blk => (&BLK_PROGRAM, BLK_RULES),
            Self::Net => (&NET_PROGRAM, NET_RULES),
            Self::Vsock => (&VSOCK_PROGRAM, VSOCK_RULES),
            Self::Device => (&DEVICE_PROGRAM, DEVICE_RULES),
            Self::Port => (&PORT_PROGRAM, PORT_RULES),
            Self::Console => (&CONSOLE_PROGRAM, CONSOLE_RULES),
            Self::Intx => (&INTX_PROGRAM, INTX_RULES),
            Self::Spare => (&SPARE_PROGRAM, SPARE_RULES),
            Self::Hotplug => (&HOTPLUG_PROGRAM, HOTPLUG_RULES),
            Self::Peers => (&PEERS_PROGRAM, PEERS_RULES),
            Self::Compiler => (&COMPILER_PROGRAM, COMPILER_RULES),
            Self::PolicyLoad => (&POLICY_LOAD_PROGRAM, POLICY_LOAD_RULES),
            Self::Policy => (&POLICY_PROGRAM, POLICY_RULES),
            Self::PolicyTicker => (&POLICY_TICKER_PROGRAM, POLICY_TICKER_RULES),
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
    /// Why no test sees it used; `None`: one does.
    pub unseen: Option<&'static str>,
    /// The file that it stands in, without `.toml`: that of its role, or one that this takes in.
    pub file: &'static str,
    /// The comparisons of `when` as numbers.
    pub comparisons: &'static [Comparison],
}

impl Rule {
    /// Whether a call of this rule's name with these arguments is a use that the rule speaks of.
    pub fn is_met_by(&self, arguments: [u64; 6]) -> bool {
        let holds = |Comparison { argument, mask, value }: &Comparison| {
            arguments.get(usize::from(*argument)).is_some_and(|given| given & mask == *value)
        };
        self.comparisons.iter().all(holds)
    }
}

/// A comparison of one argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Which argument, 0 to 5.
    pub argument: u8,
    /// The bits that are looked at.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The rules of a role. Those of [`Role::Build`] include the narrow roles'.
pub fn rules(role: Role) -> &'static [Rule] {
    role.compiled().1
}

/// How many different system calls a role's filter lets run, with some argument.
pub fn calls_of(role: Role) -> usize {
    let calls: BTreeSet<_> =
        rules(role).iter().filter(|rule| rule.fails_with.is_none()).map(|rule| rule.call).collect();
    calls.len()
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
