//! From the first instruction to the last: filter, socket, machine, and the control thread's loop.

use std::{
    convert::Infallible,
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    process::ExitCode,
    time::{Duration, Instant},
};

use casemate_filters::Role;
use casemate_wire::{Channel, End, FromCell, Machine, Pages, ToCell, VERSION, WireError, peer_is_listener};
use rustix::{
    event::epoll,
    net::{SocketFlags, accept_with},
};

use crate::{
    asks::{Asks, Reply},
    error::{During, Error, bounded},
    gate, layout,
    machine::{Built, Running},
};

/// The listening control socket, by agreement with the keep.
const CONTROL: i32 = 3;

/// Runs one guest from start to end. Called once, first thing in `main`.
///
/// Exit codes: 0 when the guest ended and the keep was told how, 1 when the machine was refused and the keep was told
/// why, 2 when the keep could not be told.
pub fn enter() -> ExitCode {
    // One arena for all threads: they allocate little, and glibc reads a file to learn how many processors there are
    // before it makes a ninth. musl has one.
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number of the allocator's, and there is one thread yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    if let Err(error) = casemate_filters::install(Role::Build) {
        eprintln!("casemate-vmm: the filter cannot be installed: {error}");
        return ExitCode::from(2);
    }
    // A program that is executed by its descriptor is called by that number. A name is for people; without it nothing fails.
    let _ = rustix::thread::set_name(c"casemate-vmm");
    // SAFETY: the keep puts the control socket there before it executes this program, and nothing else here has
    // taken a descriptor yet. If it is missing, the first call on it says so.
    let listener = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    match conversation(listener) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("casemate-vmm: {error}");
            ExitCode::from(2)
        }
    }
}

fn conversation(listener: OwnedFd) -> Result<ExitCode, Error> {
    let channel = loop {
        if let Some(channel) = accept(&listener)? {
            break channel;
        }
    };
    gate::install_handler()?;
    // Before the filter narrows.
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).during("making an epoll set")?;
    let running = match receive_machine(&channel).and_then(|built| built.start()) {
        Ok(running) => running,
        Err(error) => {
            let refused =
                FromCell::Refused { code: error.code().to_owned(), message: bounded(error.to_string()) };
            channel.send(&refused, &[])?;
            return Ok(ExitCode::from(1));
        }
    };
    channel.send(&FromCell::Running, &[])?;
    let asks = Asks::default();
    match (Control { poll, listener, channel: Some(channel), running, asks, button: false }).run()? {}
}

/// Takes the next peer; one that is not the keep is hung up on.
fn accept(listener: &OwnedFd) -> Result<Option<Channel>, Error> {
    let peer = accept_with(listener, SocketFlags::CLOEXEC).during("accepting the keep's connection")?;
    let keep = peer_is_listener(listener.as_fd(), peer.as_fd()).during("asking who connected")?;
    Ok(keep.then(|| Channel::new(peer)))
}

fn receive_machine(channel: &Channel) -> Result<Built, Error> {
    let (message, descriptors) = channel.receive::<ToCell>()?;
    let ToCell::Start { version: VERSION, machine } = message else {
        return Err(Error::Message("the first message must be Start, of this version".into()));
    };
    check(&machine)?;
    Built::new(*machine, descriptors)
}

/// The keep is trusted more than this process, and yet its message is checked: what follows relies on it.
fn check(machine: &Machine) -> Result<(), Error> {
    let wrong = |what: &str| Err(Error::Message(what.to_owned()));
    if !(1..=64).contains(&machine.vcpus) {
        return wrong("there must be 1 to 64 vCPUs");
    }
    if !(64 << 20..=1 << 40).contains(&machine.memory_bytes) || !machine.memory_bytes.is_multiple_of(2 << 20)
    {
        return wrong("memory must be 64 MiB to 1 TiB, in steps of 2 MiB");
    }
    if machine.ram.pages == Pages::Huge1Gib && !machine.memory_bytes.is_multiple_of(1 << 30) {
        return wrong("memory in pages of 1 GiB must be a multiple of that");
    }
    if ![0, usize::from(machine.vcpus)].contains(&machine.cpu.pins.len()) {
        return wrong("all vCPUs must be pinned, or none");
    }
    if machine.command_line.len() > 2047 || machine.command_line.contains('\0') {
        return wrong("the command line must have at most 2047 bytes and no NUL");
    }
    let casemate_wire::Platform { serial, oem_strings, .. } = &machine.platform;
    let is_text = |text: &String, most| (1..=most).contains(&text.len()) && !text.contains('\0');
    if oem_strings.len() > 8
        || !oem_strings.iter().all(|text| is_text(text, 1024))
        || !(serial.is_empty() || is_text(serial, 64))
    {
        return wrong(
            "a serial number has at most 64 bytes, and there are at most 8 OEM strings of 1 to 1024",
        );
    }
    if machine.disks.iter().any(|disk| disk.size_bytes == 0 || !disk.size_bytes.is_multiple_of(512)) {
        return wrong("a disk's size must be a multiple of 512 and not 0");
    }
    let is_name = |name: &str| (1..=64).contains(&name.len()) && !name.bytes().any(|byte| byte == 0);
    if machine.ports.len() > casemate_virtio::CONSOLE_PORTS_MAX
        || !machine.ports.iter().all(|port| is_name(&port.name))
    {
        return wrong("there are at most 8 ports, with names of 1 to 64 bytes");
    }
    let hotplug = &machine.hotplug;
    let windows = [hotplug.memory_bytes, hotplug.prefetchable_bytes];
    let sizes_are_good =
        windows.iter().all(|size| (1 << 20..=1 << 38).contains(size) && size.is_multiple_of(1 << 20));
    if hotplug.slots > layout::HOTPLUG_SLOTS_MOST || (hotplug.slots > 0 && !sizes_are_good) {
        return wrong("there are at most 8 slots for hot-plug, with windows of whole MiB");
    }
    let has_first = |card: u8| machine.devices.iter().any(|other| (other.card, other.function) == (card, 0));
    if !machine.devices.iter().all(|device| device.function < 8 && has_first(device.card)) {
        return wrong("functions of one card begin with 0 and end with 7");
    }
    if machine.container.is_none() != machine.devices.is_empty() {
        return wrong("assigned devices and a container go together");
    }
    Ok(())
}

/// The control thread's loop.
struct Control {
    poll: OwnedFd,
    listener: OwnedFd,
    channel: Option<Channel>,
    running: Running,
    asks: Asks,
    /// The power button is to be pressed.
    button: bool,
}

/// When a press of the power button that found the IOAPIC in use is tried again.
const BUTTON_AGAIN: Duration = Duration::from_millis(10);

/// For disks to write what they hold back, when the guest has ended.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// What woke the control thread.
const REQUEST: u64 = 0;
const KEEP: u64 = 1;
const CONNECTION: u64 = 2;

impl Control {
    fn run(mut self) -> Result<Infallible, Error> {
        // SAFETY: the eventfd lives in `self.running`, which this function owns until it returns.
        self.watch(unsafe { BorrowedFd::borrow_raw(self.running.control.wake().as_raw_fd()) }, REQUEST)?;
        self.watch(self.listener.as_fd(), CONNECTION)?;
        if let Some(channel) = &self.channel {
            self.watch(channel.as_fd(), KEEP)?;
        }
        let mut events = Vec::with_capacity(4);
        loop {
            events.clear();
            self.button = self.button && !self.running.platform.press_power_button();
            let again = self.button.then_some(BUTTON_AGAIN);
            let patience = self
                .running
                .control
                .patience()
                .into_iter()
                .chain(again)
                .chain(self.asks.patience())
                .min()
                .map(rustix::event::Timespec::try_from);
            let patience = patience.transpose().unwrap_or_default();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.poll, space, patience.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result.during("waiting for events")?,
            };
            if events.is_empty()
                && let Some(end) = self.serve()
            {
                self.end(end);
            }
            for event in &events {
                let end = match event.data.u64() {
                    REQUEST => self.serve(),
                    KEEP => self.hear(),
                    _ => {
                        // While the keep is there, whoever else comes is hung up on.
                        // A visitor who cannot be looked at costs the visit, not the guest.
                        let visitor = accept(&self.listener).unwrap_or(None);
                        if let Some(channel) = visitor.filter(|_| self.channel.is_none()) {
                            self.watch(channel.as_fd(), KEEP)?;
                            self.channel = Some(channel);
                        }
                        None
                    }
                };
                if let Some(end) = end {
                    self.end(end);
                }
            }
        }
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Error> {
        let data = epoll::EventData::new_u64(token);
        epoll::add(&self.poll, fd, data, epoll::EventFlags::IN).during("watching a descriptor")
    }

    /// Does what the other threads asked for, and tells the keep what came of it.
    fn serve(&mut self) -> Option<End> {
        let end = self.running.control.serve();
        for event in self.running.control.take_events() {
            self.tell(&FromCell::Event(event));
        }
        for reply in self.running.control.take_answers() {
            self.answer(reply);
        }
        for reply in self.asks.due(&self.running) {
            self.answer(reply);
        }
        end
    }

    fn answer(&mut self, (id, answer): Reply) {
        self.tell(&FromCell::Answer { id, answer });
    }

    /// Tells the keep. One that does not read is hung up on: the guest's processors may wait for this thread.
    fn tell(&mut self, message: &FromCell) {
        if self.channel.as_ref().is_some_and(|channel| channel.send_now(message, &[]).is_err()) {
            self.channel = None;
        }
    }

    /// Takes a message from the keep. A keep that has gone leaves the guest running; another may connect.
    fn hear(&mut self) -> Option<End> {
        match self.channel.as_ref()?.receive::<ToCell>() {
            Ok((ToCell::Stop, _)) => Some(End::Stopped),
            Ok((ToCell::PowerButton, _)) => {
                self.button = true;
                None
            }
            Ok((ToCell::Ask { id, ask }, descriptors)) => {
                let now = self.asks.take(id, ask, descriptors, &self.running);
                let later = self.asks.due(&self.running);
                now.into_iter().chain(later).for_each(|reply| self.answer(reply));
                None
            }
            Ok((ToCell::Start { .. }, _)) => None,
            Err(WireError::Malformed | WireError::TooLarge) => None,
            Err(_) => {
                self.channel = None;
                None
            }
        }
    }

    /// Tells the keep how the guest ended, and ends the process. Nothing is taken down first: the other threads still
    /// use all of it, and the kernel takes it back in an order that is safe. Only what a disk holds back is written.
    fn end(self, end: End) -> ! {
        let deadline = Instant::now() + FINISH_WITHIN;
        for finisher in &self.running.finishers {
            finisher.finish(deadline.saturating_duration_since(Instant::now()));
        }
        let end = match end {
            End::Fault(text) => End::Fault(bounded(text)),
            end => end,
        };
        let counters = self.running.platform.counters();
        match self.channel.as_ref().map(|channel| channel.send(&FromCell::Ended { end, counters }, &[])) {
            Some(Ok(())) => std::process::exit(0),
            _ => std::process::exit(2),
        }
    }
}

/// A descriptor as a file.
pub(crate) fn file(fd: OwnedFd) -> File {
    File::from(fd)
}
