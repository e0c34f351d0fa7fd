//! What is said between who asks and `casemate-policy-engine`: over a stream socket, a length and so many bytes each way, a reply to
//! each question. Compiled code rides along as a descriptor. A message is JSON, but for looks at guests, of which there are
//! thousands: they are in postcard's encoding, which takes a tenth of the time.
//!
//! The engine runs what strangers wrote, so who asks takes its word for a stranger's: bounded here, checked where it's used.

use std::{
    borrow::Cow,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::{
    Decision, Fault, Field, Kind, Memory, PluginLimits, PolicyError, ReleasedDevice, Request, Rules, Ruling,
    Samples, Tick,
};

pub use crate::text::{hex, unhex};

/// Most bytes of one message: samples of thousands of guests, and what governors remember of them.
pub const MOST_BYTES: usize = 32 << 20;
/// The length before a message: little-endian.
const LENGTH_BYTES: usize = 4;
/// What a message in postcard's encoding begins with, as no JSON does.
const POSTCARD: u8 = 1;
/// Room that is made for what was announced, before it has come.
const ROOM_BYTES: usize = 64 << 10;

/// A plugin of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// Its name in the bundle.
    pub name: String,
    /// SHA-256 of its component, in hexadecimal.
    pub digest: String,
    /// A JSON object; none when it's only to tell what it is.
    pub settings: Option<String>,
    /// What one call may take.
    pub limits: PluginLimits,
    /// What its word counts for.
    pub rules: Rules,
    /// What it may change of a guest that asks to start.
    pub may_change: Vec<Field>,
    /// What it may do to a guest that runs.
    pub may_do: Vec<String>,
}

/// What a plugin says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Its own name.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// What it says it does.
    pub summary: String,
    /// What it's for.
    pub kinds: Vec<Kind>,
    /// A JSON Schema of its settings.
    pub settings_schema: Option<String>,
    /// Codes of the reasons that it may give.
    pub reasons: Vec<String>,
    /// Fields that it may want to change, and what it may want done.
    pub changes: Vec<String>,
    /// What it has to know that costs the host time.
    pub needs: Vec<String>,
    /// Names of what it imports.
    pub imports: Vec<String>,
    /// Names of what it exports.
    pub exports: Vec<String>,
}

/// A question, or what goes before one.
#[derive(Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "a question is made, sent and dropped")]
pub enum Ask<'a> {
    /// Load a plugin: the descriptor that rides along begins with its compiled code.
    Load(Box<Plugin>),
    /// All are loaded: none comes any more. With `suspends`, those that fail too often aren't asked any more.
    Ready {
        /// Whether.
        suspends: bool,
    },
    /// May this guest?
    Admit {
        /// The question.
        request: Cow<'a, Request>,
        /// An operator's reason to override what can be.
        override_why: Option<Cow<'a, str>>,
    },
    /// What is to be done about the guests that run?
    Tick {
        /// A look at them.
        samples: Cow<'a, Samples>,
        /// What governors remember.
        memory: Cow<'a, Memory>,
    },
    /// May the host have this device back?
    Release(Cow<'a, ReleasedDevice>),
    /// Which plugins aren't asked any more?
    Suspended,
}

/// What governors remember, by their names in the bundle, in hexadecimal: numbers would take twice the place.
pub type Remembered = Vec<(String, String)>;

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Ask::Load`].
    Loaded(Box<Described>),
    /// To [`Ask::Load`]: the code can't be taken as it is; in words.
    Foreign(String),
    /// To [`Ask::Ready`].
    Ready,
    /// To [`Ask::Admit`].
    Decided(Box<Decision>),
    /// To [`Ask::Tick`].
    Ticked {
        /// What governors want.
        tick: Tick,
        /// What they remember now.
        memory: Remembered,
    },
    /// To [`Ask::Release`].
    Ruled(Ruling),
    /// To [`Ask::Suspended`].
    Suspended(Vec<String>),
    /// To any.
    Failed {
        /// The kind of error.
        fault: Fault,
        /// What it's about.
        subject: String,
        /// What is wrong.
        cause: String,
    },
}

impl From<PolicyError> for Reply {
    fn from(error: PolicyError) -> Self {
        Self::Failed { fault: error.fault(), subject: error.subject().into(), cause: error.cause().into() }
    }
}

/// A question as it's sent.
///
/// # Errors
/// When it's longer than any.
pub fn encode_ask(ask: &Ask<'_>) -> io::Result<Vec<u8>> {
    let Ask::Tick { .. } = ask else { return encode(ask) };
    let mut bytes = vec![0; LENGTH_BYTES];
    bytes.push(POSTCARD);
    framed(postcard::to_extend(ask, bytes).map_err(io::Error::other)?)
}

/// A question that was sent.
///
/// # Errors
/// When it's none.
pub fn decode_ask(message: &[u8]) -> io::Result<Ask<'static>> {
    match message.split_first() {
        Some((&POSTCARD, rest)) => postcard::from_bytes(rest).map_err(io::Error::other),
        _ => Ok(serde_json::from_slice(message)?),
    }
}

/// A message as it's sent.
///
/// # Errors
/// When it's longer than any.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut bytes, message)?;
    framed(bytes)
}

/// Writes the length where there is room for it.
fn framed(mut bytes: Vec<u8>) -> io::Result<Vec<u8>> {
    let length = bytes.len().saturating_sub(LENGTH_BYTES);
    if length > MOST_BYTES {
        return Err(io::Error::other(format!("a message of {length} bytes; at most {MOST_BYTES} are sent")));
    }
    let length = u32::try_from(length).map_err(io::Error::other)?;
    if let Some(place) = bytes.first_chunk_mut() {
        *place = length.to_le_bytes();
    }
    Ok(bytes)
}

/// Sends one message that was encoded, with a descriptor where there is one.
///
/// # Errors
/// Those of sendmsg(2) and write(2).
pub fn send<S>(mut socket: &S, message: &[u8], code: Option<BorrowedFd<'_>>) -> io::Result<()>
where
    S: AsFd,
    for<'s> &'s S: Write,
{
    let Some(code) = code else { return socket.write_all(message) };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [code];
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    // The descriptor goes with the first byte; what doesn't fit follows.
    let sent = sendmsg(socket.as_fd(), &[IoSlice::new(message)], &mut control, SendFlags::NOSIGNAL)?;
    socket.write_all(message.get(sent..).unwrap_or_default())
}

/// Takes one message; none when the other side is gone.
///
/// # Errors
/// Those of read(2), and of a message that is cut off or longer than any.
pub fn receive(socket: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; LENGTH_BYTES];
    match socket.read(&mut length)? {
        0 => return Ok(None),
        n => socket.read_exact(length.get_mut(n..).unwrap_or_default())?,
    }
    body(socket, length).map(Some)
}

/// As [`receive`], with the descriptor that rode along.
///
/// # Errors
/// Those of recvmsg(2), and as [`receive`].
pub fn receive_with_code<S>(mut socket: &S) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>>
where
    S: AsFd,
    for<'s> &'s S: Read,
{
    let mut length = [0; LENGTH_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut length)];
    let got = loop {
        match recvmsg(socket.as_fd(), &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?.bytes,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    let code = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    socket.read_exact(length.get_mut(got..).unwrap_or_default())?;
    Ok(Some((body(&mut socket, length)?, code)))
}

fn body(socket: &mut impl Read, length: [u8; LENGTH_BYTES]) -> io::Result<Vec<u8>> {
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    if length > MOST_BYTES {
        return Err(io::Error::other(format!("a message of {length} bytes; at most {MOST_BYTES} are read")));
    }
    // It grows by what has come, and not by what was announced.
    let mut message = Vec::with_capacity(length.min(ROOM_BYTES));
    Read::by_ref(socket).take(length as u64).read_to_end(&mut message)?;
    if message.len() == length { Ok(message) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, thread};

    #[test]
    fn a_message_and_its_descriptor_come_as_they_were_sent() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let long = "7".repeat(1 << 20);
        let sent = long.clone();
        let sender = thread::spawn(move || {
            let file = std::fs::File::open("/dev/null").unwrap();
            send(&ours, &encode(&1).unwrap(), Some(file.as_fd())).unwrap();
            send(&ours, &encode(&sent).unwrap(), Some(file.as_fd())).unwrap();
            send(&ours, &encode(&()).unwrap(), None).unwrap();
        });
        let (message, code) = receive_with_code(&theirs).unwrap().unwrap();
        assert_eq!(message, b"1");
        assert!(code.is_some());
        let (message, code) = receive_with_code(&theirs).unwrap().unwrap();
        assert!(serde_json::from_slice::<String>(&message).unwrap() == long);
        assert!(code.is_some());
        assert_eq!(receive(&mut theirs).unwrap().unwrap(), b"null");
        sender.join().unwrap();
        assert!(receive(&mut theirs).unwrap().is_none());
        assert!(receive_with_code(&theirs).unwrap().is_none());
    }

    #[test]
    fn a_look_at_guests_comes_as_it_was_sent() {
        let samples: Samples = serde_json::from_str(include_str!("../examples/samples.json")).unwrap();
        let memory = Memory::from([("fair-share".to_owned(), vec![0, 1, 255])]);
        let ask = Ask::Tick { samples: Cow::Borrowed(&samples), memory: Cow::Borrowed(&memory) };
        let sent = encode_ask(&ask).unwrap();
        let Ask::Tick { samples: came, memory: kept } = decode_ask(&sent[LENGTH_BYTES..]).unwrap() else {
            panic!("another question")
        };
        assert_eq!((came.as_ref(), kept.as_ref()), (&samples, &memory));
        assert!(!samples.guests.is_empty());
        for cut in LENGTH_BYTES..sent.len() - 1 {
            assert!(decode_ask(&sent[LENGTH_BYTES..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_no_message() {
        for (bytes, kind) in [
            (&[1u8, 0][..], io::ErrorKind::UnexpectedEof),
            (&[2, 0, 0, 0, 1], io::ErrorKind::UnexpectedEof),
            (&[0xff, 0xff, 0xff, 0xff], io::ErrorKind::Other),
        ] {
            for with_code in [false, true] {
                let (mut ours, mut theirs) = UnixStream::pair().unwrap();
                ours.write_all(bytes).unwrap();
                drop(ours);
                let error = if with_code {
                    receive_with_code(&theirs).map(drop).unwrap_err()
                } else {
                    receive(&mut theirs).map(drop).unwrap_err()
                };
                assert_eq!(error.kind(), kind, "{bytes:?}");
            }
        }
    }
}
