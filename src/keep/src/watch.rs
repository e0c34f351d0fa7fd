//! A running cell, watched until its end.

use std::{
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use casemate_broker::{Cell, Notices};
use casemate_host::Notice;
use casemate_spec::{Guest, PciAddress, Refusal};
use casemate_wire::{Answer, Channel, Counters, End, FromCell, ToCell, WireError};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use crate::{
    Ending, Events, Happening, RunOptions, Step,
    cell::{Started, first_word, printable},
    console::Console,
    input,
    operator::{GuestState, Heard, Order, Orders},
};

/// How often the cell's memory is measured at most.
const SAMPLE: Duration = Duration::from_millis(500);
/// And how much longer than a measurement nothing is measured: the kernel walks the guest's page tables for it, which takes a while
/// where they are of small pages, and the guest's own faults wait.
const REST: u32 = 100;
/// How often a console whose reader stalls is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// A cell that was told to stop, or said that it ends, is killed after this.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// What a cell tells of its guest unasked, before the rest is passed over.
const EVENTS_MOST: usize = 256;
/// Most of one line of the VMM's log.
const LOG_LINE_BYTES: usize = 1024;
/// Most of the VMM's log that is told.
const LOG_BYTES: usize = 64 << 10;

/// What was seen of a cell.
pub(crate) struct Seen {
    pub(crate) ending: Ending,
    pub(crate) counters: Counters,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) cpu: Option<Duration>,
    pub(crate) line: Option<Duration>,
}

/// What a watch has to know beside the cell.
pub(crate) struct Watching<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) options: &'a RunOptions<'a>,
    pub(crate) signals: &'a StopSignals,
    /// What others in this process want of the guest.
    pub(crate) orders: Orders,
    /// What the kernel tells of its devices.
    pub(crate) notices: Option<&'a Notices>,
    pub(crate) events: Events,
}

/// Watches the cell until its process has ended. The console's bytes go to `console`, steps to `tell`; a signal brings
/// the end on.
///
/// # Errors
/// When the machine was refused by the cell before it ran.
pub(crate) fn until_end(
    started: Started,
    watching: Watching<'_>,
    console: Box<dyn Write + Send>,
    tell: &mut dyn FnMut(Step),
) -> Result<Seen, Refusal> {
    let Watching { guest, options, signals, orders, notices, events } = watching;
    let Started { cell, channel, console: console_pipe, console_input, log: log_pipe, .. } = started;
    let terminal = console_input.map(|pipe| input::carry(options.input, pipe, signals, guest));
    let _terminal = terminal.transpose()?;
    let console = Console::start(console).map_err(|error| {
        let cause = format_args!("its console cannot be carried: {error}");
        Refusal::new("keep-failed", &guest.name, cause, "try again")
    })?;
    let mut watch = Watch {
        console,
        begun: Instant::now(),
        running: false,
        ended: None,
        ending: FromOutside::Untouched,
        deadline: None,
        memory_bytes: None,
        next_sample: Instant::now(),
        line: options.line.map(LineWatch::new),
        log: LogLines::default(),
        orders,
        failed: None,
        events: 0,
    };
    let mut console_pipe = Some(console_pipe);
    let mut log_pipe = Some(log_pipe);
    let mut talking = true;
    let mut ended_at: Option<Instant> = None;
    loop {
        let room = watch.console.has_room();
        let fds = [
            Some(cell.pidfd()),
            talking.then(|| channel.as_fd()),
            console_pipe.as_ref().filter(|_| room).map(AsFd::as_fd),
            log_pipe.as_ref().map(AsFd::as_fd),
            Some(signals.read.as_fd()),
            Some(watch.orders.wake()),
            notices.map(Notices::wake),
        ];
        let ready = wait(&fds, if room { SAMPLE } else { RETRY });
        let [ended, message, console_ready, log_ready, signalled, ordered, noticed] = ready;
        if console_ready {
            watch.carry(&mut console_pipe);
        }
        if log_ready {
            watch.log(&mut log_pipe, tell);
        }
        if message {
            let sensible = match channel.receive::<FromCell>() {
                Ok((message, _)) => watch.hear(message, tell)?,
                Err(WireError::Closed) => {
                    talking = false;
                    true
                }
                Err(_) => false,
            };
            // Nonsense from a cell, or words out of turn, are no reason to listen on.
            if !sensible {
                talking = false;
                let _ = cell.kill();
            }
        }
        // However much a cell says, the user is heard.
        if signalled {
            signals.drain();
            watch.stop(options.grace, &channel, &cell, tell);
        }
        if ordered {
            watch.obey(options.grace, &channel, &cell, tell);
        }
        if noticed
            && let Some(notice) = notices.and_then(Notices::next)
            && let Some(happening) = happening(notice)
        {
            events.add(guest.name.as_str(), guest.tenant.as_str(), happening);
            watch.heed(notice, options.grace, &channel, &cell, tell);
        }
        let late = ended && ended_at.get_or_insert_with(Instant::now).elapsed() > LAST_WORDS;
        if ended && !message && !signalled && !ordered && !console_ready && !log_ready && (room || late) {
            break;
        }
        if watch.deadline.is_some_and(|deadline| Instant::now() > deadline) {
            watch.stop(options.grace, &channel, &cell, tell);
        }
        watch.sample(&cell);
    }
    let how = cell.wait().map_or_else(|error| error.to_string(), |end| end.to_string());
    let cpu = cell.cpu_time();
    // A cgroup that stays for a while does not make the run another; the next command removes it.
    let closed = cell.close();
    watch.log.flush(tell);
    if let Err(refusal) = closed {
        tell(Step::Log { line: refusal.to_string() });
    }
    watch.seen(guest, how, cpu)
}

/// What asks this program to stop: the user's and the system's signals, which end it no longer at once, and the escape
/// key.
pub(crate) struct StopSignals {
    read: UnixStream,
    write: UnixStream,
}

impl StopSignals {
    /// Takes the signals over.
    pub(crate) fn take(guest: &Guest) -> Result<Self, Refusal> {
        let make = || {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
                signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
            }
            Ok(Self { read, write })
        };
        make().map_err(|error: std::io::Error| {
            let cause = format_args!("signals cannot be watched: {error}");
            Refusal::new("keep-failed", &guest.name, cause, "try again")
        })
    }

    /// What another thread writes to as if it were a signal.
    pub(crate) fn another(&self) -> std::io::Result<UnixStream> {
        self.write.try_clone()
    }

    fn drain(&self) {
        let mut bytes = [0; 16];
        while (&self.read).read(&mut bytes).is_ok_and(|count| count > 0) {}
    }
}

/// What is logged of a notice. Of faults the first, the second, the fourth, and so on: a guest can make as many as it likes.
fn happening(notice: Notice) -> Option<Happening> {
    match notice {
        Notice::Wanted(device) => Some(Happening::DeviceWanted { device: device.to_string(), slot: None }),
        Notice::Failed(device) => Some(Happening::DeviceFailed { device: device.to_string() }),
        Notice::ParentReset(device) => {
            Some(Happening::ParentReset { device: device.to_string(), slot: None })
        }
        Notice::Faulted { device, count } => faulted(device, count),
    }
}

/// What is logged of DMA that was stopped.
pub(crate) fn faulted(device: PciAddress, count: u64) -> Option<Happening> {
    count.is_power_of_two().then(|| Happening::DmaStopped { device: device.to_string(), count })
}

/// Which of the descriptors have something to say, at the latest after `most`, which is below a second.
fn wait<const N: usize>(fds: &[Option<BorrowedFd<'_>>; N], most: Duration) -> [bool; N] {
    let mut ready = [false; N];
    let present: Vec<(usize, BorrowedFd<'_>)> =
        fds.iter().enumerate().filter_map(|(index, fd)| fd.map(|fd| (index, fd))).collect();
    let mut polled: Vec<PollFd<'_>> = present.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)).collect();
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(most.subsec_nanos()) };
    if poll(&mut polled, Some(&timeout)).is_ok() {
        for ((index, _), poll) in present.iter().zip(&polled) {
            if let Some(flag) = ready.get_mut(*index) {
                *flag = !poll.revents().is_empty();
            }
        }
    }
    ready
}

/// Reads once from a pipe; closes it at its end.
fn read_pipe(pipe: &mut Option<OwnedFd>, buffer: &mut [u8]) -> usize {
    let Some(fd) = pipe else { return 0 };
    match rustix::io::read(&*fd, buffer) {
        Err(Errno::INTR | Errno::AGAIN) => 0,
        Ok(0) | Err(_) => {
            *pipe = None;
            0
        }
        Ok(count) => count,
    }
}

/// How far the guest's end was brought on from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FromOutside {
    Untouched,
    /// Its power button was pressed.
    Asked,
    /// Its VMM was told to stop, or said by itself that it ends.
    Told,
}

struct Watch {
    console: Console,
    begun: Instant,
    running: bool,
    ended: Option<(End, Counters)>,
    ending: FromOutside,
    /// When the next step towards the end is due.
    deadline: Option<Instant>,
    memory_bytes: Option<u64>,
    next_sample: Instant,
    line: Option<LineWatch>,
    log: LogLines,
    orders: Orders,
    /// The device whose error ended the guest.
    failed: Option<PciAddress>,
    /// Events that the cell told.
    events: usize,
}

impl Watch {
    fn carry(&mut self, pipe: &mut Option<OwnedFd>) {
        let mut buffer = [0; 4096];
        let count = read_pipe(pipe, &mut buffer);
        let bytes = buffer.get(..count).unwrap_or_default();
        if !bytes.is_empty() {
            self.console.take(bytes.to_vec());
        }
        if let Some(line) = &mut self.line {
            line.see(bytes, self.begun);
        }
    }

    fn log(&mut self, pipe: &mut Option<OwnedFd>, tell: &mut dyn FnMut(Step)) {
        let mut buffer = [0; 4096];
        let count = read_pipe(pipe, &mut buffer);
        self.log.take(buffer.get(..count).unwrap_or_default(), tell);
    }

    /// One step further towards the guest's end: its power button, then its VMM, then its process.
    fn stop(&mut self, grace: Duration, channel: &Channel, cell: &Cell, tell: &mut dyn FnMut(Step)) {
        let (message, ending, patience) = match self.ending {
            FromOutside::Untouched if self.running => (ToCell::PowerButton, FromOutside::Asked, grace),
            FromOutside::Untouched | FromOutside::Asked => (ToCell::Stop, FromOutside::Told, LAST_WORDS),
            FromOutside::Told => {
                let _ = cell.kill();
                return;
            }
        };
        if channel.send(&message, &[]).is_err() {
            let _ = cell.kill();
        } else if message == ToCell::PowerButton {
            tell(Step::AskedToPowerOff { grace });
        }
        self.ending = ending;
        if ending == FromOutside::Told {
            self.orders.set_state(GuestState::Ending);
        }
        self.deadline = Some(Instant::now() + patience);
    }

    /// Begins the guest's end for what the kernel tells of one of its devices.
    fn heed(
        &mut self,
        notice: Notice,
        grace: Duration,
        channel: &Channel,
        cell: &Cell,
        tell: &mut dyn FnMut(Step),
    ) {
        match notice {
            Notice::Wanted(device) => tell(Step::DeviceWanted { device, slot: None }),
            Notice::Failed(device) => tell(Step::DeviceFailed { device }),
            Notice::ParentReset(device) => tell(Step::ParentReset { device, slot: None }),
            // It reached nothing, so nothing has to end.
            Notice::Faulted { device, count } => return tell(Step::DmaStopped { device, count }),
        }
        if let (Notice::Failed(device), None) = (notice, &self.ended) {
            self.failed.get_or_insert(device);
        }
        // One that is paused would not notice its power button; one whose device has failed is not to go on.
        let at_once = matches!(notice, Notice::Failed(_)) || self.orders.state() == GuestState::Paused;
        if at_once && self.ending == FromOutside::Untouched {
            self.ending = FromOutside::Asked;
        }
        if self.ending == FromOutside::Untouched || (at_once && self.ending == FromOutside::Asked) {
            self.stop(grace, channel, cell, tell);
        }
    }

    /// Does what others in this process want of the guest.
    fn obey(&mut self, grace: Duration, channel: &Channel, cell: &Cell, tell: &mut dyn FnMut(Step)) {
        while let Some((order, reply)) = self.orders.next() {
            match order {
                Order::Ask(ask, descriptors) => {
                    self.orders.ask(ask, &descriptors, channel, reply);
                    continue;
                }
                Order::PowerOff if self.orders.state() == GuestState::Paused => {
                    let cause = "it is paused, and would not notice its power button";
                    let remedy = "resume it first, or stop it";
                    let _ = reply.send(Err(Refusal::new("guest-paused", self.orders.guest(), cause, remedy)));
                    continue;
                }
                Order::Tell(step) => tell(*step),
                Order::DeviceFailed(device) => {
                    self.heed(Notice::Failed(device), grace, channel, cell, tell);
                }
                // Pressed once; who wants more than that stops it.
                Order::PowerOff if self.ending != FromOutside::Untouched => {}
                Order::PowerOff => self.stop(grace, channel, cell, tell),
                Order::Stop => {
                    if self.ending == FromOutside::Untouched {
                        self.ending = FromOutside::Asked;
                    }
                    if self.ending == FromOutside::Asked {
                        self.stop(grace, channel, cell, tell);
                    }
                }
            }
            let _ = reply.send(Ok(Answer::Done));
        }
    }

    /// Takes a cell's word; says whether it was its turn to say it.
    fn hear(&mut self, message: FromCell, tell: &mut dyn FnMut(Step)) -> Result<bool, Refusal> {
        match message {
            FromCell::Ended { end, counters } if self.running && self.ended.is_none() => {
                self.ended = Some((end, counters));
                self.ending = FromOutside::Told;
                self.deadline = Some(Instant::now() + LAST_WORDS);
                self.orders.set_state(GuestState::Ending);
            }
            FromCell::Answer { id, answer } if self.running => match self.orders.answered(id, answer) {
                Heard::Nonsense => return Ok(false),
                Heard::Paused => tell(Step::Paused),
                Heard::Resumed => tell(Step::Resumed),
                Heard::Passed => {}
            },
            FromCell::Event(event) if self.running => {
                self.events = self.events.saturating_add(1);
                if self.events <= EVENTS_MOST {
                    tell(Step::Event { event });
                }
            }
            message if !self.running => {
                first_word(message)?;
                self.running = true;
                self.orders.set_state(GuestState::Running);
                tell(Step::Running { elapsed: self.begun.elapsed() });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn sample(&mut self, cell: &Cell) {
        let begun = Instant::now();
        if begun < self.next_sample {
            return;
        }
        if self.running
            && self.ended.is_none()
            && let Ok(memory) = cell.memory()
        {
            self.memory_bytes = Some(memory.pss_bytes_less_guest);
            let guest_bytes = memory.pss_bytes.saturating_sub(memory.pss_bytes_less_guest);
            self.orders.set_memory(memory.pss_bytes_less_guest, guest_bytes);
        }
        self.next_sample = Instant::now() + SAMPLE.max(begun.elapsed() * REST);
    }

    fn seen(self, guest: &Guest, how: String, cpu: Option<Duration>) -> Result<Seen, Refusal> {
        self.console.close(LAST_WORDS);
        if !self.running && self.ending != FromOutside::Told && self.ended.is_none() {
            let remedy = "see its log above; a call stopped by seccomp is named in the kernel's log too";
            return Err(Refusal::new("cell-died", &guest.name, format_args!("the VMM {how}"), remedy));
        }
        let (ending, counters) = match self.ended {
            // It had no time for a last word, or did not take it.
            None if self.ending == FromOutside::Told => (Ending::Stopped, Counters::default()),
            None => (Ending::CellDied { how }, Counters::default()),
            Some((end, counters)) => (
                match end {
                    End::PowerOff => Ending::PowerOff,
                    End::Reset => Ending::Reset,
                    End::Panic => Ending::Panic,
                    End::TripleFault => Ending::TripleFault,
                    End::Watchdog => Ending::Watchdog,
                    End::Stopped => Ending::Stopped,
                    End::Fault(why) => Ending::Fault { why: printable(&why) },
                },
                counters,
            ),
        };
        let ending = match (ending, self.failed) {
            (Ending::Stopped, Some(device)) => Ending::DeviceFailed { device },
            (ending, _) => ending,
        };
        Ok(Seen {
            ending,
            counters,
            memory_bytes: self.memory_bytes,
            cpu,
            line: self.line.and_then(|line| line.seen),
        })
    }
}

/// Notes when the console first showed a text.
struct LineWatch {
    text: Vec<u8>,
    tail: Vec<u8>,
    seen: Option<Duration>,
}

impl LineWatch {
    fn new(text: &str) -> Self {
        Self { text: text.as_bytes().to_vec(), tail: Vec::new(), seen: None }
    }

    fn see(&mut self, bytes: &[u8], begun: Instant) {
        if self.seen.is_some() || self.text.is_empty() {
            return;
        }
        self.tail.extend_from_slice(bytes);
        if self.tail.windows(self.text.len()).any(|window| window == self.text) {
            self.seen = Some(begun.elapsed());
        }
        let keep = self.text.len() - 1;
        let cut = self.tail.len().saturating_sub(keep);
        self.tail.drain(..cut);
    }
}

/// The VMM's log in lines, bounded.
#[derive(Default)]
struct LogLines {
    line: Vec<u8>,
    told_bytes: usize,
}

impl LogLines {
    fn take(&mut self, bytes: &[u8], tell: &mut dyn FnMut(Step)) {
        for byte in bytes {
            if *byte == b'\n' || self.line.len() == LOG_LINE_BYTES {
                self.flush(tell);
            }
            if *byte != b'\n' {
                self.line.push(*byte);
            }
        }
    }

    fn flush(&mut self, tell: &mut dyn FnMut(Step)) {
        let line = std::mem::take(&mut self.line);
        if !line.is_empty() && self.told_bytes < LOG_BYTES {
            self.told_bytes += line.len();
            tell(Step::Log { line: printable(&String::from_utf8_lossy(&line)) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_seen_across_reads() {
        let mut watch = LineWatch::new("INIT");
        let begun = Instant::now();
        watch.see(b"boot IN", begun);
        assert!(watch.seen.is_none());
        watch.see(b"IT\n", begun);
        assert!(watch.seen.is_some());
    }

    #[test]
    fn the_log_is_cut_into_bounded_lines_and_ends() {
        let mut told = Vec::new();
        let mut log = LogLines::default();
        let mut tell = |step| {
            if let Step::Log { line } = step {
                told.push(line);
            }
        };
        log.take(b"one\ntw", &mut tell);
        log.take(b"o\n", &mut tell);
        log.take(&vec![b'x'; 10 * LOG_BYTES], &mut tell);
        assert_eq!(told.get(..2), Some(&["one".to_owned(), "two".to_owned()][..]));
        let bytes: usize = told.iter().map(String::len).sum();
        assert!(bytes <= LOG_BYTES + LOG_LINE_BYTES, "{bytes}");
    }
}
