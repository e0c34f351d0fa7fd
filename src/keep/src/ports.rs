//! Ports with names (virtio console): each is a socket on the host, by which one program at a time speaks with one in the guest.
//!
//! The cell has a stream to the keep for each port, from before the guest's start to its end. What the guest writes while nobody
//! is connected is lost, as with a serial line that is not plugged in.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
};

use casemate_spec::Refusal;
use rustix::event::{PollFd, PollFlags, poll};

use crate::vsock::{GuestSocket, listen};

/// Bytes on their way in one direction at most.
const CHUNK_BYTES: usize = 16 << 10;

/// Listens at `path`, for root, and serves until the cell has gone, whose end of the stream is returned.
///
/// # Errors
/// `port-socket`.
pub(crate) fn open(path: &Path) -> Result<(GuestSocket, OwnedFd), Refusal> {
    let (socket, listener) = listen(path, "port-socket")?;
    let failed = |error: io::Error| {
        let cause = format_args!("its port cannot be served: {error}");
        Refusal::new("port-socket", path.display(), cause, "try again")
    };
    let (keep, cell) = UnixStream::pair().map_err(failed)?;
    keep.set_nonblocking(true).and_then(|()| cell.set_nonblocking(true)).map_err(failed)?;
    let mut port = Port { listener, guest: keep, client: None, to_guest: Vec::new(), to_client: Vec::new() };
    let serve = move || while port.turn().is_some() {};
    thread::Builder::new().name("port".into()).spawn(serve).map_err(failed)?;
    Ok((socket, cell.into()))
}

struct Port {
    listener: UnixListener,
    guest: UnixStream,
    client: Option<UnixStream>,
    to_guest: Vec<u8>,
    to_client: Vec<u8>,
}

impl Port {
    /// Waits for something, and does it; `None` when the cell has gone.
    fn turn(&mut self) -> Option<()> {
        let wanted = |reads: bool, writes: bool| {
            let flag = |is: bool, flag: PollFlags| if is { flag } else { PollFlags::empty() };
            flag(reads, PollFlags::IN) | flag(writes, PollFlags::OUT)
        };
        let of_guest = wanted(self.to_client.is_empty(), !self.to_guest.is_empty());
        let of_client = wanted(self.to_guest.is_empty(), !self.to_client.is_empty());
        let mut fds = vec![PollFd::from_borrowed_fd(self.guest.as_fd(), of_guest)];
        match &self.client {
            Some(client) => fds.push(PollFd::from_borrowed_fd(client.as_fd(), of_client)),
            None => fds.push(PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)),
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Some(()),
            Err(_) => return None,
        }
        let [of_guest, of_other] = [0, 1].map(|at| fds.get(at).map_or(PollFlags::empty(), PollFd::revents));
        drop(fds);
        if !of_guest.is_empty() {
            read(&self.guest, &mut self.to_client).ok()?;
        }
        match &self.client {
            None if !of_other.is_empty() => {
                let arrived = self.listener.accept().ok().map(|(stream, _)| stream);
                self.client = arrived.filter(|stream| stream.set_nonblocking(true).is_ok());
            }
            Some(client) if !of_other.is_empty() && read(client, &mut self.to_guest).is_err() => {
                self.client = None;
            }
            _ => {}
        }
        write(&self.guest, &mut self.to_guest).ok()?;
        match &self.client {
            Some(client) if write(client, &mut self.to_client).is_err() => self.client = None,
            Some(_) => {}
            None => self.to_client.clear(),
        }
        Some(())
    }
}

/// Reads what is there, when what was read before has gone; an error at the end.
fn read(mut from: &UnixStream, into: &mut Vec<u8>) -> io::Result<()> {
    if !into.is_empty() {
        return Ok(());
    }
    into.resize(CHUNK_BYTES, 0);
    let count = match from.read(into) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        count => count,
    };
    into.truncate(count.as_ref().copied().unwrap_or(0));
    count.map(drop)
}

/// Writes as much as there is room for.
fn write(mut to: &UnixStream, from: &mut Vec<u8>) -> io::Result<()> {
    if from.is_empty() {
        return Ok(());
    }
    match to.write(from) {
        Ok(count) => {
            from.drain(..count.min(from.len()));
            Ok(())
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    #[test]
    fn one_after_the_other_speaks_with_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let (socket, cell) = open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut cell = UnixStream::from(cell);
        cell.set_nonblocking(false).unwrap();
        cell.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        for word in [b"first", b"other"] {
            let mut client = connect(&path);
            client.write_all(word).unwrap();
            let mut heard = [0; 5];
            cell.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, word);
            cell.write_all(b"reply").unwrap();
            client.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"reply");
        }
        drop((cell, socket));
        assert!(!path.exists());
    }

    #[test]
    fn much_goes_both_ways_at_once() {
        const ALL: usize = 4 << 20;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent");
        let (_socket, cell) = open(&path).unwrap();
        let cell = UnixStream::from(cell);
        cell.set_nonblocking(false).unwrap();
        let client = connect(&path);
        let say = |stream: &UnixStream, byte: u8| {
            let mut stream = stream.try_clone().unwrap();
            thread::spawn(move || stream.write_all(&vec![byte; ALL]).unwrap())
        };
        // The first byte says that the client was taken.
        (&client).write_all(&[1]).unwrap();
        let mut heard = [0];
        (&cell).read_exact(&mut heard).unwrap();
        let sayers = [say(&client, 1), say(&cell, 2)];
        for (stream, byte) in [(&cell, 1), (&client, 2)] {
            let mut heard = vec![0; ALL];
            let mut stream = stream.try_clone().unwrap();
            stream.read_exact(&mut heard).unwrap();
            assert!(heard.iter().all(|heard| *heard == byte));
        }
        sayers.into_iter().for_each(|sayer| sayer.join().unwrap());
    }
}
