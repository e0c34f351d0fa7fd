use std::{
    collections::VecDeque,
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::*;
use crate::testing::{Ring, active, attack, bytes, descriptor, fill, memory};

const CID: u32 = 3;
const OUT: u64 = 0x20000;
const IN: u64 = 0x40000;

#[derive(Default)]
struct Host {
    arrivals: VecDeque<Arrival>,
    asked: Vec<(u64, u32)>,
}

/// A host whose word is always worth asking for.
struct Shared(Arc<Mutex<Host>>, OwnedFd);

impl VsockHost for Shared {
    fn events(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
    fn arrival(&mut self) -> io::Result<Option<Arrival>> {
        Ok(self.0.lock().unwrap().arrivals.pop_front())
    }
    fn connect(&mut self, number: u64, port: u32) -> io::Result<()> {
        self.0.lock().unwrap().asked.push((number, port));
        Ok(())
    }
}

fn device() -> (Vsock, Arc<Mutex<Host>>) {
    let host = Arc::new(Mutex::new(Host::default()));
    let flags = rustix::event::EventfdFlags::NONBLOCK;
    let event = rustix::event::eventfd(1, flags).unwrap();
    (Vsock::new(CID, Box::new(Shared(host.clone(), event))).unwrap(), host)
}

fn stream() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours.into(), theirs)
}

/// A guest with both queues.
struct Guest {
    memory: crate::Memory,
    rings: [Ring; 3],
    active: Active,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let rings = [0x1000, 0x5000, 0x9000].map(|base| Ring::new(&memory, base, 64));
        let (active, _) = active(&memory, &rings.iter().collect::<Vec<_>>(), 0);
        Self { memory, rings, active }
    }

    fn run(&mut self, device: &mut Vsock) {
        while device.backend_ready(&mut self.active, 0).unwrap() == Progress::More {}
    }

    fn send(&mut self, device: &mut Vsock, header: Header, data: &[u8]) {
        fill(&self.memory, OUT, &header.bytes());
        fill(&self.memory, OUT + 0x1000, data);
        let mut parts = vec![(OUT, HEADER_BYTES as u32, false)];
        if !data.is_empty() {
            parts.push((OUT + 0x1000, data.len() as u32, false));
        }
        self.rings[TRANSMIT].offer(&parts);
        self.run(device);
        assert!(self.rings[TRANSMIT].take().is_some());
    }

    /// The next packet, with its data.
    fn receive(&mut self, device: &mut Vsock) -> Option<(Header, Vec<u8>)> {
        self.rings[RECEIVE].offer(&[(IN, HEADER_BYTES as u32, true), (IN + 0x1000, 4096, true)]);
        self.run(device);
        self.rings[RECEIVE].take().map(|(_, length)| {
            let header = Header::read(&bytes(&self.memory, IN, HEADER_BYTES).try_into().unwrap());
            assert_eq!((header.destination_cid, header.source_cid), (CID.into(), HOST_CID));
            assert_eq!(length, HEADER_BYTES as u32 + header.length);
            (header, bytes(&self.memory, IN + 0x1000, header.length as usize))
        })
    }
}

fn packet(op: Op, guest_port: u32, host_port: u32, length: usize) -> Header {
    Header {
        source_cid: CID.into(),
        destination_cid: HOST_CID,
        source_port: guest_port,
        destination_port: host_port,
        length: length as u32,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buffer_bytes: 10_000,
        forwarded: 0,
    }
}

#[test]
fn headers_read_back() {
    let header = Header { flags: 3, forwarded: 77, ..packet(Op::Shutdown, 1000, 7, 5) };
    assert_eq!(Header::read(&header.bytes()), header);
}

#[test]
fn the_guest_connects_and_both_speak() {
    let (mut device, host) = device();
    let mut guest = Guest::new();
    guest.send(&mut device, packet(Op::Request, 1000, 7001, 0), &[]);
    let (number, port) = host.lock().unwrap().asked[0];
    assert_eq!(port, 7001);
    let (ours, mut theirs) = stream();
    host.lock().unwrap().arrivals.push_back(Arrival::Answer { number, stream: Some(ours) });
    let (header, _) = guest.receive(&mut device).unwrap();
    assert_eq!((header.op, header.source_port, header.destination_port), (Op::Response, 7001, 1000));
    assert_eq!(header.buffer_bytes, BUFFER_BYTES);

    guest.send(&mut device, packet(Op::Data, 1000, 7001, 5), b"hello");
    let mut got = [0; 16];
    assert_eq!(theirs.read(&mut got).unwrap(), 5);
    theirs.write_all(&[9; 30_000]).unwrap();
    let mut received = 0;
    while let Some((header, data)) = guest.receive(&mut device) {
        assert_eq!((header.op, header.forwarded), (Op::Data, 5));
        assert!(data.iter().all(|byte| *byte == 9));
        received += data.len();
    }
    assert_eq!(received, 10_000, "what the guest has room for");
    let credit = Header { forwarded: 10_000, ..packet(Op::CreditUpdate, 1000, 7001, 0) };
    // One buffer was offered in vain, and is used now.
    guest.send(&mut device, credit, &[]);
    assert!(guest.rings[RECEIVE].take().is_some());

    // The end: first theirs, then the guest's.
    drop(theirs);
    let mut last = None;
    let credit =
        Header { forwarded: 14_096, buffer_bytes: 1 << 20, ..packet(Op::CreditUpdate, 1000, 7001, 0) };
    guest.send(&mut device, credit, &[]);
    while let Some((header, _)) = guest.receive(&mut device) {
        last = Some(header);
    }
    assert_eq!(last.map(|header| (header.op, header.flags)), Some((Op::Shutdown, 2)));
    let end = Header { flags: 3, ..packet(Op::Shutdown, 1000, 7001, 0) };
    guest.send(&mut device, end, &[]);
    assert!(device.connections.is_empty() && device.by_ports.is_empty());
}

#[test]
fn the_host_connects_and_is_told() {
    let (mut device, host) = device();
    let mut guest = Guest::new();
    let (ours, mut theirs) = stream();
    host.lock().unwrap().arrivals.push_back(Arrival::Stream { port: 7000, stream: ours });
    theirs.write_all(b"early").unwrap();
    let (header, _) = guest.receive(&mut device).unwrap();
    assert_eq!(
        (header.op, header.source_port, header.destination_port),
        (Op::Request, FIRST_HOST_PORT, 7000)
    );
    guest.send(&mut device, packet(Op::Response, 7000, FIRST_HOST_PORT, 0), &[]);
    let mut line = [0; 64];
    let length = theirs.read(&mut line).unwrap();
    assert_eq!(&line[..length], format!("OK {FIRST_HOST_PORT}\n").as_bytes());
    let (header, data) = guest.receive(&mut device).unwrap();
    assert_eq!((header.op, &data[..]), (Op::Data, &b"early"[..]));
    // A driver that begins anew.
    device.quiesce();
    assert_eq!(theirs.read(&mut line).unwrap(), 0);
}

#[test]
fn what_belongs_to_nothing_is_refused() {
    let (mut device, host) = device();
    let mut guest = Guest::new();
    let mut refused = |guest: &mut Guest, header: Header| {
        let length = header.length as usize;
        guest.send(&mut device, header, &vec![0; length]);
        guest.receive(&mut device).map(|(header, _)| header.op)
    };
    assert_eq!(refused(&mut guest, packet(Op::Data, 1, 2, 10)), Some(Op::Reset));
    // The buffer offered in vain after this one is used by the next answer.
    assert_eq!(refused(&mut guest, packet(Op::Reset, 1, 2, 0)), None);
    assert_eq!(refused(&mut guest, Header { kind: 2, ..packet(Op::Request, 1, 2, 0) }), Some(Op::Reset));
    assert_eq!(refused(&mut guest, Header { destination_cid: 9, ..packet(Op::Data, 1, 2, 0) }), None);
    guest.send(&mut device, packet(Op::Request, 5, 6, 0), &[]);
    let (number, _) = host.lock().unwrap().asked[0];
    host.lock().unwrap().arrivals.push_back(Arrival::Answer { number, stream: None });
    assert_eq!(guest.receive(&mut device).map(|(header, _)| header.op), Some(Op::Reset));
}

#[test]
fn a_guest_that_sends_too_much_is_cut_off() {
    let (mut device, host) = device();
    let mut guest = Guest::new();
    guest.send(&mut device, packet(Op::Request, 1000, 7001, 0), &[]);
    let (ours, theirs) = stream();
    host.lock().unwrap().arrivals.push_back(Arrival::Answer { number: 0, stream: Some(ours) });
    guest.receive(&mut device).unwrap();
    for _ in 0..1000 {
        guest.send(&mut device, packet(Op::Data, 1000, 7001, 4096), &[1; 4096]);
        if device.connections.is_empty() {
            break;
        }
        let held: usize = device.connections.values().map(Connection::held).sum();
        assert!(held <= BUFFER_BYTES as usize + 64);
    }
    assert!(device.connections.is_empty(), "nobody reads on the other side");
    drop(theirs);
    // Connections are bounded, and so are answers.
    for port in 0..3000 {
        fill(&guest.memory, OUT, &packet(Op::Request, port, 1, 0).bytes());
        guest.rings[TRANSMIT].offer(&[(OUT, HEADER_BYTES as u32, false)]);
        guest.run(&mut device);
        // It waits, when the guest does not take its answers.
        if guest.rings[TRANSMIT].take().is_none() {
            break;
        }
    }
    assert!(device.connections.len() <= CONNECTIONS_MAX && device.replies.len() <= 2 * REPLIES_MAX);
}

proptest! {
    #[test]
    fn survives_any_driver(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0u16..18, 1..16),
    ) {
        let (mut device, _host) = device();
        attack(&mut device, &table, &heads, 0);
    }

    #[test]
    fn survives_any_packets(packets in prop::collection::vec((0u16..9, 0u32..4, 0u32..4, 0usize..3000, 0u32..4, any::<bool>()), 0..60)) {
        let (mut device, host) = device();
        let mut guest = Guest::new();
        let mut kept = Vec::new();
        for (op, guest_port, host_port, length, flags, answers) in packets {
            let mut raw = Header { flags, ..packet(Op::Other, guest_port, host_port, length) }.bytes();
            raw[30..32].copy_from_slice(&op.to_le_bytes());
            guest.send(&mut device, Header::read(&raw), &vec![0; length]);
            if answers {
                let asked: Vec<_> = host.lock().unwrap().asked.drain(..).collect();
                for (number, _) in asked {
                    let (ours, theirs) = stream();
                    kept.push(theirs);
                    host.lock().unwrap().arrivals.push_back(Arrival::Answer { number, stream: Some(ours) });
                }
            }
            guest.receive(&mut device);
        }
        prop_assert_eq!(device.connections.len(), device.by_ports.len());
    }
}
