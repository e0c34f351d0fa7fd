//! The half of the test program that runs inside the lab.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{
    Ctx, Failure, LabTest, PATIENCE,
    lines::{Growing, add},
    protocol::{EVENTS, Event, ONE, ORDERS, Order, Outcome, SHARE},
};

/// Where a test's own process leaves its outcome.
const OUTCOME: &str = "/run/lab-outcome";
/// How often it looks for what is to be done next.
const ORDERS_EVERY: Duration = Duration::from_millis(50);
/// How long processes that a test started may take to go after its end.
const GRACE: Duration = Duration::from_secs(3);
/// How much of the kernel's log goes into that of a failed test.
const KERNEL_LINES_MAX: usize = 40;

/// Runs the tests that it is dealt, one after another, each in a process of its own.
pub(crate) fn run_all(tests: &[LabTest]) -> ExitCode {
    match try_run_all(tests) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: the tests can't be run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_run_all(tests: &[LabTest]) -> io::Result<()> {
    let events = Path::new(SHARE).join(EVENTS);
    let tell = |event: &Event| add(&events, event);
    let mut orders = Growing::new(Path::new(SHARE).join(ORDERS));
    tell(&Event::Ready)?;
    loop {
        let name = match orders.new_ones().pop() {
            Some(Order::Run(name)) => name,
            Some(Order::End) => return Ok(()),
            None => {
                thread::sleep(ORDERS_EVERY);
                continue;
            }
        };
        let Some(test) = tests.iter().find(|test| test.name == name) else {
            return Err(io::Error::other(format!("there is no test {name}")));
        };
        tell(&Event::Started { name: test.name.to_owned() })?;
        let start = Instant::now();
        let outcome = run_process(test).unwrap_or_else(|error| {
            Outcome::Failed(format!("the harness could not run the test's process: {error}"))
        });
        let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        tell(&Event::Ended { name: test.name.to_owned(), outcome, milliseconds })?;
    }
}

/// One test in a process and a cgroup of its own, with its output in its log.
fn run_process(test: &LabTest) -> io::Result<Outcome> {
    let log_path = Path::new(SHARE).join(format!("{}.log", test.name));
    let mut log = OpenOptions::new().create(true).append(true).open(log_path)?;
    let _ = fs::remove_file(OUTCOME);
    let kernel_said = kernel_log()?.pop();
    let cgroup = Cgroup::new("lab-test")?;
    // A child starts in its parent's cgroup, so that nothing it forks can be outside.
    cgroup.enter()?;
    let spawned = Command::new("/proc/self/exe")
        .args([ONE, test.name])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        .spawn();
    Cgroup::root().enter()?;
    let mut child = spawned?;
    let start = Instant::now();
    let deadline = test.deadline * PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > deadline {
            break None;
        }
        thread::sleep(Duration::from_millis(30));
    };
    let mut outcome = match status {
        Some(status) => told_outcome(status),
        None => Outcome::Failed(format!("did not end within {} s", deadline.as_secs())),
    };
    let left = if status.is_some() { cgroup.processes_after(GRACE) } else { Vec::new() };
    cgroup.kill();
    let _ = child.wait();
    if outcome == Outcome::Passed && !left.is_empty() {
        outcome = Outcome::Failed(format!("passed, but left processes behind: {}", left.join(", ")));
    }
    if matches!(outcome, Outcome::Failed(_)) {
        let lines = kernel_log()?;
        let new =
            kernel_said.and_then(|last| lines.iter().rposition(|line| *line == last)).map_or(0, |at| at + 1);
        let new = new.max(lines.len().saturating_sub(KERNEL_LINES_MAX));
        writeln!(log, "--- what the lab's kernel logged meanwhile")?;
        writeln!(log, "{}", lines.get(new..).unwrap_or_default().join("\n"))?;
    }
    Ok(outcome)
}

fn kernel_log() -> io::Result<Vec<String>> {
    let dmesg = Command::new("busybox").arg("dmesg").output()?;
    Ok(String::from_utf8_lossy(&dmesg.stdout).lines().map(str::to_owned).collect())
}

fn told_outcome(status: ExitStatus) -> Outcome {
    let told = fs::read_to_string(OUTCOME).ok().and_then(|text| serde_json::from_str(&text).ok());
    told.unwrap_or_else(|| Outcome::Failed(format!("the test's process ended without an outcome: {status}")))
}

/// The test itself, in its own process.
pub(crate) fn run_one(tests: &[LabTest], name: &str) -> ExitCode {
    let Some(test) = tests.iter().find(|test| test.name == name) else { return ExitCode::FAILURE };
    let outcome = match catch_unwind(AssertUnwindSafe(|| (test.body)(&mut Ctx::new(test.name)?))) {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(Failure::Failed(message))) => Outcome::Failed(message),
        Ok(Err(Failure::Skipped(reason))) => Outcome::Skipped(reason),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Outcome::Failed(format!("panicked: {text}"))
        }
    };
    println!("--- {outcome:?}");
    let written = serde_json::to_string(&outcome).map(|text| fs::write(OUTCOME, text));
    if matches!(written, Ok(Ok(()))) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A control group (v2), removed with all of its processes when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn root() -> Self {
        Self(PathBuf::from("/sys/fs/cgroup"))
    }

    fn new(name: &str) -> io::Result<Self> {
        let path = Self::root().0.join(name);
        let _ = fs::remove_dir(&path);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// Moves this process into it.
    fn enter(&self) -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .open(self.0.join("cgroup.procs"))
            .and_then(|mut file: File| file.write_all(b"0"))
    }

    /// Those that still run after `grace`, as "PID NAME".
    fn processes_after(&self, grace: Duration) -> Vec<String> {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
            if text.is_empty() || start.elapsed() > grace {
                let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                return text.lines().map(|pid| format!("{pid} {}", name(pid).trim())).collect();
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&self) {
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
