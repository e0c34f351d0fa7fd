use casemate_plugin_sdk::testing::{guest_sample, samples};

use super::*;

/// A guest that kept so many thousandths of a processor busy, and waited for so many.
fn guest(name: &str, tenant: &str, used: u64, waited: u64) -> GuestSample {
    let mut guest = guest_sample(name);
    guest.tenant = tenant.into();
    guest.cpu.used_us = used * 1_000;
    guest.cpu.waited_us = waited * 1_000;
    guest
}

fn credit_us(state: &State, name: &str) -> i64 {
    state.credit_us.iter().find(|(known, _)| known == name).unwrap().1
}

fn tick(state: &mut State, guests: Vec<GuestSample>) -> Vec<String> {
    let mut samples = samples(guests);
    samples.host.cpus = 2;
    let actions = FairShare::tick(Settings::default(), samples, state);
    let text = |action: &Action| format!("{} {:?} {}", action.guest, action.deed, action.why.code);
    actions.iter().map(text).map(|line| line.replace("Deed::", "")).collect()
}

#[test]
fn shares_are_by_vcpus_and_tenants_and_never_more_than_there_are_vcpus() {
    let mut samples = samples(vec![guest("a", "acme", 0, 0), guest("b", "rival", 0, 0)]);
    let settings = Settings { shares: [("acme".to_owned(), 300)].into(), ..Settings::default() };
    let shares = fair_shares(&settings, &samples);
    assert_eq!(shares, [2.0, 1.0], "3 of 4 would be more than its vCPUs");
    samples.guests.pop();
    assert_eq!(fair_shares(&settings, &samples), [2.0]);
    samples.guests.clear();
    assert!(fair_shares(&settings, &samples).is_empty());
}

#[test]
fn weights_follow_what_was_saved_and_overdrawn() {
    let mut state = State::default();
    let mut seen = Vec::new();
    for _ in 0..60 {
        seen.extend(tick(&mut state, vec![guest("busy", "acme", 1_900, 0), guest("idle", "rival", 0, 0)]));
    }
    assert!(
        seen.iter().any(|line| line.starts_with("busy CpuWeight(") && line.ends_with("credit")),
        "{seen:?}"
    );
    assert!(credit_us(&state, "busy") < 0 && credit_us(&state, "idle") > 0);
    // What is saved has an end.
    assert_eq!(credit_us(&state, "idle"), 60_000_000);
    assert!(seen.iter().all(|line| !line.contains("CpuLimit")), "nobody waits: {seen:?}");
    let weight = |credit| weigh(&guest("a", "acme", 0, 0), credit).map(|action| action.deed);
    assert_eq!(weight(1.0), Some(Deed::CpuWeight(400)));
    assert_eq!(weight(-1.0), Some(Deed::CpuWeight(25)));
    assert_eq!(weight(0.05), None, "it is close enough");
}

#[test]
fn who_is_noisy_while_others_wait_is_held_until_they_do_not() {
    let mut state = State::default();
    let crowded = || vec![guest("noisy", "acme", 1_500, 0), guest("quiet", "rival", 500, 400)];
    let first = tick(&mut state, crowded());
    assert!(first.contains(&"noisy CpuLimit(Some(1000)) noisy".to_owned()), "{first:?}");
    assert!(first.iter().all(|line| !line.starts_with("quiet CpuLimit")), "{first:?}");
    let second = tick(&mut state, crowded());
    assert!(second.iter().all(|line| !line.contains("CpuLimit")), "it is held already: {second:?}");
    let third = tick(&mut state, vec![guest("noisy", "acme", 1_000, 0), guest("quiet", "rival", 500, 0)]);
    assert!(third.contains(&"noisy CpuLimit(None) calm".to_owned()), "{third:?}");
}

#[test]
fn nobody_is_held_for_what_it_waits_for_itself() {
    let mut state = State::default();
    let seen = tick(&mut state, vec![guest("a", "acme", 1_900, 900), guest("b", "rival", 0, 0)]);
    assert!(seen.iter().all(|line| !line.contains("CpuLimit")), "{seen:?}");
}

#[test]
fn some_are_never_held_and_what_is_gone_is_forgotten() {
    let mut state = State::default();
    let settings = Settings { exempt: ["acme".to_owned()].into(), ..Settings::default() };
    let mut question = samples(vec![guest("noisy", "acme", 1_500, 0), guest("quiet", "rival", 500, 400)]);
    question.host.cpus = 2;
    let actions = FairShare::tick(settings, question, &mut state);
    assert!(actions.iter().all(|action| !matches!(action.deed, Deed::CpuLimit(_))));
    assert_eq!(state.credit_us.len(), 2);
    tick(&mut state, vec![]);
    assert!(state.credit_us.is_empty());
}

#[test]
fn settings_out_of_bounds_are_refused() {
    for json in [r#"{"burst_seconds": 0}"#, r#"{"steal_percent": 101}"#, r#"{"shares": {"acme": 0}}"#] {
        let settings = serde_json::from_str(json).unwrap();
        assert_eq!(FairShare::check(&settings).unwrap_err().len(), 1, "{json}");
    }
    assert!(FairShare::check(&Settings::default()).is_ok());
    assert!(serde_json::from_str::<Settings>(r#"{"share": {}}"#).is_err());
}
