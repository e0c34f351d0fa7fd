//! The same questions get byte-equal verdicts, for the same fuel, in two processes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

mod common;

use std::{fs, path::Path, process::Command};

use casemate_policy::{Engine, Neighbour, Operation, Request};
use common::*;

const QUESTIONS: u64 = 10_000;
const OUT: &str = "CASEMATE_TEST_VERDICTS";

/// All shipped plugins, so set that random guests are allowed by some and denied by others.
fn bundle() -> String {
    let built = root().join("plugins/built");
    let plugin = |name: &str, settings: &str| entry(name, &built.join(format!("{name}.wasm")), settings);
    let images = "kernels = ['0000000000000000000000000000000000000000000000000000000000000000'], \
                  folders = ['/boot/', '/srv/{tenant}/'], forbidden_words = ['init=*']";
    let quota = "default = { guests = 3, vcpus = 24, memory = '64 GiB', devices = 3 }, host = { vcpus = 40 }";
    [
        plugin("limits", "max_memory = '32 GiB', max_vcpus = 16, keep_free = '1 GiB', devices = ['8086:', '::01']"),
        plugin("quota", quota),
        plugin("devices", "grant = [{ tenants = ['acme', 'b'], kinds = ['8086:'], most = 1 }], never = ['::0604']"),
        plugin("images", images),
        plugin("schedule", "open = [{ from = '06:00', to = '22:00' }], closed = [{ days = ['sun'], from = '12:00', to = '14:00' }]"),
    ]
    .concat()
}

/// Numbers that look random and are the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

fn question(seed: u64) -> Request {
    let mut numbers = Numbers(seed);
    let mut request = request();
    use Operation::{Create, HotPlug, Migrate, Resume, Update};
    request.operation = numbers.one_of(&[Create, Create, Update, HotPlug, Resume, Migrate]);
    request.tenant.name = numbers.one_of(&["acme", "b", "rival"]).into();
    request.guest.vcpus = numbers.below(20) as u32;
    request.guest.memory_bytes = numbers.below(40 << 10) << 20;
    let digest = numbers.one_of(&[None, Some("00"), Some("01")]);
    request.guest.kernel.sha256 = digest.map(|pair| pair.repeat(32));
    request.guest.kernel.path =
        numbers.one_of(&["/boot/vmlinux", "/srv/acme/k", "/srv/acme/../b/k", "/tmp/k"]).into();
    request.guest.command_line =
        numbers.one_of(&["", "console=ttyS0", "quiet init=/bin/sh", "é \u{1f980}"]).into();
    let device = request.guest.devices.remove(0);
    for slot in 0..numbers.below(4) {
        let mut device = device.clone();
        device.vendor = numbers.one_of(&[0x8086, 0x10de, 0x1af4]);
        device.class = numbers.one_of(&[0x02_00_00, 0x01_08_02, 0x06_04_00]);
        device.address = format!("0000:0{slot}:00.0").parse().unwrap();
        request.guest.devices.push(device);
    }
    for number in 0..numbers.below(5) {
        request.beside.push(Neighbour {
            name: format!("other-{number}"),
            tenant: numbers.one_of(&["acme", "b"]).into(),
            vcpus: numbers.below(16) as u32,
            memory_bytes: numbers.below(u64::MAX),
            devices: Vec::new(),
            attrs: Default::default(),
        });
    }
    if request.operation == Update {
        request.old = Some(request.guest.clone());
    }
    request.host.memory_free_bytes = numbers.below(64 << 30);
    request.now_seconds = numbers.below(1 << 33);
    request
}

fn answer(engine: &Engine, seed: u64) -> String {
    let decision = engine.admit(&question(seed), None).unwrap();
    let fuel: Vec<_> = decision.plugins.iter().map(|run| run.fuel).collect();
    format!("{seed} {} {fuel:?}\n", serde_json::to_string(&decision.verdict).unwrap())
}

#[test]
#[ignore = "the other process of the test below"]
fn other_process() {
    let Some(out) = std::env::var_os(OUT) else { return };
    let engine = open(&bundle()).unwrap();
    // Backwards: no answer depends on those before it.
    let mut answers: Vec<_> = (0..QUESTIONS).rev().map(|seed| answer(&engine, seed)).collect();
    answers.reverse();
    fs::write(Path::new(&out), answers.concat()).unwrap();
}

#[test]
fn ten_thousand_questions_get_equal_answers_in_two_processes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("verdicts");
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "other_process", "--ignored"])
        .env(OUT, &out)
        .spawn()
        .unwrap();
    let engine = open(&bundle()).unwrap();
    let answers: String = (0..QUESTIONS).map(|seed| answer(&engine, seed)).collect();
    assert!(other.wait().unwrap().success());
    assert!(answers == fs::read_to_string(&out).unwrap(), "the answers differ");
    // Questions that are all answered alike would show little.
    let share = |word: &str| answers.lines().filter(|line| line.contains(word)).count();
    assert!(share("\"allow\"") > 20, "{} are allowed", share("\"allow\""));
    for code in [
        "vcpus",
        "host-memory",
        "not-granted",
        "never",
        "folder",
        "forbidden-word",
        "closed",
        "not-open",
        "host-vcpus",
    ] {
        assert!(share(&format!("\"code\":\"{code}\"")) > 20, "{code} is seldom seen");
    }
}
