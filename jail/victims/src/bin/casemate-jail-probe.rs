//! Starts a cell for every attempt to get out of one, and prints what stopped it, one JSON object a line.
//!
//! `casemate-jail-probe VICTIM CGROUP [--without-seccomp | --with-seccomp] [ATTEMPT…]`: VICTIM is the program
//! casemate-victim, CGROUP the parent cgroup to use (as /sys/fs/cgroup/casemate). It needs to be root. Without one of
//! the two options it tries with and without filters. It ends with 1 when a line is not `"ok":true`.

#[path = "probe/checks.rs"]
mod checks;
#[path = "probe/start.rs"]
mod start;

use std::{fs::File, path::PathBuf, process::ExitCode};

use casemate_filters::Role;
use casemate_jail::{End, Program};
use casemate_victims::{ATTEMPTS, Attempt, Beneath, Expected, REACHED, STOPPED, THROUGH, expected};
use serde_json::{Value, json};

use start::{Probe, Told};

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("casemate-jail-probe: {problem}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Vec<String>) -> Result<bool, String> {
    let (options, mut words): (Vec<_>, Vec<_>) =
        arguments.into_iter().partition(|word| word.starts_with("--"));
    if words.len() < 2 {
        return Err(
            "usage: casemate-jail-probe VICTIM CGROUP [--without-seccomp | --with-seccomp] [ATTEMPT…]".into(),
        );
    }
    let names = words.split_off(2);
    let has = |option: &str| options.iter().any(|given| given == option);
    let (with, without) = (!has("--without-seccomp"), !has("--with-seccomp"));
    let mut words = words.into_iter();
    let victim =
        File::open(words.next().unwrap_or_default()).map_err(|error| format!("the victim: {error}"))?;
    let probe = Probe {
        program: Program::seal(victim).map_err(|refusal| refusal.to_string())?,
        parent: PathBuf::from(words.next().unwrap_or_default()),
    };
    let _listener = start::listen_abstract()?;
    let mut is_ok = true;
    let mut print = |row: Value| {
        is_ok &= row.get("ok") == Some(&Value::Bool(true));
        println!("{row}");
    };
    for attempt in
        ATTEMPTS.iter().filter(|attempt| names.is_empty() || names.iter().any(|name| name == attempt.name))
    {
        let roles = Role::ALL.into_iter().filter(|role| attempt.is_tried_in(*role)).map(Some);
        let roles = roles.filter(|_| with).chain(without.then_some(None));
        for role in roles {
            print(row(attempt, role, &probe)?);
        }
    }
    if names.is_empty() {
        checks::all(&probe, &mut print)?;
    }
    Ok(is_ok)
}

/// Makes one attempt in a cell of its own.
fn row(attempt: &Attempt, role: Option<Role>, probe: &Probe) -> Result<Value, String> {
    let expected = expected(attempt, role);
    let role_name = role.map_or("-", Role::name);
    let base = json!({ "attempt": attempt.name, "role": role_name, "expected": words(expected) });
    if attempt.needs_kvm && !std::path::Path::new("/dev/kvm").exists() {
        return Ok(merge(base, json!({ "stopped_by": "skipped: no /dev/kvm", "ok": true })));
    }
    let Told { end, said } = probe.attempt(attempt, role_name)?;
    let has_reached = said.lines().next() == Some(REACHED);
    let outcome = Outcome::of(&end, &said);
    let is_ok = has_reached && outcome.is(expected);
    let mut row = merge(base, json!({ "stopped_by": outcome.words(), "reached": has_reached, "ok": is_ok }));
    if !is_ok {
        row = merge(row, json!({ "end": end.to_string(), "said": said }));
    }
    Ok(row)
}

/// What became of an attempt.
enum Outcome {
    Killed { call: Option<u32> },
    Refused { call: String, error: i32 },
    Through,
    Signalled(i32),
    Unknown,
}

impl Outcome {
    fn of(end: &End, said: &str) -> Self {
        let last = said.lines().last().unwrap_or_default();
        // What it said counts, once it could say it: few filters let a program end by a call of its own afterwards.
        if last == THROUGH {
            return Self::Through;
        }
        // The call's name may hold spaces; the number comes last.
        let told = last.strip_prefix(STOPPED).and_then(|rest| rest.trim().rsplit_once(' '));
        let told = told.and_then(|(call, error)| Some((call.to_owned(), error.parse().ok()?)));
        match (told, end) {
            (Some((call, error)), _) => Self::Refused { call, error },
            (None, End::StoppedBySeccomp { call, .. }) => Self::Killed { call: *call },
            (None, End::Signalled(signal)) => Self::Signalled(*signal),
            (None, End::Exited(_)) => Self::Unknown,
        }
    }

    fn is(&self, expected: Expected) -> bool {
        match (self, expected) {
            (Self::Killed { .. }, Expected::Killed)
            | (Self::Through, Expected::Through | Expected::Beneath(Beneath::Nothing))
            | (
                Self::Signalled(libc::SIGABRT | libc::SIGSEGV),
                Expected::Signalled | Expected::Beneath(Beneath::Signal),
            ) => true,
            (Self::Signalled(libc::SIGKILL), Expected::Beneath(Beneath::MemoryLimit)) => true,
            (Self::Refused { error, .. }, Expected::Answered(expected)) => *error == expected,
            (Self::Refused { error, .. }, Expected::Beneath(layer)) => layer.errors().contains(error),
            _ => false,
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Killed { call } => {
                let name = call
                    .map(|call| casemate_filters::call_name(call).map_or(call.to_string(), str::to_owned));
                format!("seccomp: {}", name.as_deref().unwrap_or("call not told"))
            }
            Self::Refused { call, error } => format!("{call}: {}", std::io::Error::from_raw_os_error(*error)),
            Self::Through => "nothing".into(),
            Self::Signalled(signal) => format!("signal {signal}"),
            Self::Unknown => "unknown".into(),
        }
    }
}

fn words(expected: Expected) -> String {
    match expected {
        Expected::Killed => "seccomp".into(),
        Expected::Answered(error) => format!("seccomp answers {}", std::io::Error::from_raw_os_error(error)),
        Expected::Through => "allowed".into(),
        Expected::Signalled => "signal".into(),
        Expected::Beneath(layer) => format!("beneath seccomp: {layer:?}"),
    }
}

/// One object of the fields of two.
pub(crate) fn merge(mut first: Value, second: Value) -> Value {
    if let (Value::Object(into), Value::Object(from)) = (&mut first, second) {
        into.extend(from);
    }
    first
}
