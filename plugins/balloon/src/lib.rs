//! Governor `balloon`: memory to where it is needed. While the host is short, guests that can spare some give it up; a guest
//! that is short gets its memory back, and all do when there is plenty. Nothing is taken from a guest with physical devices,
//! which reach all of its memory.

use std::collections::BTreeSet;

use casemate_plugin_sdk::{
    Action, Bytes, Deed, Governor, GuestSample, Reason, Samples, Severity, act, export_governor,
};
use serde::Deserialize;

/// A balloon isn't moved for less.
const STEP_LEAST: u64 = 16 << 20;
/// The share of an interval in which some of a guest's tasks wait for memory, from which it is short.
const WAITS: f64 = 0.05;
/// The same of the host's, from which the host is.
const HOST_WAITS: f64 = 0.1;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// What shall be free on the host.
    keep_free: Bytes,
    /// What a guest keeps of what it doesn't use, as a part of what it uses.
    spare_percent: u64,
    /// What is taken or given at once, as a part of a guest's memory.
    step_percent: u64,
    /// Tenants from whose guests nothing is taken.
    exempt: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { keep_free: Bytes(1 << 30), spare_percent: 25, step_percent: 10, exempt: BTreeSet::new() }
    }
}

struct Balloon;

impl Governor for Balloon {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["host-short", "guest-short", "plenty"];
    const DEEDS: &'static [&'static str] = &["balloon"];

    type Settings = Settings;
    type State = ();

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        for (key, value, least, most) in [
            ("spare_percent", settings.spare_percent, 5, 100),
            ("step_percent", settings.step_percent, 1, 50),
        ] {
            if !(least..=most).contains(&value) {
                let message = format!("{value} is not from {least} to {most}");
                reasons.push(Reason::new("bad-number", message).field(format!("settings.{key}")));
            }
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn tick(settings: Settings, samples: Samples, (): &mut ()) -> Vec<Action> {
        let free = samples.host.memory_free_bytes;
        let waits = samples.host.memory.some_share(samples.interval_ms) > HOST_WAITS;
        let keep = settings.keep_free.0;
        let wanted = keep.saturating_sub(free).max(if waits { keep / 4 } else { 0 });
        let plenty = !waits && free > keep.saturating_mul(2);
        let spare: u64 =
            samples.guests.iter().map(|guest| spare(&settings, guest)).fold(0, u64::saturating_add);
        let mut actions = Vec::new();
        for guest in samples.guests.iter().filter(|guest| !guest.pinned && !guest.paused) {
            actions.extend(match need(&settings, guest, samples.interval_ms) {
                Some(bytes) => give_back(guest, bytes, free),
                None if wanted > 0 => take(&settings, guest, wanted, spare),
                None if plenty => give_slowly(&settings, guest),
                None => None,
            });
        }
        actions
    }
}

export_governor!(Balloon);

/// A part of a guest's memory.
fn step(settings: &Settings, guest: &GuestSample) -> u64 {
    (guest.memory_bytes / 100).saturating_mul(settings.step_percent).max(STEP_LEAST)
}

/// What a guest uses and what it keeps beside, by its own word.
fn kept(settings: &Settings, guest: &GuestSample) -> Option<u64> {
    let used = guest.memory.given_bytes.saturating_sub(guest.memory.available_bytes?);
    Some((used / 100).saturating_mul(settings.spare_percent).max(STEP_LEAST))
}

/// What can be taken from it in all.
fn spare(settings: &Settings, guest: &GuestSample) -> u64 {
    if guest.pinned || guest.paused || settings.exempt.contains(&guest.tenant) {
        return 0;
    }
    let (Some(available), Some(kept)) = (guest.memory.available_bytes, kept(settings, guest)) else {
        return 0;
    };
    // What its balloon is still to take of it, it has no longer.
    let coming = guest.memory.given_bytes.saturating_sub(guest.knobs.balloon_bytes);
    let left = guest.knobs.balloon_bytes.min(guest.memory.given_bytes);
    let unused = available.saturating_sub(kept.saturating_add(coming));
    unused.min(left.saturating_sub(guest.bounds.memory_least_bytes))
}

/// What a guest that is short wants back; nothing while it has all.
fn need(settings: &Settings, guest: &GuestSample, interval_ms: u32) -> Option<u64> {
    if guest.memory.given_bytes >= guest.memory_bytes {
        return None;
    }
    let waits = guest.memory.pressure.some_share(interval_ms) > WAITS;
    let tight = match (guest.memory.available_bytes, kept(settings, guest)) {
        (Some(available), Some(kept)) => available < kept / 2,
        _ => false,
    };
    (waits || tight).then(|| step(settings, guest))
}

/// At once, and as much as the host has.
fn give_back(guest: &GuestSample, bytes: u64, free: u64) -> Option<Action> {
    let bytes = bytes.min(free / 2);
    if bytes < STEP_LEAST {
        return None;
    }
    let available = guest.memory.available_bytes.unwrap_or(0);
    let message = format!("it has {} left", in_mib(available));
    let target = most(guest).saturating_add(bytes).min(guest.memory_bytes);
    Some(act(guest, Deed::Balloon(target), Reason::new("guest-short", message)))
}

/// Each gives by what it can spare.
fn take(settings: &Settings, guest: &GuestSample, wanted: u64, all: u64) -> Option<Action> {
    let own = spare(settings, guest);
    let part = u128::from(wanted) * u128::from(own) / u128::from(all.max(1));
    let bytes = u64::try_from(part).unwrap_or(u64::MAX).min(own).min(step(settings, guest));
    if bytes < STEP_LEAST {
        return None;
    }
    let message = format!("the host wants {} more, and it can spare {}", in_mib(wanted), in_mib(own));
    let target = guest.knobs.balloon_bytes.min(guest.memory.given_bytes).saturating_sub(bytes);
    Some(act(guest, Deed::Balloon(target), Reason::new("host-short", message)))
}

fn give_slowly(settings: &Settings, guest: &GuestSample) -> Option<Action> {
    let missing = guest.memory_bytes.saturating_sub(most(guest));
    if missing < STEP_LEAST {
        return None;
    }
    let target = most(guest).saturating_add(step(settings, guest).min(missing));
    let why = Reason::new("plenty", "the host has plenty").severity(Severity::Low);
    Some(act(guest, Deed::Balloon(target), why))
}

/// What it has, or is about to have back.
fn most(guest: &GuestSample) -> u64 {
    guest.memory.given_bytes.max(guest.knobs.balloon_bytes)
}

fn in_mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::testing::{guest_sample, samples};

    use super::*;

    const GIB: u64 = 1 << 30;

    /// A guest of 4 GiB that has `given` of them and `available` to spare or use.
    fn guest(name: &str, given: u64, available: u64) -> GuestSample {
        let mut guest = guest_sample(name);
        (guest.memory.given_bytes, guest.knobs.balloon_bytes) = (given, given);
        guest.memory.available_bytes = Some(available);
        guest
    }

    fn tick(free: u64, guests: Vec<GuestSample>) -> Vec<(String, u64, String)> {
        let mut samples = samples(guests);
        samples.host.memory_free_bytes = free;
        let actions = Balloon::tick(Settings::default(), samples, &mut ());
        let seen = |action: Action| match action.deed {
            Deed::Balloon(bytes) => (action.guest, bytes, action.why.code),
            other => panic!("{other:?}"),
        };
        actions.into_iter().map(seen).collect()
    }

    #[test]
    fn who_can_spare_some_gives_by_what_it_can_spare() {
        let seen =
            tick(GIB - (300 << 20), vec![guest("rich", 4 * GIB, 3 * GIB), guest("poor", 4 * GIB, GIB)]);
        let step = 4 * GIB / 100 * 10;
        let [(rich, rich_target, code), (poor, poor_target, _)] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!((rich.as_str(), poor.as_str(), code.as_str()), ("rich", "poor", "host-short"));
        let (rich, poor) = (4 * GIB - rich_target, 4 * GIB - poor_target);
        assert!(
            rich > poor && rich <= step && (280 << 20..=300 << 20).contains(&(rich + poor)),
            "{rich} {poor}"
        );
    }

    #[test]
    fn nothing_is_taken_where_it_can_not_be() {
        let mut pinned = guest("pinned", 4 * GIB, 3 * GIB);
        pinned.pinned = true;
        let mut silent = guest("silent", 4 * GIB, 0);
        silent.memory.available_bytes = None;
        let mut floor = guest("floor", 4 * GIB, 3 * GIB);
        floor.bounds.memory_least_bytes = 4 * GIB;
        let mut paused = guest("paused", 4 * GIB, 3 * GIB);
        paused.paused = true;
        assert_eq!(tick(0, vec![pinned, silent, floor, paused, guest("full", 4 * GIB, 64 << 20)]), []);
        let settings = Settings { exempt: ["acme".to_owned()].into(), ..Settings::default() };
        assert_eq!(spare(&settings, &guest("a", 4 * GIB, 3 * GIB)), 0);
    }

    #[test]
    fn who_is_short_gets_it_back_at_once_and_others_when_there_is_plenty() {
        let step = 4 * GIB / 100 * 10;
        let short = guest("short", 2 * GIB, 10 << 20);
        assert_eq!(tick(GIB, vec![short.clone()]), [("short".into(), 2 * GIB + step, "guest-short".into())]);
        assert_eq!(tick(0, vec![short]), [], "the host has nothing to give");
        let mut waiting = guest("waiting", 2 * GIB, GIB);
        waiting.memory.pressure.some_us = 100_000;
        assert_eq!(tick(GIB, vec![waiting])[0].2, "guest-short");
        let calm = guest("calm", 2 * GIB, GIB);
        assert_eq!(tick(GIB + 1, vec![calm.clone()]), [], "neither short nor plenty");
        assert_eq!(tick(3 * GIB, vec![calm]), [("calm".into(), 2 * GIB + step, "plenty".into())]);
        assert_eq!(tick(3 * GIB, vec![guest("whole", 4 * GIB, GIB)]), []);
    }

    #[test]
    fn a_balloon_that_is_still_on_its_way_is_let_arrive() {
        let mut inflating = guest("a", 3 * GIB, 2 * GIB);
        inflating.knobs.balloon_bytes = 2 * GIB;
        assert_eq!(
            spare(&Settings::default(), &inflating),
            GIB - kept(&Settings::default(), &inflating).unwrap()
        );
        let seen = tick(GIB - (300 << 20), vec![inflating]);
        assert!(seen[0].1 < 2 * GIB, "it would be given some back for the host's need: {seen:?}");
        let mut deflating = guest("b", 2 * GIB, GIB);
        deflating.knobs.balloon_bytes = 4 * GIB;
        assert_eq!(tick(3 * GIB, vec![deflating]), []);
    }

    #[test]
    fn numbers_beyond_all_bounds_do_not_overflow() {
        let mut wild = guest("wild", u64::MAX, u64::MAX);
        wild.memory_bytes = u64::MAX;
        wild.bounds.memory_least_bytes = 0;
        assert_eq!(tick(0, vec![wild.clone(), wild]).len(), 2);
    }

    #[test]
    fn settings_out_of_bounds_are_refused() {
        for json in [r#"{"spare_percent": 0}"#, r#"{"step_percent": 51}"#] {
            assert_eq!(Balloon::check(&serde_json::from_str(json).unwrap()).unwrap_err().len(), 1, "{json}");
        }
        assert!(Balloon::check(&Settings::default()).is_ok());
    }
}
