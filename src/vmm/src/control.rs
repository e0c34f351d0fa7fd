//! The control thread: it alone changes the machine.
//!
//! Interrupt routes, irqfds, ioeventfds, memory slots and VFIO's interrupts are changed here and nowhere else; a vCPU
//! thread whose guest writes to an MSI-X table or moves a BAR asks, and waits for the answer. So the filters of the
//! other threads need none of those calls. Control never takes a device's lock: who holds one may wait for it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender, SyncSender},
    },
    time::{Duration, Instant},
};

use casemate_passthrough::{VectorKind, VfioDevice};
use casemate_pci::MsiMessage;
use casemate_wire::{Answer, End, Event, Refused};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    asks::Reply,
    error::{During, Error},
    machine::Emulated,
    maps::{Answers, Attachments, Kernel, Maps},
    memory::{self, MemorySlot},
    peers::Peers,
    platform::lock,
    root::Place,
};

/// Interrupt lines that the IOAPIC has; message-signalled interrupts are numbered from here.
pub(crate) const FIRST_MSI_GSI: u32 = 24;
/// Requests served before the keep is heard again.
const TURN: usize = 64;
/// Routes that KVM takes (`KVM_MAX_IRQ_ROUTES`).
const ROUTES_MOST: u32 = 4096;

/// A change that a vCPU thread asks for.
pub(crate) enum Change {
    /// The interrupt `gsi` delivers this message from now on, or is held back.
    Route {
        /// Global system interrupt number.
        gsi: u32,
        /// `None` holds events back until the next route.
        message: Option<MsiMessage>,
    },
    /// A level-triggered pin of the IOAPIC delivers this message from now on: KVM then tells of its end.
    Pin {
        /// Its GSI, below [`FIRST_MSI_GSI`].
        gsi: u32,
        /// As the guest's redirection table has it.
        message: MsiMessage,
    },
    /// These functions' BARs answer elsewhere.
    Answer(Vec<Answers>),
    /// A piece of memory that the guest reads is to be an exit from now on.
    Forget(MemorySlot),
    /// What follows the BARs of a function that comes while the guest runs.
    Attach(Place, Attachments),
    /// A function goes, and what followed its BARs with it.
    Detach(Place),
    /// An emulated device came into a slot, from 0: what control can have to do with it.
    Plug(usize, Box<Emulated>),
    /// It goes.
    Unplug(usize),
    /// The vectors of a function that has gone are given up.
    ForgetVectors {
        /// As [`Requests::add_vectors`] told it.
        first_gsi: u32,
        /// How many.
        count: u32,
    },
    /// An assigned function's messages are turned on, or off.
    Vectors {
        /// Its number among the assigned ones.
        device: usize,
        /// Of which kind.
        kind: VectorKind,
        /// One event a vector.
        events: Arc<[EventFd]>,
        /// How many of them; 0 turns all off.
        count: u16,
    },
    /// One more vector of an assigned function's MSI-X is turned on.
    Vector {
        /// Its number among the assigned ones.
        device: usize,
        /// Which vector.
        vector: u16,
        /// One event a vector.
        events: Arc<[EventFd]>,
    },
    /// An assigned function is to be reset.
    Reset {
        /// Its number among the assigned ones.
        device: usize,
    },
    /// An assigned function has gone.
    ForgetDevice {
        /// Its number among the assigned ones.
        device: usize,
    },
}

/// What a guest that has panicked is given to write the rest of its console and to end by itself. A kernel tells of its
/// panic first and prints more afterwards; without `panic=` on its command line it then stands still.
const LAST_WORDS: Duration = Duration::from_secs(1);

enum Request {
    Change(Change, SyncSender<Result<(), String>>),
    Vectors(Vec<EventFd>, SyncSender<Result<u32, String>>),
    Device(Arc<VfioDevice>, SyncSender<usize>),
    Answer(Reply),
    Panicked,
    Paused,
    End(End),
}

/// How other threads reach the control thread.
pub(crate) struct Requests {
    sender: Sender<Request>,
    wake: EventFd,
    panicked: AtomicBool,
    /// When the guest's watchdog bites. No other lock is taken while this one is held.
    watchdog: Arc<Mutex<Option<Instant>>>,
}

impl Requests {
    /// Asks for a change and waits until it is made.
    pub(crate) fn change(&self, change: Change) -> Result<(), String> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Request::Change(change, reply));
        answer.recv().unwrap_or_else(|_| Err("the control thread has gone".into()))
    }

    /// Reserves a GSI for each of these events, for a function that comes while the guest runs. Returns the first.
    pub(crate) fn add_vectors(&self, events: Vec<EventFd>) -> Result<u32, String> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Request::Vectors(events, reply));
        answer.recv().unwrap_or_else(|_| Err("the control thread has gone".into()))
    }

    /// Gives control an assigned function's device, of one that comes while the guest runs. Returns its number.
    pub(crate) fn add_device(&self, device: Arc<VfioDevice>) -> Result<usize, String> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Request::Device(device, reply));
        answer.recv().map_err(|_| "the control thread has gone".into())
    }

    /// Answers the keep.
    pub(crate) fn answer(&self, id: u32, answer: Result<Answer, Refused>) {
        self.send(Request::Answer((id, answer)));
    }

    /// A control that does nothing but tell `see` of every change, for tests of those who ask.
    #[cfg(test)]
    pub(crate) fn answered_by(see: impl Fn(Change) + Send + 'static) -> Arc<Self> {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            while let Ok(request) = receiver.recv() {
                if let Request::Change(change, reply) = request {
                    see(change);
                    let _ = reply.send(Ok(()));
                }
            }
        });
        let wake = EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
        Arc::new(Self { sender, wake, panicked: AtomicBool::new(false), watchdog: Arc::default() })
    }

    /// Says that the guest has ended. The process ends soon after.
    pub(crate) fn end(&self, end: End) {
        self.send(Request::End(end));
    }

    /// Says that the guest's kernel has panicked. It may end by itself yet; if not, it is ended soon.
    pub(crate) fn panicked(&self) {
        // Once: a guest that says it in a loop fills no queue.
        if !self.panicked.swap(true, Ordering::Relaxed) {
            self.send(Request::Panicked);
        }
    }

    /// Says that the last processor stands at the gate.
    pub(crate) fn paused(&self) {
        self.send(Request::Paused);
    }

    /// Says when the guest's watchdog bites now. Control looks at it again by itself when the time has come, so it is
    /// woken for an earlier one only: a guest that kicks its dog costs no switch of threads.
    pub(crate) fn watch(&self, deadline: Option<Instant>) {
        let before = std::mem::replace(&mut *lock(&self.watchdog), deadline);
        if deadline.is_some_and(|deadline| before.is_none_or(|before| deadline < before)) {
            let _ = self.wake.write(1);
        }
    }

    fn send(&self, request: Request) {
        // Both fail only when the control thread has gone, and the process with it.
        let _ = self.sender.send(request);
        let _ = self.wake.write(1);
    }
}

/// All that the control thread holds.
pub(crate) struct Control {
    vm: Arc<VmFd>,
    receiver: Receiver<Request>,
    wake: EventFd,
    routes: BTreeMap<u32, MsiMessage>,
    events: BTreeMap<u32, EventFd>,
    maps: Maps,
    peers: Option<Peers>,
    /// Emulated devices in slots, from 0.
    plugged: BTreeMap<usize, Emulated>,
    devices: BTreeMap<usize, Arc<VfioDevice>>,
    next_device: usize,
    panic_deadline: Option<Instant>,
    /// What the keep has not been told yet.
    news: Vec<Event>,
    watchdog: Arc<Mutex<Option<Instant>>>,
    answers: Vec<Reply>,
}

impl Control {
    /// A control without devices, and a handle to it. Memory slots below `first_slot` are RAM.
    pub(crate) fn new(vm: Arc<VmFd>, first_slot: u32) -> Result<(Self, Arc<Requests>), Error> {
        let (sender, receiver) = mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).during("making an eventfd")?;
        let copy = wake.try_clone().during("duplicating an eventfd")?;
        let watchdog = Arc::new(Mutex::new(None));
        let requests = Arc::new(Requests {
            sender,
            wake: copy,
            panicked: AtomicBool::new(false),
            watchdog: Arc::clone(&watchdog),
        });
        let control = Self {
            vm,
            receiver,
            wake,
            routes: BTreeMap::new(),
            events: BTreeMap::new(),
            maps: Maps::new(first_slot),
            peers: None,
            plugged: BTreeMap::new(),
            devices: BTreeMap::new(),
            next_device: 0,
            panic_deadline: None,
            news: Vec::new(),
            watchdog,
            answers: Vec::new(),
        };
        Ok((control, requests))
    }

    /// Readable when somebody asks for something.
    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Reserves a GSI for each of these events. They are connected once the guest routes them.
    /// It takes them over: once the guest runs, this thread may not make descriptors.
    pub(crate) fn add_vectors(&mut self, events: Vec<EventFd>) -> Result<u32, Error> {
        let first = first_free(&self.events, events.len() as u32)
            .ok_or_else(|| Error::Layout(format!("more than {ROUTES_MOST} interrupt vectors")))?;
        self.events.extend((first..).zip(events));
        Ok(first)
    }

    /// Takes over what follows the BARs of the function at `place`.
    pub(crate) fn add_function(&mut self, place: Place, attachments: Attachments) {
        self.maps.attach(place, attachments);
    }

    /// Lets functions' registers be reached by the guest's other devices from now on, those that say so.
    pub(crate) fn have_peers(&mut self, peers: Peers) {
        self.peers = Some(peers);
    }

    /// Takes over an assigned function's VFIO device; returns its number.
    pub(crate) fn add_device(&mut self, device: Arc<VfioDevice>) -> usize {
        let number = self.next_device;
        self.next_device = self.next_device.wrapping_add(1);
        self.devices.insert(number, device);
        number
    }

    /// Emulated devices that are in slots now, from 0.
    pub(crate) fn plugged(&self) -> &BTreeMap<usize, Emulated> {
        &self.plugged
    }

    /// How long control may sleep.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let deadline = self.panic_deadline.into_iter().chain(*lock(&self.watchdog)).min();
        deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Answers for the keep that have come since the last call.
    pub(crate) fn take_answers(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.answers)
    }

    /// What has happened since the last call, for the keep.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.news)
    }

    /// Does what was asked since the last call. Returns how the guest ended, once it has.
    pub(crate) fn serve(&mut self) -> Option<End> {
        let _ = self.wake.read();
        let end = self.serve_requests();
        let panicked = self.panic_deadline.is_some();
        match end {
            // By which way a panicked kernel left is its `panic=` setting's business.
            Some(End::PowerOff | End::Reset | End::TripleFault) if panicked => Some(End::Panic),
            // A panicked kernel kicks no dog.
            None if self.patience() == Some(Duration::ZERO) && panicked => Some(End::Panic),
            None if self.patience() == Some(Duration::ZERO) => Some(End::Watchdog),
            end => end,
        }
    }

    fn serve_requests(&mut self) -> Option<End> {
        // Bounded: processors that ask without end must not keep this thread from hearing the keep.
        for _ in 0..TURN {
            let Ok(request) = self.receiver.try_recv() else { return None };
            match request {
                Request::Change(change, reply) => {
                    let _ = reply.send(self.apply(change).map_err(|error| error.to_string()));
                }
                Request::Vectors(events, reply) => {
                    let _ = reply.send(self.add_vectors(events).map_err(|error| error.to_string()));
                }
                Request::Device(device, reply) => {
                    let _ = reply.send(self.add_device(device));
                }
                Request::Answer(answer) => self.answers.push(answer),
                Request::Panicked => {
                    self.panic_deadline.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                    self.news.push(Event::Panicked);
                }
                // Who looks whether all stand there is woken, which is all there is to it.
                Request::Paused => {}
                Request::End(end) => return Some(end),
            }
        }
        // There may be more; it is this thread's turn again after the others have been heard.
        let _ = self.wake.write(1);
        None
    }

    fn apply(&mut self, change: Change) -> Result<(), Error> {
        match change {
            Change::Route { gsi, message } => self.route(gsi, message),
            Change::Pin { gsi, message } => {
                if gsi >= FIRST_MSI_GSI {
                    return Err(Error::Lacks("such a pin"));
                }
                self.write_route(gsi, message)
            }
            Change::Answer(answers) => {
                self.maps.answer(&Kernel { vm: &self.vm, peers: self.peers.as_ref() }, &answers)
            }
            Change::Forget(slot) => {
                // SAFETY: the slot is deleted, which needs no mapping.
                let forgotten = unsafe { memory::set_slot(&self.vm, MemorySlot { size_bytes: 0, ..slot }) };
                forgotten.during("unmapping a function's configuration space")
            }
            Change::Attach(place, attachments) => {
                self.maps.attach(place, attachments);
                Ok(())
            }
            Change::Plug(slot, device) => {
                self.plugged.insert(slot, *device);
                Ok(())
            }
            Change::Unplug(slot) => {
                self.plugged.remove(&slot);
                Ok(())
            }
            Change::Detach(place) => {
                self.maps.detach(&Kernel { vm: &self.vm, peers: self.peers.as_ref() }, place)
            }
            Change::ForgetVectors { first_gsi, count } => {
                let gsis = first_gsi.max(FIRST_MSI_GSI)..first_gsi.saturating_add(count);
                let gone = gsis.clone().map(|gsi| self.route(gsi, None));
                let gone = gone.fold(Ok(()), Result::and);
                self.events.retain(|gsi, _| !gsis.contains(gsi));
                gone
            }
            Change::Vectors { device, kind, events, count } => {
                let device = self.device(device)?;
                let events = events.get(..usize::from(count)).ok_or(Error::Lacks("such a vector"))?;
                device.set_vectors(kind, events).map_err(|error| Error::device("interrupts", error))
            }
            Change::Vector { device, vector, events } => {
                let device = self.device(device)?;
                let event = events.get(usize::from(vector)).ok_or(Error::Lacks("such a vector"))?;
                device.add_vector(vector, event).map_err(|error| Error::device("interrupts", error))
            }
            Change::Reset { device } => {
                self.device(device)?.reset().map_err(|error| Error::device("reset", error))
            }
            Change::ForgetDevice { device } => {
                self.devices.remove(&device);
                Ok(())
            }
        }
    }

    fn device(&self, number: usize) -> Result<&VfioDevice, Error> {
        self.devices.get(&number).map(AsRef::as_ref).ok_or(Error::Lacks("such a device"))
    }

    /// Routes an interrupt before its irqfd is connected, and disconnects it before its route is dropped: an eventfd
    /// without an irqfd keeps its count, and KVM delivers it when the irqfd comes back.
    fn route(&mut self, gsi: u32, message: Option<MsiMessage>) -> Result<(), Error> {
        if !self.events.contains_key(&gsi) {
            return Err(Error::Lacks("such an interrupt"));
        }
        let connected = self.routes.contains_key(&gsi);
        match message {
            Some(message) => {
                self.write_route(gsi, message)?;
                if !connected
                    && let Some(event) = self.events.get(&gsi)
                    && let Err(error) = self.vm.register_irqfd(event, gsi)
                {
                    // Without its irqfd the route counts for nothing, and the next message must try both again.
                    self.routes.remove(&gsi);
                    self.write_routes()?;
                    return Err(error).during("connecting an interrupt");
                }
            }
            None if connected => {
                let event = self.events.get(&gsi).ok_or(Error::Lacks("such an interrupt"))?;
                self.vm.unregister_irqfd(event, gsi).during("disconnecting an interrupt")?;
                self.routes.remove(&gsi);
                self.write_routes()?;
            }
            None => {}
        }
        Ok(())
    }

    /// Adds or replaces one route. KVM takes the table whole or not at all: a message of the guest's that it does not take
    /// must not stand in the way of the next.
    fn write_route(&mut self, gsi: u32, message: MsiMessage) -> Result<(), Error> {
        let before = self.routes.insert(gsi, message);
        self.write_routes().inspect_err(|_| {
            match before {
                Some(before) => self.routes.insert(gsi, before),
                None => self.routes.remove(&gsi),
            };
        })
    }

    fn write_routes(&self) -> Result<(), Error> {
        let entries: Vec<_> = self.routes.iter().map(|(gsi, message)| msi_route(*gsi, *message)).collect();
        let table =
            KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Lacks("room for interrupt routes"))?;
        self.vm.set_gsi_routing(&table).during("routing interrupts")
    }
}

/// The first of `count` GSIs for messages, one behind the other, that no event has.
fn first_free(taken: &BTreeMap<u32, EventFd>, count: u32) -> Option<u32> {
    let mut first = FIRST_MSI_GSI;
    for gsi in taken.keys() {
        if gsi.checked_sub(first).is_some_and(|room| room >= count) {
            break;
        }
        first = gsi + 1;
    }
    (first.checked_add(count)? <= ROUTES_MOST).then_some(first)
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// The vectors of one function: events, and the GSIs they are numbered by.
pub(crate) struct Vectors {
    /// GSI of vector 0.
    pub(crate) first_gsi: u32,
    /// One event a vector.
    pub(crate) events: Arc<[EventFd]>,
    /// Who makes the routes.
    pub(crate) requests: Arc<Requests>,
}

impl casemate_pci::VectorSink for Vectors {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        if usize::from(vector) < self.events.len() {
            // A route that KVM refuses is a message that only the guest could have made wrong: it gets no interrupt.
            let _ = self.requests.change(Change::Route { gsi: self.first_gsi + u32::from(vector), message });
        }
    }

    fn is_pending(&self, vector: u16) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        self.events.get(usize::from(vector)).is_some_and(|event| {
            // SAFETY: the descriptor is open for as long as `event`, which outlives this borrow.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
            let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready == 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_that_were_given_up_are_given_out_again() {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut taken: BTreeMap<u32, EventFd> = BTreeMap::new();
        assert_eq!(first_free(&taken, 3), Some(FIRST_MSI_GSI));
        taken.extend((24..30).chain(33..40).map(|gsi| (gsi, event())));
        assert_eq!(first_free(&taken, 3), Some(30));
        assert_eq!(first_free(&taken, 4), Some(40));
        assert_eq!(first_free(&taken, 0), Some(24));
        assert_eq!(first_free(&taken, ROUTES_MOST - 40), Some(40));
        assert_eq!(first_free(&taken, ROUTES_MOST - 39), None);
    }
}
