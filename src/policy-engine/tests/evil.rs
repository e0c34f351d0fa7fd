//! The evil set, `policies/evil`: what each of its plugins is refused with, while another bundle goes on admitting guests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test may panic and tell"
)]

mod common;

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use casemate_policy::{Config, Engine, Plain, PolicyError, Programs};
use common::*;
use serde::Deserialize;
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};

/// The contract that the texts are written for.
const CONTRACT: &str = "@1.1.0";
/// What stands before the part that is repeated.
const REPEATED: &str = "\n;; repeated\n";

#[derive(Deserialize)]
struct Cases {
    case: Vec<Case>,
}

/// A table `[[case]]` of `cases.toml`, whose head says what each key is.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Case {
    name: String,
    why: String,
    file: Option<PathBuf>,
    settings: String,
    limits: String,
    contract: Option<String>,
    keep_percent: Option<usize>,
    repeat: usize,
    code: Option<String>,
    text: String,
}

impl Case {
    /// The component's bytes.
    fn make(&self) -> Vec<u8> {
        if let Some(file) = &self.file {
            return fs::read(root().join(file)).unwrap();
        }
        let read = |name: &str| fs::read_to_string(root().join(format!("policies/evil/{name}.wat"))).unwrap();
        let text = read(&self.name);
        let mut bytes = if text.starts_with("(component") || text.starts_with("(module") {
            wat::parse_str(text).unwrap()
        } else {
            let (text, repeated) = text.split_once(REPEATED).unwrap_or((&text, ""));
            let mut module = format!("(module\n{}{text}\n", read("prelude"));
            (0..self.repeat).for_each(|n| module.push_str(&repeated.replace("{n}", &n.to_string())));
            module.push(')');
            self.component(&module)
        };
        bytes.truncate(bytes.len() * self.keep_percent.unwrap_or(100) / 100);
        bytes
    }

    /// A core module's text as a component of the world `admission`.
    fn component(&self, module: &str) -> Vec<u8> {
        let version = self.contract.as_ref().map_or(CONTRACT.into(), |version| format!("@{version}"));
        let mut contract = String::new();
        for name in ["types", "admission"] {
            let text = fs::read_to_string(root().join(format!("policies/wit/{name}.wit"))).unwrap();
            let text = text.strip_prefix(&format!("package casemate:policy{CONTRACT};")).unwrap();
            contract.push_str(text);
        }
        let mut resolve = wit_parser::Resolve::default();
        let contract = format!("package casemate:policy{version};\n{contract}");
        let package = resolve.push_source("contract.wit", &contract).unwrap();
        let world = resolve.select_world(&[package], Some("admission")).unwrap();
        let mut module = wat::parse_str(module.replace(CONTRACT, &version)).unwrap();
        embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
        ComponentEncoder::default().module(&module).unwrap().validate(true).encode().unwrap()
    }

    fn told(&self) -> String {
        let mut told = self.name.clone();
        if !self.why.is_empty() {
            write!(told, " ({})", self.why).unwrap();
        }
        told
    }
}

fn cases() -> Vec<Case> {
    let text = fs::read_to_string(root().join("policies/evil/cases.toml")).unwrap();
    toml::from_str::<Cases>(&text).unwrap().case
}

/// A bundle of this plugin alone, opened with an empty cache and asked.
fn ask(case: &Case, programs: &Programs) -> Result<(), PolicyError> {
    let folder = tempfile::tempdir().unwrap();
    let (plugin, bundle) = (folder.path().join("plugin.wasm"), folder.path().join("bundle.toml"));
    fs::write(&plugin, case.make()).unwrap();
    let text = entry(&case.name, &plugin, &case.settings);
    fs::write(&bundle, format!("{text}limits = {{ {} }}\n", case.limits)).unwrap();
    let cache = folder.path().join("cache");
    let engine = Engine::open(Config { bundle: &bundle, cache: &cache, programs, key: None })?;
    assert!(engine.admit(&request(), None)?.is_allowed());
    Ok(())
}

#[test]
fn each_of_the_evil_set_is_refused_by_its_own_code_while_others_are_admitted() {
    let good = open(&entry("limits", &limits(), "")).unwrap();
    let mut wrong = Vec::new();
    for case in cases() {
        let begun = Instant::now();
        let (answer, admitted) = beside(&good, || ask(&case, programs()));
        let (code, message) = match &answer {
            Ok(()) => (None, String::new()),
            Err(error) => (Some(error.code()), error.to_string()),
        };
        let told = case.told();
        println!(
            "{told}: {} in {} ms, {admitted} others admitted; {message}",
            code.unwrap_or("admitted"),
            begun.elapsed().as_millis()
        );
        if code != case.code.as_deref() || !message.contains(&case.text) {
            wrong.push(format!("{told}: {code:?} {message:?}"));
        }
        assert!(message.len() < 1_000, "{told}: a message for people: {message}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{told}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_text_of_the_evil_set_has_a_case() {
    let cases = cases();
    for file in fs::read_dir(root().join("policies/evil")).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_some_and(|extension| extension == "wat") && name != "prelude" {
            assert!(cases.iter().any(|case| case.name == name), "no case for {name}");
        }
    }
}

#[test]
fn a_compiler_that_takes_too_long_is_ended_and_named() {
    let slow = cases().into_iter().find(|case| case.repeat > 0).unwrap();
    let launch = Arc::new(Plain { deadline: Duration::from_millis(300) });
    let error = ask(&slow, &Programs { launch, ..programs().clone() }).unwrap_err();
    assert_eq!(error.code(), "policy-compiler");
    assert!(error.to_string().contains("did not end within 0.3 s"), "{error}");
}

#[test]
fn a_compiler_that_is_at_work_holds_nobody_up() {
    let good = open(&entry("limits", &limits(), "")).unwrap();
    let slow = cases().into_iter().find(|case| case.repeat > 0).unwrap();
    let begun = Instant::now();
    let (answer, admitted) = beside(&good, || ask(&slow, programs()));
    answer.unwrap();
    assert!(begun.elapsed() > Duration::from_secs(1), "it is to take a whole second to compile");
    assert!(admitted > 1_000, "{admitted} in {:?}", begun.elapsed());
}

/// Does this while the other bundle is asked again and again; gives how many guests that one admitted meanwhile.
fn beside<R: Send>(good: &Engine, work: impl FnOnce() -> R + Send) -> (R, usize) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut admitted = 0;
            loop {
                let decision = good.admit(&request(), None).unwrap();
                assert!(decision.is_allowed());
                admitted += 1;
                if done.load(Ordering::Relaxed) {
                    return admitted;
                }
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, others.join().unwrap())
    })
}
