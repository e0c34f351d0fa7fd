//! The keep's side: the broker, as something to be asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use casemate_host::{DmaNeeds, Image, Life, PciFunction, Recovered, Tap, TapRequest};
use casemate_jail::{End, Landlock, MemoryUse};
use casemate_policy::{Code, Ended as EngineEnded, EngineStreams, Fault, Launch, PolicyError, Streams};
use casemate_spec::{CellPart, Name, PciAddress, Pooled, Refusal};
use casemate_wire::{Channel, WireError};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::{Gid, Uid},
    thread::{
        CapabilitySet, CapabilitySets, set_capabilities, set_keep_capabilities, set_no_new_privs,
        set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Claiming, Kept, Knob, Limit, Node, Places, Rules, Seen, What,
    claim::Claim,
    console_log::ConsoleLog,
    door::{give_up_rights, nobody_has_rights},
    envelope,
    journal::Log,
    protocol::{Answer, CellThere, CellWanted, Ended, Request, gone},
};

/// How long a keep waits for its broker's end at its own.
const ENDING: Duration = Duration::from_secs(5);

/// Of this process: a keep has one, as it has one user.
static BROKER: OnceLock<Broker> = OnceLock::new();

/// This process's broker; none where nobody began one, as for a user who isn't root.
pub fn broker() -> Option<&'static Broker> {
    BROKER.get()
}

/// The broker of this process, which is asked from any thread.
pub struct Broker {
    /// Over which others are made.
    first: Mutex<Channel>,
    idle: Mutex<Vec<Channel>>,
    process: Mutex<Child>,
    uid: u32,
    operator: u32,
}

/// What a broker is told first.
#[derive(Debug, serde::Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) places: Places,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the broker, and gives up being root: what this process does from now on it does as a user that nobody else is, but for
/// what it asks of the broker. Until [`Broker::close_the_door`] it can read any file, as whoever started it can.
///
/// To be called while the process has one thread.
///
/// # Errors
/// `broker-gone` when the program can't be had or this process stays root.
pub fn begin(program: &Path, places: Places) -> Result<&'static Broker, Refusal> {
    let operator = rustix::process::getuid().as_raw();
    let (ours, theirs) = envelope::pair().map_err(gone)?;
    let mut command = Command::new(program);
    command.env_clear().current_dir("/").stdin(theirs).stdout(Stdio::null());
    let failed = |error: io::Error| gone(format_args!("{} can't be started: {error}", program.display()));
    let process = command.spawn().map_err(failed)?;
    drop(command);
    let first = Channel::new(ours);
    envelope::send(&first, &Hello { places }, &[]).map_err(gone)?;
    let (answer, _) = envelope::receive::<Answer>(&first).map_err(gone)?;
    let uid: u32 = value_of(answer)?;
    become_user(uid).map_err(|error| gone(format_args!("this process can't become user {uid}: {error}")))?;
    let this = Broker {
        first: Mutex::new(first),
        idle: Mutex::default(),
        process: Mutex::new(process),
        uid,
        operator,
    };
    BROKER.set(this).map_err(|_| gone("there is one already"))?;
    broker().ok_or_else(|| gone("this process has none"))
}

/// Of the calling thread, and those that it starts.
fn become_user(id: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    set_keep_capabilities(true)?;
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    let reads = CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(
        None,
        CapabilitySets { effective: reads, permitted: reads, inheritable: CapabilitySet::empty() },
    )?;
    set_no_new_privs(true)
}

fn value_of<T: DeserializeOwned>(answer: Answer) -> Result<T, Refusal> {
    match answer {
        Answer::Done(value) => serde_json::from_value(value).map_err(gone),
        Answer::Refused(refused) => Err(refused.into()),
        Answer::Judge(_) => Err(gone("it asks what nobody asked it to")),
    }
}

impl Broker {
    /// The user that this process is.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The user who started this process.
    pub fn operator_uid(&self) -> u32 {
        self.operator
    }

    /// From now on this process reads nothing but what its user may, and where the kernel has Landlock does nothing else by path.
    ///
    /// # Errors
    /// `broker-gone` when a thread of it still could.
    pub fn close_the_door(&self) -> Result<(), Refusal> {
        give_up_rights()?;
        nobody_has_rights()
    }

    /// Lets go of the broker, which then ends, and waits for that.
    pub fn end(&self) {
        lock(&self.idle).clear();
        if let Ok((ours, _)) = envelope::pair() {
            // The other end of the new one is closed already: whoever asks from now on is told so.
            drop(std::mem::replace(&mut *lock(&self.first), Channel::new(ours)));
        }
        // It has seconds, in which it does what is left; then who waits for this process has waited enough.
        let deadline = Instant::now() + ENDING;
        while Instant::now() < deadline && matches!(lock(&self.process).try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn channel(&self) -> Result<Channel, Refusal> {
        if let Some(channel) = lock(&self.idle).pop() {
            return Ok(channel);
        }
        let first = lock(&self.first);
        let (_, mut descriptors) = exchange(&first, &Request::Connect, &[])?;
        descriptors.pop().map(Channel::new).ok_or_else(|| gone("it gives no connection"))
    }

    /// Asks, with descriptors, and waits for the answer.
    fn ask<T: DeserializeOwned>(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, Vec<OwnedFd>), Refusal> {
        let channel = self.channel()?;
        let (answer, descriptors) = exchange(&channel, request, descriptors)?;
        lock(&self.idle).push(channel);
        Ok((value_of(answer)?, descriptors))
    }

    fn value<T: DeserializeOwned>(&self, request: &Request) -> Result<T, Refusal> {
        self.ask(request, &[]).map(|(value, _)| value)
    }

    fn descriptor(&self, request: &Request) -> Result<OwnedFd, Refusal> {
        let (_, mut descriptors) = self.ask::<Value>(request, &[])?;
        descriptors.pop().ok_or_else(|| gone("a descriptor did not come"))
    }

    /// Gives back what keeps that were killed left behind.
    ///
    /// # Errors
    /// As [`casemate_host::recover`].
    pub fn recover(&self) -> Result<Vec<Recovered>, Refusal> {
        self.value(&Request::Recover)
    }

    /// Reserves a guest's name; gives the user of its cell.
    ///
    /// # Errors
    /// `guest-runs`, `host-full`, `host-folder`.
    pub fn reserve(&self, guest: &Name) -> Result<u32, Refusal> {
        self.value(&Request::Reserve { guest: guest.clone() })
    }

    /// Tells what the host file says: of pools, and of what cells may lack. The broker heeds it from then on.
    ///
    /// # Errors
    /// `broker-gone`; `broker-not-granted` once the guest runs.
    pub fn set_rules(&self, rules: Rules) -> Result<(), Refusal> {
        self.value(&Request::Rules(rules))
    }

    pub(crate) fn put(&self, kind: Kept, text: &str) -> io::Result<()> {
        in_words(self.value(&Request::Put { kind, text: text.to_owned() }))
    }

    pub(crate) fn remove(&self, kind: Kept) {
        let _ = self.value::<()>(&Request::Remove { kind });
    }

    pub(crate) fn read_all(&self, kind: Kept) -> Vec<Seen> {
        self.value(&Request::ReadAll { kind }).unwrap_or_default()
    }

    pub(crate) fn append(&self, log: Log, line: &[u8]) -> io::Result<()> {
        let line = String::from_utf8(line.to_vec()).map_err(io::Error::other)?;
        in_words(self.value(&Request::Append { log, line }))
    }

    pub(crate) fn open(&self, what: What, path: &Path) -> Result<Image, Refusal> {
        let path = std::path::absolute(path).unwrap_or(path.to_owned());
        let ((size_bytes, file_bytes, path), mut descriptors) =
            self.ask::<(u64, u64, PathBuf)>(&Request::Open { what, path }, &[])?;
        let fd = descriptors.pop().ok_or_else(|| gone("the file did not come"))?;
        Ok(Image { fd, size_bytes, file_bytes, path })
    }

    pub(crate) fn functions(&self) -> Result<Vec<PciFunction>, Refusal> {
        self.value(&Request::Functions)
    }

    pub(crate) fn outline(&self, addresses: BTreeSet<PciAddress>) -> Result<Vec<PciFunction>, Refusal> {
        self.value(&Request::Outline { addresses })
    }

    pub(crate) fn taken(&self) -> Result<BTreeMap<PciAddress, Life>, Refusal> {
        self.value(&Request::Taken)
    }

    pub(crate) fn lives(&self, addresses: Vec<PciAddress>) -> Result<Vec<Life>, Refusal> {
        self.value(&Request::Lives { addresses })
    }

    pub(crate) fn choose(
        &self,
        tenant: &Name,
        named: &[PciAddress],
        pooled: &[Pooled],
    ) -> Result<Vec<(Pooled, PciAddress)>, Refusal> {
        let (named, pooled) = (named.to_vec(), pooled.to_vec());
        self.value(&Request::Choose { tenant: tenant.clone(), named, pooled })
    }

    pub(crate) fn assignable(&self, addresses: &[PciAddress]) -> Result<(), Refusal> {
        self.value(&Request::Assignable { addresses: addresses.to_vec() })
    }

    pub(crate) fn judge_dma(&self, addresses: &[PciAddress], needs: &DmaNeeds) -> Result<(), Refusal> {
        self.value(&Request::Dma { addresses: addresses.to_vec(), needs: needs.clone() })
    }

    /// Has the virtual functions made that these pools are of, for the guest's start or a slot; tells whether there are any.
    ///
    /// # Errors
    /// As [`casemate_host::make_virtual_functions`].
    pub fn make_virtual(&self, slot: Option<u8>, pooled: &[Pooled]) -> Result<bool, Refusal> {
        if pooled.is_empty() {
            return Ok(false);
        }
        self.value(&Request::MakeVirtual { slot, pooled: pooled.to_vec() })
    }

    /// They are no longer used.
    pub fn leave_virtual(&self, slot: Option<u8>) {
        let _ = self.value::<()>(&Request::LeaveVirtual { slot });
    }

    /// Waits until no other guest of this host is between choosing its devices and claiming them.
    ///
    /// # Errors
    /// As [`casemate_host::Ledger::choosing`].
    pub fn begin_choosing(&'static self) -> Result<Choosing, Refusal> {
        self.value::<()>(&Request::Choosing)?;
        Ok(Choosing(self))
    }

    /// Takes devices for the guest. What it has of them when it fails is released, and told.
    ///
    /// # Errors
    /// As [`casemate_host::claim`] and [`casemate_host::Ledger::attach`].
    pub fn claim(&'static self, claiming: Claiming) -> Result<Claim, crate::claim::Failed> {
        let slot = claiming.slot;
        let (claimed, descriptors) = self.ask(&Request::Claim(claiming), &[])?;
        Claim::new(self, slot, claimed, descriptors)
    }

    pub(crate) fn release(
        &self,
        slot: Option<u8>,
        runs_on: bool,
        judge: &mut dyn FnMut(&casemate_host::Returned) -> Option<String>,
    ) -> Result<Vec<casemate_host::Returned>, Refusal> {
        let channel = self.channel()?;
        let mut request = Request::Release { slot, runs_on };
        loop {
            match exchange(&channel, &request, &[])?.0 {
                Answer::Judge(returned) => request = Request::Ruling(judge(&returned)),
                answer => {
                    lock(&self.idle).push(channel);
                    return value_of(answer);
                }
            }
        }
    }

    pub(crate) fn tap(&self, request: &TapRequest) -> Result<Tap, Refusal> {
        let (_, queues) = self.ask::<()>(&Request::Tap(request.clone()), &[])?;
        Ok(Tap { queues, name: request.name.clone() })
    }

    /// Opens a device node that the guest's VMM uses.
    ///
    /// # Errors
    /// `kvm-missing`, `vhost-missing`.
    pub fn open_node(&self, node: Node) -> Result<OwnedFd, Refusal> {
        self.descriptor(&Request::Node(node))
    }

    /// Closes a cell around the VMM, which writes its own words to `log`; gives the way to it as well.
    ///
    /// # Errors
    /// As [`casemate_jail::start`]; `vmm-missing`.
    pub fn close_cell(
        &'static self,
        wanted: CellWanted,
        log: BorrowedFd<'_>,
    ) -> Result<(Cell, OwnedFd), Refusal> {
        let (there, mut descriptors) = self.ask::<CellThere>(&Request::Cell(wanted), &[log])?;
        let (Some(peer), Some(pidfd)) = (descriptors.pop(), descriptors.pop()) else {
            return Err(gone("the way to the cell did not come"));
        };
        let CellThere { pid, abi, filesystem, network, scopes, weakened } = there;
        let landlock = Landlock { abi, filesystem, network, scopes };
        Ok((Cell { broker: self, pid, pidfd, landlock, weakened, is_closed: false }, peer))
    }

    /// Sets a limit of the process in the cell.
    ///
    /// # Errors
    /// In words.
    pub fn limit(&self, limit: Limit, most: u64) -> Result<(), String> {
        self.value(&Request::Limit { limit, most }).unwrap_or_else(|refusal| Err(refusal.to_string()))
    }

    /// Turns a knob of the cell's cgroup.
    ///
    /// # Errors
    /// In words.
    pub fn turn(&self, knob: Knob) -> Result<(), String> {
        self.value(&Request::Turn(knob)).unwrap_or_else(|refusal| Err(refusal.to_string()))
    }

    /// Listens at a path, for root alone, until [`Broker::unlisten`].
    ///
    /// # Errors
    /// A refusal of this code.
    pub fn listen(&self, path: &Path, code: &str) -> Result<UnixListener, Refusal> {
        let (path, code) = (path.to_owned(), code.to_owned());
        self.descriptor(&Request::Listen { path, code }).map(UnixListener::from)
    }

    /// Nobody listens there any more.
    pub fn unlisten(&self, path: &Path) {
        let _ = self.value::<()>(&Request::Unlisten { path: path.to_owned() });
    }

    /// Connects to who listens beside one of the guest's sockets, for this port.
    ///
    /// # Errors
    /// When nobody does.
    pub fn speak(&self, path: &Path, port: u32) -> io::Result<OwnedFd> {
        let request = Request::Speak { path: path.to_owned(), port };
        let (spoken, mut descriptors) =
            self.ask::<Result<(), String>>(&request, &[]).map_err(io::Error::other)?;
        spoken.map_err(io::Error::other)?;
        descriptors.pop().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Has operators taken in at the guest's socket for them; gives its path and the way on which they come.
    ///
    /// # Errors
    /// `host-folder`.
    pub fn listen_to_operators(&self) -> Result<(PathBuf, Operators), Refusal> {
        let (path, mut descriptors) = self.ask(&Request::ListenToOperators, &[])?;
        let way = descriptors.pop().ok_or_else(|| gone("the way of operators did not come"))?;
        Ok((path, Operators(Channel::new(way))))
    }

    /// Has the guest's console kept: what is written to this goes into a log that is bounded.
    ///
    /// # Errors
    /// `console-log`.
    pub fn keep_console(&self, log: ConsoleLog<'_>) -> Result<File, Refusal> {
        let path = std::path::absolute(log.path).unwrap_or(log.path.to_owned());
        let request = Request::ConsoleLog { path, file_bytes: log.file_bytes, files: log.files };
        self.descriptor(&request).map(File::from)
    }
}

fn exchange(
    channel: &Channel,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(Answer, Vec<OwnedFd>), Refusal> {
    let asked = envelope::send(channel, request, descriptors);
    asked.and_then(|()| envelope::receive(channel)).map_err(|error| match error {
        WireError::Closed => gone("it has ended"),
        error => gone(error),
    })
}

fn in_words(answered: Result<Result<(), String>, Refusal>) -> io::Result<()> {
    answered.map_err(io::Error::other)?.map_err(io::Error::other)
}

/// While it lives, no other guest of this host chooses devices.
#[must_use = "dropped, it lets others choose"]
pub struct Choosing(&'static Broker);

impl Drop for Choosing {
    fn drop(&mut self) {
        let _ = self.0.value::<()>(&Request::Chosen);
    }
}

/// The way on which operators come.
#[derive(Debug)]
pub struct Operators(Channel);

impl Operators {
    /// The next operator; none once the socket is gone.
    pub fn next(&self) -> Option<UnixStream> {
        let ((), mut descriptors) = envelope::receive::<()>(&self.0).ok()?;
        descriptors.pop().map(UnixStream::from)
    }
}

/// A cell that the broker made. It is killed, and its cgroup removed, when this is dropped.
pub struct Cell {
    broker: &'static Broker,
    pid: u32,
    pidfd: OwnedFd,
    landlock: Landlock,
    weakened: BTreeSet<CellPart>,
    is_closed: bool,
}

impl Cell {
    /// The process's pid as the host sees it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The parts that it is without.
    pub fn weakened(&self) -> &BTreeSet<CellPart> {
        &self.weakened
    }

    /// What its Landlock ruleset denies.
    pub fn landlock(&self) -> Landlock {
        self.landlock
    }

    /// How the process ended; to be asked once it has.
    ///
    /// # Errors
    /// When the broker can't tell.
    pub fn wait(&self) -> io::Result<End> {
        let ended: Result<Ended, String> = self.broker.value(&Request::Wait).map_err(io::Error::other)?;
        ended.map(End::from).map_err(io::Error::other)
    }

    /// Kills the process. One that has ended already is no error.
    ///
    /// # Errors
    /// When the broker can't.
    pub fn kill(&self) -> io::Result<()> {
        in_words(self.broker.value(&Request::Kill))
    }

    /// The process's memory.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn memory(&self) -> io::Result<MemoryUse> {
        let memory: Result<(u64, u64), String> =
            self.broker.value(&Request::Memory).map_err(io::Error::other)?;
        let (pss_bytes, pss_bytes_less_guest) = memory.map_err(io::Error::other)?;
        Ok(MemoryUse { pss_bytes, pss_bytes_less_guest })
    }

    /// Processor time that the cell has taken.
    pub fn cpu_time(&self) -> Option<Duration> {
        self.broker.value::<Option<u64>>(&Request::CpuTime).ok().flatten().map(Duration::from_micros)
    }

    /// Kills what still runs, waits for it, and removes the cgroup.
    ///
    /// # Errors
    /// `cell-cgroup` when the cgroup does not become empty in half a minute.
    pub fn close(mut self) -> Result<(), Refusal> {
        self.is_closed = true;
        self.broker.value(&Request::Close)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if !self.is_closed {
            let _ = self.broker.value::<()>(&Request::Close);
        }
    }
}

/// The programs for policies, run by the broker in cells.
pub struct ByBroker(pub &'static Broker);

struct EngineThere {
    broker: &'static Broker,
    engine: u32,
    pid: u32,
    has_ended: bool,
}

impl casemate_policy::Running for EngineThere {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn end(mut self: Box<Self>) -> String {
        self.has_ended = true;
        let ended = self.broker.value(&Request::EndEngine { engine: self.engine });
        ended.unwrap_or_else(|refusal| refusal.to_string())
    }
}

impl Drop for EngineThere {
    fn drop(&mut self) {
        if !self.has_ended {
            let _ = self.broker.value::<()>(&Request::DropEngine { engine: self.engine });
        }
    }
}

impl Launch for ByBroker {
    fn compile(&self, _: &Path, _: Streams) -> Result<EngineEnded, String> {
        Err("code that a keep has compiled is nobody's to run".into())
    }

    fn engine(&self, _: &Path, streams: EngineStreams) -> Result<Box<dyn casemate_policy::Running>, String> {
        // The thread that starts an engine stays with it, and has nothing to read.
        give_up_rights().map_err(|error| error.to_string())?;
        let EngineStreams { socket, complaint } = streams;
        let descriptors = [socket.as_fd(), complaint.as_fd()];
        let (started, _) = self
            .0
            .ask::<Result<(u32, u32), String>>(&Request::Engine, &descriptors)
            .map_err(|r| r.to_string())?;
        let (engine, pid) = started?;
        Ok(Box::new(EngineThere { broker: self.0, engine, pid, has_ended: false }))
    }

    fn code(&self) -> Option<Box<dyn Code + '_>> {
        Some(Box::new(CodeThere(self.0)))
    }
}

fn not_kept(refusal: Refusal) -> PolicyError {
    PolicyError::new(Fault::Cache, refusal.subject, refusal.cause)
}

/// Compiled code, which is the broker's to keep.
struct CodeThere(&'static Broker);

impl Code for CodeThere {
    fn load(&self, digest: &str, engine: &str, may_be_shared: bool) -> Result<Option<File>, PolicyError> {
        let request = Request::Code { digest: digest.to_owned(), engine: engine.to_owned(), may_be_shared };
        let (loaded, mut descriptors) = self.0.ask(&request, &[]).map_err(not_kept)?;
        let loaded: Result<bool, PolicyError> = loaded;
        loaded?;
        Ok(descriptors.pop().map(File::from))
    }

    fn compile(&self, name: &str, _: &str, engine: &str, component: &[u8]) -> Result<(), PolicyError> {
        let in_memory = || {
            let mut file = File::from(memfd_create("casemate-policy", MemfdFlags::CLOEXEC)?);
            file.write_all(component)?;
            file.seek(SeekFrom::Start(0))?;
            Ok::<_, io::Error>(file)
        };
        let file = in_memory().map_err(|error| not_kept(gone(error)))?;
        let request = Request::Compile { name: name.to_owned(), engine: engine.to_owned() };
        let (compiled, _) = self.0.ask(&request, &[file.as_fd()]).map_err(not_kept)?;
        compiled
    }
}
