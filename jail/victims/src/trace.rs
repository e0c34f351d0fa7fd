//! Records the system calls of a VMM, thread by thread, and which rules of the filters they use.
//!
//! A program is run and followed by ptrace(2), with all its processes. Of those that put on a filter of
//! casemate-filters each call is seen before the filter judges it; which filters a thread has is known from its calls of
//! seccomp(2). The programs are the shipped ones, and nothing in them knows of this.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{c_int, c_uint, c_ulong},
    fs::File,
    io,
    mem::zeroed,
    os::unix::{fs::FileExt, process::CommandExt},
    process::Command,
    ptr,
};

use casemate_filters::{Role, Rule, call_name, rules};

/// What was seen of a program's threads.
#[derive(Debug, Default)]
pub struct Seen {
    /// How often each rule was used, by role and the rule's number in [`rules`].
    pub used: BTreeMap<(Role, usize), u64>,
    /// Calls that no rule of their thread's role speaks of, with their arguments, by role; each once.
    pub unruled: BTreeSet<(Role, String, [u64; 6])>,
    /// The exit code of the program; `None` when a signal ended it.
    pub exit: Option<i32>,
}

/// A thread that is followed.
#[derive(Clone, Copy, Default)]
struct Thread {
    /// What its innermost filter is for.
    role: Option<Role>,
    /// The role whose filter it is putting on right now.
    putting_on: Option<Role>,
    /// Whether its calls are looked at one by one.
    is_looked_at: bool,
    /// Whether it has stopped for the first time.
    has_stopped: bool,
    /// Whether the thread that made it has told of it. Until then it stands at its first stop.
    is_told: bool,
}

impl Thread {
    /// The request by which it goes on.
    fn onwards(self) -> c_uint {
        if self.is_looked_at { libc::PTRACE_SYSCALL } else { libc::PTRACE_CONT }
    }
}

const OPTIONS: c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

/// Programs whose calls are looked at, by their names in /proc/PID/exe: what is executed in a cell.
const IN_CELLS: [&str; 4] =
    ["casemate-vmm", "casemate-policy-compiler", "casemate-policy-engine", "casemate-victim"];

/// Runs a program to its end, and what it starts.
///
/// # Errors
/// When the program can't be started or followed: another tracer, or Yama's ptrace_scope.
pub fn follow(mut command: Command) -> io::Result<Seen> {
    // SAFETY: between fork and exec one system call is made, which allocates nothing.
    unsafe {
        command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0usize, 0usize) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    let child = command.spawn()?;
    let first = c_int::try_from(child.id()).map_err(io::Error::other)?;
    let mut seen = Seen::default();
    let mut threads: BTreeMap<c_int, Thread> = BTreeMap::new();
    let mut ready = false;
    loop {
        let mut status = 0;
        // SAFETY: writes one int, which lives through the call.
        let tid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        if tid == -1 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => return Ok(seen),
                _ => return Err(error),
            }
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if tid == first {
                seen.exit = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
            }
            threads.remove(&tid);
            continue;
        }
        if tid == first && !ready {
            // It stands at its exec. What it makes from here on is followed from its first instruction.
            request(libc::PTRACE_SETOPTIONS, tid, OPTIONS as usize)?;
            threads.insert(tid, Thread { is_told: true, ..Thread::default() });
            ready = true;
        }
        let signal = stopped(tid, status, &mut threads, &mut seen)?;
        if let Some(thread) = threads.get(&tid).filter(|thread| thread.is_told) {
            go_on(tid, *thread, signal)?;
        }
    }
}

fn go_on(tid: c_int, thread: Thread, signal: usize) -> io::Result<()> {
    match request(thread.onwards(), tid, signal) {
        // It was killed while it stood.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// Looks at what a thread stopped for; returns the signal that it is to go on with.
fn stopped(
    tid: c_int,
    status: c_int,
    threads: &mut BTreeMap<c_int, Thread>,
    seen: &mut Seen,
) -> io::Result<usize> {
    let signal = libc::WSTOPSIG(status);
    let thread = threads.entry(tid).or_default();
    let is_first_stop = !std::mem::replace(&mut thread.has_stopped, true);
    Ok(match status >> 16 {
        libc::PTRACE_EVENT_EXEC => {
            let program = std::fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default();
            let program = program.to_string_lossy();
            *thread = Thread {
                is_looked_at: IN_CELLS.iter().any(|name| program.contains(name)),
                has_stopped: true,
                is_told: true,
                ..Thread::default()
            };
            0
        }
        libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
            let parent = *thread;
            let mut made: c_ulong = 0;
            // SAFETY: for this request the kernel writes one unsigned long, which lives through the call.
            let result = unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, tid, 0usize, &raw mut made) };
            if let (0, Ok(made)) = (result, c_int::try_from(made)) {
                let child = threads.entry(made).or_default();
                (child.role, child.is_looked_at, child.is_told) = (parent.role, parent.is_looked_at, true);
                if child.has_stopped {
                    go_on(made, *child, 0)?;
                }
            }
            0
        }
        0 if signal == libc::SIGTRAP | 0x80 => {
            call(tid, thread, seen);
            0
        }
        // The stop with which a new thread begins.
        0 if signal == libc::SIGSTOP && is_first_stop => 0,
        // That of the first exec.
        0 if signal == libc::SIGTRAP && is_first_stop => 0,
        0 => usize::try_from(signal).unwrap_or(0),
        _ => 0,
    })
}

/// A thread enters a call, or comes out of one.
fn call(tid: c_int, thread: &mut Thread, seen: &mut Seen) {
    // SAFETY: plain numbers, for which zero is valid.
    let mut info: libc::ptrace_syscall_info = unsafe { zeroed() };
    let size = size_of::<libc::ptrace_syscall_info>();
    // SAFETY: the kernel writes at most `size` bytes into `info`, which lives through the call.
    if unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, size, &raw mut info) } <= 0 {
        return;
    }
    match info.op {
        libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: `op` says that this is what the kernel wrote.
            let entry = unsafe { info.u.entry };
            let number = u32::try_from(entry.nr).unwrap_or(u32::MAX);
            note(thread.role, number, entry.args, seen);
            let is_seccomp = i64::try_from(entry.nr) == Ok(libc::SYS_seccomp);
            let puts_on = is_seccomp && entry.args[0] == u64::from(libc::SECCOMP_SET_MODE_FILTER);
            thread.putting_on = puts_on.then(|| role_of(tid, entry.args[2])).flatten();
        }
        libc::PTRACE_SYSCALL_INFO_EXIT => {
            // SAFETY: as above.
            let is_error = unsafe { info.u.exit.is_error } != 0;
            if let Some(role) = thread.putting_on.take().filter(|_| !is_error) {
                thread.role = Some(role);
            }
        }
        _ => {}
    }
}

/// The role whose filter lies at this `struct sock_fprog` of the thread.
fn role_of(tid: c_int, at: u64) -> Option<Role> {
    let memory = File::open(format!("/proc/{tid}/mem")).ok()?;
    let mut program = [0; 16];
    memory.read_exact_at(&mut program, at).ok()?;
    let (length, filter) = program.split_at_checked(8)?;
    let count = usize::from(u16::from_le_bytes(length.get(..2)?.try_into().ok()?));
    let mut bytes = vec![0; count * 8];
    memory.read_exact_at(&mut bytes, u64::from_le_bytes(filter.try_into().ok()?)).ok()?;
    let is_its = |role: &Role| {
        let own = role.program().iter().flat_map(|at| {
            let ([a, b], [c, d, e, f]) = (at.code.to_le_bytes(), at.k.to_le_bytes());
            [a, b, at.jt, at.jf, c, d, e, f]
        });
        own.eq(bytes.iter().copied())
    };
    Role::ALL.into_iter().find(is_its)
}

fn note(role: Option<Role>, number: u32, arguments: [u64; 6], seen: &mut Seen) {
    let Some(role) = role else { return };
    let name = call_name(number).unwrap_or("unknown");
    let uses = |rule: &Rule| rule.call == name && rule.is_met_by(arguments);
    let mut has_rule = false;
    for (index, _) in rules(role).iter().enumerate().filter(|(_, rule)| uses(rule)) {
        *seen.used.entry((role, index)).or_default() += 1;
        has_rule = true;
    }
    if !has_rule {
        seen.unruled.insert((role, name.to_owned(), arguments));
    }
}

fn request(request: c_uint, tid: c_int, data: usize) -> io::Result<()> {
    // SAFETY: the requests of this module that come here take numbers only.
    match unsafe { libc::ptrace(request, tid, ptr::null_mut::<u8>(), data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
