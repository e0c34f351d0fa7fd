//! Programs that a test starts: their output kept, shown in the test's log, and bounded in time.

use std::{
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use serde_json::Value;

use super::{Failure, PATIENCE};

/// What a program has printed so far.
#[derive(Debug, Default)]
struct Printed {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    open_streams: u8,
}

#[derive(Debug, Default)]
struct Shared {
    printed: Mutex<Printed>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Printed> {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A program that runs. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    shown: String,
    child: Child,
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    start: Instant,
}

/// A program that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Running {
    pub(super) fn spawn(mut command: Command, shown: String) -> Result<Self, Failure> {
        println!("$ {shown}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().map_err(|error| Failure::new(format_args!("cannot start `{shown}`: {error}")))?;
        let shared = Arc::new(Shared::default());
        shared.lock().open_streams = 2;
        let mut readers = Vec::new();
        if let Some(stream) = child.stdout.take() {
            let shared = Arc::clone(&shared);
            readers.push(thread::spawn(move || keep(stream, &shared, |printed| &mut printed.stdout)));
        }
        if let Some(stream) = child.stderr.take() {
            let shared = Arc::clone(&shared);
            readers.push(thread::spawn(move || keep(stream, &shared, |printed| &mut printed.stderr)));
        }
        Ok(Self { shown, child, shared, readers, start: Instant::now() })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed on standard output.
    pub fn printed_so_far(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().stdout).into_owned()
    }

    /// Waits until standard output holds `text`; fails when the program ends, or `timeout` passes, without it.
    pub fn wait_for_text(&self, text: &str, timeout: Duration) -> Result<(), Failure> {
        let what = format_args!("did not print {text:?}").to_string();
        self.wait_for(&what, timeout, |printed| holds(&printed.stdout, text).then_some(()))
    }

    /// Waits until `casemate --json` has told, on standard error, of this step; returns what it said of it.
    pub fn wait_for_step(&self, step: &str, timeout: Duration) -> Result<Value, Failure> {
        let what = format_args!("did not come to step {step:?}").to_string();
        self.wait_for(&what, timeout, |printed| {
            let told = String::from_utf8_lossy(&printed.stderr);
            json_lines(&told).find(|line| line.get("step").and_then(Value::as_str) == Some(step))
        })
    }

    fn wait_for<T>(
        &self,
        what: &str,
        timeout: Duration,
        find: impl Fn(&Printed) -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + timeout * PATIENCE;
        let mut printed = self.shared.lock();
        loop {
            if let Some(found) = find(&printed) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || printed.open_streams == 0 {
                let why = if left.is_zero() { "in time" } else { "before it ended" };
                return Err(Failure::new(format_args!(
                    "`{}` {what} {why} ({} s): {}",
                    self.shown,
                    self.start.elapsed().as_secs(),
                    String::from_utf8_lossy(&printed.stderr).lines().last().unwrap_or_default()
                )));
            }
            printed =
                self.shared.changed.wait_timeout(printed, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) -> Result<(), Failure> {
        send_signal(self.pid(), signal)
    }

    /// Waits for the end; kills the program, and fails, when it hasn't come within `timeout`.
    pub fn wait(mut self, timeout: Duration) -> Result<Finished, Failure> {
        let timeout = timeout * PATIENCE;
        let deadline = Instant::now() + timeout;
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let process =
            pidfd_open(pid.ok_or_else(|| Failure::new("it has no process id"))?, PidfdFlags::empty())?;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let _ = self.child.kill();
                return Err(Failure::new(format_args!(
                    "`{}` did not end within {} s",
                    self.shown,
                    timeout.as_secs()
                )));
            }
            // Woken by a signal, it's looked at again.
            let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Timespec::try_from(left).ok().as_ref());
        };
        let elapsed = self.start.elapsed();
        // A process that it left may hold its output open: what comes later than this isn't its own.
        let late = Instant::now() + Duration::from_secs(2);
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < late {
            thread::sleep(Duration::from_millis(5));
        }
        println!("# {status} after {:.2} s", elapsed.as_secs_f64());
        let printed = self.shared.lock();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Finished {
            shown: self.shown.clone(),
            status,
            stdout: text(&printed.stdout),
            stderr: text(&printed.stderr),
            elapsed,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Fails unless the program ended with 0.
    pub fn success(&self) -> Result<&Self, Failure> {
        if self.status.success() {
            return Ok(self);
        }
        let how = match self.status.signal() {
            Some(signal) => format!("was killed by signal {signal}"),
            None => format!("ended with {}", self.status.code().unwrap_or(-1)),
        };
        let complaint = self.stderr.lines().rev().take(3).collect::<Vec<_>>();
        let complaint: Vec<&str> = complaint.into_iter().rev().collect();
        Err(Failure::new(format_args!("`{}` {how}: {}", self.shown, complaint.join(" | "))))
    }

    /// Fails unless the program ended by itself with another code than 0 and said `[code]`, or with `--json`
    /// `"refused":"code"`, in one line of stderr. Returns that line.
    pub fn refusal(&self, code: &str) -> Result<&str, Failure> {
        let marker = format!("[{code}]");
        let in_json = format!("\"refused\":\"{code}\"");
        let line = self.stderr.lines().find(|line| line.contains(&marker) || line.contains(&in_json));
        match (self.status.code(), line) {
            (Some(1..), Some(line)) => Ok(line),
            (ended, _) => Err(Failure::new(format_args!(
                "`{}` should refuse with {marker}; it ended with {ended:?} and said: {}",
                self.shown,
                self.stderr.trim()
            ))),
        }
    }

    /// The report that `casemate run --json` ends with.
    pub fn report(&self) -> Result<Value, Failure> {
        let report = json_lines(&self.stderr).find_map(|mut line| line.get_mut("report").map(Value::take));
        report.ok_or_else(|| {
            Failure::new(format_args!("`{}` gave no report: {}", self.shown, self.stderr.trim()))
        })
    }

    /// Fails unless standard output holds `text`.
    pub fn printed(&self, text: &str) -> Result<&Self, Failure> {
        if self.stdout.contains(text) {
            return Ok(self);
        }
        Err(Failure::new(format_args!("`{}` did not print {text:?}", self.shown)))
    }

    /// What follows `label` on the first line of standard output that begins with it: how a guest's script hands values
    /// to a test (`echo "digest: $d"`).
    pub fn value(&self, label: &str) -> Result<&str, Failure> {
        let found = self.stdout.lines().find_map(|line| line.trim().strip_prefix(label));
        found
            .map(str::trim)
            .ok_or_else(|| Failure::new(format_args!("`{}` printed no line {label:?}", self.shown)))
    }
}

/// Sends a signal to a process of the lab.
pub fn send_signal(pid: u32, signal: Signal) -> Result<(), Failure> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let raw = raw.ok_or_else(|| Failure::new(format_args!("{pid} is no process id")))?;
    println!("$ kill -{} {pid}", signal.as_raw());
    Ok(kill_process(raw, signal)?)
}

/// The lines that are JSON; others may stand between them.
fn json_lines(text: &str) -> impl Iterator<Item = Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}

fn keep(mut stream: impl Read, shared: &Shared, place: fn(&mut Printed) -> &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        let _ = std::io::stdout().lock().write_all(bytes);
        let _ = std::io::stdout().lock().flush();
        place(&mut shared.lock()).extend_from_slice(bytes);
        shared.changed.notify_all();
    }
    shared.lock().open_streams -= 1;
    shared.changed.notify_all();
}

fn holds(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len().max(1)).any(|window| window == text.as_bytes())
}
