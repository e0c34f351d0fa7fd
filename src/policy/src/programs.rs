//! The two programs beside `casemate` that have to do with plugins, and ways to run them. Whoever can make cells runs them in
//! cells.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{Code, OwnCode, PolicyError, limits::HOST_LIMITS};

/// The compiler's standard streams: files in memory.
#[derive(Debug)]
pub struct Streams {
    /// The component, from its start.
    pub input: File,
    /// For the compiled code.
    pub output: File,
    /// For a line that says what is wrong.
    pub complaint: File,
}

/// The engine's standard streams. It has no output.
#[derive(Debug)]
pub struct EngineStreams {
    /// Its standard input: a stream socket, over which it's asked and answers.
    pub socket: OwnedFd,
    /// For a line that says what is wrong: a file in memory.
    pub complaint: File,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// In another way, in words.
    Otherwise(String),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Otherwise(how) => f.write_str(how),
        }
    }
}

/// A way to run these programs.
pub trait Launch: Send + Sync {
    /// Runs the compiler with these streams, an empty environment and no arguments to its end, and ends it itself when that has
    /// not come within [`compile_ms`](crate::HostLimits).
    ///
    /// # Errors
    /// Why it could not be started, or was ended; in words.
    fn compile(&self, program: &Path, streams: Streams) -> Result<Ended, String>;

    /// Starts the engine with these streams, an empty environment and no arguments. It's asked and ended by the thread that
    /// called this.
    ///
    /// # Errors
    /// Why it could not be started, in words.
    fn engine(&self, program: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String>;

    /// Compiled code that somebody else keeps and makes; none where that is this process's to do.
    fn code(&self) -> Option<Box<dyn Code + '_>> {
        None
    }
}

/// An engine that was started. Dropping it ends it.
pub trait Running {
    /// Its process id, as the host counts.
    fn pid(&self) -> u32;

    /// Waits for its end, which is near, and kills it when that does not come; in words how it ended.
    fn end(self: Box<Self>) -> String;
}

/// The programs, and the way to run them.
#[derive(Clone)]
pub struct Programs {
    /// `casemate-policy-compiler`. It's started for plugins that aren't in the cache.
    pub compiler: PathBuf,
    /// `casemate-policy-engine`. One is started for each bundle that is opened.
    pub engine: PathBuf,
    /// Who runs them.
    pub launch: Arc<dyn Launch>,
}

impl Programs {
    /// Compiled code: in the cache at this path, where nobody else keeps it.
    pub(crate) fn code(&self, cache: &Path) -> Result<Box<dyn Code + '_>, PolicyError> {
        match self.launch.code() {
            Some(code) => Ok(code),
            None => Ok(Box::new(OwnCode::open(cache, &self.compiler, Arc::clone(&self.launch))?)),
        }
    }

    /// The programs as children of this process: see [`Plain`].
    pub fn plain(compiler: &Path, engine: &Path) -> Self {
        Self { compiler: compiler.into(), engine: engine.into(), launch: Arc::new(Plain::DEFAULT) }
    }
}

/// Runs the programs as children of this process, with this user's rights but for what they give up themselves: for users who
/// can't make cells.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// When the compiler is ended.
    pub deadline: Duration,
}

impl Plain {
    /// As every host has it: [`compile_ms`](crate::HostLimits).
    pub const DEFAULT: Self = Self { deadline: Duration::from_millis(HOST_LIMITS.compile_ms) };
}

/// How long an engine may take to end when nobody is there that could ask it.
const ENDING: Duration = Duration::from_secs(1);

impl Launch for Plain {
    fn compile(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        let mut command = bare(program);
        command.stdin(streams.input).stdout(streams.output).stderr(streams.complaint);
        let status = wait(&mut start(command, program)?, self.deadline)?;
        Ok(status.code().map_or_else(|| Ended::Otherwise(status.to_string()), Ended::Exited))
    }

    fn engine(&self, program: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String> {
        let mut command = bare(program);
        command.stdin(streams.socket).stdout(Stdio::null()).stderr(streams.complaint);
        Ok(Box::new(PlainRunning(start(command, program)?)))
    }
}

fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    // As in a cell (`casemate_jail`): the engine's filters don't let its threads register restartable sequences.
    command.env_clear().env("GLIBC_TUNABLES", "glibc.pthread.rseq=0").current_dir("/");
    command
}

fn start(mut command: Command, program: &Path) -> Result<Child, String> {
    command.spawn().map_err(|error| format!("{} can't be started: {error}", program.display()))
}

struct PlainRunning(Child);

impl Running for PlainRunning {
    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn end(mut self: Box<Self>) -> String {
        match wait(&mut self.0, ENDING) {
            Ok(status) => status.to_string(),
            Err(cause) => cause,
        }
    }
}

impl Drop for PlainRunning {
    fn drop(&mut self) {
        // Nothing happens where it has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait(child: &mut Child, most: Duration) -> Result<ExitStatus, String> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if start.elapsed() < most => sleep(Duration::from_millis(5)),
            outcome => {
                // It's reaped in any case; that it may have ended by itself just now changes nothing.
                let _ = child.kill();
                let _ = child.wait();
                return Err(match outcome {
                    Err(error) => format!("it can't be waited for: {error}"),
                    Ok(_) => format!("it did not end within {} s", most.as_secs_f64()),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_a_program_that_does_not_end() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let start = Instant::now();
        assert!(wait(&mut child, Duration::from_millis(20)).is_err());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
