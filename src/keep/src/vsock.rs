//! A guest's sockets on the host: the cell can connect to nothing, so connections are made here and handed in.
//!
//! As Firecracker and Cloud Hypervisor have it: who connects to the guest's socket and says `CONNECT PORT` speaks with that
//! port of the guest's, once it has read a line that begins with `OK`; and when the guest connects to a port of the host's,
//! it speaks with who listens at the socket's path, `_` and the port.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use casemate_broker::hands;
use casemate_spec::Refusal;
use casemate_wire::{Channel, FromVsock, Slot, ToVsock, WireError};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

/// Who has connected and has not yet said where to; more wait in the kernel's queue.
const VISITORS_MAX: usize = 64;
/// For saying so.
const PATIENCE: Duration = Duration::from_secs(5);
/// `CONNECT 4294967295`, and more than that is none.
const LINE_BYTES_MAX: usize = 32;

/// The socket's path while its guest runs.
pub(crate) struct GuestSocket {
    path: PathBuf,
}

impl Drop for GuestSocket {
    fn drop(&mut self) {
        hands::unlisten(&self.path);
    }
}

struct Visitor {
    stream: UnixStream,
    line: Vec<u8>,
    since: Instant,
}

struct Service {
    path: PathBuf,
    listener: UnixListener,
    channel: Channel,
    visitors: Vec<Visitor>,
}

impl GuestSocket {
    /// Listens at `path`, for root, and serves until the other end is closed, which is for the cell: streams are handed in
    /// there.
    ///
    /// # Errors
    /// `vsock-socket`.
    pub(crate) fn open(path: &Path) -> Result<(Self, OwnedFd), Refusal> {
        let (socket, listener) = listen(path, "vsock-socket")?;
        let failed = |error: &dyn std::fmt::Display| refuse(path, "vsock-socket", error);
        let (keep, cell) = make_way().map_err(|error| failed(&error))?;
        let service = Service {
            path: socket.path.clone(),
            listener,
            channel: Channel::new(keep),
            visitors: Vec::new(),
        };
        let thread = thread::Builder::new().name("vsock".into());
        thread.spawn(move || service.run()).map_err(|error| failed(&error))?;
        Ok((socket, cell))
    }
}

/// Listens at `path`, for root alone; what a killed keep left there is removed. Nobody waits for a visitor.
///
/// # Errors
/// A refusal of this code.
pub(crate) fn listen(path: &Path, code: &'static str) -> Result<(GuestSocket, UnixListener), Refusal> {
    let path = std::path::absolute(path).unwrap_or(path.to_owned());
    let listener = hands::listen(&path, code)?;
    Ok((GuestSocket { path }, listener))
}

fn refuse(path: &Path, code: &'static str, error: &dyn std::fmt::Display) -> Refusal {
    let cause = format!("no socket can be made there: {error}");
    Refusal::new(code, path.display(), cause, "name a path in a folder that is there, and free")
}

/// The way into the cell, whose end does not block.
fn make_way() -> io::Result<(OwnedFd, OwnedFd)> {
    let (keep, cell) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&cell, true)?;
    Ok((keep, cell))
}

impl Service {
    fn run(mut self) {
        while self.turn().is_some() {}
    }

    /// `None` when the cell has gone.
    fn turn(&mut self) -> Option<()> {
        let has_room = self.visitors.len() < VISITORS_MAX;
        let mut fds = vec![PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN)];
        let listening = if has_room { PollFlags::IN } else { PollFlags::empty() };
        fds.push(PollFd::from_borrowed_fd(self.listener.as_fd(), listening));
        let visitors = self.visitors.iter();
        fds.extend(visitors.map(|visitor| PollFd::from_borrowed_fd(visitor.stream.as_fd(), PollFlags::IN)));
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let patience = (!self.visitors.is_empty()).then_some(&second);
        match poll(&mut fds, patience) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready.first() == Some(&true) {
            self.hear()?;
        }
        if has_room && ready.get(1) == Some(&true) {
            self.welcome();
        }
        let mut index = 1;
        let now = Instant::now();
        let mut spoke = Vec::new();
        self.visitors.retain_mut(|visitor| {
            index += 1;
            let is_ready = ready.get(index) == Some(&true);
            match if is_ready { visitor.read() } else { Ok(None) } {
                Ok(None) => now.duration_since(visitor.since) < PATIENCE,
                Ok(Some(port)) => {
                    spoke.extend(visitor.stream.try_clone().map(|stream| (port, stream)));
                    false
                }
                Err(_) => false,
            }
        });
        for (port, stream) in spoke {
            self.channel.send(&ToVsock::Stream { port, stream: Slot(0) }, &[stream.as_fd()]).ok()?;
        }
        Some(())
    }

    fn welcome(&mut self) {
        let Ok((stream, _)) = self.listener.accept() else { return };
        if stream.set_nonblocking(true).is_ok() {
            self.visitors.push(Visitor { stream, line: Vec::new(), since: Instant::now() });
        }
    }

    /// The guest wants to speak with a port of the host's.
    fn hear(&mut self) -> Option<()> {
        let (number, port) = match self.channel.receive::<FromVsock>() {
            Ok((FromVsock::Connect { number, port }, _)) => (number, port),
            // A cell is not believed, and what it says wrongly is not answered.
            Err(WireError::Malformed | WireError::TooLarge) => return Some(()),
            Err(_) => return None,
        };
        let answer = match self.connect(port) {
            Ok(stream) => {
                let message = ToVsock::Answer { number, stream: Some(Slot(0)) };
                self.channel.send(&message, &[stream.as_fd()])
            }
            Err(_) => self.channel.send(&ToVsock::Answer { number, stream: None }, &[]),
        };
        answer.ok()
    }

    fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        hands::speak(&self.path, port)
    }
}

impl Visitor {
    /// The port, once the line is whole. What comes behind it is the guest's, and stays in the stream.
    fn read(&mut self) -> io::Result<Option<u32>> {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if self.line.len() < LINE_BYTES_MAX => self.line.extend(byte),
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let line = std::str::from_utf8(&self.line).map_err(io::Error::other)?;
        let port = line.strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok());
        port.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn opened() -> (tempfile::TempDir, GuestSocket, Channel) {
        let directory = tempfile::tempdir().unwrap();
        let (socket, cell) = GuestSocket::open(&directory.path().join("web.vsock")).unwrap();
        let cell = Channel::new(cell);
        rustix::io::ioctl_fionbio(&cell, false).unwrap();
        (directory, socket, cell)
    }

    #[test]
    fn a_visitor_is_handed_in_when_it_said_where_to() {
        let (_directory, socket, cell) = opened();
        for nonsense in ["HELLO\n", "CONNECT x\n", &"x".repeat(100)] {
            let mut visitor = UnixStream::connect(&socket.path).unwrap();
            visitor.write_all(nonsense.as_bytes()).unwrap();
            assert!(!matches!(visitor.read(&mut [0]), Ok(1..)), "{nonsense}");
        }
        let mut visitor = UnixStream::connect(&socket.path).unwrap();
        visitor.write_all(b"CONNECT 700").unwrap();
        thread::sleep(Duration::from_millis(50));
        visitor.write_all(b"0\nand more").unwrap();
        let (message, mut descriptors) = cell.receive::<ToVsock>().unwrap();
        assert_eq!(message, ToVsock::Stream { port: 7000, stream: Slot(0) });
        let mut stream = UnixStream::from(descriptors.take(Slot(0)).unwrap());
        stream.set_nonblocking(false).unwrap();
        let mut more = [0; 8];
        stream.read_exact(&mut more).unwrap();
        assert_eq!(&more, b"and more");
    }

    #[test]
    fn the_guest_reaches_who_listens() {
        let (directory, socket, cell) = opened();
        let listener = UnixListener::bind(directory.path().join("web.vsock_7001")).unwrap();
        for (number, port, there) in [(1, 7001, true), (2, 7002, false)] {
            cell.send(&FromVsock::Connect { number, port }, &[]).unwrap();
            let (message, mut descriptors) = cell.receive::<ToVsock>().unwrap();
            assert_eq!(message, ToVsock::Answer { number, stream: there.then_some(Slot(0)) });
            if there {
                let mut stream = UnixStream::from(descriptors.take(Slot(0)).unwrap());
                stream.write_all(b"hello").unwrap();
                let mut hello = [0; 5];
                listener.accept().unwrap().0.read_exact(&mut hello).unwrap();
                assert_eq!(&hello, b"hello");
            }
        }
        let path = socket.path.clone();
        assert!(matches!(GuestSocket::open(&path), Err(refusal) if refusal.code == "vsock-socket"));
        drop((socket, cell));
        assert!(!path.exists());
    }
}
