//! The thread of a device.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, Event, EventData, EventFlags},
    },
    io::Errno,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    active::Active,
    bits::bits,
    counters::Counters,
    device::{Device, Fault, Kind, Progress},
    device_config::DeviceConfig,
    event_fd::borrowed,
    limit::{Limiter, Limits},
};

/// What epoll reports with an event: a queue's index, behind all of them a backend's, or this.
const COMMAND: u64 = 63;
/// The unit of a disk's capacity (virtio 1.3, 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// Queues and backends that a device can have together, so that each is a bit beside the one above.
pub(crate) const EVENTS_MAX: usize = 62;

enum Command {
    Activate(Box<Active>),
    Deactivate(Sender<()>),
    Finish(Sender<()>),
    End,
}

/// The thread of one device: [`Worker::run`] is all that it does.
///
/// It can be started under a filter that forbids nearly everything: it opens nothing, and its epoll set is complete
/// from the start.
pub struct Worker {
    device: Box<dyn Device>,
    active: Option<Box<Active>>,
    /// Work to do without waiting for an event, by the numbers that epoll reports.
    due: u64,
    /// Work that the limits hold back, by the same numbers, and until when.
    held: Option<(u64, Instant)>,
    control: WorkerControl,
    counters: Arc<Counters>,
    config: Arc<DeviceConfig>,
    /// How many of the numbers that epoll reports are queues', and how many are queues' and backends'.
    numbers: (u64, u64),
    epoll: OwnedFd,
    commands: Receiver<Command>,
    finisher: Option<Sender<Command>>,
    // Held open for the epoll set.
    _doorbells: Arc<[EventFd]>,
}

/// What can be asked of a device's thread from outside. It waits for nobody, and keeps no thread from ending.
#[derive(Clone)]
pub struct WorkerControl {
    limiter: Arc<Limiter>,
    /// A new size that the device has not taken note of; 0 is none.
    size_bytes: Arc<AtomicU64>,
    wake: Arc<EventFd>,
}

impl WorkerControl {
    /// Sets the device's limits, in force at once.
    pub fn limit(&self, limits: Limits) {
        self.limiter.set(limits, Instant::now());
        // Work that was held back by the old ones is looked at again.
        self.wake();
    }

    /// Tells a disk that it has so many bytes now, not 0. The driver is told when it has taken note.
    pub fn resize(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
    }
}

/// A way to have a device write what it holds back, from any thread.
pub struct Finisher {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Finisher {
    /// Returns when the device holds nothing back any more, or its thread is gone, or after this time.
    pub fn finish(&self, within: Duration) {
        let (done, wait) = mpsc::channel();
        if self.commands.send(Command::Finish(done)).is_ok() {
            let _ = self.wake.write(1);
            let _ = wait.recv_timeout(within);
        }
    }
}

/// The transport's side of a worker.
pub(crate) struct Remote {
    commands: Option<Sender<Command>>,
    control: WorkerControl,
}

impl Worker {
    /// A worker of `device`, rung by `doorbells`, one a queue.
    pub(crate) fn new(
        mut device: Box<dyn Device>,
        doorbells: Arc<[EventFd]>,
        counters: Arc<Counters>,
        config: Arc<DeviceConfig>,
    ) -> io::Result<(Self, Remote)> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        // Edge-triggered, so that doorbells need no read, and a tap that no buffer waits for does not keep us awake.
        let add_for = |fd: BorrowedFd<'_>, what: EventFlags, number: u64| {
            epoll::add(&epoll, fd, EventData::new_u64(number), what | EventFlags::ET)
        };
        let add = |fd: BorrowedFd<'_>, number: u64| add_for(fd, EventFlags::IN, number);
        add(borrowed(&wake), COMMAND)?;
        device.take_doorbells(&doorbells);
        for (number, doorbell) in doorbells.iter().enumerate().filter(|(number, _)| device.hears(*number)) {
            add(borrowed(doorbell), number as u64)?;
        }
        let queues = doorbells.len() as u64;
        let mut numbers = (queues, queues);
        for backend in device.backends() {
            add(backend, numbers.1)?;
            numbers.1 += 1;
        }
        for sink in device.sinks() {
            add_for(sink, EventFlags::OUT, numbers.1)?;
            numbers.1 += 1;
        }
        let (sender, commands) = mpsc::channel();
        let finisher = device.holds_back().then(|| sender.clone());
        let control = WorkerControl { limiter: Arc::default(), size_bytes: Arc::default(), wake };
        let remote = Remote { commands: Some(sender), control: control.clone() };
        let worker = Self {
            device,
            active: None,
            due: 0,
            held: None,
            control,
            counters,
            config,
            numbers,
            epoll,
            commands,
            finisher,
            _doorbells: doorbells,
        };
        Ok((worker, remote))
    }

    /// What its device is, which says what its thread has to do.
    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// For a device that holds something back; to be asked for before the thread runs.
    pub fn finisher(&self) -> Option<Finisher> {
        self.finisher.clone().map(|commands| Finisher { commands, wake: Arc::clone(&self.control.wake) })
    }

    /// A name for the thread.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// Runs until the device's transport is dropped.
    pub fn run(mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(16);
        loop {
            events.clear();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, self.timeout().as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // Not on a set of our own; and if so, there is nothing to wait on any more.
                Err(_) => return,
            }
            for event in &events {
                let number = event.data.u64();
                self.due |= 1u64.checked_shl(u32::try_from(number).unwrap_or(u32::MAX)).unwrap_or(0);
            }
            self.release_held();
            if self.is_due(COMMAND) && self.obey().is_none() {
                return;
            }
            self.work();
        }
    }

    /// How long to sleep at most; `None` is for ever.
    fn timeout(&self) -> Option<Timespec> {
        if self.due != 0 {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        // Rounded up, so that it is time then: the kernel is told whole milliseconds. What is held back is so for an hour at most.
        let (_, until) = self.held?;
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Timespec::try_from(left).ok()
    }

    /// What was held back is due again when it is time, or when something changed.
    fn release_held(&mut self) {
        if let Some((work, until)) = self.held
            && (self.is_due(COMMAND) || Instant::now() >= until)
        {
            self.due |= work;
            self.held = None;
        }
    }

    /// Whether this work waits for its device's limits; if so, it is taken care of.
    fn hold_back(&mut self, number: u64) -> bool {
        // A backend that is no tap tells of what is done already.
        if number >= self.numbers.0 && self.device.kind() != Kind::Net {
            return false;
        }
        let Some(wait) = self.control.limiter.wait() else { return false };
        // No longer than an hour at a time: an instant has an end.
        let until = Instant::now() + wait.min(Duration::from_secs(3600));
        let (work, before) = self.held.unwrap_or((0, until));
        self.held = Some((work | 1 << number, before.min(until)));
        true
    }

    fn is_due(&self, number: u64) -> bool {
        self.due >> number & 1 == 1
    }

    /// Obeys what was commanded; `None` when nobody is left to command.
    fn obey(&mut self) -> Option<()> {
        self.due &= !(1 << COMMAND);
        self.take_size();
        loop {
            match self.commands.try_recv() {
                Ok(Command::Activate(mut active)) => {
                    // Whatever happened before counts as an event: edges may have been missed.
                    self.due |= (1 << self.numbers.1) - 1;
                    match self.device.activate(&mut active) {
                        Ok(()) => self.active = Some(active),
                        Err(fault) => {
                            active.counters().error();
                            active.interrupt().set_fault(fault);
                        }
                    }
                }
                Ok(Command::Deactivate(done)) => {
                    self.device.quiesce();
                    self.active = None;
                    self.held = None;
                    // A transport that no longer waits is one that is gone.
                    let _ = done.send(());
                }
                Ok(Command::Finish(done)) => {
                    self.device.finish();
                    let _ = done.send(());
                }
                Ok(Command::End) => return None,
                Err(TryRecvError::Empty) => return Some(()),
                Err(TryRecvError::Disconnected) => return None,
            }
        }
    }

    /// Takes note of a new size, and tells the driver.
    fn take_size(&mut self) {
        let size_bytes = self.control.size_bytes.swap(0, Ordering::AcqRel);
        if size_bytes != 0 {
            self.device.resize(size_bytes);
            // The capacity, the first field of a disk's configuration (virtio 1.3, 5.2.4).
            self.config.set(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
            if let Some(active) = &self.active {
                active.interrupt().signal_config();
            }
        }
    }

    /// One turn for each queue and the backend that is due.
    fn work(&mut self) {
        let due = std::mem::take(&mut self.due);
        for number in bits(due).map(|bit| bit as u64) {
            if self.active.is_some() && self.hold_back(number) {
                continue;
            }
            let Some(active) = &mut self.active else { return };
            let before = self.control.limiter.is_limited().then(|| self.counters.read());
            // Both are below `EVENTS_MAX`.
            let turn = match number.checked_sub(self.numbers.0) {
                Some(backend) => self.device.backend_ready(active, backend as usize),
                None => self.device.queue_ready(active, number as usize),
            };
            match turn {
                Ok(Progress::Idle) => {}
                Ok(Progress::More) => self.due |= 1 << number,
                Err(fault) => return self.stop(fault),
            }
            if let Some(before) = before {
                let after = self.counters.read();
                let bytes = after.bytes().wrapping_sub(before.bytes());
                self.control.limiter.charge(bytes, after.requests.wrapping_sub(before.requests));
            }
        }
    }

    /// Gives the memory up and tells the driver.
    fn stop(&mut self, fault: Fault) {
        self.due = 0;
        self.device.quiesce();
        if let Some(active) = self.active.take() {
            active.counters().error();
            active.interrupt().set_fault(fault);
        }
    }
}

impl Remote {
    /// Makes the device active.
    ///
    /// # Errors
    /// When its thread has ended.
    pub(crate) fn activate(&self, active: Active) -> Result<(), Fault> {
        self.send(Command::Activate(Box::new(active)))
    }

    /// Returns when the device holds no memory any more.
    pub(crate) fn deactivate(&self) {
        let (done, wait) = mpsc::channel();
        if self.send(Command::Deactivate(done)).is_ok() {
            // An error tells that the thread ended, and with it what it held.
            let _ = wait.recv();
        }
    }

    /// What can be asked of the device's thread from outside.
    pub(crate) fn control(&self) -> &WorkerControl {
        &self.control
    }

    fn send(&self, command: Command) -> Result<(), Fault> {
        let commands = self.commands.as_ref().ok_or(Fault::Worker)?;
        commands.send(command).map_err(|_| Fault::Worker)?;
        self.control.wake();
        Ok(())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(commands) = self.commands.take() {
            let _ = commands.send(Command::End);
        }
        self.control.wake();
    }
}
