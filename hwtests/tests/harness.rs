//! The harness of the lab tests can fail: tests that go wrong in every way, and a check that each is told as it is.
//!
//! This program is a lab test program whose tests mostly fail. Run by cargo it starts itself as one, and judges what that
//! says. It takes three lab runs, for one of its tests crashes its lab.

use std::{
    env, fs,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{self, Ctx, Failure, LabTest, NO_LABS},
};

/// Set, this program is the lab test program itself.
const CASES_ONLY: &str = "CASEMATE_HARNESS_CASES";

const CASES: &[LabTest] = &[
    LabTest::new("case-passes", |_| Ok(())),
    LabTest::new("case-fails", |ctx| {
        expect!(ctx.name() == "another", "said by the test");
        Ok(())
    }),
    LabTest::new("case-panics", panics),
    LabTest::new("case-hangs", hangs).deadline_seconds(2),
    LabTest::new("case-leaves-a-process", leaves_a_process),
    LabTest::new("case-skips", |_| Err(Failure::skip("nothing to test here"))),
    LabTest::new("case-kills-its-own-process", |ctx| ctx.shell("kill -9 $PPID").map(drop)),
    LabTest::new("case-crashes-the-lab", crashes_the_lab),
    LabTest::new("case-runs-in-the-next-lab", |_| Ok(())),
    LabTest::new("case-is-long", |_| Ok(())).long("on purpose"),
];

/// What the runner must say of each: its word, and a part of the message if it has one.
const EXPECTED: &[(&str, &str, &str)] = &[
    ("case-passes", "ok", ""),
    ("case-fails", "FAILED", "said by the test"),
    ("case-panics", "FAILED", "panicked: index out of bounds"),
    ("case-hangs", "FAILED", "did not end within 6 s"),
    ("case-leaves-a-process", "FAILED", "left processes behind"),
    ("case-skips", "ignored", "nothing to test here"),
    ("case-kills-its-own-process", "FAILED", "ended without an outcome: signal: 9"),
    ("case-crashes-the-lab", "FAILED", "Kernel panic - not syncing: sysrq triggered crash"),
    ("case-runs-in-the-next-lab", "ok", ""),
    ("case-is-long", "ignored", "on purpose"),
];
const CLOSING: &str = "2 passed; 6 failed; 2 ignored";

fn panics(ctx: &mut Ctx) -> Result<(), Failure> {
    let empty: Vec<u8> = fs::read(ctx.directory()).unwrap_or_default();
    #[allow(clippy::indexing_slicing)]
    let _ = empty[0];
    Ok(())
}

fn hangs(_: &mut Ctx) -> Result<(), Failure> {
    thread::sleep(Duration::from_secs(1000));
    Ok(())
}

fn leaves_a_process(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("setsid sleep 1000 >/dev/null 2>&1 &").map(drop)
}

fn crashes_the_lab(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("echo c >/proc/sysrq-trigger").map(drop)
}

fn main() -> ExitCode {
    let inside =
        env::args().nth(1).is_some_and(|first| first.starts_with("--inside") || first == "--one-test");
    if inside || env::var_os(CASES_ONLY).is_some() {
        return harness::main(CASES);
    }
    if env::args().any(|argument| argument == "--list") {
        println!("the-harness-tells-what-went-wrong: test");
        return ExitCode::SUCCESS;
    }
    if env::var_os(NO_LABS).is_some() {
        println!("the harness is not tested: {NO_LABS} is set");
        return ExitCode::SUCCESS;
    }
    match judge() {
        Ok(()) => {
            println!("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
            ExitCode::SUCCESS
        }
        Err(message) => {
            println!(
                "{message}\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out"
            );
            ExitCode::FAILURE
        }
    }
}

fn judge() -> Result<(), String> {
    let this = env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(this).env(CASES_ONLY, "1").env_remove("CASEMATE_LONG").output();
    let output = output.map_err(|error| error.to_string())?;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let wrong = |what: String| Err(format!("{what}; all that the cases' run said:\n{said}"));
    for (name, word, message) in EXPECTED {
        let line = said.lines().find(|line| line.starts_with("test ") && line.contains(name));
        if !line.is_some_and(|line| line.contains(word)) {
            return wrong(format!("{name} should be told as {word}, and is as {line:?}"));
        }
        let heading = format!("---- {name} ----");
        let details = said.split_once(&heading).map_or("", |(_, rest)| rest);
        let details = details.split_once("\n---- ").map_or(details, |(own, _)| own);
        if !details.contains(message) && !line.is_some_and(|line| line.contains(message)) {
            return wrong(format!("the message of {name} should hold {message:?}"));
        }
    }
    if !said.contains(CLOSING) || output.status.success() {
        return wrong(format!("the run should end with {CLOSING} and fail; it ended with {}", output.status));
    }
    Ok(())
}
