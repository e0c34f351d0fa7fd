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
    /// What must become of it under the filter of a role.
    pub in_role: fn(Role) -> Expected,
    /// What stops it where no filter is on.
    pub beneath: Beneath,
}

impl Attempt {
    /// Whether it is tried under this role's filter. What tells roles apart is tried in all; what every filter stops for want
    /// of a rule is tried in those of the threads that strangers reach first, for each is a cell of its own. That the
    /// programs of all roles stop it is a test of casemate-filters.
    pub fn is_tried_in(&self, role: Role) -> bool {
        const EVERYWHERE: [&str; 4] = ["control-", "ioctl-", "kvm-", "bomb-memory"];
        const EXAMPLES: [&str; 3] = ["open-passwd", "connect-loopback", "mmap-exec"];
        // The thread that counts time can't say what became of it.
        if role == Role::PolicyTicker {
            return false;
        }
        matches!(
            role,
            Role::Build | Role::Vcpu | Role::Control | Role::Compiler | Role::PolicyLoad | Role::Policy
        ) || EVERYWHERE.iter().any(|begin| self.name.starts_with(begin))
            || EXAMPLES.contains(&self.name)
    }
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
    /// The limits of descriptors (RLIMIT_NOFILE): EMFILE.
    DescriptorLimit,
    /// The limits of processes and threads (pids.max, RLIMIT_NPROC): EAGAIN.
    PidLimit,
    /// The limit of memory (memory.max): the kernel kills the whole cell.
    MemoryLimit,
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
            Self::DescriptorLimit => &[libc::EMFILE],
            Self::PidLimit => &[libc::EAGAIN],
            Self::Descriptor => &[libc::ENOTTY],
            Self::Host => {
                &[libc::EAFNOSUPPORT, libc::ENODEV, libc::ENETUNREACH, libc::ECONNRESET, libc::ETIMEDOUT]
            }
            Self::Kernel => &[libc::ENOSYS],
            Self::Nothing | Self::Signal | Self::MemoryLimit => &[],
        }
    }
}

const fn out(name: &'static str, beneath: Beneath, run: fn(RawFd) -> Outcome) -> Attempt {
    Attempt { name, run, needs_kvm: false, in_role: killed, beneath }
}

const fn with(attempt: Attempt, in_role: fn(Role) -> Expected) -> Attempt {
    Attempt { in_role, ..attempt }
}

fn killed(_: Role) -> Expected {
    Expected::Killed
}

fn through_everywhere(_: Role) -> Expected {
    Expected::Through
}

/// The policy compiler aborts by no call that its filter knows.
fn signal_in_the_vmm(role: Role) -> Expected {
    if role == Role::Compiler { Expected::Killed } else { Expected::Signalled }
}

fn through_while_building(role: Role) -> Expected {
    if role == Role::Build { Expected::Through } else { Expected::Killed }
}

/// Programs of more than one thread start them under their first filter.
fn through_at_first(role: Role) -> Expected {
    if matches!(role, Role::Build | Role::PolicyLoad) { Expected::Through } else { Expected::Killed }
}

fn memory_is_limited(_: Role) -> Expected {
    Expected::Beneath(Beneath::MemoryLimit)
}

fn descriptors_are_limited(role: Role) -> Expected {
    if role == Role::Build { Expected::Beneath(Beneath::DescriptorLimit) } else { Expected::Killed }
}

fn threads_are_limited(role: Role) -> Expected {
    if matches!(role, Role::Build | Role::PolicyLoad) {
        Expected::Beneath(Beneath::PidLimit)
    } else {
        Expected::Killed
    }
}

/// A request of ioctl(2) gets past the filters of these roles, and then meets a descriptor of another kind.
fn past(role: Role, roles: &[Role]) -> Expected {
    if role == Role::Build || roles.contains(&role) {
        Expected::Beneath(Beneath::Descriptor)
    } else {
        Expected::Killed
    }
}

fn for_processors(role: Role) -> Expected {
    past(role, &[Role::Vcpu])
}

fn for_control(role: Role) -> Expected {
    past(role, &[Role::Control])
}

/// Whoever raises a pin of the IOAPIC.
fn for_pins(role: Role) -> Expected {
    past(role, &[Role::Vcpu, Role::Control, Role::Console, Role::Intx])
}

/// The thread that puts the host's devices into slots, and the one that lets devices reach each other.
fn for_mapping(role: Role) -> Expected {
    past(role, &[Role::Hotplug, Role::Peers])
}

fn for_building(role: Role) -> Expected {
    past(role, &[])
}

/// An attempt of a request that means nothing to the descriptor, so that nothing but the filter tells roles apart.
const fn request(name: &'static str, in_role: fn(Role) -> Expected, run: fn(RawFd) -> Outcome) -> Attempt {
    with(out(name, Beneath::Descriptor, run), in_role)
}

fn answered_while_building(role: Role) -> Expected {
    if matches!(role, Role::Build | Role::PolicyLoad) {
        Expected::Answered(libc::ENOSYS)
    } else {
        Expected::Killed
    }
}

const EXECUTABLE: i32 = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;

/// Every attempt.
pub static ATTEMPTS: &[Attempt] = &[
    // What must work, or the rest of the table would prove nothing.
    with(out("control-nothing", Beneath::Nothing, |_| Ok(())), through_everywhere),
    with(out("control-memory", Beneath::Nothing, |_| calls::use_memory()), through_everywhere),
    with(out("control-abort", Beneath::Signal, |_| std::process::abort()), signal_in_the_vmm),
    with(out("control-fault", Beneath::Signal, |_| calls::touch_what_is_not_there()), signal_in_the_vmm),
    with(out("control-thread", Beneath::Nothing, |_| calls::start_a_thread()), through_at_first),
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
    with(out("clone3", Beneath::Nothing, |_| calls::clone3()), answered_while_building),
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
    with(out("io-uring", Beneath::Nothing, |_| calls::make_a_ring().map(drop)), through_while_building),
    out("io-uring-buffers", Beneath::Nothing, |_| calls::register_buffers_with_a_ring()),
    // A filter of the first phase has what the narrow ones have: one of them names files to rings, and can make none.
    with(
        out("io-uring-other-files", Beneath::Nothing, |_| calls::change_the_files_of_a_ring()),
        through_while_building,
    ),
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
            through_while_building,
        )
    },
    request("ioctl-kvm-run", for_processors, |_| calls::request(0xae80)),
    request("ioctl-kvm-signal-msi", for_pins, |_| calls::request(0x4020_aea5)),
    request("ioctl-kvm-memory-slot", for_control, |_| calls::request(0x4020_ae46)),
    request("ioctl-kvm-routes", for_control, |_| calls::request(0x4008_ae6a)),
    request("ioctl-kvm-irqfd", for_control, |_| calls::request(0x4020_ae76)),
    request("ioctl-kvm-ioeventfd", for_control, |_| calls::request(0x4040_ae79)),
    request("ioctl-kvm-create-vcpu", for_building, |_| calls::request(0xae41)),
    request("ioctl-kvm-create-device", for_building, |_| calls::request(0xc00c_aee0)),
    request("ioctl-vfio-interrupts", for_control, |_| calls::request(0x3b6e)),
    request("ioctl-vfio-reset", for_control, |_| calls::request(0x3b6f)),
    request("ioctl-vfio-map-dma", for_mapping, |_| calls::request(0x3b71)),
    request("ioctl-vfio-unmap-dma", for_mapping, |_| calls::request(0x3b72)),
    out("ioctl-tap-name", Beneath::Descriptor, |_| calls::request(0x4004_54ca)),
    // Bombs: what there is of something is used up.
    out("bomb-processes", Beneath::PidLimit, |_| calls::fork_without_end()),
    with(out("bomb-threads", Beneath::PidLimit, |_| calls::start_threads_without_end()), threads_are_limited),
    with(
        out("bomb-descriptors", Beneath::DescriptorLimit, |_| calls::make_events_without_end()),
        descriptors_are_limited,
    ),
    with(out("bomb-memory", Beneath::MemoryLimit, |_| calls::use_memory_without_end()), memory_is_limited),
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
