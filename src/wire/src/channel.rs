//! How messages and descriptors cross the socket.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{DESCRIPTORS, MESSAGE_BYTES, Slot};

/// Why a message could not be sent or taken.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The socket failed.
    #[error("the control socket failed: {0}")]
    Socket(#[from] Errno),
    /// The peer has gone.
    #[error("the other side of the control socket has gone")]
    Closed,
    /// More bytes or descriptors than a message has.
    #[error(
        "a message on the control socket is larger than {MESSAGE_BYTES} bytes or {DESCRIPTORS} descriptors"
    )]
    TooLarge,
    /// Not a message of ours.
    #[error("a message on the control socket does not decode")]
    Malformed,
    /// The message names a descriptor that did not come, or names one twice.
    #[error("a message on the control socket names descriptor {0}, which did not come or was taken already")]
    NoDescriptor(u8),
    /// Descriptors came that the message does not name.
    #[error("{0} descriptors came that the message does not name")]
    Unnamed(usize),
}

/// One end of a control socket.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// The descriptors of one message, each to be taken once by its [`Slot`].
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Takes the descriptor in `slot`.
    ///
    /// # Errors
    /// [`WireError::NoDescriptor`] when it did not come or was taken.
    pub fn take(&mut self, slot: Slot) -> Result<OwnedFd, WireError> {
        self.0.get_mut(usize::from(slot.0)).and_then(Option::take).ok_or(WireError::NoDescriptor(slot.0))
    }

    /// Declares all of them taken.
    ///
    /// # Errors
    /// [`WireError::Unnamed`] when some were not.
    pub fn finish(self) -> Result<(), WireError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            left => Err(WireError::Unnamed(left)),
        }
    }
}

impl Channel {
    /// A channel over a connected `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one message with descriptors.
    ///
    /// # Errors
    /// When it is too large or the socket fails.
    pub fn send<M: Serialize>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), WireError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL)
    }

    /// Sends one message with descriptors, or none of it: a peer that does not read is not waited for.
    ///
    /// # Errors
    /// As for [`Channel::send`], and [`Errno::AGAIN`] of the socket when the peer leaves no room.
    pub fn send_now<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with<M: Serialize>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), WireError> {
        let bytes = postcard::to_stdvec(message).map_err(|_| WireError::Malformed)?;
        if bytes.len() > MESSAGE_BYTES || descriptors.len() > DESCRIPTORS {
            return Err(WireError::TooLarge);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(WireError::TooLarge);
        }
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(WireError::Closed),
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Waits for one message. Descriptors arrive close-on-exec.
    ///
    /// # Errors
    /// When the peer has gone, the socket fails, or what came is not a message of ours, whole.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<(M, Descriptors), WireError> {
        // One byte more than a message has: a longer packet is seen even where MSG_TRUNC is not.
        let mut bytes = vec![0; MESSAGE_BYTES + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(WireError::Closed),
                result => break result?,
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights.map(Some));
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
            || received.bytes > MESSAGE_BYTES
        {
            return Err(WireError::TooLarge);
        }
        let bytes = bytes.get(..received.bytes).unwrap_or_default();
        if bytes.is_empty() {
            return Err(WireError::Closed);
        }
        match postcard::take_from_bytes(bytes) {
            Ok((message, [])) => Ok((message, Descriptors(descriptors))),
            _ => Err(WireError::Malformed),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Answer, BalloonStatistics, COUNTED_MOST, Counters, DeviceKind, DeviceStatistics, End, FromCell,
        Statistics, ToCell,
    };
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Channel, Channel) {
        let (a, b) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn messages_and_descriptors_cross() {
        let (keep, cell) = pair();
        let file = tempfile();
        keep.send(&ToCell::Stop, &[file.as_fd()]).unwrap();
        let (message, mut descriptors) = cell.receive::<ToCell>().unwrap();
        assert_eq!(message, ToCell::Stop);
        descriptors.take(Slot(0)).unwrap();
        assert!(matches!(descriptors.take(Slot(0)), Err(WireError::NoDescriptor(0))));
        descriptors.finish().unwrap();
    }

    #[test]
    fn a_descriptor_nobody_named_is_an_error() {
        let (keep, cell) = pair();
        keep.send(&ToCell::Stop, &[tempfile().as_fd()]).unwrap();
        let (_, descriptors) = cell.receive::<ToCell>().unwrap();
        assert!(matches!(descriptors.finish(), Err(WireError::Unnamed(1))));
    }

    #[test]
    fn a_closed_peer_is_told() {
        let (keep, cell) = pair();
        drop(cell);
        assert!(matches!(keep.receive::<FromCell>(), Err(WireError::Closed)));
        assert!(matches!(keep.send(&ToCell::Stop, &[]), Err(WireError::Closed)));
    }

    #[test]
    fn too_large_packets_are_refused() {
        let (keep, cell) = pair();
        rustix::io::write(keep.as_fd(), &vec![0; MESSAGE_BYTES + 1]).unwrap();
        assert!(matches!(cell.receive::<ToCell>(), Err(WireError::TooLarge)));
        let end = End::Fault("x".repeat(MESSAGE_BYTES));
        let large = FromCell::Ended { end, counters: Counters::default() };
        assert!(matches!(cell.send(&large, &[]), Err(WireError::TooLarge)));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for() {
        let (keep, cell) = pair();
        let full = (0..100_000).find_map(|_| keep.send_now(&ToCell::Stop, &[]).err());
        assert!(matches!(full, Some(WireError::Socket(Errno::AGAIN))), "{full:?}");
        assert_eq!(cell.receive::<ToCell>().unwrap().0, ToCell::Stop);
    }

    #[test]
    fn the_largest_statistics_fit_a_message() {
        let most = u64::MAX;
        let vcpu = Counters { pio_exits: most, mmio_exits: most, other_exits: most, bus_locks: most };
        let device = DeviceStatistics {
            kind: DeviceKind::Balloon,
            number: u16::MAX,
            slot: Some(u8::MAX),
            requests: most,
            bytes_to_guest: most,
            bytes_from_guest: most,
            errors: most,
        };
        let all = Some(most);
        let told = BalloonStatistics {
            target_bytes: most,
            actual_bytes: most,
            free_bytes: all,
            total_bytes: all,
            available_bytes: all,
            caches_bytes: all,
            swapped_in_bytes: all,
            swapped_out_bytes: all,
            major_faults: all,
            minor_faults: all,
            oom_kills: all,
        };
        let statistics = Statistics {
            vcpus: vec![vcpu; COUNTED_MOST],
            devices: vec![device; COUNTED_MOST],
            balloon: Some(told),
        };
        assert!(statistics.is_bounded());
        let answer = Ok(Answer::Statistics(Box::new(statistics)));
        let (keep, cell) = pair();
        cell.send(&FromCell::Answer { id: u32::MAX, answer: answer.clone() }, &[]).unwrap();
        let (message, _) = keep.receive::<FromCell>().unwrap();
        assert_eq!(message, FromCell::Answer { id: u32::MAX, answer });
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let (keep, cell) = pair();
        let mut bytes = postcard::to_stdvec(&ToCell::Stop).unwrap();
        bytes.push(0);
        rustix::io::write(keep.as_fd(), &bytes).unwrap();
        assert!(matches!(cell.receive::<ToCell>(), Err(WireError::Malformed)));
    }

    proptest! {
        #[test]
        fn any_packet_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 1..300)) {
            let (keep, cell) = pair();
            rustix::io::write(keep.as_fd(), &bytes).unwrap();
            rustix::io::write(cell.as_fd(), &bytes).unwrap();
            let _ = cell.receive::<ToCell>();
            let _ = keep.receive::<FromCell>();
        }
    }

    fn tempfile() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }
}
