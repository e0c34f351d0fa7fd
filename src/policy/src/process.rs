//! The process that runs plugins, as whoever asks it has it: `casemate-policy-engine`.
//!
//! A thread starts it and ends it, and does nothing else: a cell can be tied to the thread that made it, so that what a killed keep
//! leaves behind ends too. An answer that is none, or that doesn't come in time, is the process's last: it's ended, and whatever is
//! asked from then on fails with the same words.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Mutex, MutexGuard, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    EngineStreams, Fault, PolicyError, Programs,
    compiler::{anonymous_file, read},
    talk::{self, Ask, Reply},
};

/// What errors call it.
const NAME: &str = "casemate-policy-engine";

/// A running engine.
pub(crate) struct Process {
    line: Mutex<Line>,
    keeper: Keeper,
    pid: u32,
}

/// The way to it.
struct Line {
    /// None once it has failed.
    socket: Option<UnixStream>,
    complaint: File,
    /// Why it's asked nothing any more.
    fate: String,
}

impl Process {
    /// Starts it.
    pub(crate) fn start(programs: &Programs) -> Result<Self, PolicyError> {
        let failed = |error: io::Error| broken(format!("it can't be started: {error}"));
        let (socket, theirs) = UnixStream::pair().map_err(failed)?;
        let complaint = anonymous_file().map_err(failed)?;
        let streams = EngineStreams {
            socket: OwnedFd::from(theirs),
            complaint: complaint.try_clone().map_err(failed)?,
        };
        let (keeper, pid) = Keeper::start(programs, streams)?;
        let line = Line { socket: Some(socket), complaint, fate: String::new() };
        Ok(Self { line: Mutex::new(line), keeper, pid })
    }

    /// Asks, with `code` riding along, and waits for the answer.
    pub(crate) fn ask(
        &self,
        ask: &Ask<'_>,
        code: Option<File>,
        patience: Duration,
    ) -> Result<Reply, PolicyError> {
        let message = talk::encode_ask(ask).map_err(|error| broken(error.to_string()))?;
        self.send(&message, code, patience)
    }

    /// The same with a question that was encoded.
    pub(crate) fn send(
        &self,
        message: &[u8],
        code: Option<File>,
        patience: Duration,
    ) -> Result<Reply, PolicyError> {
        let reply = self.line().exchange(&self.keeper, message, code.as_ref(), patience).map_err(broken)?;
        let reply = serde_json::from_slice(&reply);
        match reply.map_err(|error| broken(format!("its answer can't be read: {error}")))? {
            Reply::Failed { fault, subject, cause } => Err(PolicyError::new(fault, subject, cause)),
            reply => Ok(reply),
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it can still be asked: it has not failed, and is there and silent, as one is that isn't asked.
    pub(crate) fn is_alive(&self) -> bool {
        let line = self.line();
        let Some(socket) = &line.socket else { return false };
        let events =
            poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        events == Ok(0)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It ends when nobody can ask it any more, and is waited for.
        self.line().socket = None;
        self.keeper.end();
    }
}

/// About the process as such.
pub(crate) fn broken(cause: String) -> PolicyError {
    PolicyError::new(Fault::Engine, NAME, cause)
}

impl Line {
    fn exchange(
        &mut self,
        keeper: &Keeper,
        message: &[u8],
        code: Option<&File>,
        patience: Duration,
    ) -> Result<Vec<u8>, String> {
        let Some(socket) = &self.socket else { return Err(self.fate.clone()) };
        let error = match exchange(socket, message, code, patience) {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let what = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("it did not answer within {} s", patience.as_secs_f64())
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "it ended while it was asked".to_owned()
            }
            _ => format!("it can't be talked to: {error}"),
        };
        self.socket = None;
        let how = keeper.end();
        let said = read(&mut self.complaint, 4 << 10).unwrap_or_default();
        let fate = format!("{what} ({how}) {}", String::from_utf8_lossy(&said));
        fate.trim_end().clone_into(&mut self.fate);
        Err(self.fate.clone())
    }
}

/// Sends and receives.
fn exchange(
    socket: &UnixStream,
    message: &[u8],
    code: Option<&File>,
    patience: Duration,
) -> io::Result<Vec<u8>> {
    socket.set_write_timeout(Some(patience))?;
    talk::send(socket, message, code.map(AsFd::as_fd))?;
    let mut until = Until { socket, deadline: Instant::now() + patience };
    talk::receive(&mut until)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// The thread that has started it.
struct Keeper {
    /// None once it has ended it.
    thread: Mutex<Option<Thread>>,
}

struct Thread {
    /// Has it end the engine, and say how that ended.
    end: SyncSender<SyncSender<String>>,
    handle: JoinHandle<()>,
}

impl Keeper {
    fn start(programs: &Programs, streams: EngineStreams) -> Result<(Self, u32), PolicyError> {
        let (started, told) = sync_channel(1);
        let (end, ends) = sync_channel::<SyncSender<String>>(1);
        let programs = programs.clone();
        let keep = move || match programs.launch.engine(&programs.engine, streams) {
            Ok(running) => {
                // Whoever starts it waits for this.
                let _ = started.send(Ok(running.pid()));
                let asked = ends.recv();
                let how = running.end();
                let _ = asked.map(|asked| asked.send(how));
            }
            Err(cause) => {
                let _ = started.send(Err(cause));
            }
        };
        let handle = Builder::new()
            .name("policy-engine".into())
            .spawn(keep)
            .map_err(|error| broken(format!("no thread: {error}")))?;
        let pid = told.recv().unwrap_or_else(|_| Err("its thread is gone".into())).map_err(broken)?;
        Ok((Self { thread: Mutex::new(Some(Thread { end, handle })) }, pid))
    }

    /// Ends it and waits for that; in words how it ended.
    fn end(&self) -> String {
        let taken = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Thread { end, handle }) = taken else { return "it was ended before".into() };
        let (answer, told) = sync_channel(1);
        let how = end.send(answer).ok().and_then(|()| told.recv().ok());
        let _ = handle.join();
        how.unwrap_or_else(|| "its thread is gone".into())
    }
}

/// Reads until a moment.
struct Until<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
}

impl io::Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        let mut socket = self.socket;
        socket.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Ended, Launch, Running, Streams};
    use std::{path::Path, sync::Arc, thread};

    /// An engine that says this, and then nothing.
    struct Liar(Vec<u8>);

    struct Nobody(JoinHandle<()>);

    impl Running for Nobody {
        fn pid(&self) -> u32 {
            0
        }
        fn end(self: Box<Self>) -> String {
            self.0.join().unwrap();
            "killed".into()
        }
    }

    impl Launch for Liar {
        fn compile(&self, _: &Path, _: Streams) -> Result<Ended, String> {
            Err("no compiler".into())
        }
        fn engine(&self, _: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String> {
            let says = self.0.clone();
            let lie = move || {
                let mut socket = UnixStream::from(streams.socket);
                io::Write::write_all(&mut socket, &says).unwrap();
                // Until nobody asks any more.
                io::copy(&mut socket, &mut io::sink()).unwrap();
            };
            Ok(Box::new(Nobody(thread::spawn(lie))))
        }
    }

    #[test]
    fn whatever_an_engine_says_is_an_error_by_name() {
        let framed =
            |text: &str| [&u32::try_from(text.len()).unwrap().to_le_bytes(), text.as_bytes()].concat();
        for (says, told) in [
            (Vec::new(), "did not answer within 0.2 s"),
            (vec![1], "did not answer"),
            (vec![0xff; 4], "a message of 4294967295 bytes"),
            (vec![9, 0, 0, 0, b'{'], "did not answer"),
            (framed(""), "can't be read"),
            (framed("{\"Dance\":1}"), "can't be read"),
            (framed("{\"Suspended\":7}"), "can't be read"),
        ] {
            let none = Path::new("/nowhere").to_owned();
            let programs =
                Programs { compiler: none.clone(), engine: none, launch: Arc::new(Liar(says.clone())) };
            let process = Process::start(&programs).unwrap();
            let error = process.ask(&Ask::Suspended, None, Duration::from_millis(200)).unwrap_err();
            assert_eq!(error.code(), "policy-engine");
            assert!(error.to_string().contains(told), "{says:?}: {error}");
            if error.to_string().contains("answer within") {
                assert!(!process.is_alive());
                let again = process.ask(&Ask::Suspended, None, Duration::from_secs(60)).unwrap_err();
                assert_eq!(again, error, "it's not asked again");
            }
        }
    }

    #[test]
    fn an_engine_that_is_not_there_is_told() {
        let none = Path::new("/nowhere/engine");
        let error = Process::start(&Programs::plain(none, none)).err().unwrap();
        assert!(error.to_string().contains("/nowhere/engine can't be started"), "{error}");
    }
}
