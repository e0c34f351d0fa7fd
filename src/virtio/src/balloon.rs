//! The memory balloon (virtio 1.3, 5.5): the guest gives up memory when it is asked to, tells how it fares, and reports
//! memory that it does not use: as it frees it (free page reporting), or all of it when it is asked (free page hinting). What it gives goes
//! back to the host until the guest touches it again.

mod hints;

use std::{
    io,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use hints::Hints;

use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    device_config::DeviceConfig,
    request::{Buffers, Request},
    vectored::{release, release_slice},
};

// Feature bits (`linux/virtio_balloon.h`).
const VIRTIO_BALLOON_F_STATS_VQ: u32 = 1;
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_FREE_PAGE_HINT: u32 = 3;
const VIRTIO_BALLOON_F_PAGE_POISON: u32 = 4;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

// Fields of `struct virtio_balloon_config`.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const HINT_NUMBER: usize = 8;
const POISON_VALUE: usize = 12;
const CONFIG_BYTES: usize = 16;
const DRIVERS_FIELDS: &[Range<usize>] = &[ACTUAL..ACTUAL + 4, POISON_VALUE..POISON_VALUE + 4];

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Where the driver took the statistics. The reporting queue is the fifth by the specification; Linux before 6.11 leaves no
/// gaps for the queues of features that are not offered, and takes the first behind. So all from here on report, but this one.
const STATISTICS: usize = 2;
/// Where the driver took the hints: then no driver has reports here.
const HINTS: usize = 3;
/// What Linux reports in one request (`PAGE_REPORTING_CAPACITY`, `include/linux/page_reporting.h`), and room for it.
const QUEUE_SIZE: u16 = 32;
/// Requests handled before others have their turn; each may name a hundred megabytes.
const BUDGET: usize = 4;
/// A balloon counts in pages of this size, whatever the guest's are.
pub const BALLOON_PAGE_BYTES: u64 = 4096;
/// Pages that one request may name: 16 times what Linux does.
const PAGES_MOST: usize = 4096;
/// Pages handled at a time.
const CHUNK: usize = 256;
/// Kinds of numbers that a guest tells (`VIRTIO_BALLOON_S_*`), by their tags.
const TAGS: usize = 16;
/// `struct virtio_balloon_stat`: a tag of 2 bytes and a number of 8.
const STATISTIC_BYTES: usize = 10;

/// A balloon.
#[derive(Debug)]
pub struct Balloon(Arc<BalloonControl>);

/// What is asked of a balloon from outside, and what it tells. All of what it tells is the guest's word.
#[derive(Debug)]
pub struct BalloonControl {
    config: Arc<DeviceConfig>,
    /// A number for each tag; all ones where the guest told none.
    told: [AtomicU64; TAGS],
    updates: AtomicU64,
    /// The guest is to tell anew: set, and then rung for.
    wanted: AtomicBool,
    ask: OwnedFd,
    /// Nothing may be given back.
    held: Mutex<bool>,
    hints: Mutex<Hints>,
}

/// What a guest tells of its memory; `None` is what it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemoryTold {
    /// Swapped in and out, in bytes, since its start.
    pub swapped_in_bytes: Option<u64>,
    /// See there.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that needed a disk, since its start.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Memory that is used for nothing.
    pub free_bytes: Option<u64>,
    /// All that it has, less the balloon.
    pub total_bytes: Option<u64>,
    /// What new programs could have without swapping.
    pub available_bytes: Option<u64>,
    /// Caches that can be dropped.
    pub caches_bytes: Option<u64>,
    /// Processes killed for want of memory; newer kernels tell.
    pub oom_kills: Option<u64>,
}

impl Balloon {
    /// A balloon, not inflated, for memory that is private and anonymous, and that nobody has pinned: what a device of the
    /// host's reaches by DMA must not be given back, for the device would go on using the old page.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(BalloonControl {
            config: Arc::new(DeviceConfig::new(vec![0; CONFIG_BYTES], DRIVERS_FIELDS)),
            told: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            updates: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
            ask: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            held: Mutex::new(false),
            hints: Mutex::default(),
        })))
    }

    /// The way to it from outside.
    pub fn control(&self) -> Arc<BalloonControl> {
        Arc::clone(&self.0)
    }

    fn inflate(&self, active: &mut Active) -> Result<Progress, Fault> {
        let memory = Arc::clone(active.memory());
        active.serve(INFLATE, BUDGET, |request| {
            let pages = pages_of(request)?;
            let held = self.0.held();
            if !*held {
                (0..pages)
                    .step_by(CHUNK)
                    .for_each(|first| give_back(&memory, &request.readable, first, pages));
            }
            Ok(Some(0))
        })
    }

    /// The driver's buffer holds what it last told. It stays with us; given back, it comes again with news.
    fn statistics(&self, active: &mut Active) -> Result<Progress, Fault> {
        active.serve(STATISTICS, BUDGET, |request| {
            if self.0.wanted.swap(false, Ordering::AcqRel) {
                return Ok(Some(0));
            }
            self.0.hear(&request.readable);
            Ok(None)
        })
    }

    fn reports(&self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        let reports = active.has_feature(VIRTIO_BALLOON_F_REPORTING) && !self.is_poisoned(active);
        active.serve(index, BUDGET, |request| {
            let held = self.0.held();
            // A page that cannot be given back stays.
            if reports && !*held {
                release(&request.writable);
            }
            Ok(Some(0))
        })
    }

    /// What the driver names of its free memory, between its word that it begins and the one that this was all.
    fn hinted(&self, active: &mut Active) -> Result<Progress, Fault> {
        let poisoned = self.is_poisoned(active);
        let mut is_done = false;
        let progress = active.serve(HINTS, BUDGET, |request| {
            let mut hints = self.0.hints();
            let mut word = [0; 4];
            if request.readable.read(0, &mut word) && hints.hear(u32::from_le_bytes(word)) {
                // Under the lock: a number that is asked under next isn't overwritten.
                self.0.config.set(HINT_NUMBER, &hints::DONE.to_le_bytes());
                is_done = true;
            }
            let held = self.0.held();
            if hints.is_under_way() && !poisoned && !*held {
                release(&request.writable);
                hints.add(request.writable.bytes() as u64);
            }
            Ok(Some(0))
        })?;
        if is_done {
            active.interrupt().signal_config();
        }
        Ok(progress)
    }

    /// Given back, a page reads as zeros. A guest that fills free pages with something else must find them as they were.
    fn is_poisoned(&self, active: &Active) -> bool {
        active.has_feature(VIRTIO_BALLOON_F_PAGE_POISON) && self.0.config.u32_at(POISON_VALUE) != 0
    }
}

/// How many pages the request names.
fn pages_of(request: &Request<'_>) -> Result<usize, Fault> {
    let pages = request.readable.bytes() / 4;
    if pages > PAGES_MOST { Err(Fault::Request("names too many pages")) } else { Ok(pages) }
}

/// Gives back up to [`CHUNK`] of the `pages` that `buffers` name, from the `first` on: neighbours together. What is not
/// in memory is nothing that could be given.
fn give_back(memory: &GuestMemoryMmap, buffers: &Buffers<'_>, first: usize, pages: usize) {
    let mut bytes = [0; 4 * CHUNK];
    let count = CHUNK.min(pages.saturating_sub(first));
    let Some(bytes) = bytes.get_mut(..4 * count).filter(|bytes| !bytes.is_empty()) else { return };
    if !buffers.read(4 * first, bytes) {
        return;
    }
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut numbers: Vec<u64> = numbers.iter().map(|number| u32::from_le_bytes(*number).into()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    for run in numbers.chunk_by(|one, next| one + 1 == *next) {
        let [start, ..] = run else { continue };
        let length = run.len() * BALLOON_PAGE_BYTES as usize;
        // A run that memory does not have as a whole is given page by page.
        if !give_run(memory, *start, length) {
            for page in run {
                give_run(memory, *page, BALLOON_PAGE_BYTES as usize);
            }
        }
    }
}

fn give_run(memory: &GuestMemoryMmap, page: u64, length: usize) -> bool {
    let address = GuestAddress(page * BALLOON_PAGE_BYTES);
    let Ok(slices) = memory.get_slices(address, length, Permissions::Write) else { return false };
    slices.flatten().for_each(|slice| release_slice(&slice));
    memory.check_range(address, length, Permissions::Write)
}

impl BalloonControl {
    /// How large the balloon is to be, in pages of 4 KiB. The driver has to be told.
    pub fn set_target(&self, pages: u32) {
        self.config.set(NUM_PAGES, &pages.to_le_bytes());
    }

    /// How large it is to be, in pages.
    pub fn target(&self) -> u32 {
        self.config.u32_at(NUM_PAGES)
    }

    /// How large it is, in pages, by the driver's word.
    pub fn actual(&self) -> u32 {
        self.config.u32_at(ACTUAL)
    }

    /// Asks the guest to tell of its memory anew; false when it never told.
    pub fn ask_for_news(&self) -> bool {
        self.wanted.store(true, Ordering::Release);
        // It fails only when the counter is full, and then the worker is awake.
        let _ = rustix::io::write(&self.ask, &1u64.to_ne_bytes());
        self.updates() > 0
    }

    /// How often the guest has told of its memory.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Acquire)
    }

    /// What the guest told last.
    pub fn told(&self) -> GuestMemoryTold {
        let of = |tag: usize| {
            self.told.get(tag).map(|told| told.load(Ordering::Relaxed)).filter(|told| *told != u64::MAX)
        };
        GuestMemoryTold {
            swapped_in_bytes: of(0),
            swapped_out_bytes: of(1),
            major_faults: of(2),
            minor_faults: of(3),
            free_bytes: of(4),
            total_bytes: of(5),
            available_bytes: of(6),
            caches_bytes: of(7),
            oom_kills: of(10),
        }
    }

    /// Asks the guest to name all memory that it has free, under the number that this returns. The driver has to be told.
    pub fn ask_for_free_memory(&self) -> u32 {
        let mut hints = self.hints();
        let number = hints.ask();
        self.config.set(HINT_NUMBER, &number.to_le_bytes());
        number
    }

    /// How much was given back of what it named under this number, once that is all of it.
    pub fn free_memory_given(&self, number: u32) -> Option<u64> {
        self.hints().ended(number)
    }

    fn hints(&self) -> MutexGuard<'_, Hints> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing is given back.
    pub fn is_held(&self) -> bool {
        *self.held()
    }

    /// Says whether a device of the host's reaches the memory: then nothing is given back, and when this returns nothing is under
    /// way either.
    pub fn hold(&self, held: bool) {
        *self.held() = held;
    }

    fn held(&self) -> MutexGuard<'_, bool> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, buffers: &Buffers<'_>) {
        let mut bytes = [0; STATISTIC_BYTES * 2 * TAGS];
        let length = buffers.bytes().min(bytes.len());
        let Some(bytes) = bytes.get_mut(..length) else { return };
        if !buffers.read(0, bytes) {
            return;
        }
        let (statistics, _) = bytes.as_chunks::<STATISTIC_BYTES>();
        for [low, high, number @ ..] in statistics {
            if let Some(told) = self.told.get(usize::from(u16::from_le_bytes([*low, *high]))) {
                told.store(u64::from_le_bytes(*number), Ordering::Relaxed);
            }
        }
        self.updates.fetch_add(1, Ordering::AcqRel);
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_STATS_VQ
            | 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT
            | 1 << VIRTIO_BALLOON_F_PAGE_POISON
            | 1 << VIRTIO_BALLOON_F_REPORTING
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }
    fn config(&self) -> &[u8] {
        &[0; CONFIG_BYTES]
    }
    fn changing_config(&self) -> Option<Arc<DeviceConfig>> {
        Some(Arc::clone(&self.0.config))
    }
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.0.ask.as_fd()]
    }
    fn backend_ready(&mut self, active: &mut Active, _backend: usize) -> Result<Progress, Fault> {
        if active.has_feature(VIRTIO_BALLOON_F_STATS_VQ) {
            self.statistics(active)
        } else {
            Ok(Progress::Idle)
        }
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        match index {
            INFLATE => self.inflate(active),
            // The guest takes pages back by touching them.
            DEFLATE => active.serve(DEFLATE, BUDGET, |_| Ok(Some(0))),
            STATISTICS if active.has_feature(VIRTIO_BALLOON_F_STATS_VQ) => self.statistics(active),
            HINTS if active.has_feature(VIRTIO_BALLOON_F_FREE_PAGE_HINT) => self.hinted(active),
            _ => self.reports(active, index),
        }
    }
}

#[cfg(test)]
#[path = "balloon_tests.rs"]
mod tests;
