//! What a bundle of real plugins decides, and that everything that goes wrong with one refuses.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

mod common;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use casemate_policy::{Config, Engine, Programs, Verdict, install};
use casemate_spec::Refusal;
use common::*;

fn code_of<T>(result: Result<T, casemate_policy::PolicyError>) -> &'static str {
    result.map(|_| ()).expect_err("must refuse").code()
}

fn codes(decision: &casemate_policy::Decision) -> Vec<String> {
    match &decision.verdict {
        Verdict::Allow { .. } => vec![],
        Verdict::Deny { reasons } => reasons.iter().map(|r| format!("{}/{}", r.plugin, r.code)).collect(),
    }
}

#[test]
fn the_shipped_bundle_admits_a_modest_guest() {
    let bundle = root().join("policies/default.toml");
    let engine =
        Engine::open(Config { bundle: &bundle, cache: shared_cache(), programs: programs(), key: None })
            .unwrap();
    let decision = engine.admit(&request(), None).unwrap();
    assert!(decision.is_allowed(), "{decision:?}");
    assert_eq!(engine.plugins()[0].name, "limits");
    assert_eq!(decision.plugins[0].digest, sha256(&fs::read(limits()).unwrap()));
}

#[test]
fn a_denial_names_plugin_field_cause_and_remedy() {
    let decision = admit(&entry("limits", &limits(), "max_memory = '4 GiB'")).unwrap();
    let Verdict::Deny { reasons } = &decision.verdict else { panic!("allowed") };
    assert_eq!(
        reasons[0].to_string(),
        "[limits/memory] memory: 8 GiB is more than the 4 GiB that one guest may have; ask for at most 4 GiB"
    );
    assert_eq!(decision.refusals()[0].code, "policy-denied");
}

#[test]
fn settings_flip_the_verdict() {
    for (settings, denied) in [
        ("", vec![]),
        ("max_memory = '8 GiB'", vec![]),
        ("max_memory = '7 GiB'", vec!["limits/memory"]),
        ("max_vcpus = 1, devices = ['1af4:']", vec!["limits/vcpus", "limits/device-kind"]),
    ] {
        let decision = admit(&entry("limits", &limits(), settings)).unwrap();
        assert_eq!(codes(&decision), denied, "{settings}");
    }
}

#[test]
fn another_plugin_in_its_place_flips_the_verdict() {
    assert_eq!(codes(&admit(&entry("p", &limits(), "")).unwrap()), [""; 0]);
    assert_eq!(codes(&admit(&entry("p", &deny_all(), "")).unwrap()), ["p/closed"]);
}

#[test]
fn every_denial_counts_in_the_order_of_the_bundle() {
    let limits = |name| entry(name, &limits(), "max_vcpus = 1");
    let bundle = format!("{}{}{}", limits("b"), entry("c", &deny_all(), ""), limits("a"));
    let decision = admit(&bundle).unwrap();
    assert_eq!(codes(&decision), ["b/vcpus", "c/closed", "a/vcpus"]);
    assert_eq!(decision.plugins.len(), 3);
}

#[test]
fn warnings_hold_nothing_up() {
    let engine = open(&entry("limits", &limits(), "")).unwrap();
    let mut request = request();
    request.guest.vcpus = 9;
    let Verdict::Allow { warnings } = engine.admit(&request, None).unwrap().verdict else { panic!("denied") };
    assert_eq!(warnings[0].code, "overcommitted");
}

#[test]
fn what_is_missing_or_not_what_it_was_refuses() {
    let missing = Path::new("/nowhere/bundle.toml");
    let config = Config { bundle: missing, cache: shared_cache(), programs: programs(), key: None };
    assert_eq!(code_of(Engine::open(config)), "policy-bundle-missing");
    assert_eq!(code_of(open("")), "policy-none");
    assert_eq!(code_of(open("[[plugin]]\nname = 'x'\n")), "policy-bundle");

    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("p.wasm");
    fs::copy(limits(), &plugin).unwrap();
    let bundle = entry("limits", &plugin, "");
    open(&bundle).unwrap();
    fs::copy(deny_all(), &plugin).unwrap();
    assert_eq!(code_of(open(&bundle)), "policy-digest");
    fs::remove_file(&plugin).unwrap();
    let error = open(&bundle).err().unwrap();
    assert_eq!(error.code(), "policy-missing");
    let refusal = Refusal::from(error);
    assert_eq!(refusal.location.unwrap().line, 2, "the bundle's line that names the plugin");
    fs::create_dir(&plugin).unwrap();
    assert_eq!(code_of(open(&bundle)), "policy-missing");
}

#[test]
fn settings_that_a_plugin_does_not_take_refuse_when_the_bundle_is_opened() {
    let error = open(&entry("limits", &limits(), "max_ram = 1")).err().unwrap();
    assert_eq!(error.code(), "policy-settings");
    assert!(error.to_string().contains("unknown field `max_ram`, expected one of `max_memory`"), "{error}");
    assert_eq!(code_of(open(&entry("limits", &limits(), "max_vcpus = 0"))), "policy-settings");
}

#[test]
fn a_plugin_that_misbehaves_refuses_and_says_how() {
    for (what, limits, code, text) in [
        ("trap", "", "policy-trap", "unreachable"),
        ("recurse", "", "policy-trap", "call stack exhausted"),
        ("spin", "", "policy-timeout", "all of its 20000000 units of fuel"),
        ("spin", "fuel = 2_000_000_000, deadline_ms = 50", "policy-timeout", "within 50 ms"),
        ("hog", "", "policy-memory", "more than the 32 MiB"),
        ("hog", "memory = '8 MiB'", "policy-memory", "more than the 8 MiB"),
        ("well", "memory = '64 KiB'", "policy-memory", "more than"),
        ("well", "instances = 1", "policy-trap", "instance"),
        ("well", "table_elements = 1", "policy-memory", "table"),
        ("long-message", "", "policy-answer", "128 KiB at once"),
        ("many-reasons", "fuel = 2_000_000_000", "policy-answer", "128 KiB at once"),
        ("65-reasons", "", "policy-answer", "65 reasons; at most 64"),
        ("no-reason", "", "policy-answer", "without a reason"),
        ("bad-code", "", "policy-answer", "\"Not A Code\" is not a code"),
        ("long-log", "", "policy-answer", "128 KiB at once"),
        ("spin-at-load", "", "policy-timeout", "fuel"),
    ] {
        let start = Instant::now();
        let error = admit(&how(what, limits)).expect_err(what);
        assert_eq!(error.code(), code, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
    }
}

#[test]
fn a_failure_is_an_error_even_beside_a_denial_and_others_go_on() {
    let bundle = format!("{}{}", entry("no", &deny_all(), ""), how("trap", ""));
    let engine = open(&bundle).unwrap();
    let well = open(&how("well", "")).unwrap();
    for _ in 0..3 {
        assert_eq!(code_of(engine.admit(&request(), None)), "policy-trap");
        assert!(well.admit(&request(), None).unwrap().is_allowed());
    }
}

#[test]
fn the_log_is_kept_and_bounded() {
    let decision = admit(&how("chatter", "")).unwrap();
    let run = &decision.plugins[0];
    assert_eq!(run.log.iter().map(|line| line.message.len()).sum::<usize>(), 16 << 10);
    assert_eq!(run.log_dropped_bytes, (1 << 20) - (16 << 10));
}

#[test]
fn a_message_stays_one_line_and_draws_nothing() {
    let decision = admit(&how("escapes", "")).unwrap();
    let text = decision.refusals()[0].to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
}

#[test]
fn nothing_is_remembered_from_one_call_to_the_next() {
    let engine = open(&how("remember", "")).unwrap();
    for _ in 0..3 {
        let Verdict::Allow { warnings } = engine.admit(&request(), None).unwrap().verdict else {
            panic!("denied")
        };
        assert_eq!(warnings[0].message, "1");
    }
}

#[test]
fn the_same_question_takes_the_same_fuel_and_gets_the_same_answer() {
    let bundle = entry("limits", &limits(), "max_memory = '1 GiB', devices = ['1af4:']");
    let ask = |engine: &Engine| {
        let decision = engine.admit(&request(), None).unwrap();
        let fuel: Vec<_> = decision.plugins.iter().map(|run| run.fuel).collect();
        (serde_json::to_string(&decision.verdict).unwrap(), fuel)
    };
    let engine = open(&bundle).unwrap();
    let first = ask(&engine);
    assert!(first.1[0] > 1_000);
    assert_eq!(ask(&engine), first);
    assert_eq!(ask(&open(&bundle).unwrap()), first);
    let threads = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| ask(&engine))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(threads.iter().all(|answer| *answer == first));
}

#[test]
fn a_request_that_is_too_large_is_not_asked() {
    let engine = open(&entry("limits", &limits(), "")).unwrap();
    let mut request = request();
    request.attrs.insert("padding".into(), "x".repeat(256 << 10));
    assert_eq!(code_of(engine.admit(&request, None)), "policy-request");
    request.attrs.insert("padding".into(), "x".repeat(200 << 10));
    assert!(engine.admit(&request, None).unwrap().is_allowed());
}

#[test]
fn a_request_survives_the_audit_log() {
    let json = serde_json::to_string(&request()).unwrap();
    assert_eq!(serde_json::from_str::<casemate_policy::Request>(&json).unwrap(), request());
}

#[test]
fn a_plugin_that_wants_more_than_the_log_is_not_taken() {
    let bundle = entry("net", &forbidden(), "");
    let error = open(&bundle).err().unwrap();
    assert_eq!(error.code(), "policy-import");
    assert!(error.to_string().contains("tests:network/connect@1.0.0"), "{error}");
    assert_eq!(code_of(install(&forbidden(), shared_cache(), programs())), "policy-import");
}

#[test]
fn a_plugin_for_a_newer_contract_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("newer.wasm");
    let mut bytes = fs::read(limits()).unwrap();
    // Of the same length, so that the component stays one.
    let (old, new) = (b"@1.1.0", b"@2.0.0");
    let places: Vec<_> = (0..bytes.len() - old.len()).filter(|at| bytes[*at..].starts_with(old)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + new.len()].copy_from_slice(new);
    }
    fs::write(&plugin, bytes).unwrap();
    let error = install(&plugin, shared_cache(), programs()).unwrap_err();
    assert_eq!(error.code(), "policy-contract");
    assert!(error.to_string().contains("@2.0.0"), "{error}");
}

#[test]
fn what_is_no_component_is_told_from_a_broken_compiler() {
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("p.wasm");
    let component = fs::read(limits()).unwrap();
    let core_module = b"\0asm\x01\0\0\0".to_vec();
    let empty_component = b"\0asm\x0d\0\x01\0".to_vec();
    let mut altered = component.clone();
    altered[8] ^= 0xff;
    for (bytes, code) in [
        (Vec::new(), "policy-invalid"),
        (b"#!/bin/sh".to_vec(), "policy-invalid"),
        (core_module, "policy-invalid"),
        (component[..component.len() / 2].to_vec(), "policy-invalid"),
        (altered, "policy-invalid"),
        (empty_component, "policy-contract"),
    ] {
        fs::write(&plugin, bytes).unwrap();
        assert_eq!(code_of(open(&entry("p", &plugin, ""))), code);
    }
    let file = fs::File::create(&plugin).unwrap();
    file.set_len(33 << 20).unwrap();
    assert_eq!(code_of(install(&plugin, shared_cache(), programs())), "policy-size");
}

#[test]
fn without_a_compiler_only_what_is_in_the_cache_loads() {
    let folder = tempfile::tempdir().unwrap();
    let (bundle, cache) = (root().join("policies/default.toml"), folder.path().join("cache"));
    let without = Programs::plain(Path::new("/nowhere"), engine_program());
    let open = |programs| Engine::open(Config { bundle: &bundle, cache: &cache, programs, key: None });
    assert_eq!(code_of(open(&without)), "policy-compiler");
    assert!(open(programs()).unwrap().plugins()[0].compile_time.is_some());
    assert!(open(&without).unwrap().plugins()[0].compile_time.is_none());
}

#[test]
fn the_compiler_has_given_everything_up_before_it_reads() {
    use std::process::{Command, Stdio};
    // It waits for a component that doesn't come.
    let mut child = Command::new(compiler_program())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .env_clear()
        .spawn()
        .unwrap();
    let proc = |file: &str| fs::read_to_string(format!("/proc/{}/{file}", child.id())).unwrap();
    let start = Instant::now();
    while !proc("status").contains("Seccomp:\t2") && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (status, limits) = (proc("status"), proc("limits"));
    child.kill().unwrap();
    child.wait().unwrap();
    let words = |text: &str, line: &str| -> Vec<String> {
        let line = text.lines().find(|found| found.starts_with(line)).unwrap();
        line.split_whitespace().map(ToOwned::to_owned).collect()
    };
    assert_eq!(words(&status, "NoNewPrivs"), ["NoNewPrivs:", "1"]);
    assert_eq!(words(&status, "Seccomp:"), ["Seccomp:", "2"]);
    assert_eq!(words(&status, "CapEff"), ["CapEff:", "0000000000000000"]);
    assert!(!words(&status, "Uid:").contains(&"0".to_owned()), "{status}");
    assert_eq!(words(&limits, "Max open files")[3..5], ["3", "3"]);
    assert_eq!(words(&limits, "Max address space")[3..5], ["2147483648", "2147483648"]);
    assert_eq!(words(&limits, "Max cpu time")[3..5], ["60", "60"]);
}

#[test]
fn compiled_code_that_was_changed_is_never_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let bundle = entry("limits", &limits(), "");
    open_with(&bundle, &cache).unwrap();
    let entries = fs::read_dir(&cache).unwrap().map(|file| file.unwrap().path());
    let [compiled] = &entries.filter(|path| path.extension().is_some()).collect::<Vec<_>>()[..] else {
        panic!("one entry")
    };
    let good = fs::read(compiled).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(compiled, bad).unwrap();
    assert_eq!(code_of(open_with(&bundle, &cache)), "policy-cache-tampered");
    fs::write(compiled, good).unwrap();
    open_with(&bundle, &cache).unwrap();
    fs::remove_file(cache.join("key")).unwrap();
    open_with(&bundle, &cache).expect("with a new key, what the old one signed is as good as not there");
}

#[test]
fn install_tells_what_a_plugin_is() {
    let inspection = install(&limits(), shared_cache(), programs()).unwrap();
    assert_eq!((inspection.name.as_str(), inspection.version.as_str()), ("limits", "1.0.0"));
    assert_eq!(inspection.digest, sha256(&fs::read(limits()).unwrap()));
    assert!(inspection.imports.iter().all(|import| import.starts_with("casemate:policy/")));
    assert!(inspection.exports.contains(&"casemate:policy/gate@1.1.0".to_owned()));
    assert!(inspection.settings_schema.unwrap().contains("max_memory"));
}
