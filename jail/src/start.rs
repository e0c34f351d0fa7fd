//! From a plan to a running cell.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use casemate_spec::{CellPart, Refusal};
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::Resource,
};

use crate::{
    Cell, CellPlan, Rlimits,
    cell::Parts,
    cgroup::Cgroup,
    child::{self, Prepared},
    lacking, landlock,
    step::{Step, unpack},
    sys::{self, Arguments, Cloned},
};

/// Starts a cell. It is closed, and its program runs, when this returns. Only what kills the new process from outside
/// (the memory limit, an operator) goes unseen here; [`Cell::wait`] tells it.
///
/// # Errors
/// A refusal that names the part which could not be had: `cell-plan`, `cell-cgroup`, `cell-seccomp`, `cell-landlock`,
/// `cell-core-scheduling`, `cell-io`, `cell-namespaces`, `cell-descriptors`, `cell-session`, `cell-root`, `cell-rlimits`, `cell-capabilities`,
/// `cell-identity`, `cell-tie`, `cell-exec`. Nothing is left behind.
pub fn start(plan: CellPlan) -> Result<Cell, Refusal> {
    plan.check()?;
    sys::seccomp_kills_process().map_err(|error| {
        let remedy = "use a kernel with CONFIG_SECCOMP_FILTER";
        Refusal::new(
            "cell-seccomp",
            "seccomp",
            format_args!("the kernel has no filters that kill: {error}"),
            remedy,
        )
    })?;
    let weakened = lacking::accepted(&plan)?;
    let ruleset = (!weakened.contains(&CellPart::Landlock)).then(landlock::ruleset).transpose()?;
    let null = open_null()?;
    let (report, status) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| descriptors("pipe", error))?;
    let arguments = [CString::from(plan.program.name())].into_iter().chain(plan.arguments).collect();
    let prepared = Prepared {
        null: null.as_raw_fd(),
        input: plan.input.as_ref().map_or(null.as_raw_fd(), AsRawFd::as_raw_fd),
        output: plan.output.as_ref().map_or(null.as_raw_fd(), AsRawFd::as_raw_fd),
        log: plan.log.as_raw_fd(),
        control: plan.control.as_ref().map(AsRawFd::as_raw_fd),
        program: plan.program.as_fd().as_raw_fd(),
        ruleset: ruleset.as_ref().map(|ruleset| ruleset.ruleset.as_raw_fd()),
        ruleset_flags: ruleset.as_ref().map_or(0, |ruleset| ruleset.flags),
        status: status.as_raw_fd(),
        arguments: Arguments::new(arguments),
        rlimits: limits(&plan.rlimits),
        uid: plan.uid,
        gid: plan.gid,
        tied_to_parent: plan.tied_to_parent,
    };
    // Last of the preparations, since it is the one that leaves something on the host.
    let cgroup = Cgroup::create(&plan.cgroup, &plan.guest)?;
    let log_of_kernel = open_kernel_log();
    let (pid, pidfd) = match sys::clone_into(cgroup.directory(), child::NAMESPACES, child::run, &prepared) {
        Ok(Cloned { pid, pidfd }) => (pid, pidfd),
        Err(error) => {
            cgroup.remove()?;
            return Err(clone_refusal(&plan.guest, error));
        }
    };
    drop(status);
    let landlock = ruleset.map(|ruleset| ruleset.handled).unwrap_or_default();
    let cell = Cell::new(Parts { pid, pidfd, cgroup, landlock, weakened, log_of_kernel });
    closed(report, &plan.guest)?;
    Ok(cell)
}

/// Waits until the child has executed its program, which closes the pipe, or has reported.
fn closed(report: OwnedFd, guest: &str) -> Result<(), Refusal> {
    let mut bytes = Vec::new();
    File::from(report).read_to_end(&mut bytes).map_err(|error| {
        Refusal::new(
            "cell-exec",
            guest,
            format_args!("the cell's report can't be read: {error}"),
            "start the guest again",
        )
    })?;
    match unpack(&bytes) {
        _ if bytes.is_empty() => Ok(()),
        Some((step, error)) => Err(step.refusal(guest, error)),
        None => Err(Step::Exec.refusal(guest, Errno::PROTO)),
    }
}

fn limits(limits: &Rlimits) -> [(Resource, u64); 8] {
    let Rlimits { memlock_bytes, descriptors_max, threads_max, file_size_bytes_max } = *limits;
    [
        (Resource::Memlock, memlock_bytes),
        (Resource::Nofile, descriptors_max),
        (Resource::Nproc, threads_max),
        (Resource::Fsize, file_size_bytes_max),
        // A core dump would hold the guest's memory.
        (Resource::Core, 0),
        // What a cell has no use for.
        (Resource::Msgqueue, 0),
        (Resource::Rtprio, 0),
        (Resource::Nice, 0),
    ]
}

fn open_null() -> Result<File, Refusal> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    null.map_err(|error| descriptors("/dev/null", Errno::from_io_error(&error).unwrap_or(Errno::IO)))
}

fn descriptors(what: &str, error: Errno) -> Refusal {
    let remedy = "raise the keep's RLIMIT_NOFILE, and see that /dev/null is there";
    Refusal::new("cell-descriptors", what, error, remedy)
}

/// The kernel's log from now on, for the line it writes when seccomp stops a call. Without it the call is not named.
fn open_kernel_log() -> Option<File> {
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok()?;
    log.seek(SeekFrom::End(0)).ok()?;
    Some(log)
}

fn clone_refusal(guest: &str, error: Errno) -> Refusal {
    let (code, remedy) = match error {
        Errno::BUSY | Errno::OPNOTSUPP => {
            ("cell-cgroup", "let no process and no threaded cgroup live in the parent cgroup")
        }
        Errno::AGAIN => ("cell-cgroup", "raise pids.max of the cell and of the cgroups above it"),
        Errno::NOSPC => ("cell-namespaces", "raise the limits under /proc/sys/user, as max_net_namespaces"),
        _ => ("cell-namespaces", "run the keep as root, with Linux 5.7 or newer and all namespaces built in"),
    };
    Refusal::new(code, guest, format_args!("no process in new namespaces and its cgroup: {error}"), remedy)
}
