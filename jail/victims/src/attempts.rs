//! The table: what is tried, and what must stop it.

use std::os::fd::RawFd;

use casemate_filters::Role;

use crate::calls::{self, Outcome, flag, map, only, open, text};

/// One way out.
pub struct Attempt {
    /// Its name on the command line and in the table.
    pub name: &'static str,
    /// Tries it. It is given a descriptor of /dev/kvm where it needs one.
    pub run: fn(kvm: RawFd) -> Outcome,
    /// Whether it needs that descriptor.
    pub needs_kvm: bool,
    /// Roles whose filter does other than kill it.
    pub in_roles: &'static [(Role, Expected)],
    /// What stops it where no filter is on.
    pub beneath: Beneath,
}

/// What must become of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Seccomp kills the process.
    Killed,
    /// Seccomp answers with this error.
    Answered(i32),
    /// It succeeds: the role needs it.
    Through,
    /// It ends with a signal: it kills itself.
    Signalled,
    /// No filter is on: what else there is.
    Beneath(Beneath),
}

/// The layer beneath seccomp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beneath {
    /// The root is empty: ENOENT.
    EmptyRoot,
    /// The root is read-only, or Landlock: EROFS or EACCES, whichever looks first.
    ReadOnlyRootAndLandlock,
    /// Landlock: EACCES.
    Landlock,
    /// The network namespace is empty, and Landlock: ENETUNREACH, or EACCES with ABI 4.
    EmptyNetworkAndLandlock,
    /// The network namespace is empty: ENETUNREACH.
    EmptyNetwork,
    /// Abstract names are the network namespace's, and scoped by Landlock: ECONNREFUSED, or EPERM with ABI 6.
    NetworkNamespaceAndLandlock,
    /// The pid namespace holds nobody else: ESRCH.
    PidNamespace,
    /// It takes a capability: EPERM or EACCES; ENOSYS where the kernel was built without it.
    Capability,
    /// A resource limit: EPERM.
    Rlimit,
    /// The handed descriptor is of another kind: ENOTTY.
    Descriptor,
    /// The host has no such transport, or refuses the connection. A host that listens there must see to it itself.
    Host,
    /// The kernel does not have it: ENOSYS.
    Kernel,
    /// Nothing does: seccomp stands alone. It reaches nothing outside of the cell; it widens what a captured program can do to
    /// the kernel.
    Nothing,
    /// It is no way out: the program kills itself.
    Signal,
}

impl Beneath {
    /// The errors by which the layer shows itself; none means that the attempt goes through.
    pub const fn errors(self) -> &'static [i32] {
        match self {
            Self::EmptyRoot => &[libc::ENOENT],
            Self::ReadOnlyRootAndLandlock => &[libc::EROFS, libc::EACCES],
            Self::Landlock => &[libc::EACCES],
            Self::EmptyNetworkAndLandlock => &[libc::ENETUNREACH, libc::EACCES],
            Self::EmptyNetwork => &[libc::ENETUNREACH],
            Self::NetworkNamespaceAndLandlock => &[libc::ECONNREFUSED, libc::EPERM],
            Self::PidNamespace => &[libc::ESRCH],
            Self::Capability => &[libc::EPERM, libc::EACCES, libc::ENOSYS],
            Self::Rlimit => &[libc::EPERM],
            Self::Descriptor => &[libc::ENOTTY],
            Self::Host => {
                &[libc::EAFNOSUPPORT, libc::ENODEV, libc::ENETUNREACH, libc::ECONNRESET, libc::ETIMEDOUT]
            }
            Self::Kernel => &[libc::ENOSYS],
            Self::Nothing | Self::Signal => &[],
        }
    }
}

const fn out(name: &'static str, beneath: Beneath, run: fn(RawFd) -> Outcome) -> Attempt {
    Attempt { name, run, needs_kvm: false, in_roles: &[], beneath }
}

const fn with(attempt: Attempt, in_roles: &'static [(Role, Expected)]) -> Attempt {
    Attempt { in_roles, ..attempt }
}

const THROUGH_EVERYWHERE: &[(Role, Expected)] = &[
    (Role::Build, Expected::Through),
    (Role::Vcpu, Expected::Through),
    (Role::Rest, Expected::Through),
    (Role::Compiler, Expected::Through),
];
const SIGNAL_EVERYWHERE: &[(Role, Expected)] = &[
    (Role::Build, Expected::Signalled),
    (Role::Vcpu, Expected::Signalled),
    (Role::Rest, Expected::Signalled),
];
const THROUGH_WHILE_BUILDING: &[(Role, Expected)] = &[(Role::Build, Expected::Through)];
const EXECUTABLE: i32 = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;

/// Every attempt.
pub static ATTEMPTS: &[Attempt] = &[
    // What must work, or the rest of the table would prove nothing.
    with(out("control-nothing", Beneath::Nothing, |_| Ok(())), THROUGH_EVERYWHERE),
    with(out("control-memory", Beneath::Nothing, |_| calls::use_memory()), THROUGH_EVERYWHERE),
    with(out("control-abort", Beneath::Signal, |_| std::process::abort()), SIGNAL_EVERYWHERE),
    with(out("control-thread", Beneath::Nothing, |_| calls::start_a_thread()), THROUGH_WHILE_BUILDING),
    // Files.
    out("open-passwd", Beneath::EmptyRoot, |_| open(c"/etc/passwd", libc::O_RDONLY).map(drop)),
    out("open-proc-mem", Beneath::EmptyRoot, |_| open(c"/proc/self/mem", libc::O_RDWR).map(drop)),
    out("open-dev-kvm", Beneath::EmptyRoot, |_| open(c"/dev/kvm", libc::O_RDWR).map(drop)),
    out("open-root", Beneath::Landlock, |_| open(c"/", libc::O_RDONLY | libc::O_DIRECTORY).map(drop)),
    out("open-create", Beneath::ReadOnlyRootAndLandlock, |_| {
        open(c"/x", libc::O_CREAT | libc::O_WRONLY).map(drop)
    }),
    out("open-dot-dot", Beneath::EmptyRoot, |_| calls::climb_out_of_the_root()),
    out("open-by-handle", Beneath::Capability, |_| calls::open_by_handle()),
    out("make-directory", Beneath::ReadOnlyRootAndLandlock, |_| only(libc::SYS_mkdir, [text(c"/x"), 0o700])),
    out("make-device", Beneath::ReadOnlyRootAndLandlock, |_| {
        only(libc::SYS_mknod, [text(c"/x"), flag(0o20_600), 0x0a_e8])
    }),
    out("chroot", Beneath::Capability, |_| only(libc::SYS_chroot, [text(c"/")])),
    // Sockets.
    out("connect-loopback", Beneath::EmptyNetworkAndLandlock, |_| calls::connect_to_loopback()),
    out("send-datagram", Beneath::EmptyNetwork, |_| calls::send_a_datagram()),
    out("connect-abstract", Beneath::NetworkNamespaceAndLandlock, |_| calls::connect_to_an_abstract_socket()),
    out("connect-vsock", Beneath::Host, |_| calls::connect_to_the_host_by_vsock()),
    out("socket-packet", Beneath::Capability, |_| calls::socket(libc::AF_PACKET, libc::SOCK_RAW).map(drop)),
    out("socket-netlink", Beneath::Nothing, |_| calls::socket(libc::AF_NETLINK, libc::SOCK_RAW).map(drop)),
    out("bind-abstract", Beneath::Nothing, |_| calls::bind_an_abstract_socket()),
    // Code.
    out("mmap-exec", Beneath::Nothing, |_| map(EXECUTABLE).map(drop)),
    out("mprotect-exec", Beneath::Nothing, |_| calls::make_memory_executable()),
    out("shmat-exec", Beneath::Nothing, |_| calls::attach_executable_memory()),
    out("memfd-create", Beneath::Nothing, |_| only(libc::SYS_memfd_create, [text(c"x"), 0])),
    out("personality-exec", Beneath::Nothing, |_| {
        only(libc::SYS_personality, [flag(libc::READ_IMPLIES_EXEC)])
    }),
    out("execve", Beneath::EmptyRoot, |_| only(libc::SYS_execve, [text(c"/bin/sh"), 0, 0])),
    out("modify-ldt", Beneath::Nothing, |_| calls::write_an_ldt_entry()),
    // Processes.
    out("fork", Beneath::Nothing, |_| calls::fork()),
    with(
        out("clone3", Beneath::Nothing, |_| calls::clone3()),
        &[(Role::Build, Expected::Answered(libc::ENOSYS))],
    ),
    out("ptrace", Beneath::PidNamespace, |_| {
        only(libc::SYS_ptrace, [flag(libc::PTRACE_ATTACH as i32), 2, 0, 0])
    }),
    out("process-vm-readv", Beneath::PidNamespace, |_| calls::read_another_process()),
    out("kill-everyone", Beneath::PidNamespace, |_| only(libc::SYS_kill, [u64::MAX, flag(libc::SIGTERM)])),
    out("pidfd-open", Beneath::PidNamespace, |_| only(libc::SYS_pidfd_open, [2, 0])),
    // Namespaces and mounts.
    out("unshare-user", Beneath::Nothing, |_| only(libc::SYS_unshare, [flag(libc::CLONE_NEWUSER)])),
    out("unshare-net", Beneath::Capability, |_| only(libc::SYS_unshare, [flag(libc::CLONE_NEWNET)])),
    out("mount", Beneath::Capability, |_| {
        only(libc::SYS_mount, [text(c"x"), text(c"/"), text(c"tmpfs"), 0, 0])
    }),
    out("unmount", Beneath::Capability, |_| only(libc::SYS_umount2, [text(c"/"), flag(libc::MNT_DETACH)])),
    out("fsopen", Beneath::Capability, |_| only(libc::SYS_fsopen, [text(c"proc"), 0])),
    // Rights.
    out("setuid", Beneath::Capability, |_| only(libc::SYS_setuid, [0])),
    out("capset", Beneath::Capability, |_| calls::raise_capabilities()),
    out("sethostname", Beneath::Capability, |_| only(libc::SYS_sethostname, [text(c"x"), 1])),
    out("raise-rlimit", Beneath::Rlimit, |_| calls::raise_a_limit()),
    out("real-time", Beneath::Rlimit, |_| calls::become_real_time()),
    out("settimeofday", Beneath::Capability, |_| calls::set_the_clock()),
    out("finit-module", Beneath::Capability, |_| only(libc::SYS_finit_module, [2, text(c""), 0])),
    out("reboot", Beneath::Capability, |_| only(libc::SYS_reboot, [0xfee1_dead, 672_274_793, 0x0123_4567])),
    out("dumpable", Beneath::Nothing, |_| only(libc::SYS_prctl, [flag(libc::PR_SET_DUMPABLE), 1])),
    // The kernel's larger engines.
    out("io-uring", Beneath::Nothing, |_| calls::make_a_ring()),
    out("bpf", Beneath::Capability, |_| calls::load_a_bpf_program()),
    out("perf-event", Beneath::Capability, |_| calls::count_events_of_a_processor()),
    out("userfaultfd", Beneath::Capability, |_| only(libc::SYS_userfaultfd, [0])),
    out("add-key", Beneath::Nothing, |_| calls::add_a_key()),
    // Other doors into the kernel.
    out("int80", Beneath::Nothing, |_| calls::call_as_32_bit()),
    out("x32", Beneath::Kernel, |_| calls::call_as_x32()),
    // Descriptors that were handed in.
    Attempt {
        needs_kvm: true,
        ..with(
            out("kvm-create-vm", Beneath::Nothing, |kvm| only(libc::SYS_ioctl, [flag(kvm), 0xae01, 0])),
            THROUGH_WHILE_BUILDING,
        )
    },
    out("vfio-set-container", Beneath::Descriptor, |_| only(libc::SYS_ioctl, [2, 0x3b68, 0])),
    out("terminal-input", Beneath::Descriptor, |_| only(libc::SYS_ioctl, [2, libc::TIOCSTI, text(c"x")])),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_told_apart() {
        let names: BTreeSet<_> = ATTEMPTS.iter().map(|attempt| attempt.name).collect();
        assert_eq!(names.len(), ATTEMPTS.len());
    }

    /// What lies beneath seccomp is real outside of a cell as well, where it can be tried without harm: here nothing stops it.
    #[test]
    fn attempts_succeed_where_there_is_no_cell() {
        for name in [
            "open-passwd",
            "open-root",
            "mmap-exec",
            "mprotect-exec",
            "memfd-create",
            "socket-netlink",
            "control-thread",
        ] {
            assert_eq!((crate::attempt(name).unwrap().run)(-1), Ok(()), "{name}");
        }
    }
}
