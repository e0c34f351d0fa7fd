//! Names and users of cells, what killed keeps left of them, and the cells of the programs that read and run what strangers wrote:
//! the policy compiler and the policy engine.
//!
//! Those cells are that of a guest's VMM, with less: no control socket, and their own filters (`jail/filters/compiler.toml`,
//! `policy.toml`), which the program puts on before it reads a byte. The compiler has one thread, the engine two.

use std::{
    ffi::CStr,
    fs::{self, DirBuilder, File},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use casemate_jail::{Cell, CellPlan, CgroupPlan, End, IoPlan, Program, Rlimits, start};
use casemate_policy::{Ended, EngineStreams, HOST_LIMITS, PluginLimits, Streams};
use casemate_spec::{CellUids, Name, Refusal};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FlockOperation, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};

use crate::{Places, Rules};

/// uids of keeps, which have theirs before they can read what the host file says of cells'.
pub(crate) const UIDS_OF_KEEPS: CellUids = CellUids { first: 0x4361_8000 };
/// What the compiler allows itself of address space, and what the kernel keeps for it. The files in memory that it writes
/// are counted here as well.
const COMPILER_BYTES: u64 = (2 << 30) + (64 << 20);
/// The memory of the plugin that is asked, as much as a bundle may give one, and the engine's own: code that is mapped, questions
/// and answers.
const ENGINE_BYTES: u64 = PluginLimits::MOST.memory_bytes as u64 + (192 << 20);
/// How long an engine may take to end when nobody is there that could ask it.
const ENDING: Duration = Duration::from_secs(1);

/// Makes the folder for sockets and locks, for this user alone.
pub(crate) fn make_runtime(runtime: &Path) -> Result<(), Refusal> {
    let private = fs::Permissions::from_mode(0o700);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(runtime);
    made.and_then(|()| fs::set_permissions(runtime, private)).map_err(|error| {
        let cause = format_args!("it cannot be made: {error}");
        Refusal::new("host-folder", runtime.display(), cause, "run as root on a host with /run")
    })
}

/// A guest's name and its cell's user, reserved while this lives.
#[derive(Debug)]
pub(crate) struct Reserved {
    pub(crate) guest: Name,
    /// The uid and gid.
    pub(crate) uid: u32,
    pub(crate) control: PathBuf,
    _uid_lock: File,
    _name_lock: File,
}

impl Reserved {
    /// Reserves a guest's name, and a uid that no other cell has.
    pub(crate) fn new(places: &Places, guest: Name, uids: CellUids) -> Result<Self, Refusal> {
        make_runtime(&places.runtime)?;
        let name = places.runtime.join(format!("{guest}.lock"));
        let name_lock = try_lock(&name)?.ok_or_else(|| {
            let remedy = "stop it first, or give this guest another name";
            Refusal::new("guest-runs", &guest, "a guest of this name runs already", remedy)
        })?;
        let (uid, uid_lock) = reserve_uid(&places.runtime, guest.as_str(), uids)?;
        let control = places.runtime.join(format!("{guest}.socket"));
        Ok(Self { guest, uid, control, _uid_lock: uid_lock, _name_lock: name_lock })
    }
}

/// A uid that nobody else has, for as long as the lock is held. No guest's name begins with a sign, so its lock is never
/// taken for one of these.
pub(crate) fn reserve_uid(runtime: &Path, whose: &str, uids: CellUids) -> Result<(u32, File), Refusal> {
    for uid in (uids.first..).take(CellUids::COUNT as usize) {
        if let Some(lock) = try_lock(&runtime.join(format!("+uid-{uid}.lock")))? {
            return Ok((uid, lock));
        }
    }
    let cause = format!("{} cells or keeps are there already", CellUids::COUNT);
    Err(Refusal::new("host-full", whose, cause, "wait until a guest has ended"))
}

/// Removes what keeps that were killed left behind of their guests: accounts, records, sockets, and cgroups that are empty
/// by now.
pub(crate) fn sweep(places: &Places) {
    sweep_programs(&places.cgroup);
    let Ok(entries) = fs::read_dir(&places.runtime) else { return };
    let left = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(
            extension,
            Some(
                "account"
                    | "account-new"
                    | "json"
                    | "json-new"
                    | "operator"
                    | "sample"
                    | "sample-new"
                    | "socket"
            )
        )
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(left) {
        let Some(guest) = path.file_stem() else { continue };
        // Whoever has the lock watches over the guest.
        let Ok(Some(_lock)) = try_lock(&path.with_extension("lock")) else { continue };
        // A cgroup with processes in it stays, and so does the socket, which is the way to them.
        let cgroup = places.cgroup.join(guest);
        let empty = fs::remove_dir(&cgroup).is_ok() || !cgroup.exists();
        if empty || path.extension().is_none_or(|extension| extension != "socket") {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Removes the empty cgroups of killed keeps' other programs: `-engine-PID-N`, where no process of this id runs.
fn sweep_programs(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix('-')) else { continue };
        let Some(pid) = rest.split('-').nth(1).and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(pid.to_string()).exists() {
            // One with processes in it stays.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn try_lock(path: &Path) -> Result<Option<File>, Refusal> {
    let refuse = |error: &dyn std::fmt::Display| {
        let cause = format_args!("it cannot be locked: {error}");
        Refusal::new("host-folder", path.display(), cause, "run as root")
    };
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        // A lock can be held by whoever can open the file.
        .mode(0o600)
        .open(path)
        .map_err(|error| refuse(&error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(refuse(&error)),
    }
}

/// A listening socket for a cell, and a connection to it.
pub(crate) fn control_socket(path: &Path) -> Result<(OwnedFd, OwnedFd), Errno> {
    let _ = fs::remove_file(path);
    let make = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let address = SocketAddrUnix::new(path)?;
    let listener = make()?;
    bind(&listener, &address)?;
    listen(&listener, 1)?;
    let peer = make()?;
    connect(&peer, &address)?;
    Ok((listener, peer))
}

/// What differs between the cells of the compiler and the engine.
struct Room {
    name: &'static str,
    called: &'static CStr,
    input: OwnedFd,
    output: Option<OwnedFd>,
    complaint: File,
    memory_bytes_max: u64,
    file_size_bytes_max: u64,
    threads_max: u64,
}

/// A program in its cell. Dropping it ends both.
pub(crate) struct Closed {
    cell: Cell,
    /// Its uid is nobody else's as long as this is held.
    _uid_lock: File,
}

impl Closed {
    pub(crate) fn pid(&self) -> u32 {
        self.cell.pid()
    }

    /// Waits for its end, which is near; in words how it ended.
    pub(crate) fn end(mut self) -> String {
        match wait(&mut self.cell, ENDING) {
            Ok(ended) => ended.to_string(),
            Err(cause) => cause,
        }
    }
}

/// Runs the compiler in a cell, to its end or its deadline.
///
/// # Errors
/// Why it could not be, in words.
pub(crate) fn compile(
    places: &Places,
    rules: &Rules,
    program: &Path,
    streams: Streams,
) -> Result<Ended, String> {
    let Streams { input, output, complaint } = streams;
    let room = Room {
        name: "compiler",
        called: c"casemate-policy-compiler",
        input: input.into(),
        output: Some(output.into()),
        complaint,
        memory_bytes_max: COMPILER_BYTES,
        file_size_bytes_max: HOST_LIMITS.compiled_bytes as u64,
        threads_max: 1,
    };
    let mut closed = close(places, rules, program, room)?;
    let ended = wait(&mut closed.cell, Duration::from_millis(HOST_LIMITS.compile_ms))?;
    closed.cell.close().map_err(in_words)?;
    Ok(ended)
}

/// Starts the engine in a cell.
///
/// # Errors
/// Why it could not be, in words.
pub(crate) fn engine(
    places: &Places,
    rules: &Rules,
    program: &Path,
    streams: EngineStreams,
) -> Result<Closed, String> {
    let EngineStreams { socket, complaint } = streams;
    let room = Room {
        name: "engine",
        called: c"casemate-policy-engine",
        input: socket,
        output: None,
        complaint,
        memory_bytes_max: ENGINE_BYTES,
        file_size_bytes_max: 0,
        threads_max: 2,
    };
    close(places, rules, program, room)
}

fn close(places: &Places, rules: &Rules, program: &Path, room: Room) -> Result<Closed, String> {
    let file = File::open(program);
    let file = file.map_err(|error| format!("{} can't be opened: {error}", program.display()))?;
    make_runtime(&places.runtime).map_err(in_words)?;
    let (uid, uid_lock) = reserve_uid(&places.runtime, room.name, rules.uids).map_err(in_words)?;
    let cell = start(CellPlan {
        guest: name(room.name),
        uid,
        gid: uid,
        program: Program::shared(room.called, file, &places.cgroup).map_err(in_words)?,
        arguments: Vec::new(),
        input: Some(room.input),
        output: room.output,
        log: OwnedFd::from(room.complaint),
        control: None,
        rlimits: Rlimits {
            memlock_bytes: 0,
            descriptors_max: 16,
            threads_max: room.threads_max,
            file_size_bytes_max: room.file_size_bytes_max,
        },
        cgroup: CgroupPlan {
            parent: places.cgroup.clone(),
            memory_bytes_max: room.memory_bytes_max,
            pids_max: room.threads_max,
            cpus_max: 1,
            io: IoPlan::default(),
        },
        may_lack: rules.may_lack.clone(),
        tied_to_parent: true,
    })
    .map_err(in_words)?;
    Ok(Closed { cell, _uid_lock: uid_lock })
}

fn in_words(refusal: Refusal) -> String {
    refusal.to_string()
}

/// A name for its cgroup, which no guest has: theirs begin with a letter.
fn name(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("-{what}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Waits for the program's end; when that has not come in time, dropping the cell ends it.
fn wait(cell: &mut Cell, most: Duration) -> Result<Ended, String> {
    let deadline = Instant::now() + most;
    loop {
        match cell.try_wait().map_err(|error| format!("it can't be waited for: {error}"))? {
            Some(End::Exited(code)) => return Ok(Ended::Exited(code)),
            Some(end) => return Ok(Ended::Otherwise(end.to_string())),
            None => {}
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("it did not end within {} s", most.as_secs()));
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let pidfd = cell.pidfd();
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(format!("it can't be waited for: {error}")),
        }
    }
}
