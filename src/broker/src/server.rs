//! The broker's side: a thread for each connection, one desk for all of them.

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use casemate_host::{Host, Ledger, Tap, recover};
use casemate_policy::{Code, EngineStreams, HOST_LIMITS, OwnCode, PolicyError};
use casemate_spec::Refusal;
use casemate_wire::{Channel, WireError};
use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    Kept, Places, Rules,
    cells::{self, Reserved},
    console_log::{ConsoleLog, Rotating},
    devices::Devices,
    envelope, files,
    grants::{Grants, not_granted},
    in_cells::InCells,
    protocol::{Answer, Ended, Refused, Request, gone},
    running::Running,
    sockets,
};

/// Connections of a keep at a time.
const CONNECTIONS_MOST: usize = 64;
/// Engines of a keep at a time: one that decides, one that takes its place, and some that are looked at.
const ENGINES_MOST: usize = 4;

/// An answer, with descriptors.
type Answered = Result<(Value, Vec<OwnedFd>), Refusal>;

/// All that one keep has by its broker.
pub(crate) struct Desk {
    pub(crate) places: Places,
    pub(crate) host: Host,
    pub(crate) grants: Arc<Grants>,
    pub(crate) devices: Devices,
    pub(crate) running: Running,
    state: Mutex<State>,
    connections: AtomicUsize,
    /// Read while something is asked that makes, takes or gives back, which takes minutes at worst: whoever writes has seen the last of it.
    at_work: RwLock<()>,
    /// One compiler at a time: each may take 2 GiB.
    compiling: Mutex<()>,
}

#[derive(Default)]
struct State {
    reserved: Option<Arc<Reserved>>,
    rules: Rules,
    sockets: Vec<(PathBuf, Option<Arc<UnixListener>>)>,
    logs: Vec<thread::JoinHandle<()>>,
}

/// Serves the keep at the other end of this channel until it has gone; then gives back what it left.
pub(crate) fn serve(places: Places, channel: &Channel) {
    let desk = Arc::new(Desk {
        places,
        host: Host::live(),
        grants: Arc::default(),
        devices: Devices::default(),
        running: Running::default(),
        state: Mutex::default(),
        connections: AtomicUsize::new(0),
        at_work: RwLock::default(),
        compiling: Mutex::default(),
    });
    desk.listen_to(channel);
    desk.clean_up();
}

/// A value as an answer.
fn done(value: impl Serialize) -> Answered {
    with(value, Vec::new())
}

fn with(value: impl Serialize, descriptors: Vec<OwnedFd>) -> Answered {
    let value = serde_json::to_value(value).map_err(gone)?;
    Ok((value, descriptors))
}

impl Desk {
    fn listen_to(self: &Arc<Self>, channel: &Channel) {
        loop {
            let answered = match envelope::receive::<Request>(channel) {
                Ok((request, descriptors)) => self.answer(request, descriptors, channel),
                // What is no request is refused; who has gone asks nothing more.
                Err(WireError::Malformed) => Err(gone("this is no request")),
                Err(_) => return,
            };
            let (answer, descriptors) = match answered {
                Ok((value, descriptors)) => (Answer::Done(value), descriptors),
                Err(refusal) => (Answer::Refused(Refused::from(refusal)), Vec::new()),
            };
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            if envelope::send(channel, &answer, &borrowed).is_err() {
                return;
            }
        }
    }

    fn answer(self: &Arc<Self>, request: Request, fds: Vec<OwnedFd>, channel: &Channel) -> Answered {
        let before = |what: &str| self.before_the_start(what);
        // Who waits for the guest's end has nothing to lose.
        let _working = (!matches!(request, Request::Wait))
            .then(|| self.at_work.read().unwrap_or_else(PoisonError::into_inner));
        match request {
            Request::Connect => self.connect(),
            Request::Recover => {
                before("what was left is given back")?;
                let recovered = recover(&self.host, &self.ledger()?)?;
                cells::sweep(&self.places);
                done(recovered)
            }
            Request::Reserve { guest } => {
                before("a guest has one name")?;
                let uids = self.state().rules.uids;
                let reserved = Reserved::new(&self.places, guest, uids)?;
                let uid = reserved.uid;
                self.state().reserved = Some(Arc::new(reserved));
                self.running.begin(&self.places);
                done(uid)
            }
            Request::Rules(rules) => {
                before("the host's rules are read once")?;
                self.devices.set_pools(rules.pools.clone());
                self.state().rules = rules;
                done(())
            }
            Request::Put { kind, text } => {
                let put = files::put(&self.places.runtime, &self.reserved()?.guest, kind, &text);
                done(put.map_err(|error| error.to_string()))
            }
            Request::Remove { kind } => {
                files::remove(&self.places.runtime, &self.reserved()?.guest, kind);
                done(())
            }
            Request::ReadAll { kind } => done(files::read_all(&self.places.runtime, kind)),
            Request::Append { log, line } => {
                let journal = log.below(&self.places.state);
                if line.len() as u64 > journal.bounds.line_bytes
                    || line.find('\n') != line.len().checked_sub(1)
                {
                    return done(Err::<(), _>("this is no line"));
                }
                done(journal.write(line.as_bytes()).map_err(|error| error.to_string()))
            }
            Request::Open { what, path } => {
                let granted = match what {
                    crate::What::Raw { read_only } => self.grants.may_open(&path, read_only),
                    _ => false,
                };
                if !granted {
                    before("files are opened").map_err(|_| not_granted(path.display()))?;
                }
                let image = files::open(what, &path)?;
                with((image.size_bytes, image.file_bytes, image.path), vec![image.fd])
            }
            Request::Functions => done(self.devices.survey(&self.host)?),
            Request::Outline { addresses } => done(self.host.outline(&addresses)?),
            Request::Taken => done(self.ledger()?.taken()?),
            Request::Lives { addresses } => done(self.ledger()?.lives(addresses)?),
            Request::Choose { tenant, named, pooled } => {
                done(self.devices.choose(self, &tenant, &named, &pooled)?)
            }
            Request::Assignable { addresses } => done(self.devices.assignable(self, &addresses)?),
            Request::Dma { addresses, needs } => done(self.devices.judge_dma(self, &addresses, &needs)?),
            Request::MakeVirtual { slot, pooled } => done(self.devices.make_virtual(self, slot, &pooled)?),
            Request::LeaveVirtual { slot } => {
                self.devices.leave_virtual(self, slot);
                done(())
            }
            Request::Choosing => {
                if !self.grants.may_take_some() {
                    before("devices are chosen")?;
                }
                done(self.devices.begin_choosing(self)?)
            }
            Request::Chosen => {
                self.devices.end_choosing();
                done(())
            }
            Request::Claim(claiming) => {
                let (claimed, descriptors) = self.devices.claim(self, claiming)?;
                with(claimed, descriptors)
            }
            Request::Release { slot, runs_on } => {
                // Whatever a keep says: while the cell is there, its process may have a device.
                let runs_on = runs_on || self.running.has_cell();
                done(self.devices.release(self, slot, runs_on, &mut |returned| rule(channel, returned)))
            }
            Request::Ruling(_) => Err(gone("nobody asked for a ruling")),
            Request::Tap(request) => {
                if !self.grants.may_make(&request) {
                    before("taps are made").map_err(|_| not_granted(&request.name))?;
                }
                let tap = Tap::create(&request)?;
                with((), tap.queues)
            }
            Request::Node(node) => {
                before("device nodes are opened")?;
                with((), vec![files::open_node(node)?.into()])
            }
            Request::Cell(_)
            | Request::Memory
            | Request::Kill
            | Request::Wait
            | Request::CpuTime
            | Request::Close
            | Request::Limit { .. }
            | Request::Turn(_) => self.of_the_cell(request, fds),
            Request::Code { digest, engine, may_be_shared } => {
                let loaded = self.code().and_then(|code| code.load(&digest, &engine, may_be_shared));
                match loaded {
                    Ok(Some(file)) => with(Ok::<_, ()>(true), vec![file.into()]),
                    Ok(None) => done(Ok::<_, ()>(false)),
                    Err(error) => done(Err::<bool, _>(error)),
                }
            }
            Request::Compile { name, engine } => done(self.compile(&name, &engine, fds)),
            Request::Engine => self.start_engine(fds),
            Request::EndEngine { engine } => done(self.running.end_engine(engine)),
            Request::DropEngine { engine } => {
                drop(self.running.take_engine(engine));
                done(())
            }
            Request::Listen { path, code } => {
                before("sockets are made")?;
                let code = if code == "port-socket" { "port-socket" } else { "vsock-socket" };
                let listener = sockets::listen(&path, code)?;
                self.state().sockets.push((path, None));
                with((), vec![listener.into()])
            }
            Request::ListenToOperators => self.listen_to_operators(),
            Request::Unlisten { path } => {
                self.unlisten(&path);
                done(())
            }
            Request::Speak { path, port } => {
                if !self.state().sockets.iter().any(|(known, _)| *known == path) {
                    return done(Err::<(), _>("no socket of this guest's is there"));
                }
                match sockets::speak(&path, port) {
                    Ok(stream) => with(Ok::<_, ()>(()), vec![stream]),
                    Err(error) => done(Err::<(), _>(error.to_string())),
                }
            }
            Request::ConsoleLog { path, file_bytes, files } => {
                before("logs are opened")?;
                self.keep_console(&ConsoleLog { path: &path, file_bytes, files })
            }
        }
    }

    /// Another connection, which is served like this one.
    fn connect(self: &Arc<Self>) -> Answered {
        // Threads of a keep's that ask at a time: some for operators, and a handful of its own.
        if self.connections.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MOST {
            self.connections.fetch_sub(1, Ordering::AcqRel);
            return Err(gone(format_args!("there are {CONNECTIONS_MOST} connections already")));
        }
        let (ours, theirs) = envelope::pair().map_err(gone)?;
        let desk = Arc::clone(self);
        let serve = move || {
            desk.listen_to(&Channel::new(ours));
            desk.connections.fetch_sub(1, Ordering::AcqRel);
        };
        thread::Builder::new().name("desk".into()).spawn(serve).map_err(gone)?;
        with((), vec![theirs])
    }

    fn of_the_cell(&self, request: Request, mut fds: Vec<OwnedFd>) -> Answered {
        let in_words = |error: std::io::Error| error.to_string();
        match request {
            Request::Cell(wanted) => {
                self.before_the_start("a guest has one cell")?;
                let log = fds.pop().ok_or_else(|| gone("a cell has a log"))?;
                let (reserved, may_lack) = (self.reserved()?, self.state().rules.may_lack.clone());
                let (there, descriptors) =
                    self.running.start(&self.places, &reserved, wanted, may_lack, log)?;
                self.devices.note_cell(self, there.pid)?;
                with(there, descriptors)
            }
            Request::Memory => {
                let memory = self.running.memory().map_err(in_words);
                done(memory.map(|memory| (memory.pss_bytes, memory.pss_bytes_less_guest)))
            }
            Request::Kill => done(self.running.with_cell(|cell| cell.kill()).map_err(in_words)),
            Request::Wait => done(self.running.wait().map(Ended::from).map_err(in_words)),
            Request::CpuTime => done(
                self.running
                    .with_cell(|cell| Ok(cell.cpu_time()))
                    .ok()
                    .flatten()
                    .map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
            ),
            Request::Close => done(self.running.close()?),
            Request::Limit { limit, most } => done(self.running.limit(limit, most)),
            Request::Turn(knob) => {
                let cgroup = self.places.cgroup.join(self.reserved()?.guest.as_str());
                done(self.running.turn(&cgroup, knob))
            }
            _ => Err(gone("this is not about a cell")),
        }
    }

    fn in_cells(&self) -> InCells {
        InCells { places: self.places.clone(), rules: self.state().rules.clone() }
    }

    fn code(&self) -> Result<OwnCode, PolicyError> {
        OwnCode::open(&self.places.cache, &self.places.policy_compiler, Arc::new(self.in_cells()))
    }

    /// Compiles a component and keeps what came of it, under the digest that is taken here.
    fn compile(&self, name: &str, engine: &str, mut fds: Vec<OwnedFd>) -> Result<(), PolicyError> {
        let mut component = Vec::new();
        if let Some(file) = fds.pop() {
            let most = HOST_LIMITS.component_bytes as u64;
            let _ = File::from(file).take(most).read_to_end(&mut component);
        }
        let _one = self.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        let digest: String = Sha256::digest(&component).iter().map(|byte| format!("{byte:02x}")).collect();
        self.code()?.compile(name, &digest, engine, &component)
    }

    fn start_engine(&self, mut fds: Vec<OwnedFd>) -> Answered {
        let (Some(complaint), Some(socket)) = (fds.pop(), fds.pop()) else {
            return Err(gone("an engine has a socket and a file for complaints"));
        };
        if self.running.engines() >= ENGINES_MOST {
            return done(Err::<(u32, u32), _>(format!("{ENGINES_MOST} engines run already")));
        }
        let streams = EngineStreams { socket, complaint: File::from(complaint) };
        let rules = self.state().rules.clone();
        let started = cells::engine(&self.places, &rules, &self.places.policy_engine, streams);
        done(started.map(|engine| self.running.keep_engine(engine)))
    }

    fn listen_to_operators(self: &Arc<Self>) -> Answered {
        let path = self.places.runtime.join(format!("{}.operator", self.reserved()?.guest));
        let _ = std::fs::remove_file(&path);
        let listener = sockets::listen(&path, "host-folder")?;
        listener.set_nonblocking(false).map_err(gone)?;
        let listener = Arc::new(listener);
        let (ours, theirs) = envelope::pair().map_err(gone)?;
        let (heard, grants) = (Arc::clone(&listener), Arc::clone(&self.grants));
        let take = move || sockets::take_operators(&heard, &Channel::new(ours), &grants);
        thread::Builder::new().name("operators".into()).spawn(take).map_err(gone)?;
        let mut state = self.state();
        if state.sockets.iter().any(|(_, operators)| operators.is_some()) {
            return Err(gone("operators have a socket already"));
        }
        state.sockets.push((path.clone(), Some(listener)));
        with(path, vec![theirs])
    }

    fn unlisten(&self, path: &std::path::Path) {
        let mut state = self.state();
        if let Some(at) = state.sockets.iter().position(|(known, _)| known == path) {
            let (path, operators) = state.sockets.swap_remove(at);
            drop(state);
            forget(&path, operators.as_deref());
        }
    }

    /// Writes what comes on a pipe into a log, until the keep closes it.
    fn keep_console(&self, log: &ConsoleLog<'_>) -> Answered {
        let mut log = Rotating::open(*log)?;
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(gone)?;
        let keep = move || {
            let mut buffer = [0; 4096];
            let mut pipe = File::from(read);
            let mut fails = false;
            while let Ok(count) = pipe.read(&mut buffer) {
                let bytes = buffer.get(..count).unwrap_or_default();
                if bytes.is_empty() {
                    return;
                }
                // A disk that is full does not stop the guest.
                if !fails && let Err(error) = log.put(bytes) {
                    fails = true;
                    tracing::warn!(%error, "the console is no longer kept");
                }
            }
        };
        let thread = thread::Builder::new().name("console-log".into()).spawn(keep).map_err(gone)?;
        self.state().logs.push(thread);
        with((), vec![write])
    }

    /// Refuses what is for the time before a guest's cell is closed: then the keep has met nobody but its operator's files.
    fn before_the_start(&self, what: &str) -> Result<(), Refusal> {
        if self.running.has_started() {
            let cause = "its guest's cell is closed, and this is for the time before";
            return Err(Refusal::new("broker-not-granted", what, cause, "report it with this message"));
        }
        Ok(())
    }

    pub(crate) fn reserved(&self) -> Result<Arc<Reserved>, Refusal> {
        self.state().reserved.clone().ok_or_else(|| gone("no guest has a name yet"))
    }

    pub(crate) fn ledger(&self) -> Result<Ledger, Refusal> {
        Ledger::open(&self.places.state)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its keep has gone: in order, with nothing left, or not.
    fn clean_up(&self) {
        let (sockets, logs) = {
            let mut state = self.state();
            (std::mem::take(&mut state.sockets), std::mem::take(&mut state.logs))
        };
        for (path, operators) in sockets {
            forget(&path, operators.as_deref());
        }
        let close = || {
            if let Err(refusal) = self.running.close() {
                tracing::warn!("{refusal}");
            }
        };
        close();
        // What a thread of the keep's has begun comes to its end before that is undone.
        let _working = self.at_work.write();
        close();
        self.devices.release_all(self);
        self.running.end_engines();
        if let Ok(reserved) = self.reserved() {
            for kind in [Kept::Account, Kept::Record, Kept::Sample] {
                files::remove(&self.places.runtime, &reserved.guest, kind);
            }
            let _ = std::fs::remove_file(&reserved.control);
        }
        for log in logs {
            let _ = log.join();
        }
    }
}

fn forget(path: &std::path::Path, operators: Option<&UnixListener>) {
    let _ = std::fs::remove_file(path);
    // Wakes the thread that accepts, which then ends.
    if let Some(listener) = operators {
        let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
    }
}

/// Asks the keep for the policies' word on a device. One that gives none, or nonsense, has no word, and the device goes to nobody.
fn rule(channel: &Channel, returned: &casemate_host::Returned) -> Option<String> {
    let asked = envelope::send(channel, &Answer::Judge(Box::new(returned.clone())), &[]);
    match asked.and_then(|()| envelope::receive::<Request>(channel)) {
        Ok((Request::Ruling(ruling), _)) => ruling,
        _ => Some("policies were to judge it, and its guest's keep could not ask them".into()),
    }
}
