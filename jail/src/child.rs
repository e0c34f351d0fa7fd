//! What runs between clone and exec, in the child.
//!
//! No allocation, no lock, no panic: everything was prepared before, and every error goes back through the pipe.

use std::{ffi::c_int, os::fd::RawFd};

use rustix::{
    fs::Mode,
    io::{Errno, Result},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{
        Resource, Rlimit, Signal, chdir, pivot_root, set_parent_process_death_signal, setrlimit, setsid,
        umask,
    },
    system::{setdomainname, sethostname},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
        set_capabilities, set_capabilities_secure_bits, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use crate::{
    step::{Step, pack},
    sys::{self, Arguments},
};

/// The namespaces that the child is cloned into; the cgroup namespace follows when it is in its cgroup.
pub(crate) const NAMESPACES: c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Everything the child uses.
pub(crate) struct Prepared {
    pub(crate) null: RawFd,
    pub(crate) input: RawFd,
    pub(crate) output: RawFd,
    pub(crate) log: RawFd,
    pub(crate) control: Option<RawFd>,
    pub(crate) program: RawFd,
    /// Without one there is no Landlock.
    pub(crate) ruleset: Option<RawFd>,
    pub(crate) ruleset_flags: u32,
    /// The write end of the pipe for a [`Report`](crate::step::Report).
    pub(crate) status: RawFd,
    pub(crate) arguments: Arguments,
    pub(crate) rlimits: [(Resource, u64); 8],
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) tied_to_parent: bool,
}

/// Where descriptors stand from [`place`] on; the last three are closed by exec.
const LOG: RawFd = 2;
const CONTROL: RawFd = 3;
const PROGRAM: RawFd = 4;
const RULESET: RawFd = 5;
const STATUS: RawFd = 6;

/// Above all of those places.
const OUT_OF_THE_WAY: RawFd = 10;

/// Closes the cell around the process and executes the program.
pub(crate) fn run(prepared: &Prepared) -> ! {
    let (status, step, error) = match sys::duplicate_above(prepared.status, OUT_OF_THE_WAY) {
        Err(error) => (prepared.status, Step::Descriptors, error),
        Ok(status) => match place(prepared, status) {
            Err(error) => (status, Step::Descriptors, error),
            Ok(()) => {
                let (step, error) = close_cell(prepared);
                (STATUS, step, error)
            }
        },
    };
    // Should this fail, the parent sees a cell that ended with status 1 at once.
    let _ = sys::write(status, &pack(step, error));
    sys::exit_now(1)
}

/// Does the steps in order; comes back only with the one that failed.
fn close_cell(prepared: &Prepared) -> (Step, Errno) {
    let steps: [(Step, &dyn Fn() -> Result<()>); 10] = [
        (Step::Session, &session),
        (Step::CgroupNamespace, &sys::own_cgroup_namespace),
        (Step::Hostname, &name_host),
        (Step::Root, &empty_root),
        (Step::Rlimits, &|| limit(&prepared.rlimits)),
        (Step::Capabilities, &drop_capabilities),
        (Step::Identity, &|| change_identity(prepared.uid, prepared.gid)),
        (Step::NoNewPrivileges, &|| set_no_new_privs(true)),
        // After the change of uid, which takes it back.
        (Step::Tie, &|| if prepared.tied_to_parent { tie() } else { Ok(()) }),
        (Step::Landlock, &|| match prepared.ruleset {
            Some(_) => sys::landlock_restrict_self(RULESET, prepared.ruleset_flags),
            None => Ok(()),
        }),
    ];
    for (step, act) in steps {
        if let Err(error) = act() {
            return (step, error);
        }
    }
    (Step::Exec, sys::execute(PROGRAM, &prepared.arguments))
}

/// Puts the descriptors in their places and closes all others. They go out of each other's way first, since any of them may
/// stand on another's place; `status` has done so.
fn place(prepared: &Prepared, status: RawFd) -> Result<()> {
    let away = |descriptor| sys::duplicate_above(descriptor, OUT_OF_THE_WAY);
    let places = [
        (away(prepared.input)?, 0, false),
        (away(prepared.output)?, 1, false),
        (away(prepared.log)?, LOG, false),
        // Without one the place is empty from exec on.
        (away(prepared.control.unwrap_or(prepared.null))?, CONTROL, prepared.control.is_none()),
        (away(prepared.program)?, PROGRAM, true),
        (away(prepared.ruleset.unwrap_or(prepared.null))?, RULESET, true),
        (status, STATUS, true),
    ];
    for (from, to, close_on_exec) in places {
        sys::duplicate_to(from, to, close_on_exec)?;
    }
    sys::close_from(STATUS.cast_unsigned() + 1)
}

fn session() -> Result<()> {
    setsid()?;
    umask(Mode::from_raw_mode(0o077));
    sys::plain_personality()?;
    sys::own_core_cookie()?;
    sys::fresh_signals()
}

fn name_host() -> Result<()> {
    sethostname(b"cell")?;
    setdomainname(b"")
}

/// Makes an empty read-only tmpfs the root and lets go of the old one. /proc is where it is mounted for a moment, since every
/// host has it; nothing of that is seen outside of this mount namespace.
fn empty_root() -> Result<()> {
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    mount(c"cell", c"/proc", c"tmpfs", flags, c"size=4096,nr_inodes=1,mode=0555")?;
    chdir(c"/proc")?;
    // Both names are the same place, so the old root comes to lie over the new one, from where it is taken away.
    pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    chdir(c"/")
}

fn limit(rlimits: &[(Resource, u64)]) -> Result<()> {
    for (resource, limit) in rlimits {
        setrlimit(*resource, Rlimit { current: Some(*limit), maximum: Some(*limit) })?;
    }
    Ok(())
}

/// Nothing that is executed from here on gains a capability, whatever its uid or its file's capabilities.
fn drop_capabilities() -> Result<()> {
    clear_ambient_capability_set()?;
    sys::empty_bounding_set()?;
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
}

fn change_identity(uid: u32, gid: u32) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    // The locked securebits leave them in place at a change of uid.
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    sys::empty_key_ring()
}

/// Asks for SIGKILL when the parent's thread ends, and sees that it has not ended before.
fn tie() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if sys::has_no_reader(STATUS)? { Err(Errno::SRCH) } else { Ok(()) }
}
