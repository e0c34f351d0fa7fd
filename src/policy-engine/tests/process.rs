//! The process in which plugins run: it has given everything up before it answers, and its end refuses.

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

use casemate_policy::{GuestSample, Memory, Programs, Samples};
use common::*;
use rustix::process::{Pid, Signal, kill_process};

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn word<'a>(status: &'a str, line: &str) -> &'a str {
    let line = status.lines().find(|found| found.starts_with(line)).unwrap();
    line.split_whitespace().nth(1).unwrap()
}

#[test]
fn it_has_given_everything_up_before_it_answers() {
    let engine = open(&entry("limits", &limits(), "")).unwrap();
    let proc = Path::new("/proc").join(engine.pid().to_string());
    let mut threads = 0;
    for thread in fs::read_dir(proc.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert_eq!(word(&status, "NoNewPrivs:"), "1");
        assert_eq!(word(&status, "Seccomp:"), "2");
        assert_eq!(word(&status, "Seccomp_filters:"), "2", "{status}");
        threads += 1;
    }
    assert_eq!(threads, 2);
    let open_files: Vec<_> =
        fs::read_dir(proc.join("fd")).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(open_files, ["0", "1", "2"]);
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    for (line, most) in [("Max file size", "0"), ("Max core file size", "0"), ("Max open files", "16")] {
        let line = limits.lines().find(|found| found.starts_with(line)).unwrap();
        assert!(
            line.split_whitespace().rev().nth(1).unwrap() == most || line.contains(&format!(" {most} ")),
            "{line}"
        );
    }
    let maps = fs::read_to_string(proc.join("maps")).unwrap();
    assert!(!maps.lines().any(|line| line.contains(" rwx") || line.contains(" -wx")), "{maps}");
    // Its own code, the plugin's, and what the kernel maps.
    let executable: Vec<_> = maps.lines().filter(|line| line.contains("r-xp")).collect();
    assert_eq!(executable.iter().filter(|line| line.contains(".cwasm")).count(), 1, "{maps}");
    assert!(executable.len() <= 3, "{maps}");
}

#[test]
fn one_that_is_killed_refuses_from_then_on() {
    let steward = root().join("plugins/built/tests/steward.wasm");
    let bundle =
        format!("{}{}", entry("steward", &steward, "how = 'nothing'"), entry("limits", &limits(), ""));
    let engine = open(&bundle).unwrap();
    assert!(engine.admit(&request(), None).unwrap().is_allowed() && engine.is_alive());
    kill(engine.pid());
    let start = Instant::now();
    while engine.is_alive() && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!engine.is_alive(), "seen before it is asked");
    let error = engine.admit(&request(), None).unwrap_err();
    assert_eq!(error.code(), "policy-engine");
    assert!(error.to_string().contains("it ended while it was asked (signal: 9"), "{error}");
    assert!(!engine.is_alive());
    let tick = engine.tick(&Samples::default(), &mut Memory::new());
    assert_eq!(
        (tick.failures[0].plugin.as_str(), tick.failures[0].code.as_str()),
        ("casemate", "policy-engine")
    );
    assert!(tick.actions.is_empty());
}

#[test]
fn one_that_nobody_can_ask_any_more_ends() {
    let engine = open(&entry("limits", &limits(), "")).unwrap();
    let proc = Path::new("/proc").join(engine.pid().to_string());
    assert!(proc.exists());
    drop(engine);
    assert!(!proc.exists());
}

#[test]
fn one_that_does_not_answer_is_ended() {
    // It reads nothing and says nothing.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("engine");
    fs::write(&program, "#!/bin/sh\nexec /bin/sleep 1000\n").unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for (text, told) in [("exit 3", "exit status: 3"), ("echo no luck >&2; exit 1", "no luck")] {
        fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        let programs = Programs::plain(compiler_program(), &program);
        let error = casemate_policy::install(&limits(), shared_cache(), &programs).unwrap_err();
        assert_eq!(error.code(), "policy-engine");
        assert!(error.to_string().contains(told), "{error}");
    }
}

#[test]
fn the_shipped_plugins_in_rust_fit_into_12_mib() {
    let all = [
        ("limits", "max_memory = '32 GiB', max_vcpus = 16"),
        ("quota", "default = { guests = 30 }"),
        ("devices", "grant = [{ tenants = ['*'], kinds = ['8086:'] }]"),
        ("images", "folders = ['/boot/', '/srv/']"),
        ("network", "grant = [{ tenants = ['*'], taps = ['*'] }]"),
        ("hardening", ""),
        ("placement", "dedicated = ['nobody']"),
        ("schedule", "open = [{ from = '00:00', to = '24:00' }]"),
        ("fair-share", ""),
        ("balloon", ""),
        ("idle", ""),
    ];
    let plugin = |(name, settings): &(&str, &str)| {
        entry(name, &root().join(format!("plugins/built/{name}.wasm")), settings)
    };
    let engine = open(&all.iter().map(plugin).collect::<String>()).unwrap();
    engine.admit(&request(), None).unwrap();
    let guests = vec![GuestSample { name: "web".into(), tenant: "acme".into(), ..GuestSample::default() }];
    let tick = engine.tick(&Samples { guests, ..Samples::default() }, &mut Memory::new());
    assert_eq!(tick.failures, []);
    let status = fs::read_to_string(format!("/proc/{}/status", engine.pid())).unwrap();
    let resident_kib: u64 = word(&status, "VmRSS:").parse().unwrap();
    // An unoptimised engine is three times as large.
    assert!(resident_kib < 12 << 10 || cfg!(debug_assertions), "{resident_kib} KiB are resident");
}
