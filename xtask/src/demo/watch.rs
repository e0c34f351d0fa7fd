//! Running one of Casemate's commands before an audience.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

use crate::{progress::Ticker, steps::workspace};

/// What was seen of a command.
pub(super) struct Seen {
    /// How it ended; `None` when it could not be started.
    pub(super) status: Option<ExitStatus>,
    /// Its lines, of both streams, as they came.
    pub(super) lines: Vec<String>,
    /// When the guest's first process spoke, from the command's start.
    pub(super) guest_init: Option<Duration>,
}

impl Seen {
    /// What follows `label` on the first line that begins with it.
    pub(super) fn value(&self, label: &str) -> Option<&str> {
        self.lines.iter().find_map(|line| line.trim().strip_prefix(label)).map(str::trim)
    }

    /// Whether it ended with 0.
    pub(super) fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Runs `casemate` with these arguments and shows what it prints, with a sign of life while it prints nothing.
pub(super) fn casemate(programs: &Path, arguments: &[&str]) -> Seen {
    println!("\n$ casemate {}", arguments.join(" "));
    let mut seen = Seen { status: None, lines: Vec::new(), guest_init: None };
    let mut command = Command::new(programs.join("casemate"));
    command.env("CASEMATE_POLICY", workspace().join("policies/default.toml"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            println!("  cannot start casemate: {error}");
            return seen;
        }
    };
    let (sender, lines) = mpsc::channel();
    if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
        let second = sender.clone();
        thread::spawn(move || send_lines(stdout, &sender));
        thread::spawn(move || send_lines(stderr, &second));
    }
    let ticker = Ticker::new(arguments.first().unwrap_or(&"casemate"));
    loop {
        match lines.recv_timeout(Duration::from_millis(250)) {
            Ok(line) => {
                if line.contains("CASEMATE-INIT") && seen.guest_init.is_none() {
                    seen.guest_init = Some(start.elapsed());
                }
                ticker.say(&format!("  | {line}"));
                seen.lines.push(line);
            }
            Err(RecvTimeoutError::Timeout) => ticker.tick(),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    seen.status = child.wait().ok();
    ticker.clear();
    println!("  ({:.1} s)", start.elapsed().as_secs_f64());
    seen
}

fn send_lines(stream: impl Read, sender: &Sender<String>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        if sender.send(text).is_err() {
            return;
        }
    }
}
