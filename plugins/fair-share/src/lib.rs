//! Governor `fair-share`: processors by credit. A guest earns its share of the host's processor time and pays with what it
//! uses; who has saved weighs more among the others, who is overdrawn less. While others wait, who is overdrawn and uses more
//! than its share is held to it.

use std::collections::{BTreeMap, BTreeSet};

use casemate_plugin_sdk::{
    Action, Deed, Governor, GuestSample, Reason, Samples, Severity, act, export_governor,
};
use serde::{Deserialize, Serialize};

/// A vCPU of a tenant that isn't named.
const SHARE: u32 = 100;
/// What a guest weighs that is neither ahead nor behind.
const WEIGHT: f64 = 100.0;
/// Who has saved all that can be saved weighs so much more; who is as far overdrawn so much less.
const MOST: f64 = 4.0;
/// A weight is left alone until it is off by this part.
const CLOSE: f64 = 0.15;
/// The host is calm again at this part of what makes it crowded.
const CALM: f64 = 0.5;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// What a vCPU of each tenant counts beside others.
    shares: BTreeMap<String, u32>,
    /// For how many seconds of its share a guest can save, and overdraw.
    burst_seconds: u32,
    pressure_percent: u32,
    steal_percent: u32,
    /// Tenants that are never limited.
    exempt: BTreeSet<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            shares: BTreeMap::new(),
            burst_seconds: 60,
            pressure_percent: 20,
            steal_percent: 10,
            exempt: BTreeSet::new(),
        }
    }
}

#[derive(Default, Serialize, Deserialize)]
struct State {
    /// Processor time that each guest has saved or, below 0, overdrawn, in microseconds; sorted by name, as samples are.
    credit_us: Vec<(String, i64)>,
    /// Who is held to its share.
    held: BTreeSet<String>,
}

struct FairShare;

impl Governor for FairShare {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["credit", "noisy", "calm"];
    const DEEDS: &'static [&'static str] = &["cpu-weight", "cpu-limit"];

    type Settings = Settings;
    type State = State;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        let mut check = |key: &str, value: u32, most: u32| {
            if !(1..=most).contains(&value) {
                let message = format!("{value} is not from 1 to {most}");
                reasons.push(Reason::new("bad-number", message).field(format!("settings.{key}")));
            }
        };
        settings.shares.iter().for_each(|(name, share)| check(&format!("shares.{name}"), *share, 1_000));
        check("burst_seconds", settings.burst_seconds, 3_600);
        check("pressure_percent", settings.pressure_percent, 100);
        check("steal_percent", settings.steal_percent, 100);
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn tick(settings: Settings, samples: Samples, state: &mut State) -> Vec<Action> {
        // The first look has no interval, and so no amounts.
        if samples.interval_ms == 0 {
            return Vec::new();
        }
        let shares = fair_shares(&settings, &samples);
        let crowded = crowded(&settings, &samples);
        let mut before = std::mem::take(state);
        let mut saved = before.credit_us.into_iter().peekable();
        state.credit_us.reserve(samples.guests.len());
        let mut actions = Vec::new();
        for (guest, fair) in samples.guests.into_iter().zip(shares) {
            // What isn't taken over is of a guest that is gone.
            while saved.next_if(|(name, _)| *name < guest.name).is_some() {}
            let saved_us = saved.next_if(|(name, _)| *name == guest.name).map_or(0, |(_, saved_us)| saved_us);
            if !before.held.is_empty() && before.held.remove(&guest.name) {
                state.held.insert(guest.name.clone());
            }
            let (credit_us, credit) = settle(&settings, saved_us, &guest, fair, samples.interval_ms);
            actions.extend(weigh(&guest, credit));
            let waits =
                Waits { crowded: crowded_by_others(&crowded, &guest), interval_ms: samples.interval_ms };
            let exempt = settings.exempt.contains(&guest.tenant);
            actions.extend(hold(state, &guest, Standing { fair, credit, exempt }, &waits));
            state.credit_us.push((guest.name, credit_us));
        }
        actions
    }
}

export_governor!(FairShare);

/// How many of the host's processors each guest may have for its own, in the order of the samples: by vCPUs and shares, and never
/// more than it has vCPUs.
fn fair_shares(settings: &Settings, samples: &Samples) -> Vec<f64> {
    let weight = |guest: &GuestSample| {
        let share = settings.shares.get(&guest.tenant).copied().unwrap_or(SHARE);
        f64::from(share) * f64::from(guest.vcpus)
    };
    let all: f64 = samples.guests.iter().map(weight).sum();
    let cpus = f64::from(samples.host.cpus);
    let fair = |guest: &GuestSample| if all > 0.0 { cpus * weight(guest) / all } else { 0.0 };
    samples.guests.iter().map(|guest| fair(guest).min(guest.vcpus.into())).collect()
}

/// Who waits too long, and by how much it is too long: 1 is just so.
struct Crowd {
    host: f64,
    /// The guest that waits most, and the one that waits second most.
    waits: Vec<(String, f64)>,
}

fn crowded(settings: &Settings, samples: &Samples) -> Crowd {
    let host =
        samples.host.cpu.some_share(samples.interval_ms) * 100.0 / f64::from(settings.pressure_percent);
    let vcpu_us =
        |guest: &GuestSample| f64::from(samples.interval_ms) * 1_000.0 * f64::from(guest.vcpus.max(1));
    let wait = |guest: &GuestSample| {
        let share = guest.cpu.waited_us as f64 / vcpu_us(guest);
        share * 100.0 / f64::from(settings.steal_percent)
    };
    let mut waits = Vec::new();
    for guest in &samples.guests {
        let wait = wait(guest);
        let place = waits.iter().position(|(_, other)| wait > *other).unwrap_or(waits.len());
        if place < 2 {
            waits.insert(place, (guest.name.clone(), wait));
            waits.truncate(2);
        }
    }
    Crowd { host, waits }
}

/// How crowded it is for all but this guest, which does not disturb itself: while none of the others waits, not at all.
fn crowded_by_others(crowd: &Crowd, guest: &GuestSample) -> f64 {
    let other = crowd.waits.iter().find(|(name, _)| *name != guest.name).map_or(0.0, |(_, wait)| *wait);
    if other > 0.0 { other.max(crowd.host) } else { 0.0 }
}

/// Books an interval. Gives the credit, and the same as a part of what can be saved: -1 to 1.
fn settle(
    settings: &Settings,
    saved_us: i64,
    guest: &GuestSample,
    fair: f64,
    interval_ms: u32,
) -> (i64, f64) {
    let most = (fair * f64::from(settings.burst_seconds) * 1e6).max(1.0);
    let earned = fair * f64::from(interval_ms) * 1_000.0;
    let credit = (saved_us as f64 + earned - guest.cpu.used_us as f64).clamp(-most, most);
    (credit as i64, credit / most)
}

/// The weight that goes with a credit.
fn weigh(guest: &GuestSample, credit: f64) -> Option<Action> {
    let wanted = (WEIGHT * MOST.powf(credit)).round();
    let wanted = wanted.clamp(guest.bounds.cpu_weight_least.into(), guest.bounds.cpu_weight_most.into());
    let now = f64::from(guest.knobs.cpu_weight.max(1));
    if (wanted - now).abs() <= now * CLOSE {
        return None;
    }
    let word = if credit < 0.0 { "overdrawn" } else { "saved" };
    let message = format!("it has {word} {:.0}% of what it can", credit.abs() * 100.0);
    Some(act(guest, Deed::CpuWeight(wanted as u32), Reason::new("credit", message).severity(Severity::Low)))
}

/// How a guest stands.
struct Standing {
    fair: f64,
    credit: f64,
    exempt: bool,
}

struct Waits {
    crowded: f64,
    interval_ms: u32,
}

/// Holds who is noisy, and lets go who was held when nobody waits any more.
fn hold(state: &mut State, guest: &GuestSample, standing: Standing, waits: &Waits) -> Option<Action> {
    let Standing { fair, credit, exempt } = standing;
    let used = guest.cpu.processors(waits.interval_ms);
    if state.held.contains(&guest.name) {
        let calm = waits.crowded < CALM;
        if !(calm || credit > 0.0 || exempt) {
            return None;
        }
        state.held.remove(&guest.name);
        let message = if calm { "nobody waits for a processor any more" } else { "it has paid what it owed" };
        return Some(act(guest, Deed::CpuLimit(None), Reason::new("calm", message).severity(Severity::Low)));
    }
    if exempt || waits.crowded < 1.0 || credit >= 0.0 || used <= fair * 1.1 {
        return None;
    }
    let limit = ((fair * 1_000.0) as u32).max(guest.bounds.cpu_limit_least);
    state.held.insert(guest.name.clone());
    let message = format!("it used {used:.1} processors while others waited; its share is {fair:.1}");
    Some(act(guest, Deed::CpuLimit(Some(limit)), Reason::new("noisy", message)))
}

#[cfg(test)]
mod tests;
