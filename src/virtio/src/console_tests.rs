use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Ring, active, attack_with, bytes, descriptor, fill, memory, run};

/// A port, and the host's end of it.
fn port(name: &str) -> (PortBackend, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let input = ours.try_clone().unwrap();
    (PortBackend { name: name.into(), input: Some(input.into()), output: ours.into() }, theirs)
}

#[test]
fn a_terminal_carries_both_ways_and_tells_its_size() {
    let (backend, mut host) = port("");
    let mut terminal = Console::terminal(backend);
    assert_eq!((terminal.features(), terminal.queue_sizes().len()), (VIRTIO_CONSOLE_F_SIZE, 2));
    assert_eq!(terminal.config().len(), CONFIG_BYTES, "Linux takes no console without configuration");
    let config = terminal.changing_config().unwrap();
    terminal.control().set_size(132, 43);
    assert_eq!((config.u32_at(0), config.u32_at(4), config.generation()), (43 << 16 | 132, 1, 1));

    let memory = memory();
    let (mut to_guest, mut from_guest) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    let room = to_guest.offer(&[(0x20000, 3, true), (0x21000, 100, true)]);
    fill(&memory, 0x30000, b"hello ");
    fill(&memory, 0x31000, b"host");
    let said = from_guest.offer(&[(0x30000, 6, false), (0x31000, 4, false)]);
    let (mut active, _events) = active(&memory, &[&to_guest, &from_guest], VIRTIO_CONSOLE_F_SIZE);
    run(&mut terminal, &mut active, 0).unwrap();
    assert_eq!(to_guest.take(), None, "nothing was typed");
    host.write_all(b"typed").unwrap();
    assert_eq!(terminal.backend_ready(&mut active, 0).unwrap(), Progress::Idle);
    assert_eq!(to_guest.take(), Some((room, 5)));
    assert_eq!((bytes(&memory, 0x20000, 3), bytes(&memory, 0x21000, 2)), (b"typ".to_vec(), b"ed".to_vec()));
    run(&mut terminal, &mut active, 1).unwrap();
    assert_eq!(from_guest.take(), Some((said, 0)));
    let mut heard = [0; 16];
    assert_eq!(host.read(&mut heard).unwrap(), 10);
    assert_eq!(&heard[..10], b"hello host");
}

#[test]
fn what_finds_no_room_waits_and_is_not_said_twice() {
    let (write_end, mut read_end) = UnixStream::pair().unwrap();
    write_end.set_nonblocking(true).unwrap();
    read_end.set_nonblocking(true).unwrap();
    let mut terminal =
        Console::terminal(PortBackend { name: String::new(), input: None, output: write_end.into() });
    let memory = memory();
    let to_guest = Ring::new(&memory, 0x1000, 16);
    let mut from_guest = Ring::new(&memory, 0x8000, 16);
    let all: Vec<u8> = (0..200_000u32).map(|at| (at % 251) as u8).collect();
    memory.write_slice(&all, GuestAddress(0x20000)).unwrap();
    let said = from_guest.offer(&[(0x20000, 200_000, false)]);
    let (mut active, _events) = active(&memory, &[&to_guest, &from_guest], VIRTIO_CONSOLE_F_SIZE);
    let mut heard = Vec::new();
    for _ in 0..100 {
        run(&mut terminal, &mut active, 1).unwrap();
        let mut part = vec![0; 10_000];
        while let Ok(count) = read_end.read(&mut part) {
            heard.extend_from_slice(&part[..count]);
            // As its sink is ready again.
            let _ = terminal.backend_ready(&mut active, 0).unwrap();
        }
        if from_guest.take() == Some((said, 0)) {
            break;
        }
    }
    assert!(heard == all, "{} bytes came, of {}", heard.len(), all.len());
    drop(read_end);
    let lost = from_guest.offer(&[(0x20000, 10, false)]);
    run(&mut terminal, &mut active, 1).unwrap();
    assert_eq!(from_guest.take(), Some((lost, 0)), "what nobody can have is lost");
}

#[test]
fn ports_are_told_by_name_once_the_driver_is_there() {
    let ((first, mut host), (second, _other)) = (port("agent"), port("logs"));
    let mut ports = Console::named(vec![first, second]);
    assert_eq!((ports.features(), ports.queue_sizes().len()), (VIRTIO_CONSOLE_F_MULTIPORT, 8));
    assert_eq!(ports.changing_config().unwrap().u32_at(4), 3);
    let memory = memory();
    let mut rings: Vec<Ring> = (0..8).map(|at| Ring::new(&memory, 0x1000 + 0x4000 * at, 16)).collect();
    let place = |number: u64| 0x40000 + 64 * number;
    for number in 0..8 {
        rings[TO_DRIVER].offer(&[(place(number), 64, true)]);
    }
    let say = |ring: &mut Ring, message: Header| {
        fill(&memory, 0x50000, &message.bytes());
        ring.offer(&[(0x50000, 8, false)]);
    };
    let (mut active, _events) = {
        let all: Vec<&Ring> = rings.iter().collect();
        active(&memory, &all, VIRTIO_CONSOLE_F_MULTIPORT)
    };
    say(&mut rings[FROM_DRIVER], Header::of(0, message::DEVICE_READY, 1));
    run(&mut ports, &mut active, FROM_DRIVER).unwrap();
    let told = |number: u64, length: usize| bytes(&memory, place(number), length);
    assert_eq!(told(0, 8), Header::of(1, message::PORT_ADD, 1).bytes());
    assert_eq!(told(1, 8), Header::of(2, message::PORT_ADD, 1).bytes());
    // One that there is, and two that there are not.
    for port in [0, 3, 2] {
        say(&mut rings[FROM_DRIVER], Header::of(port, message::PORT_READY, 1));
        run(&mut ports, &mut active, FROM_DRIVER).unwrap();
    }
    assert_eq!(told(2, 12), [&Header::of(2, message::PORT_NAME, 1).bytes()[..], b"logs"].concat());
    assert_eq!(told(3, 8), Header::of(2, message::PORT_OPEN, 1).bytes());
    assert_eq!(told(4, 8), [0; 8]);

    let room = rings[4].offer(&[(0x60000, 16, true)]);
    host.write_all(b"ping").unwrap();
    ports.backend_ready(&mut active, 0).unwrap();
    assert_eq!((rings[4].take(), bytes(&memory, 0x60000, 4)), (Some((room, 4)), b"ping".to_vec()));
    fill(&memory, 0x61000, b"pong");
    rings[5].offer(&[(0x61000, 4, false)]);
    run(&mut ports, &mut active, 5).unwrap();
    let mut heard = [0; 4];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"pong");
}

#[test]
fn a_driver_that_asks_without_listening_waits() {
    let (backend, _host) = port("agent");
    let mut ports = Console::named(vec![backend]);
    let memory = memory();
    let mut rings: Vec<Ring> = (0..6).map(|at| Ring::new(&memory, 0x1000 + 0x4000 * at, 64)).collect();
    fill(&memory, 0x50000, &Header::of(1, message::PORT_READY, 1).bytes());
    for _ in 0..60 {
        rings[FROM_DRIVER].offer(&[(0x50000, 8, false)]);
    }
    let (mut active, _events) = {
        let all: Vec<&Ring> = rings.iter().collect();
        active(&memory, &all, VIRTIO_CONSOLE_F_MULTIPORT)
    };
    run(&mut ports, &mut active, FROM_DRIVER).unwrap();
    let taken = std::iter::from_fn(|| rings[FROM_DRIVER].take()).count();
    assert!(taken < 60 && ports.messages.len() <= MESSAGES_MAX + 2, "{taken} were taken");
    rings[TO_DRIVER].offer(&[(0x60000, 4, true)]);
    assert!(run(&mut ports, &mut active, TO_DRIVER).is_err(), "a message does not fit into 4 bytes");
}

proptest! {
    #[test]
    fn survives_any_driver(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0u16..18, 1..16),
        types in prop_oneof![Just(0u32), Just(1), any::<u32>()],
        is_named: bool,
    ) {
        let (backend, mut host) = port("agent");
        host.write_all(&[7; 100]).unwrap();
        let (mut device, features) = if is_named {
            (Console::named(vec![backend]), VIRTIO_CONSOLE_F_MULTIPORT)
        } else {
            (Console::terminal(backend), VIRTIO_CONSOLE_F_SIZE)
        };
        attack_with(&mut device, &table, &heads, types, features);
    }
}
