//! A policy that misbehaves as its settings say, for the tests of the host.

use std::hint::black_box;

use casemate_plugin_sdk::{Level, Policy, Reason, Request, Verdict, allow, export_policy, log, verdict};
use serde::Deserialize;

struct Misbehave;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    how: How,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    /// Not at all.
    Well,
    /// Never answers.
    Spin,
    /// Never answers, not even whether its settings are good.
    SpinAtLoad,
    /// Stops.
    Trap,
    /// Calls itself until its stack is full.
    Recurse,
    /// Takes all memory it can get.
    Hog,
    /// Answers with one message of 4 MiB.
    LongMessage,
    /// Answers with 100,000 reasons.
    ManyReasons,
    /// Answers with 65 reasons.
    #[serde(rename = "65-reasons")]
    SixtyFiveReasons,
    /// Denies without a reason.
    NoReason,
    /// Gives a code that is none.
    BadCode,
    /// Gives a message that would draw on a terminal.
    Escapes,
    /// Writes 1 MiB to the log in short lines.
    Chatter,
    /// Writes one log line of 4 MiB.
    LongLog,
    /// Counts in a static: more than one call in an instance would show.
    Remember,
}

static mut CALLS: u32 = 0;

impl Policy for Misbehave {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Misbehaves as its settings say.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &[];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        if matches!(settings.how, How::SpinAtLoad) {
            spin();
        }
        Ok(())
    }

    fn admit(settings: Settings, _: Request) -> Verdict {
        let reason = |code: &str, message: &str| Reason::new(code, message);
        match settings.how {
            How::Well => {}
            How::Spin | How::SpinAtLoad => spin(),
            How::Trap => std::process::abort(),
            How::Recurse => drop(recurse(1)),
            How::Hog => hog(),
            How::LongMessage => return verdict(vec![reason("long", &"x".repeat(4 << 20))], vec![]),
            How::ManyReasons => return verdict(many(100_000), vec![]),
            How::SixtyFiveReasons => return verdict(many(65), vec![]),
            How::NoReason => {
                return Verdict::Deny(casemate_plugin_sdk::Denied { reasons: vec![], attrs: vec![] });
            }
            How::BadCode => return verdict(vec![reason("Not A Code", "x")], vec![]),
            How::Escapes => return verdict(vec![reason("escapes", "red \x1b[31m\r\nnew line")], vec![]),
            How::Chatter => (0..16 << 10).for_each(|_| log(Level::Info, &"x".repeat(64))),
            How::LongLog => log(Level::Info, &"x".repeat(4 << 20)),
            How::Remember => return verdict(vec![], vec![reason("calls", &count().to_string())]),
        }
        allow()
    }
}

export_policy!(Misbehave);

fn many(count: usize) -> Vec<Reason> {
    // Empty texts take no memory of the plugin's: the list alone is what the host has to bound.
    (0..count).map(|_| Reason::new("", "")).collect()
}

fn spin() {
    let mut n = 0u64;
    loop {
        n = black_box(n.wrapping_add(1));
    }
}

fn recurse(depth: u64) -> u64 {
    // Through a pointer that the optimizer can't see through, so that it stays a call.
    let again: fn(u64) -> u64 = black_box(recurse);
    if depth == 0 { 0 } else { again(depth.wrapping_add(1)).wrapping_mul(depth) }
}

fn hog() {
    let mut all: Vec<Vec<u8>> = Vec::new();
    loop {
        // Untouched, so that memory runs out before fuel does.
        all.push(black_box(Vec::with_capacity(1 << 20)));
    }
}

fn count() -> u32 {
    // SAFETY: a component has one thread.
    unsafe {
        CALLS += 1;
        CALLS
    }
}
