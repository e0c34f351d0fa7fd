//! The thread of a device.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
};

/// What epoll reports with an event: a queue's index, or one of these.
const BACKEND: u64 = 62;
const COMMAND: u64 = 63;
/// Queues that a device can have, so that each is a bit beside the two above.
pub(crate) const QUEUES_MAX: usize = 62;

enum Command {
    Activate(Box<Active>),
    Deactivate(Sender<()>),
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
    epoll: Epoll,
    commands: Receiver<Command>,
    // Held open for the epoll set.
    _doorbells: Arc<[EventFd]>,
    _wake: Arc<EventFd>,
}

/// The transport's side of a worker.
pub(crate) struct Remote {
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
}

impl Worker {
    /// A worker of `device`, rung by `doorbells`, one a queue.
    pub(crate) fn new(device: Box<dyn Device>, doorbells: Arc<[EventFd]>) -> io::Result<(Self, Remote)> {
        let epoll = Epoll::new()?;
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        // Edge-triggered, so that doorbells need no read, and a tap that no buffer waits for does not keep us awake.
        let add = |fd: i32, number: u64| {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, number);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        add(wake.as_raw_fd(), COMMAND)?;
        for (number, doorbell) in (0..).zip(doorbells.iter()) {
            add(doorbell.as_raw_fd(), number)?;
        }
        if let Some(backend) = device.backend() {
            add(backend.as_raw_fd(), BACKEND)?;
        }
        let (sender, commands) = mpsc::channel();
        let remote = Remote { commands: Some(sender), wake: wake.clone() };
        let worker =
            Self { device, active: None, due: 0, epoll, commands, _doorbells: doorbells, _wake: wake };
        Ok((worker, remote))
    }

    /// What its device is, which says what its thread has to do.
    pub fn kind(&self) -> Kind {
        self.device.kind()
    }

    /// A name for the thread.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// Runs until the device's transport is dropped.
    pub fn run(mut self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let timeout_ms = if self.due == 0 { -1 } else { 0 };
            let count = match self.epoll.wait(timeout_ms, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                // Not on a set of our own; and if so, there is nothing to wait on any more.
                Err(_) => return,
            };
            for event in events.iter().take(count) {
                self.due |= 1u64.checked_shl(event.data() as u32).unwrap_or(0);
            }
            if self.is_due(COMMAND) && self.obey().is_none() {
                return;
            }
            self.work();
        }
    }

    fn is_due(&self, number: u64) -> bool {
        self.due >> number & 1 == 1
    }

    /// Obeys what was commanded; `None` when nobody is left to command.
    fn obey(&mut self) -> Option<()> {
        self.due &= !(1 << COMMAND);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Activate(active)) => {
                    // Whatever happened before counts as an event: edges may have been missed.
                    self.due |= (1 << BACKEND) | ((1 << active.queue_count()) - 1);
                    self.active = Some(active);
                }
                Ok(Command::Deactivate(done)) => {
                    self.active = None;
                    // A transport that no longer waits is one that is gone.
                    let _ = done.send(());
                }
                Err(TryRecvError::Empty) => return Some(()),
                Err(TryRecvError::Disconnected) => return None,
            }
        }
    }

    /// One turn for each queue and the backend that is due.
    fn work(&mut self) {
        let due = std::mem::take(&mut self.due);
        let Some(active) = &mut self.active else { return };
        for number in (0..=BACKEND).filter(|number| due >> number & 1 == 1) {
            let turn = match number {
                BACKEND => self.device.backend_ready(active),
                // Below `QUEUES_MAX`.
                queue => self.device.queue_ready(active, queue as usize),
            };
            match turn {
                Ok(Progress::Idle) => {}
                Ok(Progress::More) => self.due |= 1 << number,
                Err(fault) => return self.stop(fault),
            }
        }
    }

    /// Gives the memory up and tells the driver.
    fn stop(&mut self, fault: Fault) {
        self.due = 0;
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

    fn send(&self, command: Command) -> Result<(), Fault> {
        let commands = self.commands.as_ref().ok_or(Fault::Worker)?;
        commands.send(command).map_err(|_| Fault::Worker)?;
        // It fails only when the counter is full, and then the worker is awake.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.commands = None;
        let _ = self.wake.write(1);
    }
}
