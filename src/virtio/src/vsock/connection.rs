//! One connection.

use std::{
    collections::VecDeque,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::{Errno, write},
    net::{Shutdown, shutdown},
};

use super::{
    BUFFER_BYTES, HOST_CID,
    packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM},
};
use crate::{request::Buffers, vectored::receive_range};

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest asked for it, and the host was asked for a stream.
    Asked,
    /// The host gave a stream, and the guest is to be told so.
    Answered,
    /// The host asked for it, and the guest is to be told so.
    Offered,
    /// The guest was told, and has not answered.
    Waiting,
    /// Both may send.
    Established,
    /// The guest was told that it is over.
    Over,
}

/// A connection between a port of the guest's and one of the host's.
#[derive(Debug)]
pub(super) struct Connection {
    guest_port: u32,
    host_port: u32,
    pub(super) state: State,
    pub(super) stream: Option<OwnedFd>,
    /// The stream has something, perhaps.
    pub(super) can_read: bool,
    /// The guest wants to know how much it may send, or should.
    pub(super) owes_credit: bool,
    /// What the guest sent and the stream has not taken.
    buffer: VecDeque<u8>,
    /// Bytes that the stream took, and how many of them the guest was told of.
    forwarded: u32,
    told: u32,
    /// What the guest has room for, and took; and what was sent to it.
    guest_buffer_bytes: u32,
    guest_forwarded: u32,
    sent: u32,
    /// The stream has ended; and the guest knows.
    ended: bool,
    told_end: bool,
    /// What the guest has shut down.
    shut: u32,
}

impl Connection {
    pub(super) fn new(guest_port: u32, host_port: u32, state: State) -> Self {
        Self {
            guest_port,
            host_port,
            state,
            stream: None,
            can_read: true,
            owes_credit: false,
            buffer: VecDeque::new(),
            forwarded: 0,
            told: 0,
            guest_buffer_bytes: 0,
            guest_forwarded: 0,
            sent: 0,
            ended: false,
            told_end: false,
            shut: 0,
        }
    }

    pub(super) fn ports(&self) -> (u32, u32) {
        (self.guest_port, self.host_port)
    }

    pub(super) fn credit_from(&mut self, header: &Header) {
        (self.guest_buffer_bytes, self.guest_forwarded) = (header.buffer_bytes, header.forwarded);
    }

    /// The host answered. False when it had not been asked.
    pub(super) fn answered(&mut self, stream: OwnedFd) -> bool {
        let asked = self.state == State::Asked;
        self.stream = Some(stream);
        self.state = State::Answered;
        asked
    }

    /// The guest has answered, and who began is told. False when the guest was not asked, or nobody is there any more.
    pub(super) fn opened(&mut self) -> bool {
        let waited = self.state == State::Waiting;
        self.state = State::Established;
        self.buffer.extend(format!("OK {}\n", self.host_port).bytes());
        // That line is none of the guest's.
        self.forwarded = 0u32.wrapping_sub(self.buffer.len() as u32);
        self.told = 0;
        waited && self.write_out()
    }

    /// Takes data of the guest's. False when there may be none.
    pub(super) fn take(&mut self, from: &Buffers<'_>, range: Range<usize>) -> bool {
        let may = self.state == State::Established && self.shut & SHUTDOWN_SEND == 0;
        let room = (BUFFER_BYTES as usize + 64).saturating_sub(self.buffer.len());
        if !may || range.len() > room {
            return false;
        }
        let mut bytes = vec![0; range.len()];
        if !from.read(range.start, &mut bytes) {
            return false;
        }
        self.buffer.extend(bytes);
        self.write_out()
    }

    /// The guest will receive nothing more, or send nothing more.
    pub(super) fn shut_down(&mut self, flags: u32) -> bool {
        self.shut |= flags & SHUTDOWN_BOTH;
        self.write_out()
    }

    /// Bytes that the stream has not taken.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.buffer.len()
    }

    /// Whether nothing is left to be done in either direction.
    pub(super) fn is_over(&self) -> bool {
        let sent_all = self.shut & SHUTDOWN_SEND != 0 && self.buffer.is_empty();
        sent_all && (self.shut & SHUTDOWN_RECEIVE != 0 || self.told_end)
    }

    /// Gives the stream what it takes. False when it takes nothing any more.
    pub(super) fn write_out(&mut self) -> bool {
        let Some(stream) = &self.stream else { return true };
        while !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            // The program ignores SIGPIPE, as std has it.
            match write(stream, front) {
                Ok(taken) => {
                    self.buffer.drain(..taken);
                    self.forwarded = self.forwarded.wrapping_add(taken as u32);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        // The guest may know of half its room before it is told of more.
        if self.forwarded.wrapping_sub(self.told) > BUFFER_BYTES / 2 {
            self.owes_credit = true;
        }
        if self.shut & SHUTDOWN_SEND != 0 {
            // A stream that was shut down already is no worse.
            let _ = shutdown(stream, Shutdown::Write);
        }
        true
    }

    /// The next packet for the guest, with data in bytes `room` of `into`; `None` when there is none now.
    pub(super) fn next_packet(&mut self, into: &Buffers<'_>, room: Range<usize>) -> Option<Header> {
        match self.state {
            State::Answered => {
                self.state = State::Established;
                return Some(self.telling(Op::Response));
            }
            State::Offered => {
                self.state = State::Waiting;
                return Some(self.telling(Op::Request));
            }
            State::Asked | State::Waiting | State::Over => return None,
            State::Established => {}
        }
        if std::mem::take(&mut self.owes_credit) {
            return Some(self.telling(Op::CreditUpdate));
        }
        if let Some(header) = self.data(into, room) {
            return Some(header);
        }
        if self.ended && !self.told_end {
            self.told_end = true;
            let mut header = self.telling(Op::Shutdown);
            header.flags = SHUTDOWN_SEND;
            return Some(header);
        }
        // The guest has sent all, and knows that nothing comes: it waits for this.
        self.is_over().then(|| {
            self.state = State::Over;
            self.telling(Op::Reset)
        })
    }

    /// Data from the stream, as much as the guest has room for.
    fn data(&mut self, into: &Buffers<'_>, room: Range<usize>) -> Option<Header> {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        let credit = self.guest_buffer_bytes.saturating_sub(in_flight);
        if !self.can_read || self.ended || self.shut & SHUTDOWN_RECEIVE != 0 || credit == 0 {
            return None;
        }
        let length = room.len().min(credit as usize);
        let stream = self.stream.as_ref()?;
        match receive_range(stream.as_fd(), into, room.start..room.start + length) {
            Ok(0) => {
                self.ended = true;
                None
            }
            Ok(read) => {
                self.sent = self.sent.wrapping_add(read as u32);
                let mut header = self.telling(Op::Data);
                header.length = read as u32;
                Some(header)
            }
            Err(error) => {
                self.can_read = false;
                // A stream that is broken has ended.
                self.ended = error.kind() != std::io::ErrorKind::WouldBlock;
                None
            }
        }
    }

    /// A packet, which also tells of the room that there is.
    fn telling(&mut self, op: Op) -> Header {
        self.told = self.forwarded;
        self.header(op)
    }

    pub(super) fn header(&self, op: Op) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: 0,
            source_port: self.host_port,
            destination_port: self.guest_port,
            length: 0,
            kind: TYPE_STREAM,
            op,
            flags: if op == Op::Shutdown { SHUTDOWN_BOTH } else { 0 },
            buffer_bytes: BUFFER_BYTES,
            forwarded: self.forwarded,
        }
    }
}
