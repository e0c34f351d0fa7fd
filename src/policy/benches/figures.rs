//! The table of figures in docs/policies.md, measured here and now: `cargo bench -p casemate-policy --bench figures`.
//!
//! Beside the time by the clock stands the processor's time (the thread's own, as the kernel counts it): on a machine that others use
//! too, that is the one to look at. It needs CASEMATE_POLICY_COMPILER.

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
    process::Command,
    time::{Duration, Instant},
};

use casemate_policy::{Deed, GuestSample, Memory, Samples, Tick};
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

/// The processor's time that this thread has had (`/proc/thread-self/schedstat`, in nanoseconds).
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

fn status_kib(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
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

/// The argument with which this program measures its own memory.
const MEMORY: &str = "memory-of-plugins";

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == MEMORY) {
        return memory(arguments[at + 1].parse().unwrap());
    }
    let all = shipped();
    // All of them are compiled before anything is measured.
    drop(open(&all.concat()).unwrap());

    println!("| what | median, µs | p99, µs | processor, µs | a second and core |\n|---|---|---|---|---|");
    let one = open(&all[0]).unwrap();
    Measured::of(CALLS, || drop(black_box(one.admit(&request(), None).unwrap())))
        .print("one plugin asked, in a new instance");
    let every = open(&all.concat()).unwrap();
    assert!(every.admit(&request(), None).unwrap().is_allowed());
    Measured::of(CALLS, || drop(black_box(every.admit(&request(), None).unwrap())))
        .print(&format!("{} plugins asked", all.len()));

    let script = open(&naming()).unwrap();
    assert!(script.admit(&request(), None).unwrap().is_allowed());
    Measured::of(2_000, || drop(black_box(script.admit(&request(), None).unwrap())))
        .print("one in JavaScript asked, in a new instance");

    let (few, many) = (
        Measured::of(300, || drop(open(&all[0]).unwrap())),
        Measured::of(300, || drop(open(&all.concat()).unwrap())),
    );
    few.print("a bundle of one opened from the cache");
    many.print(&format!("a bundle of {} opened from the cache", all.len()));
    let further = (many.at(0.5) - few.at(0.5)) / (all.len() - 1) as f64;
    println!("| a further plugin loaded | {further:.1} | | | |");

    let steward = entry("steward", &root().join("plugins/built/tests/steward.wasm"), "how = 'nothing'");
    let governed = open(&format!("{steward}{}", entry("no", &deny_all(), ""))).unwrap();
    for count in [10, 100, 1_000] {
        let samples = samples(count);
        let mut memory = Memory::new();
        Measured::of(500, || drop(black_box(governed.tick(&samples, &mut memory))))
            .print(&format!("{count} guests looked at by a governor"));
    }
    let fair = format!("{}may_do = ['cpu-weight', 'cpu-limit']\n", built("fair-share", ""));
    let governed = open(&format!("{fair}{}", entry("no", &deny_all(), ""))).unwrap();
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

    println!("\n| memory of a process that has asked | KiB resident | KiB of its own |\n|---|---|---|");
    // Compiled before, as on a host that has run guests.
    drop(open_with(&everything().concat(), &memory_cache()).unwrap());
    for count in 0..=everything().len() {
        let this = std::env::current_exe().unwrap();
        let told = Command::new(this).args([MEMORY, &count.to_string()]).output().unwrap();
        assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
        print!("{}", String::from_utf8_lossy(&told.stdout));
    }
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

/// What this process takes, a new one, when it has a bundle of so many plugins and has asked them all.
fn memory(count: usize) {
    let all = everything();
    let engine = (count > 0).then(|| open_with(&all[..count].concat(), &memory_cache()).unwrap());
    if let Some(engine) = &engine {
        engine.admit(&request(), None).unwrap();
        engine.tick(&samples(10), &mut Memory::new());
    }
    let last = all.get(count.wrapping_sub(1)).and_then(|entry| entry.split('"').nth(1)).unwrap_or("none");
    println!(
        "| {count} plugins, the last one {last} | {} | {} |",
        status_kib("VmRSS"),
        status_kib("RssAnon")
    );
}
