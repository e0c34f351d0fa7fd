//! The socket device (virtio 1.3, 5.10): streams between guest and host, without a network.
//!
//! The device connects to nothing: somebody on the host, a [`VsockHost`], hands over a stream for each connection, and the
//! device carries bytes between that and the guest. A connection holds at most `BUFFER_BYTES` that its stream has not
//! taken yet, and there are at most `CONNECTIONS_MAX`.

mod connection;
mod packet;

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Bound,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use self::{
    connection::{Connection, State},
    packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM},
};
use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    request::Request,
};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// Packets handled before the other direction has its turn.
const BUDGET: usize = 64;
/// Connections at once.
const CONNECTIONS_MAX: usize = 256;
/// What a guest may send into a connection before its stream takes it.
const BUFFER_BYTES: u32 = 64 << 10;
/// Packets without data that wait for the guest: an answer for each connection, and as many to what is none.
const REPLIES_MAX: usize = 2 * CONNECTIONS_MAX;
/// Ports of the host's side of connections that the host began are from here on.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// What the epoll set calls the host's word; connections are called by their numbers.
const HOST_WORD: u64 = u64::MAX;

/// What comes from the host.
#[derive(Debug)]
pub enum Arrival {
    /// Somebody wants to speak with this port of the guest's. The answer, a line that begins with `OK`, goes to the stream.
    Stream {
        /// The guest's port.
        port: u32,
        /// The stream, not blocking.
        stream: OwnedFd,
    },
    /// The answer to [`VsockHost::connect`].
    Answer {
        /// As it was asked.
        number: u64,
        /// The stream, not blocking; `None` when nobody listens there.
        stream: Option<OwnedFd>,
    },
}

/// Who makes streams.
pub trait VsockHost: Send {
    /// Becomes readable when something arrives.
    fn events(&self) -> BorrowedFd<'_>;
    /// What has arrived, without waiting.
    ///
    /// # Errors
    /// When nothing will arrive any more.
    fn arrival(&mut self) -> io::Result<Option<Arrival>>;
    /// Asks for a stream to this port of the host's; the answer arrives under `number`.
    ///
    /// # Errors
    /// When that can't be asked now.
    fn connect(&mut self, number: u64, port: u32) -> io::Result<()>;
}

/// The device.
pub struct Vsock {
    cid: u32,
    config: [u8; 8],
    host: Box<dyn VsockHost>,
    epoll: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    /// Numbers of connections by the guest's port and the host's.
    by_ports: BTreeMap<(u32, u32), u64>,
    next_number: u64,
    next_port: u32,
    replies: VecDeque<Header>,
    /// The connection of the last packet for the guest.
    last: u64,
    /// The guest's packets wait until it takes some.
    blocked: bool,
}

impl Vsock {
    /// A device for the guest that is known by `cid`, 3 or more.
    ///
    /// # Errors
    /// When no epoll set can be made.
    pub fn new(cid: u32, host: Box<dyn VsockHost>) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, host.events(), EventData::new_u64(HOST_WORD), EventFlags::IN)?;
        Ok(Self {
            cid,
            config: u64::from(cid).to_le_bytes(),
            host,
            epoll,
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            next_number: 0,
            next_port: FIRST_HOST_PORT,
            replies: VecDeque::new(),
            last: 0,
            blocked: false,
        })
    }

    /// Takes what the guest sent.
    fn transmit(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        active.serve(TRANSMIT, BUDGET, |request| {
            // What the guest would be told of what it sends now has to wait until it takes what it is told already.
            if self.replies.len() >= REPLIES_MAX {
                self.blocked = true;
                return Ok(None);
            }
            let mut bytes = [0; HEADER_BYTES];
            if !request.readable.read(0, &mut bytes) {
                return Err(Fault::Request("has no header"));
            }
            let header = Header::read(&bytes);
            if header.length as usize > request.readable.bytes() - HEADER_BYTES {
                return Err(Fault::Request("is shorter than it says"));
            }
            if header.is_for_host(self.cid) {
                self.take(&header, request);
            }
            Ok(Some(0))
        })
    }

    fn take(&mut self, header: &Header, request: &Request<'_>) {
        let ports = (header.source_port, header.destination_port);
        if header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let Some(number) = self.by_ports.get(&ports).copied() else {
            return match header.op {
                Op::Request => self.begin(header),
                Op::Reset => {}
                _ => self.refuse(header),
            };
        };
        let Some(connection) = self.connections.get_mut(&number) else { return };
        connection.credit_from(header);
        let is_fine = match header.op {
            Op::Response => connection.opened(),
            Op::Data => {
                connection.take(&request.readable, HEADER_BYTES..HEADER_BYTES + header.length as usize)
            }
            Op::Shutdown => connection.shut_down(header.flags),
            Op::CreditUpdate => true,
            Op::CreditRequest => {
                connection.owes_credit = true;
                true
            }
            Op::Reset => return self.forget(number),
            Op::Request | Op::Other => false,
        };
        if !is_fine || connection.is_over() {
            self.reset(number);
        }
    }

    /// The guest wants to speak with a port of the host's.
    fn begin(&mut self, header: &Header) {
        let number = self.next_number;
        let full = self.connections.len() >= CONNECTIONS_MAX;
        if full || self.host.connect(number, header.destination_port).is_err() {
            return self.refuse(header);
        }
        let mut connection = Connection::new(header.source_port, header.destination_port, State::Asked);
        connection.credit_from(header);
        self.add(connection);
    }

    fn add(&mut self, connection: Connection) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.by_ports.insert(connection.ports(), number);
        self.connections.insert(number, connection);
        number
    }

    /// Takes what came from the host.
    fn arrivals(&mut self) {
        while let Ok(Some(arrival)) = self.host.arrival() {
            match arrival {
                Arrival::Answer { number, stream } => {
                    let Some(connection) = self.connections.get_mut(&number) else { continue };
                    let is_ready = match stream {
                        Some(stream) => connection.answered(stream) && watch(&self.epoll, connection, number),
                        None => false,
                    };
                    if !is_ready {
                        self.reset(number);
                    }
                }
                Arrival::Stream { port, stream } => {
                    // Who is turned away finds its stream closed.
                    if self.connections.len() < CONNECTIONS_MAX {
                        let host_port = self.free_port(port);
                        let mut connection = Connection::new(port, host_port, State::Offered);
                        connection.stream = Some(stream);
                        let number = self.add(connection);
                        if !self
                            .connections
                            .get(&number)
                            .is_some_and(|added| watch(&self.epoll, added, number))
                        {
                            self.forget(number);
                        }
                    }
                }
            }
        }
    }

    /// A port of the host's side that no connection to this port of the guest's has.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&(guest_port, port)) {
                return port;
            }
        }
    }

    /// Gives the guest what there is for it.
    fn receive(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        let Self { connections, replies, last, cid, .. } = self;
        let mut over = Vec::new();
        let progress = active.serve(RECEIVE, BUDGET, |request| {
            if request.writable.bytes() <= HEADER_BYTES {
                return Err(Fault::Request("has no room for a packet"));
            }
            if let Some(mut header) = replies.pop_front() {
                return send(request, &mut header, *cid).map(Some);
            }
            // Each has its turn: first those behind the one that was last.
            let numbers: [(Bound<u64>, Bound<u64>); 2] =
                [(Bound::Excluded(*last), Bound::Unbounded), (Bound::Unbounded, Bound::Included(*last))];
            let number = numbers.into_iter().find_map(|range| {
                let mut some = connections.range_mut(range);
                some.find_map(|(number, connection)| {
                    let room = HEADER_BYTES..request.writable.bytes();
                    connection.next_packet(&request.writable, room).map(|header| (*number, header))
                })
            });
            let Some((number, mut header)) = number else { return Ok(None) };
            *last = number;
            if header.op == Op::Reset {
                over.push(number);
            }
            send(request, &mut header, *cid).map(Some)
        })?;
        for number in over {
            self.forget(number);
        }
        Ok(progress)
    }

    /// What the streams can do now.
    fn look(&mut self) {
        let mut events = Vec::with_capacity(64);
        for _ in 0..CONNECTIONS_MAX.div_ceil(64) {
            events.clear();
            let space = rustix::buffer::spare_capacity(&mut events);
            let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if epoll::wait(&self.epoll, space, Some(&none)).is_err() || events.is_empty() {
                return;
            }
            for event in &events {
                match event.data.u64() {
                    HOST_WORD => self.arrivals(),
                    number => {
                        let Some(connection) = self.connections.get_mut(&number) else { continue };
                        connection.can_read = true;
                        if !connection.write_out() || connection.is_over() {
                            self.reset(number);
                        }
                    }
                }
            }
        }
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, number: u64) {
        if let Some(connection) = self.connections.get(&number) {
            let header = connection.header(Op::Reset);
            self.reply(header);
        }
        self.forget(number);
    }

    fn forget(&mut self, number: u64) {
        if let Some(connection) = self.connections.remove(&number) {
            self.by_ports.remove(&connection.ports());
        }
    }

    /// Answers what belongs to no connection.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset {
            self.reply(header.refusal());
        }
    }

    fn reply(&mut self, header: Header) {
        // Never more than twice the bound: a packet of the guest's is only taken below it, and brings one at most, and so
        // does a connection that ends.
        self.replies.push_back(header);
    }

    fn turn(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        self.look();
        let sent = self.transmit(active)?;
        let received = self.receive(active)?;
        let freed = std::mem::take(&mut self.blocked) && self.replies.len() < REPLIES_MAX;
        let more = sent == Progress::More || received == Progress::More || freed;
        Ok(if more { Progress::More } else { Progress::Idle })
    }
}

/// Has the epoll set tell of a connection's stream.
fn watch(epoll: &OwnedFd, connection: &Connection, number: u64) -> bool {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
    let data = EventData::new_u64(number);
    connection.stream.as_ref().is_some_and(|stream| epoll::add(epoll, stream, data, flags).is_ok())
}

/// Puts a packet's header in front of its data; returns the packet's length.
fn send(request: &Request<'_>, header: &mut Header, cid: u32) -> Result<u32, Fault> {
    header.destination_cid = cid.into();
    if !request.writable.write(0, &header.bytes()) {
        return Err(Fault::Request("has no room for a packet"));
    }
    Ok(header.length.saturating_add(HEADER_BYTES as u32))
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.epoll.as_fd()]
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        // Nothing is ever told by the third queue: the guest is not moved.
        if index > TRANSMIT { Ok(Progress::Idle) } else { self.turn(active) }
    }
    fn backend_ready(&mut self, active: &mut Active, _backend: usize) -> Result<Progress, Fault> {
        self.turn(active)
    }
    /// A driver that begins anew knows of no connection.
    fn quiesce(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.replies.clear();
    }
}

#[cfg(test)]
#[path = "vsock_tests.rs"]
mod tests;
