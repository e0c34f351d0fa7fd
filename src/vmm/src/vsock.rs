//! The keep's side of the guest's sockets, as the device sees it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use casemate_virtio::{Arrival, VsockHost};
use casemate_wire::{Channel, Descriptors, FromVsock, Slot, ToVsock, WireError};
use rustix::io::Errno;

/// Streams that the keep makes, and hands over on a socket of their own.
pub(crate) struct KeepStreams(Channel);

impl KeepStreams {
    /// `socket` is the cell's end, not blocking.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(Channel::new(socket))
    }
}

impl VsockHost for KeepStreams {
    fn events(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn arrival(&mut self) -> io::Result<Option<Arrival>> {
        let (message, descriptors) = match self.0.receive::<ToVsock>() {
            Ok(received) => received,
            Err(WireError::Socket(Errno::AGAIN)) => return Ok(None),
            Err(error) => return Err(io::Error::other(error)),
        };
        arrival(message, descriptors).map(Some).map_err(io::Error::other)
    }

    fn connect(&mut self, number: u64, port: u32) -> io::Result<()> {
        self.0.send(&FromVsock::Connect { number, port }, &[]).map_err(io::Error::other)
    }
}

fn arrival(message: ToVsock, mut descriptors: Descriptors) -> Result<Arrival, WireError> {
    let mut take = |slot: Slot| descriptors.take(slot);
    let arrival = match message {
        ToVsock::Stream { port, stream } => Arrival::Stream { port, stream: take(stream)? },
        ToVsock::Answer { number, stream } => {
            Arrival::Answer { number, stream: stream.map(take).transpose()? }
        }
    };
    descriptors.finish()?;
    Ok(arrival)
}
