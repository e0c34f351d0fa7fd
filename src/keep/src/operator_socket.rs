//! The operator's socket of a guest that runs: `NAME.operator` in the folder of sockets and locks, which is root's alone.
//! A request is a line of JSON, and so is its answer:
//!
//! ```text
//! {"do":"pause"}
//! {"done":{"guest":"web","state":"paused"}}
//! {"do":"dance"}
//! {"refused":"operator-request","subject":"web","cause":"…","remedy":"…"}
//! ```
//!
//! Who can connect is root, and is bounded all the same: so many connections at a time, so many bytes a line, so long for
//! a line to come.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use casemate_broker::{Attachment, Operators, broker, hands};
use casemate_policy::{GuestSpec, Operation};
use casemate_spec::{Rate, Refusal};
use casemate_wire::{Answer, Ask, DeviceKind, Limits, Statistics};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    DeviceName, Paths, Refusals,
    admitted::Admitted,
    attach::{self, Attaching},
    disks::Disks,
    operator::{GuestState, Operator, Order},
};

/// Connections that are served at a time.
const CONNECTIONS_MOST: usize = 8;
/// Most bytes of a request.
const REQUEST_BYTES: u64 = 16 << 10;
/// Most bytes of an answer.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a client waits: longer than the keep waits for its cell.
const CLIENT_PATIENCE: Duration = Duration::from_secs(20);

/// What an operator asks of a guest that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OperatorRequest {
    /// Tell how it is.
    State,
    /// Hold its processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Tell what it has done and what it takes.
    Stats,
    /// Have it give up so much of its memory.
    Balloon {
        /// In bytes.
        size_bytes: u64,
    },
    /// Have it name the memory that it has free, which goes back to the host.
    Reclaim,
    /// Tell it how large the terminal is that shows its virtio console.
    TerminalSize {
        /// Characters across.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Tell it of a disk's new size.
    Resize {
        /// The disk: its number, from 0, or `"slot1"`.
        number: DeviceName,
        /// What its file is made to have first; what it has already where this is left out.
        size_bytes: Option<u64>,
        /// Whether it may become smaller.
        #[serde(default)]
        shrink: bool,
    },
    /// Limit what one of its disks or network cards does; what is not named is not limited.
    Limit {
        /// `disk` or `net`.
        device: DeviceKind,
        /// Which of those: its number, from 0, or `"slot1"`.
        number: DeviceName,
        /// Bytes a second.
        bytes_per_second: Option<u64>,
        /// Bytes at once, after a while of nothing; those of a second where it is left out.
        burst_bytes: Option<u64>,
        /// Requests or frames a second.
        operations_per_second: Option<u64>,
        /// Requests or frames at once, after a while of nothing.
        burst_operations: Option<u64>,
    },
    /// Read its bundle of policies anew.
    ReloadPolicies {},
    /// Press its power button; it is stopped if it does not heed it.
    PowerOff,
    /// Stop it; it is not asked.
    Stop,
    /// Put something into a free slot of its.
    Attach {
        /// What.
        attachment: Attachment,
    },
    /// Take out what is in a slot.
    Detach {
        /// The slot, from 1.
        slot: u8,
        /// How long the guest may take to let it go.
        within_seconds: u64,
        /// Whether it is taken when the guest has not let it go in time.
        #[serde(default)]
        force: bool,
    },
}

/// What a guest has done and what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatistics {
    /// Its name.
    pub guest: String,
    /// How it is.
    pub state: GuestState,
    /// The VMM's own memory (Pss) beyond the guest's, when last measured.
    pub vmm_memory_bytes: Option<u64>,
    /// Of the guest's memory what takes room on the host (Pss), when last measured.
    pub guest_memory_bytes: Option<u64>,
    /// What the machine has counted, by the VMM's word.
    #[serde(flatten)]
    pub machine: Statistics,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Done { done: Value },
    Refused { refused: String, subject: String, cause: String, remedy: String },
}

impl From<Result<Value, Refusal>> for Line {
    fn from(answer: Result<Value, Refusal>) -> Self {
        match answer {
            Ok(done) => Self::Done { done },
            Err(Refusal { code, subject, cause, remedy, .. }) => {
                Self::Refused { refused: code.to_owned(), subject, cause, remedy }
            }
        }
    }
}

/// What requests reach beside the guest's VMM.
pub(crate) struct Reach {
    pub(crate) disks: Disks,
    /// Without it nothing can be attached.
    pub(crate) attaching: Option<Arc<Attaching>>,
    /// Asked before a paused guest goes on.
    pub(crate) admitted: Option<Arc<Admitted>>,
}

/// The socket; gone when this is dropped.
pub(crate) struct OperatorSocket {
    path: PathBuf,
    /// None where the broker listens.
    listener: Option<Arc<UnixListener>>,
    thread: Option<JoinHandle<()>>,
}

/// Where operators come from.
enum Door {
    Own(Arc<UnixListener>),
    /// By way of the broker, which has read what they want.
    Broker(Operators),
}

impl Door {
    /// The next operator; none once the socket is gone.
    fn next(&self) -> Option<UnixStream> {
        let listener = match self {
            Self::Broker(operators) => return operators.next(),
            Self::Own(listener) => listener,
        };
        loop {
            match listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return None,
                // Out of descriptors, or one that left again: others may have more luck in a while.
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

impl OperatorSocket {
    /// Listens. The caller holds the lock of the guest's name.
    pub(crate) fn open(paths: &Paths, operator: Operator, reach: Reach) -> Result<Self, Refusal> {
        let path = path(paths, operator.guest());
        let failed = |error: io::Error| {
            let cause = format_args!("the operator's socket cannot be made: {error}");
            Refusal::new("host-folder", path.display(), cause, "run as root, with space in /run")
        };
        let (path, listener, door) = match broker() {
            Some(broker) => {
                let (path, operators) = broker.listen_to_operators()?;
                (path, None, Door::Broker(operators))
            }
            None => {
                let _ = fs::remove_file(&path);
                let listener = Arc::new(UnixListener::bind(&path).map_err(failed)?);
                (path.clone(), Some(Arc::clone(&listener)), Door::Own(listener))
            }
        };
        let Reach { disks, attaching, admitted } = reach;
        let asked = Asked { paths: paths.clone(), operator, disks: Arc::new(disks), attaching, admitted };
        let serve = move || accept(&door, &asked);
        let thread = thread::Builder::new().name("operator".into()).spawn(serve).map_err(failed)?;
        Ok(Self { path, listener, thread: Some(thread) })
    }
}

impl Drop for OperatorSocket {
    fn drop(&mut self) {
        hands::unlisten(&self.path);
        // Wakes the thread that accepts, which then ends; those that serve a connection end with it, or with the process.
        let shut =
            |listener: &Arc<UnixListener>| rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
        let woken = self.listener.as_ref().is_none_or(|listener| shut(listener).is_ok());
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

fn path(paths: &Paths, guest: &str) -> PathBuf {
    paths.runtime.join(format!("{guest}.operator"))
}

/// A place among the connections; given back when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let free = |count| (count < CONNECTIONS_MOST).then_some(count + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, free).ok()?;
        Some(Self(Arc::clone(taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Who is asked.
#[derive(Clone)]
struct Asked {
    paths: Paths,
    operator: Operator,
    disks: Arc<Disks>,
    attaching: Option<Arc<Attaching>>,
    admitted: Option<Arc<Admitted>>,
}

impl Asked {
    /// The guest's slots.
    fn attaching(&self) -> Result<&Arc<Attaching>, Refusal> {
        self.attaching.as_ref().ok_or_else(|| {
            let remedy = "start it with `slots` in a table [hotplug] of its file";
            Refusal::new("hotplug-no-slot", self.operator.guest(), "this guest has no slots", remedy)
        })
    }
}

fn accept(door: &Door, asked: &Asked) {
    let taken = Arc::new(AtomicUsize::new(0));
    while let Some(stream) = door.next() {
        let busy = |stream: &UnixStream| {
            let cause = format_args!("{CONNECTIONS_MOST} connections are open already");
            let refusal = Refusal::new("guest-busy", asked.operator.guest(), cause, "try again");
            let _ = stream.set_nonblocking(true);
            let _ = answer(stream, Err(refusal));
        };
        let Some(place) = Place::take(&taken) else {
            busy(&stream);
            continue;
        };
        let asked = asked.clone();
        let connection = move || {
            let _place = place;
            let _ = serve(&stream, &asked);
        };
        // One that finds no thread is closed.
        let _ = thread::Builder::new().name("operator".into()).spawn(connection);
    }
}

/// Answers request after request, until the other side has gone or is no longer understood.
fn serve(stream: &UnixStream, asked: &Asked) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        (&mut lines).take(REQUEST_BYTES).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let whole = line.ends_with(b"\n");
        let request = serde_json::from_slice(&line);
        let understood = request.is_ok();
        let done = request
            .map_err(|error| {
                let remedy = r#"send a line of JSON like {"do":"pause"}"#;
                Refusal::new("operator-request", asked.operator.guest(), error, remedy)
            })
            .and_then(|request| carry_out(asked, &request));
        answer(stream, done)?;
        if !whole || !understood {
            return Ok(());
        }
    }
}

fn answer(mut stream: &UnixStream, answer: Result<Value, Refusal>) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Line::from(answer))?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn carry_out(asked: &Asked, request: &OperatorRequest) -> Result<Value, Refusal> {
    let operator = &asked.operator;
    match request {
        OperatorRequest::Attach { attachment } => return asked.attaching()?.attach(operator, attachment),
        OperatorRequest::Detach { slot, within_seconds, force } => {
            let within = Duration::from_secs(*within_seconds);
            return asked.attaching()?.detach(operator, *slot, within, *force);
        }
        OperatorRequest::State => {}
        OperatorRequest::Pause => drop(operator.ask(Ask::Pause, Vec::new())?),
        OperatorRequest::Resume => {
            let paused = operator.state() == GuestState::Paused;
            if let Some(admitted) = asked.admitted.as_ref().filter(|_| paused) {
                admitted.ask(Operation::Resume, admitted.spec(), "resume").map_err(first)?;
            }
            drop(operator.ask(Ask::Resume, Vec::new())?);
        }
        OperatorRequest::ReloadPolicies {} => {
            let admitted = asked.admitted.as_ref().ok_or_else(|| first(Refusals(Vec::new())))?;
            let sha256 = admitted.policies().reload()?;
            return Ok(json!({ "guest": operator.guest(), "bundle_sha256": sha256 }));
        }
        OperatorRequest::Balloon { size_bytes } => {
            drop(operator.ask(Ask::Balloon { target_bytes: *size_bytes }, Vec::new())?);
        }
        OperatorRequest::Reclaim => {
            let Answer::Reclaimed { bytes } = operator.ask(Ask::Reclaim, Vec::new())? else {
                return Err(Refusal::new(
                    "guest-no-answer",
                    operator.guest(),
                    "its VMM answers something else",
                    "use one build of casemate",
                ));
            };
            return Ok(json!({ "guest": operator.guest(), "reclaimed_bytes": bytes }));
        }
        OperatorRequest::TerminalSize { columns, rows } => {
            drop(operator.ask(Ask::TerminalSize { columns: *columns, rows: *rows }, Vec::new())?);
        }
        OperatorRequest::Resize { number, size_bytes, shrink } => {
            let size_bytes = resize(asked, *number, *size_bytes, *shrink)?;
            return Ok(json!({ "guest": operator.guest(), "disk": number, "size_bytes": size_bytes }));
        }
        OperatorRequest::Limit {
            device: kind,
            number,
            bytes_per_second,
            burst_bytes,
            operations_per_second,
            burst_operations,
        } => {
            let rate = |Rate { per_second, burst }| casemate_wire::Rate { per_second, burst };
            let limits = Limits {
                bytes: Rate::of(*bytes_per_second, *burst_bytes)?.map(rate),
                operations: Rate::of(*operations_per_second, *burst_operations)?.map(rate),
            };
            drop(operator.ask(Ask::Limit { kind: *kind, device: number.which(), limits }, Vec::new())?);
        }
        OperatorRequest::PowerOff => drop(operator.order(Order::PowerOff)?),
        OperatorRequest::Stop => drop(operator.order(Order::Stop)?),
        OperatorRequest::Stats => return statistics(operator),
    }
    Ok(json!({ "guest": operator.guest(), "state": operator.state() }))
}

/// Makes a disk of another size, when the policies have nothing against a larger one.
fn resize(asked: &Asked, name: DeviceName, wanted: Option<u64>, shrink: bool) -> Result<u64, Refusal> {
    let disk = match name {
        DeviceName::Number(number) => asked.disks.resizable(asked.operator.guest(), number)?,
        DeviceName::Slot(slot) => asked.attaching()?.disk_in(asked.operator.guest(), slot)?,
    };
    // In what policies know of the guest.
    let place = |spec: &GuestSpec| match (name, &disk.path) {
        (DeviceName::Number(number), _) => Some(usize::from(number)),
        (_, Some(path)) => spec.disks.iter().rposition(|known| Path::new(&known.path) == path),
        _ => None,
    };
    let set = |spec: &mut GuestSpec, size_bytes| {
        if let Some(disk) = place(spec).and_then(|place| spec.disks.get_mut(place)) {
            disk.size_bytes = size_bytes;
        }
    };
    // What the file has become counts as if it were asked for.
    let wanted = wanted.or_else(|| disk.size_bytes().ok());
    let mut before_bytes = None;
    if let (Some(admitted), Some(wanted)) = (asked.admitted.as_ref(), wanted) {
        let mut spec = admitted.spec();
        before_bytes = place(&spec).and_then(|place| spec.disks.get(place)).map(|disk| disk.size_bytes);
        if before_bytes.is_some_and(|before| wanted > before) {
            set(&mut spec, wanted);
            admitted.ask(Operation::Update, spec, &format!("resize disk {name}")).map_err(first)?;
        }
    }
    let done = disk.resize(&asked.paths, &asked.operator, wanted, shrink);
    // After a yes, the guest counts as if it had what was asked for.
    let now_bytes = done.as_ref().ok().copied().or(before_bytes);
    if let (Some(admitted), Some(now_bytes)) = (asked.admitted.as_ref(), now_bytes) {
        admitted.becomes(|spec| set(spec, now_bytes));
    }
    done
}

/// An answer has room for one.
pub(crate) fn first(refusals: Refusals) -> Refusal {
    refusals.0.into_iter().next().unwrap_or_else(|| {
        Refusal::new("operator-request", "policies", "no policies were asked about this guest", "see its log")
    })
}

fn statistics(operator: &Operator) -> Result<Value, Refusal> {
    let machine = match operator.ask(Ask::Statistics, Vec::new())? {
        Answer::Statistics(statistics) => *statistics,
        _ => Statistics::default(),
    };
    let memory = operator.memory_bytes();
    let statistics = GuestStatistics {
        guest: operator.guest().to_owned(),
        state: operator.state(),
        vmm_memory_bytes: memory.map(|(vmm, _)| vmm),
        guest_memory_bytes: memory.map(|(_, guest)| guest),
        machine,
    };
    serde_json::to_value(statistics)
        .map_err(|error| Refusal::new("operator-answer", operator.guest(), error, "try again"))
}

/// Asks the keep of a guest that runs on this host; what it answers is JSON.
///
/// # Errors
/// `not-root`; `guest-not-running`; what the keep refuses with; `operator-answer` when it gives no answer.
pub fn operate(paths: &Paths, guest: &str, request: &OperatorRequest) -> Result<Value, Refusal> {
    crate::run::require_root()?;
    let missing = || {
        let cause = "no guest of this name runs on this host";
        Refusal::new("guest-not-running", guest, cause, "see `casemate ps`")
    };
    // Nothing but a guest's name names a socket of ours.
    casemate_spec::Name::new(guest).ok_or_else(missing)?;
    let answer = exchange(&path(paths, guest), request).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => missing(),
        _ => {
            let cause = format_args!("its keep gave no answer: {error}");
            Refusal::new("operator-answer", guest, cause, "see whether it still runs: `casemate ps`")
        }
    })?;
    match answer {
        Line::Done { done } => Ok(done),
        Line::Refused { refused, subject, cause, remedy } => {
            // One a command, of a program that ends with it.
            Err(Refusal::new(String::leak(refused), subject, cause, remedy))
        }
    }
}

fn exchange(path: &Path, request: &OperatorRequest) -> io::Result<Line> {
    let mut stream = UnixStream::connect(path)?;
    let patience = match request {
        OperatorRequest::Attach { attachment } => {
            let devices = matches!(attachment, Attachment::Devices { .. });
            let claim = if devices { attach::CLAIM_PATIENCE } else { Duration::ZERO };
            CLIENT_PATIENCE + attach::ADD_PATIENCE + attach::JUDGE_PATIENCE + claim
        }
        OperatorRequest::Detach { within_seconds, .. } => {
            let within = Duration::from_secs(*within_seconds).min(attach::WITHIN_MOST);
            // Nobody knows here what is in the slot. A keep that dies hangs up.
            CLIENT_PATIENCE + within + attach::REMOVE_MARGIN + attach::RETURN_PATIENCE
        }
        _ => CLIENT_PATIENCE,
    };
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    BufReader::new(stream).take(ANSWER_BYTES).read_until(b'\n', &mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::{self, Orders};
    use std::time::Instant;

    /// A socket in a folder of its own, whose guest is paused whatever it is asked.
    fn open() -> (tempfile::TempDir, Paths, OperatorSocket, Orders) {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard().unwrap();
        paths.runtime = folder.path().into();
        let (operator, orders) = operator::pair("web").unwrap();
        orders.set_state(GuestState::Paused);
        let reach = Reach { disks: Disks::default(), attaching: None, admitted: None };
        let socket = OperatorSocket::open(&paths, operator, reach).unwrap();
        (folder, paths, socket, orders)
    }

    fn said(stream: &UnixStream) -> Value {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_default()
    }

    #[test]
    fn a_line_is_answered_with_a_line_and_the_next_one_too() {
        let (_folder, paths, _socket, _orders) = open();
        let mut stream = UnixStream::connect(path(&paths, "web")).unwrap();
        for _ in 0..3 {
            stream.write_all(b"{\"do\":\"state\"}\n").unwrap();
            assert_eq!(said(&stream), json!({"done": {"guest": "web", "state": "paused"}}));
        }
        let answer = exchange(&path(&paths, "web"), &OperatorRequest::State).unwrap();
        assert!(matches!(answer, Line::Done { done } if done["state"] == "paused"));
    }

    #[test]
    fn what_is_no_request_is_refused_and_hung_up_on() {
        let (_folder, paths, _socket, _orders) = open();
        let long = vec![b'x'; 2 * REQUEST_BYTES as usize];
        let wrong: [&[u8]; 5] = [
            b"{\"do\":\"dance\"}\n",
            b"pause\n",
            b"\xff\xfe\n",
            b"{\"do\":\"balloon\",\"size_bytes\":1,\"now\":1}\n",
            &long,
        ];
        for bytes in wrong {
            let mut stream = UnixStream::connect(path(&paths, "web")).unwrap();
            let _ = stream.write_all(bytes);
            assert_eq!(said(&stream)["refused"], "operator-request", "{:?}", bytes.get(..20));
            // Whatever more was sent is not read.
            let gone = stream.read(&mut [0]);
            assert!(matches!(gone, Ok(0)) || gone.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset));
        }
    }

    #[test]
    fn a_flood_is_bounded_and_the_socket_lives_on() {
        let (_folder, paths, _socket, _orders) = open();
        let path = path(&paths, "web");
        let silent: Vec<_> = (0..CONNECTIONS_MOST).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let deadline = Instant::now() + Duration::from_secs(10);
        let busy = loop {
            let stream = UnixStream::connect(&path).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let mut line = String::new();
            if BufReader::new(&stream).read_line(&mut line).is_ok() {
                break line;
            }
            assert!(Instant::now() < deadline);
        };
        assert!(busy.contains("guest-busy"), "{busy}");
        drop(silent);
        while exchange(&path, &OperatorRequest::State).is_ok_and(|line| matches!(line, Line::Refused { .. }))
        {
            assert!(Instant::now() < deadline);
        }
    }

    #[test]
    fn it_is_gone_when_it_is_dropped() {
        let (_folder, paths, socket, _orders) = open();
        drop(socket);
        assert!(!path(&paths, "web").exists());
    }
}
