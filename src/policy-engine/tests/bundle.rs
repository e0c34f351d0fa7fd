//! What a bundle makes of its plugins' words: modes and levels, changes, conflicts, replay, cases.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use casemate_policy::{
    Config, Engine, Field, Outcome, Record, Stance, Substitute, Value, Verdict, replay, run_cases,
};
use common::*;

/// A plugin in a bundle with more keys; `more` begins lines of its own.
fn with(name: &str, plugin: &str, settings: &str, more: &str) -> String {
    format!("{}{more}\n", entry(name, &root().join("plugins/built").join(plugin), settings))
}

fn changer(name: &str, settings: &str) -> String {
    let more = "may_change = ['vcpus', 'memory', 'boot.command_line']";
    with(name, "tests/changer.wasm", settings, more)
}

fn code(bundle: &str) -> &'static str {
    admit(bundle).expect_err("must refuse").code()
}

#[test]
fn a_denial_counts_as_far_as_mode_and_level_say() {
    for (more, allowed, warned, watched) in [
        ("", false, 0, 0),
        ("mode = 'enforce'\nlevel = 'hard'", false, 0, 0),
        ("level = 'soft'", false, 0, 0),
        ("level = 'advisory'", true, 1, 1),
        ("mode = 'warn'", true, 1, 1),
        ("mode = 'monitor'", true, 0, 1),
        ("mode = 'off'", true, 0, 0),
        ("mode = 'monitor'\nfor = [{ tenants = ['acme'], mode = 'enforce' }]", false, 0, 0),
        ("for = [{ tenants = ['rival'], mode = 'off' }]", false, 0, 0),
        ("for = [{ operations = ['create'], mode = 'off' }]", true, 0, 0),
    ] {
        let decision = admit(&with("no", "tests/deny-all.wasm", "", more)).unwrap();
        assert_eq!(decision.is_allowed(), allowed, "{more}");
        if let Verdict::Allow { warnings } = &decision.verdict {
            assert_eq!(warnings.len(), warned, "{more}");
        }
        let seen: usize = decision.plugins.iter().map(|run| run.would_refuse.len()).sum();
        assert_eq!(seen, watched, "{more}");
        assert_eq!(decision.plugins.len(), usize::from(!more.contains("'off'") || more.contains("rival")));
    }
}

#[test]
fn a_soft_denial_is_overridden_with_a_reason_unless_a_hard_one_stands_beside() {
    let soft = with("soft", "tests/deny-all.wasm", "", "level = 'soft'");
    let engine = open(&soft).unwrap();
    let refused = engine.admit(&request(), None).unwrap();
    assert!(refused.refusals()[0].to_string().ends_with(", or override it: --override REASON"));
    let decision = engine.admit(&request(), Some("the exam is today")).unwrap();
    assert!(decision.is_allowed());
    let overridden = decision.overridden.unwrap();
    assert_eq!(
        (overridden.why.as_str(), overridden.reasons[0].code.as_str()),
        ("the exam is today", "closed")
    );

    let both = format!("{soft}{}", with("hard", "tests/deny-all.wasm", "", ""));
    let decision = open(&both).unwrap().admit(&request(), Some("please")).unwrap();
    assert_eq!(decision.refusals().len(), 2);
    assert_eq!(decision.overridden, None);
}

#[test]
fn a_plugin_that_fails_holds_up_only_what_its_word_would() {
    for (more, fails, warned) in
        [("level = 'soft'", true, 0), ("mode = 'warn'", false, 1), ("mode = 'monitor'", false, 0)]
    {
        let answer = open(&format!("{}{more}\n", entry("evil", &misbehave(), "how = 'trap'")))
            .unwrap()
            .admit(&request(), Some("an override is not for this"));
        assert_eq!(answer.is_err(), fails, "{more}");
        let Ok(decision) = answer else { continue };
        let Verdict::Allow { warnings } = decision.verdict else { panic!("denied") };
        assert_eq!(warnings.len(), warned, "{more}");
        assert!(decision.plugins[0].error.as_ref().unwrap().contains("policy-trap"));
    }
}

#[test]
fn what_one_changes_all_judge() {
    let small = changer("small", "field = 'memory', number = 4294967296");
    let limits = entry("limits", &limits(), "max_memory = '4 GiB'");
    for bundle in [format!("{small}{limits}"), format!("{limits}{small}")] {
        let decision = admit(&bundle).unwrap();
        assert!(decision.is_allowed(), "{decision:?}");
        assert_eq!(decision.changes.len(), 1);
        let change = &decision.changes[0];
        assert_eq!((change.field, &change.to), (Field::Memory, &Value::Number(4 << 30)));
        assert_eq!(change.to_string(), "memory: 8 GiB -> 4 GiB (small: the settings say so)");
    }
    let large = changer("large", "field = 'memory', number = 17179869184");
    assert!(!admit(&format!("{large}{limits}")).unwrap().is_allowed());
}

#[test]
fn changers_that_disagree_or_are_never_content_are_refused_by_name() {
    let two = |a: u32, b: u32| {
        let one = |name, vcpus: u32| changer(name, &format!("field = 'vcpus', number = {vcpus}"));
        format!("{}{}", one("a", a), one("b", b))
    };
    assert!(admit(&two(1, 1)).unwrap().is_allowed());
    let error = admit(&two(1, 3)).unwrap_err();
    assert_eq!(error.code(), "policy-conflict");
    let text = error.to_string();
    assert!(text.contains("a and b: vcpus: 2 -> 1 (a: ") && text.contains("vcpus: 2 -> 3 (b: "), "{text}");
    assert_eq!(code(&changer("r", "field = 'vcpus', restless = true")), "policy-unstable");
    // It changes what another one has changed.
    let after = format!(
        "{}{}",
        changer("a", "field = 'vcpus', number = 1"),
        changer("b", "field = 'boot.command_line', text = 'x', only_vcpus = 1")
    );
    assert_eq!(code(&after), "policy-unstable");
}

#[test]
fn a_change_is_bounded_by_the_bundle_and_by_what_a_guest_can_be() {
    let not_permitted =
        with("c", "tests/changer.wasm", "field = 'vcpus', number = 1", "may_change = ['memory']");
    assert_eq!(code(&not_permitted), "policy-change");
    for settings in [
        "field = 'name', text = 'other'",
        "field = 'vcpus', number = 0",
        "field = 'vcpus', number = 65",
        "field = 'vcpus', text = '1'",
        "field = 'vcpus'",
        "field = 'memory', number = 1",
        "field = 'boot.command_line', text = \"a\\nb\"",
    ] {
        assert_eq!(code(&changer("c", settings)), "policy-change", "{settings}");
    }
    // Watched only, it changes nothing and is no fault.
    let watched = with(
        "c",
        "tests/changer.wasm",
        "field = 'vcpus', number = 1",
        "mode = 'monitor'\nmay_change = ['vcpus']",
    );
    let decision = admit(&watched).unwrap();
    assert_eq!((decision.changes.len(), decision.plugins[0].would_change.len()), (0, 1));
    // A plugin that never changes anything can't be permitted to.
    let error = open(&with("l", "limits.wasm", "", "may_change = ['vcpus']")).err().unwrap();
    assert_eq!(error.code(), "policy-bundle");
}

#[test]
fn no_plugin_can_allow_a_device_that_another_guest_has() {
    let engine = open(&entry("limits", &limits(), "")).unwrap();
    let mut request = request();
    request.beside.push(casemate_policy::Neighbour {
        name: "db".into(),
        tenant: "acme".into(),
        vcpus: 1,
        memory_bytes: 1 << 30,
        devices: vec![request.guest.devices[0].address],
        attrs: Default::default(),
    });
    let decision = engine.admit(&request, Some("whatever")).unwrap();
    assert!(decision.refusals()[0].to_string().contains("casemate/device-taken: device[0].address: "));
}

#[test]
fn what_plugins_need_is_known_when_the_bundle_is_opened() {
    let images = |more: &str| open(&with("images", "images.wasm", "", more)).map(|engine| engine.needs());
    let all = images("").unwrap();
    assert!(all.kernel_sha256 && all.initrd_sha256 && all.disk_sha256);
    let some = images("needs = ['kernel-sha256']").unwrap();
    assert!(some.kernel_sha256 && !some.initrd_sha256 && !some.disk_sha256);
    assert_eq!(images("mode = 'off'").unwrap(), casemate_policy::Needs::default());
    assert_eq!(images("needs = ['moon-phase']").err().unwrap().code(), "policy-bundle");
}

#[test]
fn recorded_questions_are_asked_again_and_differences_told() {
    let engine = open(&entry("limits", &limits(), "max_vcpus = 4")).unwrap();
    let record = |vcpus: u32| {
        let mut request = request();
        request.guest.vcpus = vcpus;
        Record {
            id: format!("{vcpus}"),
            time_seconds: 0,
            uid: 0,
            bundle: "b".into(),
            bundle_sha256: Some(engine.bundle_digest().to_owned()),
            override_why: None,
            outcome: Outcome::from(&engine.admit(&request, None)),
            request,
        }
    };
    let records = [record(2), record(4), record(5)];
    // As they come from the log.
    let records = records.map(|record| {
        let text = serde_json::to_string(&record).unwrap();
        let read: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(Stance::from(&read.outcome), Stance::from(&record.outcome));
        assert_eq!(read.request, record.request);
        read
    });
    let differences = |engine: &Engine| -> Vec<String> {
        let found = records.iter().filter_map(|record| replay(engine, record));
        found.map(|found| format!("{}: {} -> {}", found.id, found.was, found.would_be)).collect()
    };
    assert_eq!(differences(&engine), [""; 0]);
    let stricter = open(&entry("limits", &limits(), "max_vcpus = 3")).unwrap();
    assert_eq!(differences(&stricter), ["4: allowed -> denied by limits/vcpus"]);

    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("b.toml");
    std::fs::write(&bundle, with("limits", "limits.wasm", "", "")).unwrap();
    let config = Config { bundle: &bundle, cache: shared_cache(), programs: programs(), key: None };
    let file = deny_all();
    let swapped = Engine::open_with(config, Some(Substitute { name: Some("limits"), file: &file })).unwrap();
    assert_eq!(differences(&swapped).len(), 3);
    let unknown = Engine::open_with(config, Some(Substitute { name: None, file: &file }));
    assert_eq!(unknown.err().unwrap().code(), "policy-bundle", "it is called deny-all");
}

#[test]
fn each_shipped_plugin_answers_its_cases_and_each_of_its_reasons_was_seen() {
    for plugin in [
        "balloon",
        "devices",
        "fair-share",
        "hardening",
        "idle",
        "images",
        "limits",
        "network",
        "placement",
        "quota",
        "schedule",
        "scripted/naming",
    ] {
        let file = root().join("plugins").join(plugin).join("cases.toml");
        let (results, coverage) = run_cases(&file, shared_cache(), programs()).unwrap();
        let failed: Vec<_> = results.iter().filter(|result| result.instead.is_some()).collect();
        assert!(failed.is_empty(), "{plugin}: {failed:?}");
        assert!(coverage.never.is_empty() && coverage.undeclared.is_empty(), "{plugin}: {coverage:?}");
        assert!(!coverage.seen.is_empty());
    }
}

#[test]
fn cases_that_are_not_met_or_make_no_sense_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cases.toml");
    let run = |text: &str| {
        let (plugin, request) = (limits(), root().join("src/policy/examples/request.json"));
        std::fs::write(&file, format!("plugin = {plugin:?}\nrequest = {request:?}\n{text}")).unwrap();
        run_cases(&file, shared_cache(), programs())
    };
    let (results, coverage) = run("[[case]]\nname = 'a'\nexpect = 'deny'\n").unwrap();
    assert_eq!(results[0].instead.as_deref(), Some("allowed"));
    assert!(coverage.never.contains("limits/memory"));
    for text in [
        "",
        "[[case]]\nname = 'a'\nexpect = 'maybe'\n",
        "[[case]]\nname = 'a'\nexpect = 'deny'\nset = { 'guest.devices.7.vendor' = 1 }\n",
        "[[case]]\nname = 'a'\nexpect = 'deny'\nset = { 'guest.colour' = 1 }\n",
    ] {
        assert_eq!(run(text).unwrap_err().code(), "policy-cases", "{text}");
    }
}
