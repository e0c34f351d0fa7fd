//! What the keep asks while the guest runs, and the answers.
//!
//! The control thread hears and answers. It waits for nobody: what takes its time is answered later, by its number.

use std::time::{Duration, Instant};

use casemate_virtio::{BALLOON_PAGE_BYTES, BalloonControl, BlkBackend, BlkFormat, Kind};
use casemate_wire::{
    Answer, Ask, BalloonStatistics, Descriptors, DeviceKind, DeviceStatistics, Limits, Rate, Refused,
    Statistics, Which, WireError,
};

use crate::{
    error::bounded,
    hotplug::{AssignedCard, Card, Order},
    machine::{Emulated, Own, Running},
};

/// Asks of one kind that may wait for their answer at a time.
const WAITING_MOST: usize = 16;
/// How long the guest may take to tell of its memory before others are told what it told before.
const NEWS: Duration = Duration::from_millis(100);
/// How often is looked whether it has.
const LOOK: Duration = Duration::from_millis(5);
/// How long the guest may take to name its free memory: less than the keep waits.
const NAMING: Duration = Duration::from_secs(8);
/// What a balloon leaves the guest at least.
const LEFT_BYTES: u64 = 64 << 20;

/// An answer, with the number of what was asked.
pub(crate) type Reply = (u32, Result<Answer, Refused>);

/// Asks that are not answered yet.
#[derive(Default)]
pub(crate) struct Asks {
    pausing: Vec<u32>,
    /// Who asked for statistics, until when the guest's word is waited for, and how often it had told before.
    counting: Vec<(u32, Instant, u64)>,
    naming: Option<Naming>,
}

/// The guest is asked to name its free memory.
struct Naming {
    /// Under this number.
    number: u32,
    until: Instant,
    /// Who wants to know.
    ids: Vec<u32>,
}

impl Asks {
    /// Does what was asked, or begins to. `None`: the answer comes later, out of [`Asks::due`].
    pub(crate) fn take(
        &mut self,
        id: u32,
        ask: Ask,
        mut descriptors: Descriptors,
        running: &Running,
    ) -> Option<Reply> {
        let order = match take_order(id, &ask, &mut descriptors) {
            Ok(order) => order,
            Err(error) => return Some((id, refuse("ask-malformed", error.to_string()))),
        };
        if let Err(error) = descriptors.finish() {
            return Some((id, refuse("ask-malformed", error.to_string())));
        }
        if let Some(order) = order {
            let given = running.hotplug.as_ref().is_some_and(|hotplug| hotplug.give(order));
            // Answered by who does it.
            return (!given).then(|| (id, refuse("hotplug-no-slot", "the guest has no slots".into())));
        }
        match ask {
            Ask::Add { .. } | Ask::Remove { .. } => None,
            Ask::Pause if self.pausing.len() >= WAITING_MOST => {
                Some((id, refuse("ask-again", "too many wait for the same".into())))
            }
            Ask::Pause => {
                self.pausing.push(id);
                running.platform.gate().close();
                running.platform.hold_watchdog(true);
                None
            }
            Ask::Resume => {
                running.platform.hold_watchdog(false);
                running.platform.gate().open();
                Some((id, Ok(Answer::Done)))
            }
            Ask::Statistics if self.counting.len() >= WAITING_MOST => {
                Some((id, refuse("ask-again", "too many wait for the same".into())))
            }
            Ask::Statistics => {
                let balloon = running.devices.iter().find_map(Emulated::balloon);
                let told = balloon.map_or(0, BalloonControl::updates);
                // One that stands still can't tell anything.
                if balloon.is_some_and(BalloonControl::ask_for_news) && !running.platform.gate().is_closed() {
                    self.counting.push((id, Instant::now() + NEWS, told));
                    return None;
                }
                Some((id, Ok(Answer::Statistics(Box::new(statistics(running))))))
            }
            Ask::Reclaim => self.reclaim(id, running).err().map(|refused| (id, Err(refused))),
            Ask::Balloon { target_bytes } => Some((id, inflate(running, target_bytes))),
            Ask::TerminalSize { columns, rows } => Some((id, terminal_size(running, columns, rows))),
            Ask::ResizeDisk { disk, size_bytes } => Some((id, resize(running, disk, size_bytes))),
            Ask::Limit { kind, device, limits } => Some((id, limit_one(running, kind, device, limits))),
        }
    }

    /// How long control may sleep before it looks for answers.
    pub(crate) fn patience(&self) -> Option<Duration> {
        (!self.counting.is_empty() || self.naming.is_some()).then_some(LOOK)
    }

    /// Answers that are due now.
    pub(crate) fn due(&mut self, running: &Running) -> Vec<Reply> {
        let mut due = self.counted(running);
        due.extend(self.paused(running));
        due.extend(self.named(running));
        due
    }

    /// Has the guest name its free memory, for all who ask meanwhile.
    fn reclaim(&mut self, id: u32, running: &Running) -> Result<(), Refused> {
        let (device, balloon) = balloon_of(running)?;
        if running.platform.gate().is_closed() {
            return refuse("ask-paused", "a guest that stands still names nothing".into());
        }
        let naming = self.naming.get_or_insert_with(|| {
            let number = balloon.ask_for_free_memory();
            device.interrupt.signal_config();
            Naming { number, until: Instant::now() + NAMING, ids: Vec::new() }
        });
        if naming.ids.len() >= WAITING_MOST {
            return refuse("ask-again", "too many wait for the same".into());
        }
        naming.ids.push(id);
        Ok(())
    }

    fn named(&mut self, running: &Running) -> Vec<Reply> {
        let balloon = running.devices.iter().find_map(Emulated::balloon);
        let (Some(naming), Some(balloon)) = (&self.naming, balloon) else { return Vec::new() };
        let answer = match balloon.free_memory_given(naming.number) {
            Some(bytes) => Ok(Answer::Reclaimed { bytes }),
            None if Instant::now() < naming.until => return Vec::new(),
            None => {
                let seconds = NAMING.as_secs();
                refuse("ask-no-hints", format!("its kernel has not named its free memory within {seconds} s"))
            }
        };
        let ids = self.naming.take().map(|naming| naming.ids).unwrap_or_default();
        ids.into_iter().map(|id| (id, answer.clone())).collect()
    }

    fn counted(&mut self, running: &Running) -> Vec<Reply> {
        if self.counting.is_empty() {
            return Vec::new();
        }
        let (now, updates) = (Instant::now(), running.devices.iter().find_map(Emulated::balloon));
        let updates = updates.map_or(0, BalloonControl::updates);
        let ready = self.counting.extract_if(.., |(_, until, before)| updates != *before || now >= *until);
        let ready: Vec<u32> = ready.map(|(id, ..)| id).collect();
        ready.into_iter().map(|id| (id, Ok(Answer::Statistics(Box::new(statistics(running)))))).collect()
    }

    fn paused(&mut self, running: &Running) -> Vec<Reply> {
        if self.pausing.is_empty() {
            return Vec::new();
        }
        let gate = running.platform.gate();
        let answer = match (gate.is_full(), gate.is_closed()) {
            (true, _) => Ok(Answer::Done),
            (false, false) => refuse("ask-overtaken", "it was resumed before all processors stood".into()),
            (false, true) => return Vec::new(),
        };
        self.pausing.drain(..).map(|id| (id, answer.clone())).collect()
    }
}

/// What the hot-plug thread is to do, if it is its business, with the descriptors that came for it.
fn take_order(id: u32, ask: &Ask, descriptors: &mut Descriptors) -> Result<Option<Order>, WireError> {
    Ok(match ask {
        Ask::Add { slot, card } => {
            let card = match card {
                casemate_wire::Card::Disk(disk) => Card::Disk(BlkBackend {
                    file: descriptors.take(disk.image)?,
                    size_bytes: disk.size_bytes,
                    read_only: disk.read_only,
                    serial: disk.serial.clone(),
                    queues: disk.queues.into(),
                    format: BlkFormat::Raw,
                }),
                casemate_wire::Card::Assigned(card) => Card::Assigned(AssignedCard {
                    container: descriptors.take(card.container)?,
                    groups: (card.groups.iter())
                        .map(|group| descriptors.take(*group))
                        .collect::<Result<_, _>>()?,
                    functions: (card.functions.iter())
                        .map(|function| Ok((descriptors.take(function.device)?, function.address.clone())))
                        .collect::<Result<_, WireError>>()?,
                }),
                casemate_wire::Card::Net(net) => {
                    let taps = net.taps.iter().map(|tap| descriptors.take(*tap));
                    Card::Net { taps: taps.collect::<Result<_, _>>()?, mac: net.mac }
                }
            };
            Some(Order::Add { id, slot: *slot, card })
        }
        Ask::Remove { slot, patience_ms, force } => {
            let patience = Duration::from_millis((*patience_ms).into());
            Some(Order::Remove { id, slot: *slot, patience, force: *force })
        }
        _ => None,
    })
}

fn refuse<T>(code: &str, message: String) -> Result<T, Refused> {
    Err(Refused { code: code.to_owned(), message: bounded(message) })
}

/// The balloon, as long as anything may be given back.
fn balloon_of(running: &Running) -> Result<(&Emulated, &BalloonControl), Refused> {
    let device = running.devices.iter().find_map(|device| Some((device, device.balloon()?)));
    device.filter(|(_, balloon)| !balloon.is_held()).map_or_else(
        || {
            let why = "devices of the host's reach its memory, or its pages were set aside for it: none can be given back";
            refuse("ask-no-balloon", why.into())
        },
        Ok,
    )
}

/// Has the guest give up so much of its memory.
fn inflate(running: &Running, target_bytes: u64) -> Result<Answer, Refused> {
    let (device, balloon) = balloon_of(running)?;
    if target_bytes > running.memory_bytes.saturating_sub(LEFT_BYTES) {
        let left = LEFT_BYTES >> 20;
        return refuse("ask-balloon-size", format!("a guest keeps at least {left} MiB of its memory"));
    }
    let pages = u32::try_from(target_bytes / BALLOON_PAGE_BYTES);
    let Some(pages) = pages.ok().filter(|_| target_bytes.is_multiple_of(BALLOON_PAGE_BYTES)) else {
        return refuse("ask-balloon-size", "a balloon has whole pages of 4 KiB".into());
    };
    balloon.set_target(pages);
    device.interrupt.signal_config();
    Ok(Answer::Done)
}

/// The device of this number among those of its kind.
fn nth(devices: &[Emulated], kind: Kind, number: u16) -> Option<&Emulated> {
    devices.iter().filter(|device| device.kind == kind).nth(number.into())
}

/// The device that is named so, whether it was there from the start or came into a slot.
fn find(running: &Running, kind: Kind, which: Which) -> Option<&Emulated> {
    match which {
        Which::Number(number) => nth(&running.devices, kind, number),
        Which::Slot(slot) => running.control.plugged().get(&slot.into()).filter(|device| device.kind == kind),
    }
}

/// Tells the guest how large its terminal is.
fn terminal_size(running: &Running, columns: u16, rows: u16) -> Result<Answer, Refused> {
    let terminal = running.devices.iter().find_map(|device| match &device.own {
        Own::Terminal(terminal) => Some((device, terminal)),
        _ => None,
    });
    let Some((device, terminal)) = terminal else {
        return refuse("ask-no-device", "this guest has no virtio console".into());
    };
    terminal.set_size(columns, rows);
    device.interrupt.signal_config();
    Ok(Answer::Done)
}

/// Tells a disk, and by it the guest, of its new size.
fn resize(running: &Running, disk: Which, size_bytes: u64) -> Result<Answer, Refused> {
    let Some(disk) = find(running, Kind::Block, disk) else {
        return refuse("ask-no-device", "this guest has no such disk".into());
    };
    if size_bytes == 0 || !size_bytes.is_multiple_of(512) {
        return refuse("ask-disk-size", "a disk's size must be a multiple of 512 and not 0".into());
    }
    disk.worker.resize(size_bytes);
    Ok(Answer::Done)
}

/// Limits what a device does that is there from the start.
pub(crate) fn limit(
    devices: &[Emulated],
    kind: DeviceKind,
    number: u16,
    limits: Limits,
) -> Result<Answer, Refused> {
    limit_device(nth(devices, limited(kind)?, number), limits)
}

fn limit_one(running: &Running, kind: DeviceKind, device: Which, limits: Limits) -> Result<Answer, Refused> {
    limit_device(find(running, limited(kind)?, device), limits)
}

/// What can be limited.
fn limited(kind: DeviceKind) -> Result<Kind, Refused> {
    match kind {
        DeviceKind::Disk => Ok(Kind::Block),
        DeviceKind::Net => Ok(Kind::Net),
        DeviceKind::Entropy | DeviceKind::Balloon | DeviceKind::Vsock | DeviceKind::Console => {
            refuse("ask-no-device", "only disks and network cards can be limited".into())
        }
    }
}

fn limit_device(device: Option<&Emulated>, limits: Limits) -> Result<Answer, Refused> {
    let Some(device) = device else {
        return refuse("ask-no-device", "this guest has no such device".into());
    };
    if matches!(device.own, Own::NoLimits) {
        let why = "the host's kernel serves this card, and heeds no limits: take vhost = true out of the guest's file";
        return refuse("ask-no-limits", why.into());
    }
    let rate = |rate: Rate| casemate_virtio::Rate { per_second: rate.per_second, burst: rate.burst };
    device.worker.limit(casemate_virtio::Limits {
        bytes: limits.bytes.map(rate),
        operations: limits.operations.map(rate),
    });
    Ok(Answer::Done)
}

fn balloon_statistics(balloon: &BalloonControl, memory_bytes: u64) -> BalloonStatistics {
    let told = balloon.told();
    BalloonStatistics {
        target_bytes: u64::from(balloon.target()) * BALLOON_PAGE_BYTES,
        // A guest can't give up more than it has, whatever it says.
        actual_bytes: (u64::from(balloon.actual()) * BALLOON_PAGE_BYTES).min(memory_bytes),
        free_bytes: told.free_bytes,
        total_bytes: told.total_bytes,
        available_bytes: told.available_bytes,
        caches_bytes: told.caches_bytes,
        swapped_in_bytes: told.swapped_in_bytes,
        swapped_out_bytes: told.swapped_out_bytes,
        major_faults: told.major_faults,
        minor_faults: told.minor_faults,
        oom_kills: told.oom_kills,
    }
}

fn statistics(running: &Running) -> Statistics {
    let mut numbers = [0_u16; 6];
    let devices = running.devices.iter().map(|device| {
        let place = kind_of(device) as usize;
        let next = numbers.get_mut(place).map(|next| std::mem::replace(next, next.saturating_add(1)));
        counted(device, next.unwrap_or_default(), None)
    });
    let plugged = running.control.plugged().iter();
    let plugged = plugged.map(|(slot, device)| counted(device, 0, u8::try_from(slot + 1).ok()));
    let devices = devices.collect::<Vec<_>>().into_iter().chain(plugged).collect();
    let balloon = running.devices.iter().find_map(Emulated::balloon);
    let balloon = balloon.map(|balloon| balloon_statistics(balloon, running.memory_bytes));
    Statistics { vcpus: running.platform.vcpu_counters(), devices, balloon }
}

fn kind_of(device: &Emulated) -> DeviceKind {
    match device.kind {
        Kind::Entropy => DeviceKind::Entropy,
        Kind::Block => DeviceKind::Disk,
        Kind::Net => DeviceKind::Net,
        Kind::Balloon => DeviceKind::Balloon,
        Kind::Vsock => DeviceKind::Vsock,
        Kind::Console => DeviceKind::Console,
    }
}

fn counted(device: &Emulated, number: u16, slot: Option<u8>) -> DeviceStatistics {
    let counted = device.counters.read();
    DeviceStatistics {
        kind: kind_of(device),
        number,
        slot,
        requests: counted.requests,
        bytes_to_guest: counted.bytes_to_guest,
        bytes_from_guest: counted.bytes_from_guest,
        errors: counted.errors,
    }
}
