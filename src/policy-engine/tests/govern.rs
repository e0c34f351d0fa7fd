//! Governors and judges of devices: real plugins, asked.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use casemate_policy::{
    Check, CheckOutcome, Deed, Engine, GuestSample, Kind, Memory, Rate, ReleasedDevice, Samples, Tick,
    install,
};
use common::*;

fn steward() -> std::path::PathBuf {
    root().join("plugins/built/tests/steward.wasm")
}

/// A bundle with a governor that does so, and one that admits nobody, since a bundle has to admit.
fn governor(name: &str, settings: &str, more: &str) -> String {
    format!("{}{more}\n", entry(name, &steward(), settings))
}

fn bundle(governors: &str) -> Engine {
    open(&format!("{governors}{}", entry("no", &deny_all(), ""))).unwrap()
}

const ALL: &str =
    "may_do = ['cpu-weight', 'cpu-limit', 'balloon', 'disk-limit', 'net-limit', 'pause', 'resume', 'stop']";

fn samples() -> Samples {
    let guest = |name: &str, tenant: &str| GuestSample {
        name: name.into(),
        tenant: tenant.into(),
        governed: true,
        vcpus: 2,
        memory_bytes: 1 << 30,
        ..GuestSample::default()
    };
    let guests = vec![guest("db", "rival"), guest("web", "acme")];
    Samples { interval_ms: 1_000, guests, ..Samples::default() }
}

fn done(tick: &Tick) -> Vec<String> {
    tick.actions.iter().map(|action| format!("{} {}", action.guest, action.deed)).collect()
}

#[test]
fn every_deed_gets_across() {
    let rate = Rate { bytes_a_second: Some(7), requests_a_second: None };
    for (how, deed) in [
        ("cpu-weight", Deed::CpuWeight(7)),
        ("cpu-limit", Deed::CpuLimit(Some(7))),
        ("balloon", Deed::Balloon(7)),
        ("disk-limit", Deed::DiskLimit(rate)),
        ("net-limit", Deed::NetLimit(rate)),
        ("pause", Deed::Pause),
        ("resume", Deed::Resume),
        ("stop", Deed::Stop),
        ("alert", Deed::Alert),
    ] {
        let engine = bundle(&governor("steward", &format!("how = '{how}', to = 7"), ALL));
        let tick = engine.tick(&samples(), &mut Memory::new());
        assert!(tick.failures.is_empty(), "{how}: {:?}", tick.failures);
        let guests: Vec<_> = tick.actions.iter().map(|a| (a.guest.as_str(), a.deed)).collect();
        assert_eq!(guests, [("db", deed), ("web", deed)], "{how}");
        assert_eq!(tick.actions[0].why.to_string(), "[steward/told] its settings say so");
    }
}

#[test]
fn what_the_bundle_does_not_permit_is_not_done() {
    let engine = bundle(&governor("steward", "how = 'stop'", ""));
    let tick = engine.tick(&samples(), &mut Memory::new());
    assert_eq!((tick.actions.len(), tick.forbidden.len()), (0, 2));
    let alert = bundle(&governor("steward", "how = 'alert'", ""));
    assert_eq!(done(&alert.tick(&samples(), &mut Memory::new())), ["db alert", "web alert"]);
    let error = open(&governor("steward", "how = 'stop'", "may_do = ['stop']")).err().unwrap();
    assert_eq!(error.code(), "policy-none", "nobody would admit");
}

#[test]
fn a_tenant_can_be_only_watched_or_left_alone() {
    let rules = "for = [{ tenants = ['rival'], mode = 'monitor' }]";
    let engine = bundle(&governor("steward", "how = 'pause'", &format!("{ALL}\n{rules}")));
    let tick = engine.tick(&samples(), &mut Memory::new());
    assert_eq!(done(&tick), ["web pause"]);
    assert_eq!(tick.watched[0].guest, "db");
    let rules = "mode = 'off'\nfor = [{ tenants = ['rival'], mode = 'enforce' }]";
    let engine = bundle(&governor("steward", "how = 'pause'", &format!("{ALL}\n{rules}")));
    let tick = engine.tick(&samples(), &mut Memory::new());
    assert_eq!((done(&tick), tick.watched.len()), (vec!["db pause".to_owned()], 0));
}

#[test]
fn two_that_fight_get_neither() {
    let two = format!(
        "{}{}",
        governor("one", "how = 'cpu-weight', to = 100", ALL),
        governor("two", "how = 'cpu-weight', to = 200", ALL)
    );
    let tick = bundle(&two).tick(&samples(), &mut Memory::new());
    assert!(tick.actions.is_empty());
    let conflict = &tick.conflicts[0];
    assert_eq!((conflict.one.why.plugin.as_str(), conflict.other.why.plugin.as_str()), ("one", "two"));
}

#[test]
fn state_goes_out_and_comes_in_and_is_bounded() {
    let engine = bundle(&governor("steward", "how = 'count'", ""));
    let mut memory = Memory::new();
    for call in 1..=3 {
        let tick = engine.tick(&samples(), &mut memory);
        assert_eq!(tick.actions[0].why.message, format!("call {call}"));
    }
    // What can't be read is as good as not there.
    memory.insert("steward".into(), b"not JSON".to_vec());
    assert_eq!(engine.tick(&samples(), &mut memory).actions[0].why.message, "call 1");

    let before = Memory::from([("steward".to_owned(), b"[41,\"\"]".to_vec())]);
    let mut memory = before.clone();
    let hoard = bundle(&governor("steward", "how = 'hoard', to = 65536", ""));
    let failure = &hoard.tick(&samples(), &mut memory).failures[0];
    assert_eq!(failure.code, "policy-answer", "{failure:?}");
    assert_eq!(memory, before, "what it remembered before stays");
}

#[test]
fn a_governor_that_fails_is_told_and_then_not_asked_any_more() {
    for (settings, code) in [
        ("how = 'trap'", "policy-trap"),
        ("how = 'spin'", "policy-timeout"),
        ("how = 'flood', to = 5000", "policy-answer"),
        ("how = 'bad-code'", "policy-answer"),
    ] {
        let both = format!(
            "{}{}",
            governor("bad", settings, ALL),
            governor("good", "how = 'cpu-weight', to = 9", ALL)
        );
        let engine = bundle(&both).suspending().unwrap();
        let mut memory = Memory::new();
        for _ in 0..5 {
            let tick = engine.tick(&samples(), &mut memory);
            assert_eq!(tick.failures[0].code, code, "{:?}", tick.failures);
            assert_eq!(done(&tick), ["db cpu-weight 9", "web cpu-weight 9"]);
        }
        assert_eq!(engine.suspended().unwrap(), ["bad"]);
        assert_eq!(engine.tick(&samples(), &mut memory).failures[0].code, "policy-suspended");
    }
}

#[test]
fn a_suspended_plugin_that_admits_refuses() {
    let engine = open(&how("trap", "")).unwrap().suspending().unwrap();
    for _ in 0..5 {
        assert_eq!(engine.admit(&request(), None).unwrap_err().code(), "policy-trap");
    }
    assert_eq!(engine.admit(&request(), None).unwrap_err().code(), "policy-suspended");
}

#[test]
fn a_thousand_guests_are_looked_at_at_once() {
    let engine = bundle(&governor("steward", "how = 'cpu-weight', to = 9", ALL));
    let guest = samples().guests[0].clone();
    let guests = (0..1_000).map(|n| GuestSample { name: format!("guest-{n:04}"), ..guest.clone() }).collect();
    let tick = engine.tick(&Samples { guests, ..samples() }, &mut Memory::new());
    assert_eq!((tick.failures.len(), tick.actions.len()), (0, 1_000), "{:?}", tick.failures);
}

fn device() -> ReleasedDevice {
    let check = |name: &str, outcome| Check { name: name.into(), outcome, detail: String::new() };
    ReleasedDevice {
        address: "0000:03:00.0".parse().unwrap(),
        vendor: 0x144d,
        device: 0xa808,
        subsystem_vendor: 0,
        subsystem_device: 0,
        class: 0x01_08_02,
        pool: Some("fast".into()),
        guest: "web".into(),
        tenant: "acme".into(),
        checks: vec![check("reset", CheckOutcome::Passed), check("scrub", CheckOutcome::NotDone)],
        quarantined: None,
        now_seconds: 0,
        attrs: Default::default(),
    }
}

fn warden(settings: &str, more: &str) -> Engine {
    let warden = entry("warden", &root().join("plugins/built/tests/warden.wasm"), settings);
    open(&format!("{warden}{more}\n{}", entry("no", &deny_all(), ""))).unwrap()
}

#[test]
fn a_judge_of_devices_can_only_be_stricter() {
    assert_eq!(warden("wants = ['reset']", "").release(&device()).quarantine.len(), 0);
    let ruling = warden("wants = ['reset', 'scrub']", "").release(&device());
    assert_eq!(ruling.quarantine[0].to_string(), "[warden/not-passed] scrub was not passed");
    let ruling = warden("wants = ['scrub']", "mode = 'warn'").release(&device());
    assert_eq!((ruling.quarantine.len(), ruling.warnings.len()), (0, 1));
}

#[test]
fn a_judge_of_devices_that_fails_condemns() {
    for settings in ["trap = true", "mute = true"] {
        let ruling = warden(settings, "").release(&device());
        assert_eq!(
            (ruling.quarantine[0].plugin.as_str(), ruling.quarantine[0].code.as_str()),
            ("casemate", "plugin-failed")
        );
        assert!(warden(settings, "mode = 'monitor'").release(&device()).quarantine.is_empty());
    }
}

#[test]
fn kinds_are_known_by_what_is_exported() {
    for (plugin, kind) in
        [("limits", Kind::Admission), ("tests/steward", Kind::Resources), ("tests/warden", Kind::Device)]
    {
        let path = root().join(format!("plugins/built/{plugin}.wasm"));
        assert_eq!(install(&path, shared_cache(), programs()).unwrap().kinds, [kind], "{plugin}");
    }
}

#[test]
fn a_plugin_that_was_built_for_1_0_is_taken() {
    let old = root().join("src/policy-engine/tests/data/limits-for-1.0.wasm");
    let seen = install(&old, shared_cache(), programs()).unwrap();
    assert!(seen.exports.contains(&"casemate:policy/gate@1.0.0".to_owned()), "{:?}", seen.exports);
    let decision = admit(&entry("limits", &old, "max_memory = '4 GiB'")).unwrap();
    assert!(!decision.is_allowed());
}
