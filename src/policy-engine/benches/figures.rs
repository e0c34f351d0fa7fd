//! The table of figures in docs/policies.md, measured here and now: `cargo bench -p casemate-policy-engine --bench figures`.
//!
//! Beside the time by the clock stands the processor's time (this process's and its engine's, as the kernel counts it): on a machine
//! that others use too, that is the one to look at. It needs CASEMATE_POLICY_COMPILER.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::print_stdout,
    reason = "a benchmark may panic, and prints"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    fs,
    hint::black_box,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use casemate_policy::{Deed, Engine, GuestSample, Memory, Samples, Tick};
use common::{deny_all, entry, open, open_with, request, root};

const CALLS: usize = 20_000;

/// What many calls took.
struct Measured {
    clock: Vec<Duration>,
    cpu: Duration,
}

impl Measured {
    fn of(calls: usize, mut call: impl FnMut()) -> Self {
        (0..calls / 10 + 1).for_each(|_| call());
        let begun = cpu_time();
        let mut clock: Vec<_> = (0..calls)
            .map(|_| {
                let start = Instant::now();
                call();
                start.elapsed()
            })
            .collect();
        let cpu = cpu_time().saturating_sub(begun);
        clock.sort_unstable();
        Self { clock, cpu }
    }

    fn at(&self, share: f64) -> f64 {
        let index = ((self.clock.len() - 1) as f64 * share) as usize;
        micros(self.clock[index])
    }

    fn cpu_us(&self) -> f64 {
        micros(self.cpu) / self.clock.len() as f64
    }

    fn print(&self, what: &str) {
        let (p50, p99, cpu) = (self.at(0.5), self.at(0.99), self.cpu_us());
        println!("| {what} | {p50:.1} | {p99:.1} | {cpu:.1} | {:.0} |", 1e6 / cpu);
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The engine that is asked now.
static ENGINE: AtomicU32 = AtomicU32::new(0);

/// Opens a bundle, whose engine's time counts from now on.
fn opened(bundle: &str) -> Engine {
    let engine = open(bundle).unwrap();
    ENGINE.store(engine.pid(), Ordering::Relaxed);
    engine
}

/// The processor's time that this thread has had, its engine's main thread (`/proc/PID/schedstat`, in nanoseconds), and engines that
/// have ended (`/proc/PID/stat`, in hundredths of a second).
fn cpu_time() -> Duration {
    let engine = format!("/proc/{}/schedstat", ENGINE.load(Ordering::Relaxed));
    let running = ["/proc/thread-self/schedstat", &engine].map(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.split_whitespace().next().map_or(0, |nanos| nanos.parse().unwrap())
    });
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ended: u64 = fields[13..15].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_nanos(running.iter().sum()) + Duration::from_millis(ended * 10)
}

fn status_kib(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim_start_matches(':');
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// One plugin in a bundle, as it is built.
fn built(name: &str, settings: &str) -> String {
    entry(name, &root().join(format!("plugins/built/{name}.wasm")), settings)
}

/// The one with an interpreter.
fn naming() -> String {
    format!("{}limits = {{ lane = 'scripted' }}\n", built("naming", "default = '^[a-z]+$'"))
}

/// The shipped plugins that admit, so set that the request of the tests is allowed.
fn shipped() -> Vec<String> {
    [
        ("limits", "max_memory = '32 GiB', max_vcpus = 16, devices = ['8086:', '::01']"),
        ("quota", "default = { guests = 30, vcpus = 240, memory = '640 GiB', devices = 30 }"),
        ("devices", "grant = [{ tenants = ['*'], kinds = ['8086:'] }]"),
        ("images", "folders = ['/boot/', '/srv/']"),
        ("network", "grant = [{ tenants = ['*'], taps = ['*'] }]"),
        ("hardening", ""),
        ("placement", "dedicated = ['nobody']"),
        ("schedule", "closed = [{ days = ['sun'], from = '12:00', to = '12:01', tenants = ['nobody'] }]"),
    ]
    .iter()
    .map(|(name, settings)| built(name, settings))
    .collect()
}

fn samples(count: usize) -> Samples {
    let guest = |number: usize| GuestSample {
        name: format!("guest-{number:04}"),
        tenant: "acme".into(),
        vcpus: 2,
        memory_bytes: 4 << 30,
        ..GuestSample::default()
    };
    Samples { interval_ms: 1_000, guests: (0..count).map(guest).collect(), ..Samples::default() }
}

fn main() {
    let all = shipped();
    // All of them are compiled before anything is measured.
    drop(open(&all.concat()).unwrap());

    println!("| what | median, µs | p99, µs | processor, µs | a second and core |\n|---|---|---|---|---|");
    let one = opened(&all[0]);
    let mut within = Vec::new();
    Measured::of(CALLS, || {
        let decision = black_box(one.admit(&request(), None).unwrap());
        within.extend(decision.plugins.iter().map(|run| run.elapsed));
    })
    .print("one plugin asked, with the way to the engine and back");
    within.sort_unstable();
    let at = |share: usize| micros(within[within.len() * share / 100]);
    println!("| of that, in the plugin, in a new instance | {:.1} | {:.1} | | |", at(50), at(99));
    let every = opened(&all.concat());
    assert!(every.admit(&request(), None).unwrap().is_allowed());
    Measured::of(CALLS, || drop(black_box(every.admit(&request(), None).unwrap())))
        .print(&format!("{} plugins asked", all.len()));

    let script = opened(&naming());
    assert!(script.admit(&request(), None).unwrap().is_allowed());
    Measured::of(2_000, || drop(black_box(script.admit(&request(), None).unwrap())))
        .print("one in JavaScript asked, in a new instance");

    ENGINE.store(0, Ordering::Relaxed);
    let (few, many) = (
        Measured::of(300, || drop(open(&all[0]).unwrap())),
        Measured::of(300, || drop(open(&all.concat()).unwrap())),
    );
    few.print("a bundle of one opened from the cache");
    many.print(&format!("a bundle of {} opened from the cache", all.len()));
    let further = (many.at(0.5) - few.at(0.5)) / (all.len() - 1) as f64;
    println!("| a further plugin loaded | {further:.1} | | | |");

    let steward = entry("steward", &root().join("plugins/built/tests/steward.wasm"), "how = 'nothing'");
    let governed = opened(&format!("{steward}{}", entry("no", &deny_all(), "")));
    for count in [10, 100, 1_000] {
        let samples = samples(count);
        let mut memory = Memory::new();
        Measured::of(500, || drop(black_box(governed.tick(&samples, &mut memory))))
            .print(&format!("{count} guests looked at by a governor"));
    }
    let fair = format!("{}may_do = ['cpu-weight', 'cpu-limit']\n", built("fair-share", ""));
    let governed = opened(&format!("{fair}{}", entry("no", &deny_all(), "")));
    for count in [10, 1_000] {
        let (mut samples, mut memory, mut actions) = (samples(count), Memory::new(), 0);
        Measured::of(500, || {
            let tick = black_box(governed.tick(&samples, &mut memory));
            assert_eq!(tick.failures, []);
            actions += tick.actions.len();
            look_again(&mut samples, &tick);
        })
        .print(&format!("{count} guests looked at by fair-share"));
        println!("(with {actions} actions in all)");
    }

    println!(
        "\n| memory of the engine that has asked | KiB resident | KiB of its own | KiB of ours |\n|---|---|---|---|"
    );
    // Compiled before, as on a host that has run guests.
    drop(open_with(&everything().concat(), &memory_cache()).unwrap());
    (1..=everything().len()).for_each(memory);
}

/// A second later: what was wanted has been done, and some guests are busier than others, in turns.
fn look_again(samples: &mut Samples, tick: &Tick) {
    samples.now_seconds += 1;
    for action in &tick.actions {
        let guest = samples.guests.binary_search_by(|guest| guest.name.cmp(&action.guest)).unwrap();
        if let Deed::CpuWeight(weight) = action.deed {
            samples.guests[guest].knobs.cpu_weight = weight;
        }
    }
    for (number, guest) in samples.guests.iter_mut().enumerate() {
        let busy = (samples.now_seconds / 30 + number as u64).is_multiple_of(10);
        guest.cpu.used_us = if busy { 1_500_000 } else { 2_000 };
    }
}

/// Every shipped plugin, the one with an interpreter last.
fn everything() -> Vec<String> {
    let mut all = shipped();
    all.extend(["fair-share", "balloon", "idle"].map(|name| built(name, "")));
    all.push(naming());
    all
}

/// A cache that the processes share whose memory is measured.
fn memory_cache() -> PathBuf {
    std::env::temp_dir().join("casemate-figures-cache")
}

/// What an engine takes when it has a bundle of so many plugins and has asked them all; and this process, that asks.
fn memory(count: usize) {
    let all = everything();
    let engine = open_with(&all[..count].concat(), &memory_cache()).unwrap();
    engine.admit(&request(), None).unwrap();
    engine.tick(&samples(10), &mut Memory::new());
    let last = all[count - 1].split('"').nth(1).unwrap();
    let (resident, own) = (status_kib(engine.pid(), "VmRSS"), status_kib(engine.pid(), "RssAnon"));
    let ours = status_kib(std::process::id(), "VmRSS");
    println!("| {count} plugins, the last one {last} | {resident} | {own} | {ours} |");
}
