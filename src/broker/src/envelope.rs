//! How requests and answers cross: JSON in a message of [`casemate_wire`]'s, or, when it is long, in a file in memory beside it.
//!
//! JSON and not postcard, since types of the ledger ride along that leave out what they don't have.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use casemate_wire::{Channel, Slot, WireError};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What goes into the message itself: a message has 32 KiB.
const SHORT_BYTES: usize = 24 << 10;
/// Longer ones are not taken: a host of thousands of guests and hundreds of functions has a few MiB.
const LONG_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
enum Envelope {
    Short {
        descriptors: u8,
        text: String,
    },
    /// The text is the last descriptor's.
    Long {
        descriptors: u8,
    },
}

/// The two ends of a new connection.
pub(crate) fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends a value with descriptors.
pub(crate) fn send<M: Serialize>(
    channel: &Channel,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), WireError> {
    let text = serde_json::to_string(message).map_err(|_| WireError::Malformed)?;
    let count = u8::try_from(descriptors.len()).map_err(|_| WireError::TooLarge)?;
    if text.len() <= SHORT_BYTES {
        return channel.send(&Envelope::Short { descriptors: count, text }, descriptors);
    }
    let file = in_memory(text.as_bytes())?;
    let mut all = descriptors.to_vec();
    all.push(file.as_fd());
    channel.send(&Envelope::Long { descriptors: count }, &all)
}

fn in_memory(bytes: &[u8]) -> Result<File, WireError> {
    let mut file = File::from(memfd_create("casemate-request", MemfdFlags::CLOEXEC)?);
    let written = file.write_all(bytes).and_then(|()| file.seek(SeekFrom::Start(0)));
    written.map_err(|_| WireError::TooLarge)?;
    Ok(file)
}

/// Waits for a value, and its descriptors.
pub(crate) fn receive<M: DeserializeOwned>(channel: &Channel) -> Result<(M, Vec<OwnedFd>), WireError> {
    let (envelope, mut came) = channel.receive::<Envelope>()?;
    let (count, text) = match envelope {
        Envelope::Short { descriptors, text } => (descriptors, Some(text)),
        Envelope::Long { descriptors } => (descriptors, None),
    };
    let taken = (0..count).map(|slot| came.take(Slot(slot)));
    let descriptors = taken.collect::<Result<Vec<_>, _>>()?;
    let text = match text {
        Some(text) => text,
        None => {
            let mut text = String::new();
            let file = File::from(came.take(Slot(count))?);
            let read = file.take(LONG_BYTES + 1).read_to_string(&mut text);
            if read.map_err(|_| WireError::Malformed)? as u64 > LONG_BYTES {
                return Err(WireError::TooLarge);
            }
            text
        }
    };
    came.finish()?;
    let message = serde_json::from_str(&text).map_err(|_| WireError::Malformed)?;
    Ok((message, descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channels() -> (Channel, Channel) {
        let (one, other) = pair().unwrap();
        (Channel::new(one), Channel::new(other))
    }

    #[test]
    fn short_and_long_ones_cross_with_their_descriptors() {
        let (one, other) = channels();
        let null = File::open("/dev/null").unwrap();
        for length in [0, SHORT_BYTES - 2, SHORT_BYTES - 1, 1 << 20] {
            let text = "x".repeat(length);
            send(&one, &text, &[null.as_fd(), null.as_fd()]).unwrap();
            let (came, descriptors) = receive::<String>(&other).unwrap();
            assert!(came == text && descriptors.len() == 2, "{length}");
        }
    }

    #[test]
    fn what_is_no_request_or_names_descriptors_that_did_not_come_is_refused() {
        let (one, other) = channels();
        one.send(&Envelope::Short { descriptors: 0, text: "{".into() }, &[]).unwrap();
        assert!(matches!(receive::<String>(&other), Err(WireError::Malformed)));
        for wrong in
            [Envelope::Short { descriptors: 1, text: "\"\"".into() }, Envelope::Long { descriptors: 0 }]
        {
            one.send(&wrong, &[]).unwrap();
            assert!(matches!(receive::<String>(&other), Err(WireError::NoDescriptor(0))));
        }
        let null = File::open("/dev/null").unwrap();
        one.send(&Envelope::Short { descriptors: 0, text: "\"\"".into() }, &[null.as_fd()]).unwrap();
        assert!(matches!(receive::<String>(&other), Err(WireError::Unnamed(1))));
    }
}
