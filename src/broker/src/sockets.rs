//! Sockets of a guest's on the host: made for root alone. Those for operators are read here before the keep reads them, since what an
//! operator wants attached is what a keep may open while its guest runs.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use casemate_spec::Refusal;
use casemate_wire::Channel;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use serde::Deserialize;

use crate::{Attachment, envelope, grants::Grants};

/// Most bytes of an operator's request, and one more for the keep to see that it was too many.
const REQUEST_BYTES: u64 = (16 << 10) + 1;
/// Most bytes of an answer.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long an operator may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// Operators that are served at a time; the keep serves fewer, and tells those beyond.
const OPERATORS_MOST: usize = 32;

/// Listens at `path`, for root alone; what a killed keep left there is removed. Nobody waits for a visitor.
///
/// # Errors
/// A refusal of this code.
pub(crate) fn listen(path: &Path, code: &'static str) -> Result<UnixListener, Refusal> {
    let failed = |error: io::Error| {
        let cause = format_args!("no socket can be made there: {error}");
        Refusal::new(code, path.display(), cause, "name a path in a folder that is there, and free")
    };
    if is_left_over(path) {
        let _ = fs::remove_file(path);
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Whether a socket is there that nobody listens at any more: its keep was killed.
fn is_left_over(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Connects to who listens at a guest's socket, `_` and the port. Who does not take connections now does not hold up the others.
pub(crate) fn speak(socket: &Path, port: u32) -> io::Result<OwnedFd> {
    let mut path = socket.to_owned().into_os_string();
    path.push(format!("_{port}"));
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

/// Takes operators in until the socket is shut, and passes each on to the keep.
pub(crate) fn take_operators(listener: &UnixListener, keep: &Channel, grants: &Arc<Grants>) {
    let count = Arc::new(AtomicUsize::new(0));
    loop {
        let operator = match listener.accept() {
            Ok((operator, _)) => operator,
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            // Out of descriptors, or one that left again: others may have more luck in a while.
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if count.load(Ordering::Acquire) >= OPERATORS_MOST {
            continue;
        }
        let Ok((ours, theirs)) = UnixStream::pair() else { continue };
        if envelope::send(keep, &(), &[theirs.as_fd()]).is_err() {
            return;
        }
        count.fetch_add(1, Ordering::AcqRel);
        let (grants, counted) = (Arc::clone(grants), Arc::clone(&count));
        let pass = move || {
            let _ = pass_on(&operator, &ours, &grants);
            counted.fetch_sub(1, Ordering::AcqRel);
        };
        if thread::Builder::new().name("operator".into()).spawn(pass).is_err() {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// What is looked at of a request.
#[derive(Deserialize)]
struct Wanted {
    r#do: String,
    attachment: Option<Attachment>,
}

/// Passes lines on: an operator's to the keep, its answer back. While the keep works on an attachment, it may open that.
fn pass_on(operator: &UnixStream, keep: &UnixStream, grants: &Grants) -> io::Result<()> {
    operator.set_read_timeout(Some(SILENCE))?;
    operator.set_write_timeout(Some(SILENCE))?;
    let (mut requests, mut answers) = (BufReader::new(operator), BufReader::new(keep));
    loop {
        // A keep that serves enough operators already says so unasked, and hangs up.
        if requests.buffer().is_empty() && speaks_first(keep, operator)? {
            let mut answer = Vec::new();
            (&mut answers).take(ANSWER_BYTES).read_until(b'\n', &mut answer)?;
            return (&*operator).write_all(&answer);
        }
        let mut line = Vec::new();
        (&mut requests).take(REQUEST_BYTES).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let wanted = serde_json::from_slice::<Wanted>(&line).ok();
        let attachment = wanted.filter(|wanted| wanted.r#do == "attach").and_then(|wanted| wanted.attachment);
        let _granted = attachment.map(|attachment| grants.give(attachment));
        (&*keep).write_all(&line)?;
        let mut answer = Vec::new();
        (&mut answers).take(ANSWER_BYTES).read_until(b'\n', &mut answer)?;
        if answer.is_empty() {
            return Ok(());
        }
        (&*operator).write_all(&answer)?;
        if !line.ends_with(b"\n") {
            return Ok(());
        }
    }
}

/// Whether the one says something before the other does, who is not waited for without end.
fn speaks_first(one: &UnixStream, other: &UnixStream) -> io::Result<bool> {
    let patience = Timespec { tv_sec: SILENCE.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: 0 };
    let mut both = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
    let count = loop {
        match poll(&mut both, Some(&patience)) {
            Err(rustix::io::Errno::INTR) => {}
            polled => break polled?,
        }
    };
    if count == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let [one, _] = &both;
    Ok(!one.revents().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{SocketFlags, SocketType, socketpair};
    use std::path::PathBuf;

    #[test]
    fn an_operators_lines_reach_the_keep_and_what_he_attaches_is_granted_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.operator");
        let listener = listen(&path, "host-folder").unwrap();
        listener.set_nonblocking(false).unwrap();
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let grants = Arc::new(Grants::default());
        let (listener, keep, given) = (Arc::new(listener), Channel::new(ours), Arc::clone(&grants));
        let heard = Arc::clone(&listener);
        let broker = thread::spawn(move || take_operators(&heard, &keep, &given));
        let mut operator = UnixStream::connect(&path).unwrap();
        let ((), mut came) = envelope::receive::<()>(&Channel::new(theirs)).unwrap();
        let keep = UnixStream::from(came.pop().unwrap());
        let mut lines = BufReader::new(keep.try_clone().unwrap());
        let disk = PathBuf::from("/images/data.img");
        let wanted = [
            (r#"{"do":"pause"}"#, false),
            (r#"{"do":"attach","attachment":{"disk":{"path":"/images/data.img"}}}"#, true),
            (r#"{"do":"state","attachment":{"disk":{"path":"/images/data.img"}}}"#, false),
        ];
        for (line, granted) in wanted {
            operator.write_all(format!("{line}\n").as_bytes()).unwrap();
            let mut heard = String::new();
            lines.read_line(&mut heard).unwrap();
            assert_eq!(heard.trim_end(), line);
            assert_eq!(grants.may_open(&disk, false), granted, "{line}");
            assert!(!grants.may_open(&disk, true), "another way to open it");
            (&keep).write_all(b"{}\n").unwrap();
            let mut answer = String::new();
            BufReader::new(&operator).read_line(&mut answer).unwrap();
            assert_eq!(answer, "{}\n");
        }
        drop((operator, keep, lines));
        rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both).unwrap();
        broker.join().unwrap();
    }
}
