//! What an operator, or a part of this keep, asks of a guest that runs: from any thread, by way of the one that watches its
//! cell.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use casemate_spec::{PciAddress, Refusal};
use casemate_wire::{Answer, Ask, Channel, Refused, ToCell};
use serde::{Deserialize, Serialize};

use crate::{Step, cell::printable};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Orders that wait for the watch to take them.
const ORDERS_MOST: usize = 16;
/// What a cell has been asked and not answered.
const UNANSWERED_MOST: usize = 16;

/// How a guest is, as its keep knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum GuestState {
    /// Its machine is being built.
    Starting,
    /// Its processors run.
    Running,
    /// They are being held.
    Pausing,
    /// They stand.
    Paused,
    /// It is on its way to its end.
    Ending,
}

impl std::fmt::Display for GuestState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Ending => "ending",
        })
    }
}

/// Something to be done by who watches the cell.
pub(crate) enum Order {
    /// To be asked of the cell, with descriptors.
    Ask(Ask, Vec<OwnedFd>),
    /// Tell of a step that was taken beside the watch.
    Tell(Box<Step>),
    /// One of the guest's devices, in a slot, reported an error that was not corrected.
    DeviceFailed(PciAddress),
    /// Press the guest's power button; it is stopped if it does not heed it.
    PowerOff,
    /// Stop the guest at once.
    Stop,
}

type Reply = SyncSender<Result<Answer, Refusal>>;

/// The way to a guest that runs. Clones go to whoever has something to ask.
#[derive(Clone)]
pub(crate) struct Operator {
    guest: Arc<str>,
    orders: SyncSender<(Order, Reply)>,
    wake: Arc<UnixStream>,
    shared: Arc<Shared>,
}

/// What the watch tells without being asked.
struct Shared {
    state: AtomicU8,
    /// The VMM's memory beyond the guest's, and the guest's own; 0 before they were measured.
    vmm_memory_bytes: AtomicU64,
    guest_memory_bytes: AtomicU64,
}

/// The watch's side.
pub(crate) struct Orders {
    guest: Arc<str>,
    taken: Receiver<(Order, Reply)>,
    wake: UnixStream,
    shared: Arc<Shared>,
    unanswered: BTreeMap<u32, (Kind, Reply)>,
    next_id: u32,
}

/// What an answer must be to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pause,
    Resume,
    Statistics,
    /// One that changes nothing of how the guest is.
    Other,
    Add,
    Remove,
    Reclaim,
}

impl Kind {
    fn of(ask: &Ask) -> Self {
        match ask {
            Ask::Pause => Self::Pause,
            Ask::Resume => Self::Resume,
            Ask::Statistics => Self::Statistics,
            Ask::Balloon { .. } | Ask::TerminalSize { .. } | Ask::ResizeDisk { .. } | Ask::Limit { .. } => {
                Self::Other
            }
            Ask::Add { .. } => Self::Add,
            Ask::Remove { .. } => Self::Remove,
            Ask::Reclaim => Self::Reclaim,
        }
    }

    fn fits(self, answer: &Answer) -> bool {
        match answer {
            Answer::Done => !matches!(self, Self::Statistics | Self::Remove | Self::Reclaim),
            Answer::Statistics(statistics) => self == Self::Statistics && statistics.is_bounded(),
            Answer::Removed { .. } => self == Self::Remove,
            Answer::Reclaimed { .. } => self == Self::Reclaim,
        }
    }
}

/// What the watch hears of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nobody asked this, or not so: the cell talks nonsense.
    Nonsense,
    /// It was passed on.
    Passed,
    /// The processors stand now.
    Paused,
    /// They go on.
    Resumed,
}

/// An operator and the orders it gives.
pub(crate) fn pair(guest: &str) -> io::Result<(Operator, Orders)> {
    let (orders, taken) = sync_channel(ORDERS_MOST);
    let (wake, woken) = UnixStream::pair()?;
    wake.set_nonblocking(true)?;
    woken.set_nonblocking(true)?;
    let shared = Arc::new(Shared {
        state: AtomicU8::new(GuestState::Starting as u8),
        vmm_memory_bytes: AtomicU64::new(0),
        guest_memory_bytes: AtomicU64::new(0),
    });
    let guest: Arc<str> = guest.into();
    let operator =
        Operator { guest: Arc::clone(&guest), orders, wake: Arc::new(wake), shared: Arc::clone(&shared) };
    let orders = Orders { guest, taken, wake: woken, shared, unanswered: BTreeMap::new(), next_id: 0 };
    Ok((operator, orders))
}

impl Shared {
    fn state(&self) -> GuestState {
        match self.state.load(Ordering::Acquire) {
            0 => GuestState::Starting,
            1 => GuestState::Running,
            2 => GuestState::Pausing,
            3 => GuestState::Paused,
            _ => GuestState::Ending,
        }
    }
}

impl Operator {
    /// The guest's name.
    pub(crate) fn guest(&self) -> &str {
        &self.guest
    }

    /// How the guest is.
    pub(crate) fn state(&self) -> GuestState {
        self.shared.state()
    }

    /// The memory of the VMM beyond the guest's, and the guest's own, when last measured (Pss).
    pub(crate) fn memory_bytes(&self) -> Option<(u64, u64)> {
        let of = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        let both = (of(&self.shared.vmm_memory_bytes), of(&self.shared.guest_memory_bytes));
        (both.0 > 0).then_some(both)
    }

    /// Asks the guest's VMM and waits for the answer, ten seconds at most.
    ///
    /// # Errors
    /// Why it was not done; `guest-no-answer` when nobody told in time, and then it may be done later.
    pub(crate) fn ask(&self, ask: Ask, descriptors: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        self.order(Order::Ask(ask, descriptors))
    }

    /// The same with a patience of the caller's.
    pub(crate) fn ask_for(
        &self,
        ask: Ask,
        descriptors: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<Answer, Refusal> {
        self.order_for(Order::Ask(ask, descriptors), patience)
    }

    /// Has `order` carried out.
    pub(crate) fn order(&self, order: Order) -> Result<Answer, Refusal> {
        self.order_for(order, PATIENCE)
    }

    fn order_for(&self, order: Order, patience: Duration) -> Result<Answer, Refusal> {
        let (reply, answer) = sync_channel(1);
        self.orders.try_send((order, reply)).map_err(|error| match error {
            TrySendError::Full(_) => self.busy(),
            TrySendError::Disconnected(_) => ending(&self.guest),
        })?;
        // It fails only when many are in it, and then the watch is awake.
        let _ = (&*self.wake).write(&[0]);
        answer.recv_timeout(patience).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout => Err(silent(&self.guest, patience)),
            RecvTimeoutError::Disconnected => Err(ending(&self.guest)),
        })
    }

    fn busy(&self) -> Refusal {
        let cause = format_args!("{ORDERS_MOST} others are asking already");
        Refusal::new("guest-busy", &self.guest, cause, "try again")
    }
}

fn silent(guest: &str, patience: Duration) -> Refusal {
    let cause = format_args!("its VMM did not answer within {} s", patience.as_secs());
    let remedy = "it may be done yet: ask again; if a reader of its console stalls, let it read";
    Refusal::new("guest-no-answer", guest, cause, remedy)
}

pub(crate) fn ending(guest: &str) -> Refusal {
    Refusal::new("guest-ending", guest, "it is on its way to its end", "see `casemate ps`")
}

impl Orders {
    /// The guest's name.
    pub(crate) fn guest(&self) -> &str {
        &self.guest
    }

    /// Readable when there is an order.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next order, and whom to answer.
    pub(crate) fn next(&mut self) -> Option<(Order, Reply)> {
        let mut bytes = [0; ORDERS_MOST];
        let _ = (&self.wake).read(&mut bytes);
        self.taken.try_recv().ok()
    }

    /// Sets how the guest is.
    pub(crate) fn set_state(&self, state: GuestState) {
        self.shared.state.store(state as u8, Ordering::Release);
    }

    /// How the guest is.
    pub(crate) fn state(&self) -> GuestState {
        self.shared.state()
    }

    /// Notes what was measured.
    pub(crate) fn set_memory(&self, vmm_bytes: u64, guest_bytes: u64) {
        self.shared.guest_memory_bytes.store(guest_bytes, Ordering::Relaxed);
        self.shared.vmm_memory_bytes.store(vmm_bytes, Ordering::Relaxed);
    }

    /// Asks the cell; its answer goes to `reply`.
    pub(crate) fn ask(&mut self, ask: Ask, descriptors: &[OwnedFd], channel: &Channel, reply: Reply) {
        let state = self.state();
        let refusal = match state {
            GuestState::Starting => {
                Some(Refusal::new("guest-starting", &self.guest, "it does not run yet", "try again"))
            }
            GuestState::Ending => Some(ending(&self.guest)),
            _ if self.unanswered.len() >= UNANSWERED_MOST => Some(silent(&self.guest, PATIENCE)),
            _ => None,
        };
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(refusal));
            return;
        }
        let (id, kind) = (self.next_id, Kind::of(&ask));
        self.next_id = self.next_id.wrapping_add(1);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        if channel.send_now(&ToCell::Ask { id, ask }, &borrowed).is_err() {
            let _ = reply.send(Err(silent(&self.guest, PATIENCE)));
            return;
        }
        if kind == Kind::Pause && state == GuestState::Running {
            self.set_state(GuestState::Pausing);
        }
        self.unanswered.insert(id, (kind, reply));
    }

    /// Passes a cell's answer on to who asked.
    pub(crate) fn answered(&mut self, id: u32, answer: Result<Answer, Refused>) -> Heard {
        let Some((kind, reply)) = self.unanswered.remove(&id) else { return Heard::Nonsense };
        if answer.as_ref().is_ok_and(|answer| !kind.fits(answer)) {
            return Heard::Nonsense;
        }
        let before = self.state();
        let heard = match (kind, &answer, before) {
            (_, _, GuestState::Ending) => Heard::Passed,
            (Kind::Pause, Ok(_), GuestState::Running | GuestState::Pausing) => {
                self.set_state(GuestState::Paused);
                Heard::Paused
            }
            (Kind::Pause, Err(_), GuestState::Pausing) | (Kind::Resume, Ok(_), GuestState::Pausing) => {
                self.set_state(GuestState::Running);
                Heard::Passed
            }
            (Kind::Resume, Ok(_), GuestState::Paused) => {
                self.set_state(GuestState::Running);
                Heard::Resumed
            }
            _ => Heard::Passed,
        };
        // Who asked may have lost patience.
        let _ = reply.send(answer.map_err(|refused| self.refusal(&refused)));
        heard
    }

    /// A cell's refusal under a code of this side: its own is its word, as all that it says.
    fn refusal(&self, refused: &Refused) -> Refusal {
        let cause = format!("its VMM says: {} [{}]", printable(&refused.message), printable(&refused.code));
        Refusal::new("guest-refused", &self.guest, cause, "see what it says")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_wire::{Counters, DeviceKind, DeviceStatistics, FromCell, Statistics};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::thread;

    fn channels() -> (Channel, Channel) {
        let (keep, cell) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (Channel::new(keep), Channel::new(cell))
    }

    fn running() -> (Operator, Orders) {
        let (operator, orders) = pair("web").unwrap();
        orders.set_state(GuestState::Running);
        (operator, orders)
    }

    /// Has `ask` asked on another thread; the watch has sent it to the cell when this returns.
    fn asked(
        operator: &Operator,
        orders: &mut Orders,
        channel: &Channel,
        ask: Ask,
    ) -> thread::JoinHandle<Result<Answer, Refusal>> {
        let operator = operator.clone();
        let asker = thread::spawn(move || operator.ask(ask, Vec::new()));
        let (order, reply) = loop {
            if let Some(order) = orders.next() {
                break order;
            }
            thread::yield_now();
        };
        let Order::Ask(ask, descriptors) = order else { panic!("another order") };
        orders.ask(ask, &descriptors, channel, reply);
        asker
    }

    fn id_of(cell: &Channel) -> u32 {
        match cell.receive::<ToCell>().unwrap().0 {
            ToCell::Ask { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_go_to_who_asked_and_the_state_follows() {
        let ((operator, mut orders), (keep, cell)) = (running(), channels());
        let asker = asked(&operator, &mut orders, &keep, Ask::Pause);
        assert_eq!(operator.state(), GuestState::Pausing);
        assert_eq!(orders.answered(id_of(&cell), Ok(Answer::Done)), Heard::Paused);
        assert_eq!(asker.join().unwrap(), Ok(Answer::Done));
        assert_eq!(operator.state(), GuestState::Paused);
        let asker = asked(&operator, &mut orders, &keep, Ask::Resume);
        assert_eq!(orders.answered(id_of(&cell), Ok(Answer::Done)), Heard::Resumed);
        assert_eq!(asker.join().unwrap(), Ok(Answer::Done));
        assert_eq!(operator.state(), GuestState::Running);
    }

    #[test]
    fn a_cell_that_answers_what_nobody_asked_or_not_so_talks_nonsense() {
        let ((operator, mut orders), (keep, cell)) = (running(), channels());
        assert_eq!(orders.answered(7, Ok(Answer::Done)), Heard::Nonsense);
        let asker = asked(&operator, &mut orders, &keep, Ask::Pause);
        let statistics = Ok(Answer::Statistics(Box::default()));
        assert_eq!(orders.answered(id_of(&cell), statistics), Heard::Nonsense);
        assert_eq!(asker.join().unwrap().unwrap_err().code, "guest-ending");
        let asker = asked(&operator, &mut orders, &keep, Ask::Statistics);
        let id = id_of(&cell);
        let far_too_many = Statistics { vcpus: vec![Counters::default(); 65], ..Statistics::default() };
        let answer = Ok(Answer::Statistics(Box::new(far_too_many)));
        assert_eq!(orders.answered(id, answer), Heard::Nonsense);
        assert_eq!(orders.answered(id, Ok(Answer::Done)), Heard::Nonsense, "it is answered once");
        assert!(asker.join().unwrap().is_err());
    }

    #[test]
    fn a_cells_refusal_is_told_as_its_word() {
        let ((operator, mut orders), (keep, cell)) = (running(), channels());
        let asker = asked(&operator, &mut orders, &keep, Ask::Pause);
        let refused = Refused { code: "\x1b[2Jno".into(), message: "because\nof that".into() };
        orders.answered(id_of(&cell), Err(refused));
        let refusal = asker.join().unwrap().unwrap_err();
        assert_eq!(refusal.code, "guest-refused");
        assert_eq!(refusal.cause, "its VMM says: becauseof that [[2Jno]");
        assert_eq!(operator.state(), GuestState::Running);
    }

    #[test]
    fn a_cell_that_answers_nothing_is_not_asked_without_end() {
        let ((_, mut orders), (keep, _cell)) = (running(), channels());
        let mut told = Vec::new();
        for _ in 0..=UNANSWERED_MOST {
            let (reply, answer) = sync_channel(1);
            orders.ask(Ask::Statistics, &[], &keep, reply);
            told.push(answer);
        }
        let last = told.pop().unwrap().try_recv().unwrap();
        assert_eq!(last.unwrap_err().code, "guest-no-answer");
        assert!(told.iter().all(|answer| answer.try_recv().is_err()), "the others wait");
    }

    #[test]
    fn before_its_first_and_after_its_last_word_a_guest_is_not_asked() {
        let (keep, _cell) = channels();
        for (state, code) in [(GuestState::Starting, "guest-starting"), (GuestState::Ending, "guest-ending")]
        {
            let (_, mut orders) = pair("web").unwrap();
            orders.set_state(state);
            let (reply, answer) = sync_channel(1);
            orders.ask(Ask::Pause, &[], &keep, reply);
            assert_eq!(answer.try_recv().unwrap().unwrap_err().code, code);
        }
        let (operator, orders) = running();
        drop(orders);
        assert_eq!(operator.ask(Ask::Pause, Vec::new()).unwrap_err().code, "guest-ending");
    }

    #[test]
    fn statistics_come_through() {
        let ((operator, mut orders), (keep, cell)) = (running(), channels());
        let device = DeviceStatistics {
            kind: DeviceKind::Disk,
            number: 1,
            slot: None,
            requests: 2,
            bytes_to_guest: 3,
            bytes_from_guest: 4,
            errors: 5,
        };
        let statistics =
            Statistics { vcpus: vec![Counters::default()], devices: vec![device], balloon: None };
        let answer = Answer::Statistics(Box::new(statistics));
        let asker = asked(&operator, &mut orders, &keep, Ask::Statistics);
        let id = id_of(&cell);
        cell.send(&FromCell::Answer { id, answer: Ok(answer.clone()) }, &[]).unwrap();
        let FromCell::Answer { id, answer: told } = keep.receive::<FromCell>().unwrap().0 else { panic!() };
        assert_eq!(orders.answered(id, told), Heard::Passed);
        assert_eq!(asker.join().unwrap(), Ok(answer));
    }
}
