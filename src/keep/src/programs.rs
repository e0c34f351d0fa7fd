//! The programs that read and run what strangers wrote, each in a cell: the policy compiler and the policy engine.
//!
//! The cell is that of a guest's VMM, with less: no control socket, and its own filters (`jail/filters/compiler.toml`,
//! `policy.toml`), which the program puts on before it reads a byte. The compiler has one thread, the engine two.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use casemate_jail::{Cell, CellPlan, CgroupPlan, End, IoPlan, Program, Rlimits, start};
use casemate_policy::{
    Ended, EngineStreams, HOST_LIMITS, Launch, Plain, PluginLimits, Programs, Running, Streams,
};
use casemate_spec::Refusal;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{Paths, cell::reserve_uid};

/// What the compiler allows itself of address space, and what the kernel keeps for it. The files in memory that it writes
/// are counted here as well.
const COMPILER_BYTES: u64 = (2 << 30) + (64 << 20);

/// The memory of the plugin that is asked, as much as a bundle may give one, and the engine's own: code that is mapped, questions
/// and answers.
const ENGINE_BYTES: u64 = PluginLimits::MOST.memory_bytes as u64 + (192 << 20);

/// How long an engine may take to end when nobody is there that could ask it.
const ENDING: Duration = Duration::from_secs(1);

impl Paths {
    /// The programs for policies as this user runs them: root in cells, anybody else as processes of their own, which still
    /// confine themselves.
    pub fn programs(&self) -> Programs {
        let launch: Arc<dyn Launch> = if rustix::process::geteuid().is_root() {
            Arc::new(self.clone())
        } else {
            Arc::new(Plain::DEFAULT)
        };
        Programs { compiler: self.policy_compiler.clone(), engine: self.policy_engine.clone(), launch }
    }
}

/// In a cell below these paths.
impl Launch for Paths {
    fn compile(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        let Streams { input, output, complaint } = streams;
        let mut closed = self.close(Room {
            name: "compiler",
            program: Program::seal_as(c"casemate-policy-compiler", open(program)?).map_err(in_words)?,
            input: input.into(),
            output: Some(output.into()),
            complaint,
            memory_bytes_max: COMPILER_BYTES,
            file_size_bytes_max: HOST_LIMITS.compiled_bytes as u64,
            threads_max: 1,
        })?;
        let ended = wait(&mut closed.cell, Duration::from_millis(HOST_LIMITS.compile_ms))?;
        closed.cell.close().map_err(in_words)?;
        Ok(ended)
    }

    fn engine(&self, program: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String> {
        let EngineStreams { socket, complaint } = streams;
        Ok(Box::new(self.close(Room {
            name: "engine",
            program: Program::seal_as(c"casemate-policy-engine", open(program)?).map_err(in_words)?,
            input: socket,
            output: None,
            complaint,
            memory_bytes_max: ENGINE_BYTES,
            file_size_bytes_max: 0,
            threads_max: 2,
        })?))
    }
}

/// What differs between the two cells.
struct Room {
    name: &'static str,
    program: Program,
    input: OwnedFd,
    output: Option<OwnedFd>,
    complaint: File,
    memory_bytes_max: u64,
    file_size_bytes_max: u64,
    threads_max: u64,
}

/// A program in its cell. Dropping it ends both.
struct Closed {
    cell: Cell,
    /// Its uid is nobody else's as long as this is held.
    _uid_lock: File,
}

impl Running for Closed {
    fn pid(&self) -> u32 {
        self.cell.pid()
    }

    fn end(mut self: Box<Self>) -> String {
        match wait(&mut self.cell, ENDING) {
            Ok(ended) => ended.to_string(),
            Err(cause) => cause,
        }
    }
}

impl Paths {
    fn close(&self, room: Room) -> Result<Closed, String> {
        self.make_runtime().map_err(in_words)?;
        let (uid, uid_lock) = reserve_uid(self, room.name).map_err(in_words)?;
        let cell = start(CellPlan {
            guest: name(room.name),
            uid,
            gid: uid,
            program: room.program,
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
                parent: self.cgroup.clone(),
                memory_bytes_max: room.memory_bytes_max,
                pids_max: room.threads_max,
                cpus_max: 1,
                io: IoPlan::default(),
            },
            may_lack: self.read_host_file().map_err(in_words)?.cell.may_lack,
            tied_to_parent: true,
        })
        .map_err(in_words)?;
        Ok(Closed { cell, _uid_lock: uid_lock })
    }
}

fn in_words(refusal: Refusal) -> String {
    refusal.to_string()
}

fn open(program: &Path) -> Result<File, String> {
    File::open(program).map_err(|error| format!("{} can't be opened: {error}", program.display()))
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
