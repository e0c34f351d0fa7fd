//! Cards that come and go while the guest runs: the thread that puts them into slots and takes them out.
//!
//! It makes a card's function out of descriptors that the keep sent, has the control thread connect it, and puts it behind
//! a root port. It waits for locks and for the control thread, as a processor does; so neither control nor a processor
//! waits for it. A virtio device runs on a thread that has stood there for it since the start, and a raw disk works by a ring
//! that has: none is made later.

use std::{
    collections::BTreeMap,
    fmt::Display,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use casemate_pci::Function;
use casemate_virtio::{
    Blk, BlkBackend, Device, Memory, Net, PciParts, PciTransport, SpareRing, Worker, vector_count,
};
use casemate_wire::{Answer, Refused};
use vmm_sys_util::eventfd::EventFd;

mod assigned;
pub(crate) use assigned::{AssignedCard, Assigning};

use crate::{
    control::{Change, Requests, Vectors},
    error::{During, Error, bounded},
    machine::{Emulated, Own},
    maps::{Attachments, Doorbell},
    platform::Platform,
    root::Place,
};

/// What a device's thread may take to let go of it; more is a fault of ours.
const THREAD_PATIENCE: Duration = Duration::from_secs(5);

/// How often a guest is looked at that can't be asked just now.
const AGAIN: Duration = Duration::from_millis(200);

/// Something to do for the thread.
pub(crate) enum Order {
    /// The keep wants a card in a slot.
    Add {
        /// The number of what was asked.
        id: u32,
        /// Which slot, from 0.
        slot: u8,
        /// What comes.
        card: Card,
    },
    /// The keep wants a slot empty.
    Remove {
        /// The number of what was asked.
        id: u32,
        /// Which slot, from 0.
        slot: u8,
        /// How long the guest may take to let the card go.
        patience: Duration,
        /// Whether it is taken when the guest has not.
        force: bool,
    },
    /// The guest says of a slot, from 0, that its card may go.
    LetGo(usize),
}

/// What can be put into a slot.
pub(crate) enum Card {
    /// A disk.
    Disk(BlkBackend),
    /// A network card.
    Net {
        /// The queues of its tap.
        taps: Vec<OwnedFd>,
        /// Its address.
        mac: [u8; 6],
    },
    /// Functions of the host's.
    Assigned(AssignedCard),
}

/// How others reach the thread.
#[derive(Clone)]
pub(crate) struct Orders {
    sender: Sender<Order>,
    /// A slot whose guest's word is on its way: one that repeats it in a loop fills no queue.
    told: Arc<[AtomicBool]>,
}

impl Orders {
    /// A way for orders, and where they come out, for a machine of `slots` slots.
    pub(crate) fn new(slots: u8) -> (Self, Incoming) {
        let (sender, receiver) = mpsc::channel();
        let told: Arc<[AtomicBool]> = (0..slots).map(|_| AtomicBool::new(false)).collect();
        let incoming = Incoming { receiver, told: Arc::clone(&told) };
        (Self { sender, told }, incoming)
    }

    /// Has something done. `false`: nobody is there to do it.
    pub(crate) fn give(&self, order: Order) -> bool {
        self.sender.send(order).is_ok()
    }

    /// The guest says that a slot's card may go.
    pub(crate) fn let_go(&self, slot: usize) {
        if self.told.get(slot).is_some_and(|told| !told.swap(true, Ordering::AcqRel)) {
            self.give(Order::LetGo(slot));
        }
    }
}

/// Where orders come out.
pub(crate) struct Incoming {
    receiver: Receiver<Order>,
    told: Arc<[AtomicBool]>,
}

/// A thread that waits for a device to run.
pub(crate) struct Spare {
    workers: Receiver<Worker>,
    idle: Sender<()>,
}

/// The hot-plug thread's side of a [`Spare`].
pub(crate) struct SpareHandle {
    workers: Sender<Worker>,
    idle: Receiver<()>,
    /// For a disk, where the kernel has one.
    ring: Option<SpareRing>,
}

impl Spare {
    /// A thread's body, and the way to it; with the ring that a disk of the slot works by, to be made while rings may be.
    pub(crate) fn new(ring: Option<SpareRing>) -> (Self, SpareHandle) {
        let (workers, take) = mpsc::channel();
        let (idle, is_idle) = mpsc::channel();
        (Self { workers: take, idle }, SpareHandle { workers, idle: is_idle, ring })
    }

    /// Runs one device after the other.
    pub(crate) fn run(self) {
        while let Ok(worker) = self.workers.recv() {
            // With its end the device's descriptors are closed.
            worker.run();
            let _ = self.idle.send(());
        }
    }
}

/// What is in a slot.
struct Plugged {
    name: &'static str,
    what: What,
    /// Somebody waits for the card to go.
    leaving: Option<Leaving>,
}

/// What there is to undo of a card.
enum What {
    /// An emulated one, on the slot's thread.
    Virtio { first_gsi: u32, vectors: u32 },
    /// One of the host's.
    Assigned(assigned::Taken),
}

struct Leaving {
    ids: Vec<u32>,
    /// The guest was asked.
    asked: bool,
    deadline: Instant,
    force: bool,
}

/// The thread.
pub(crate) struct Hotplug {
    platform: Arc<Platform>,
    requests: Arc<Requests>,
    memory: Memory,
    incoming: Incoming,
    spares: Vec<SpareHandle>,
    assigning: Assigning,
    plugged: BTreeMap<usize, Plugged>,
}

/// Why nothing was done.
struct Refusal(&'static str, String);

impl Refusal {
    fn device(error: impl Display) -> Self {
        Self("hotplug-failed", error.to_string())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::device(error)
    }
}

/// What a [`Hotplug`] is made of.
pub(crate) struct HotplugParts {
    /// Where the slots are.
    pub(crate) platform: Arc<Platform>,
    /// Who connects what comes.
    pub(crate) requests: Arc<Requests>,
    /// The guest's memory, for devices that come.
    pub(crate) memory: Memory,
    /// What devices of the host's need.
    pub(crate) assigning: Assigning,
    /// What to do.
    pub(crate) incoming: Incoming,
    /// A thread a slot.
    pub(crate) spares: Vec<SpareHandle>,
}

impl Hotplug {
    /// A machine's hot-plug, all slots empty.
    pub(crate) fn new(parts: HotplugParts) -> Self {
        let HotplugParts { platform, requests, memory, assigning, incoming, spares } = parts;
        Self { platform, requests, memory, incoming, spares, assigning, plugged: BTreeMap::new() }
    }

    /// Does what is ordered until nobody is left to order.
    pub(crate) fn run(mut self) {
        loop {
            let order = match self.patience() {
                None => self.incoming.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(patience) => self.incoming.receiver.recv_timeout(patience),
            };
            match order {
                Ok(Order::Add { id, slot, card }) => {
                    let added = self.add(slot.into(), card).map(|()| Answer::Done);
                    self.answer(id, added);
                }
                Ok(Order::Remove { id, slot, patience, force }) => {
                    if let Err(refusal) = self.begin_removal(id, slot, patience, force) {
                        self.answer(id, Err(refusal));
                    }
                }
                Ok(Order::LetGo(slot)) => {
                    if let Some(told) = self.incoming.told.get(slot) {
                        told.store(false, Ordering::Release);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            self.look_after_leaving();
        }
    }

    /// How long the thread may sleep.
    fn patience(&self) -> Option<Duration> {
        let leaving = self.plugged.values().filter_map(|card| card.leaving.as_ref());
        leaving
            .map(|leaving| {
                let left = leaving.deadline.saturating_duration_since(Instant::now());
                if leaving.asked { left } else { left.min(AGAIN) }
            })
            .min()
    }

    fn answer(&self, id: u32, answer: Result<Answer, Refusal>) {
        let answer = answer
            .map_err(|Refusal(code, message)| Refused { code: code.to_owned(), message: bounded(message) });
        self.requests.answer(id, answer);
    }

    fn add(&mut self, slot: usize, card: Card) -> Result<(), Refusal> {
        if slot >= self.spares.len() || self.plugged.contains_key(&slot) {
            let cause =
                format!("slot {} is taken, or there is none; the guest has {}", slot + 1, self.spares.len());
            return Err(Refusal("hotplug-no-slot", cause));
        }
        let device: Box<dyn Device> = match card {
            Card::Disk(backend) => Box::new(self.disk(slot, backend)?),
            Card::Net { taps, mac } => Box::new(Net::new(taps, mac).map_err(Refusal::device)?),
            Card::Assigned(card) => return self.add_assigned(slot, card),
        };
        self.add_virtio(slot, device).inspect_err(|_| self.forget_file(slot))
    }

    fn disk(&self, slot: usize, backend: BlkBackend) -> Result<Blk, Refusal> {
        let ring = self.spares.get(slot).and_then(|spare| spare.ring.as_ref());
        let disk = Blk::with_spare(backend, ring).map_err(Refusal::device)?;
        if let Some(error) = disk.without_ring() {
            let slot = slot + 1;
            eprintln!(
                "casemate-vmm: the disk in slot {slot} does one request at a time, since its ring cannot be used: {error}"
            );
        }
        Ok(disk)
    }

    /// Lets go of what a slot's ring holds open of a disk that is gone.
    fn forget_file(&self, slot: usize) {
        if let Some(ring) = self.spares.get(slot).and_then(|spare| spare.ring.as_ref()) {
            ring.forget_file();
        }
    }

    fn add_virtio(&mut self, slot: usize, device: Box<dyn Device>) -> Result<(), Refusal> {
        let (kind, place) = (device.kind(), place_of(slot));
        let spare = self.spares.get(slot).ok_or(Error::Lacks("such a slot"))?;
        let count = vector_count(device.as_ref());
        let vectors = add_vectors(&self.requests, count)?;
        let first_gsi = vectors.first_gsi;
        let events = vectors.events.iter().map(duplicate).collect::<Result<Vec<_>, _>>();
        let made = events.map_err(Refusal::from).and_then(|events| {
            let memory = Arc::clone(&self.memory);
            let parts = PciParts { device, memory, events, vectors: Box::new(vectors) };
            let (transport, worker) = PciTransport::new(parts).map_err(Refusal::device)?;
            let ring = |bell: casemate_virtio::Doorbell<'_>| {
                Ok(Doorbell { bar: bell.bar, offset: bell.offset, event: duplicate(bell.event)? })
            };
            let doorbells = transport.doorbells().map(ring).collect::<Result<_, Error>>()?;
            Ok((transport, worker, doorbells))
        });
        let emulated = |transport: &PciTransport| Emulated {
            kind,
            counters: Arc::clone(transport.counters()),
            interrupt: transport.interrupt(),
            worker: transport.worker_control(),
            own: Own::Nothing,
        };
        let forget = || self.change(Change::ForgetVectors { first_gsi, count: count.into() });
        let (transport, worker, doorbells) = made.inspect_err(|_| forget())?;
        if spare.workers.send(worker).is_err() {
            forget();
            return Err(Error::Lacks("the slot's thread").into());
        }
        self.change(Change::Attach(place, Attachments { doorbells, regions: Vec::new() }));
        let what = What::Virtio { first_gsi, vectors: count.into() };
        let plugged = Plugged { name: kind.name(), what, leaving: None };
        self.plugged.insert(slot, plugged);
        self.change(Change::Plug(slot, Box::new(emulated(&transport))));
        self.platform.root().insert(slot, vec![Box::new(transport)]);
        Ok(())
    }

    fn add_assigned(&mut self, slot: usize, card: AssignedCard) -> Result<(), Refusal> {
        let (taken, functions) = self.assigning.take(&self.requests, place_of(slot), card)?;
        let plugged = Plugged { name: "device", what: What::Assigned(taken), leaving: None };
        self.plugged.insert(slot, plugged);
        self.platform.root().insert(slot, functions);
        Ok(())
    }

    /// Asks the guest to let a card go.
    fn begin_removal(&mut self, id: u32, slot: u8, patience: Duration, force: bool) -> Result<(), Refusal> {
        let slot = usize::from(slot);
        let empty = || Refusal("hotplug-empty-slot", "no card that came by hot-plug is in this slot".into());
        let card = self.plugged.get_mut(&slot).ok_or_else(empty)?;
        let deadline = Instant::now() + patience;
        let leaving =
            card.leaving.get_or_insert(Leaving { ids: Vec::new(), asked: false, deadline, force: false });
        leaving.ids.push(id);
        leaving.force |= force;
        leaving.deadline = leaving.deadline.min(deadline);
        Ok(())
    }

    /// Sees to the cards that are to go: asks, takes out, or gives up.
    fn look_after_leaving(&mut self) {
        let slots: Vec<usize> = self.plugged.keys().copied().collect();
        for slot in slots {
            let root = self.platform.root();
            let Some(card) = self.plugged.get_mut(&slot) else { continue };
            let Some(leaving) = &mut card.leaving else { continue };
            // A guest that never brought it up does not use it either.
            if root.has_let_go(slot) {
                self.finish_removal(slot, false);
                continue;
            }
            leaving.asked = leaving.asked || root.ask_to_let_go(slot);
            if leaving.deadline > Instant::now() {
                continue;
            }
            if leaving.force {
                self.finish_removal(slot, true);
                continue;
            }
            let (ids, name) = (std::mem::take(&mut leaving.ids), card.name);
            card.leaving = None;
            for id in ids {
                let cause = format!("the guest has not let the {name} in slot {} go", slot + 1);
                self.answer(id, Err(Refusal("hotplug-not-let-go", cause)));
            }
        }
    }

    /// Takes a card out. The guest's memory is taken from it before its descriptors are closed, and they are closed when this
    /// returns.
    fn finish_removal(&mut self, slot: usize, forced: bool) {
        let Some(card) = self.plugged.remove(&slot) else { return };
        let functions: Vec<Box<dyn Function>> = self.platform.root().remove(slot);
        match card.what {
            What::Virtio { first_gsi, vectors } => {
                self.change(Change::Unplug(slot));
                self.change(Change::Detach(place_of(slot)));
                self.change(Change::ForgetVectors { first_gsi, count: vectors });
                // Its thread ends the device when its transport is gone.
                drop(functions);
                if let Some(spare) = self.spares.get(slot)
                    && spare.idle.recv_timeout(THREAD_PATIENCE).is_err()
                {
                    eprintln!("casemate-vmm: the thread of slot {} does not come back", slot + 1);
                }
                self.forget_file(slot);
            }
            What::Assigned(taken) => {
                drop(functions);
                self.assigning.give_up(&self.requests, taken);
            }
        }
        for id in card.leaving.into_iter().flat_map(|leaving| leaving.ids) {
            self.answer(id, Ok(Answer::Removed { forced }));
        }
    }

    fn change(&self, change: Change) {
        told(self.requests.change(change));
    }
}

/// An event for each of so many vectors, and a GSI from control. Who drops them has control forget those.
fn add_vectors(requests: &Arc<Requests>, count: u16) -> Result<Vectors, Refusal> {
    let make = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).during("making an eventfd");
    let events: Arc<[EventFd]> = (0..count).map(make).collect::<Result<_, _>>()?;
    let for_control = events.iter().map(duplicate).collect::<Result<_, _>>()?;
    let first_gsi = requests.add_vectors(for_control).map_err(Refusal::device)?;
    Ok(Vectors { first_gsi, events, requests: Arc::clone(requests) })
}

fn duplicate(event: &EventFd) -> Result<EventFd, Error> {
    event.try_clone().during("duplicating an eventfd")
}

/// Writes down what went wrong with a step that others must not wait for.
fn told<E: Display>(result: Result<(), E>) {
    if let Err(error) = result {
        eprintln!("casemate-vmm: hot-plug: {error}");
    }
}

/// Where the one function of a slot's card sits.
fn place_of(slot: usize) -> Place {
    Place { bus: u8::try_from(slot + 1).unwrap_or(u8::MAX), device: 0, function: 0 }
}
