//! Governor `idle`: finds guests that sleep nearly all of the time, and tells of them, limits them, has them give up memory or
//! pauses them. Who wakes up gets back what was taken; who was paused is resumed by an operator, since it can't wake.

use std::collections::{BTreeMap, BTreeSet};

use casemate_plugin_sdk::{
    Action, Deed, Governor, GuestSample, Reason, Samples, Severity, act, export_governor,
};
use serde::{Deserialize, Serialize};

/// What a guest that shrinks keeps beside what it uses.
const SPARE_BYTES: u64 = 64 << 20;
/// Who was found asleep is awake at so many times what made it sleep.
const AWAKE: f64 = 3.0;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// It sleeps while its vCPUs are busy for less than this part of the time.
    busy_percent: u32,
    /// For how long it must have slept.
    after_minutes: u32,
    then: Then,
    /// With [`Then::Limit`]: of one processor.
    limit_percent: u32,
    /// Tenants whose guests may sleep.
    exempt: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            busy_percent: 5,
            after_minutes: 60,
            then: Then::Alert,
            limit_percent: 20,
            exempt: BTreeSet::new(),
        }
    }
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Then {
    Alert,
    Limit,
    Shrink,
    Pause,
}

/// What is remembered of a guest: an interval after the other is added until it has lasted long enough.
#[derive(Default, Serialize, Deserialize)]
struct Seen {
    watched_ms: u64,
    used_us: u64,
    /// Whether it was found asleep.
    asleep: bool,
}

struct Idle;

impl Governor for Idle {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["asleep", "awake"];
    const DEEDS: &'static [&'static str] = &["cpu-limit", "balloon", "pause"];

    type Settings = Settings;
    type State = BTreeMap<String, Seen>;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        for (key, value, most) in [
            ("busy_percent", settings.busy_percent, 50),
            ("after_minutes", settings.after_minutes, 10_080),
            ("limit_percent", settings.limit_percent, 100),
        ] {
            if !(1..=most).contains(&value) {
                let message = format!("{value} is not from 1 to {most}");
                reasons.push(Reason::new("bad-number", message).field(format!("settings.{key}")));
            }
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn tick(settings: Settings, samples: Samples, state: &mut Self::State) -> Vec<Action> {
        let present: BTreeSet<&str> = samples.guests.iter().map(|guest| guest.name.as_str()).collect();
        state.retain(|name, _| present.contains(name.as_str()));
        let mut actions = Vec::new();
        for guest in &samples.guests {
            // A guest that is paused neither sleeps nor wakes.
            if guest.paused || settings.exempt.contains(&guest.tenant) {
                continue;
            }
            let seen = state.entry(guest.name.clone()).or_default();
            actions.extend(look(&settings, guest, seen, samples.interval_ms));
        }
        actions
    }
}

export_governor!(Idle);

/// The part of the time in which its vCPUs were busy, all together.
fn busy(used_us: u64, watched_ms: u64, vcpus: u32) -> f64 {
    let most = watched_ms as f64 * 1_000.0 * f64::from(vcpus.max(1));
    if most > 0.0 { used_us as f64 / most } else { 0.0 }
}

fn look(settings: &Settings, guest: &GuestSample, seen: &mut Seen, interval_ms: u32) -> Option<Action> {
    let asleep_below = f64::from(settings.busy_percent) / 100.0;
    let now = busy(guest.cpu.used_us, interval_ms.into(), guest.vcpus);
    if seen.asleep && interval_ms > 0 && now > asleep_below * AWAKE {
        *seen = Seen::default();
        return wake(settings, guest, now);
    }
    seen.watched_ms = seen.watched_ms.saturating_add(interval_ms.into());
    seen.used_us = seen.used_us.saturating_add(guest.cpu.used_us);
    if seen.watched_ms < u64::from(settings.after_minutes) * 60_000 {
        return None;
    }
    let share = busy(seen.used_us, seen.watched_ms, guest.vcpus);
    let was_asleep = seen.asleep;
    *seen = Seen { asleep: share < asleep_below, ..Seen::default() };
    // It is told, or done, once.
    if was_asleep || !seen.asleep {
        return None;
    }
    let message =
        format!("in {} minutes it was busy for {:.1}% of the time", settings.after_minutes, share * 100.0);
    Some(act(guest, put_to_sleep(settings, guest), Reason::new("asleep", message).severity(Severity::Low)))
}

fn put_to_sleep(settings: &Settings, guest: &GuestSample) -> Deed {
    match settings.then {
        Then::Alert => Deed::Alert,
        Then::Limit => Deed::CpuLimit(Some((settings.limit_percent * 10).max(guest.bounds.cpu_limit_least))),
        Then::Pause => Deed::Pause,
        // A guest whose devices reach all of its memory has none to give, nor has one that tells nothing.
        Then::Shrink => match guest.memory.available_bytes {
            Some(available) if !guest.pinned => {
                let used = guest.memory.given_bytes.saturating_sub(available);
                let left = used.saturating_add(used / 4).saturating_add(SPARE_BYTES);
                Deed::Balloon(left.max(guest.bounds.memory_least_bytes).min(guest.memory.given_bytes))
            }
            _ => Deed::Alert,
        },
    }
}

/// Gives back what was taken.
fn wake(settings: &Settings, guest: &GuestSample, busy: f64) -> Option<Action> {
    let why = Reason::new("awake", format!("it is busy for {:.0}% of the time again", busy * 100.0));
    let deed = match settings.then {
        Then::Limit => Deed::CpuLimit(None),
        Then::Shrink if !guest.pinned => Deed::Balloon(guest.memory_bytes),
        Then::Alert | Then::Shrink | Then::Pause => return None,
    };
    Some(act(guest, deed, why.severity(Severity::Low)))
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::testing::{guest_sample, samples};

    use super::*;

    fn tick(settings: &str, state: &mut BTreeMap<String, Seen>, used_percent: u64) -> Vec<(Deed, String)> {
        let mut guest = guest_sample("web");
        guest.memory.available_bytes = Some(3 << 30);
        // Of both vCPUs, in half a minute.
        guest.cpu.used_us = used_percent * 2 * 300_000;
        let mut samples = samples(vec![guest]);
        samples.interval_ms = 30_000;
        let actions = Idle::tick(serde_json::from_str(settings).unwrap(), samples, state);
        actions.into_iter().map(|action| (action.deed, action.why.code)).collect()
    }

    #[test]
    fn who_sleeps_long_enough_is_told_of_once() {
        let (settings, mut state) = (r#"{"after_minutes": 1}"#, BTreeMap::new());
        assert_eq!(tick(settings, &mut state, 1), []);
        assert_eq!(tick(settings, &mut state, 1), [(Deed::Alert, "asleep".into())]);
        for _ in 0..5 {
            assert_eq!(tick(settings, &mut state, 1), []);
        }
        // A moment of work in a long sleep is none of waking.
        let mut state = BTreeMap::new();
        assert_eq!(tick(settings, &mut state, 7), []);
        assert_eq!(tick(settings, &mut state, 0), [(Deed::Alert, "asleep".into())]);
    }

    #[test]
    fn who_works_is_left_alone() {
        let (settings, mut state) = (r#"{"after_minutes": 1, "then": "pause"}"#, BTreeMap::new());
        for _ in 0..6 {
            assert_eq!(tick(settings, &mut state, 6), []);
        }
    }

    #[test]
    fn what_is_taken_comes_back_when_it_wakes() {
        for (then, taken, given) in [
            ("limit", Deed::CpuLimit(Some(200)), Some(Deed::CpuLimit(None))),
            ("shrink", Deed::Balloon((5 << 28) + (64 << 20)), Some(Deed::Balloon(4 << 30))),
            ("pause", Deed::Pause, None),
        ] {
            let settings = format!(r#"{{"after_minutes": 1, "then": "{then}"}}"#);
            let mut state = BTreeMap::new();
            tick(&settings, &mut state, 0);
            assert_eq!(tick(&settings, &mut state, 0), [(taken, "asleep".into())], "{then}");
            assert_eq!(tick(&settings, &mut state, 10), [], "{then}: it only turned over");
            let woken: Vec<_> = given.map(|deed| (deed, "awake".to_owned())).into_iter().collect();
            assert_eq!(tick(&settings, &mut state, 50), woken, "{then}");
        }
    }

    #[test]
    fn some_may_sleep_and_some_have_nothing_to_give() {
        let mut state = BTreeMap::new();
        let settings = r#"{"after_minutes": 1, "exempt": ["acme"]}"#;
        tick(settings, &mut state, 0);
        assert_eq!(tick(settings, &mut state, 0), []);
        let mut pinned = guest_sample("web");
        pinned.pinned = true;
        let settings = Settings { then: Then::Shrink, ..Settings::default() };
        assert_eq!(put_to_sleep(&settings, &pinned), Deed::Alert);
    }

    #[test]
    fn settings_out_of_bounds_are_refused() {
        for json in [r#"{"busy_percent": 0}"#, r#"{"after_minutes": 0}"#, r#"{"limit_percent": 101}"#] {
            assert_eq!(Idle::check(&serde_json::from_str(json).unwrap()).unwrap_err().len(), 1, "{json}");
        }
        assert!(serde_json::from_str::<Settings>(r#"{"then": "sell"}"#).is_err());
    }
}
