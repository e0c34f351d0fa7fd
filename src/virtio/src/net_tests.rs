use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::*;
use crate::testing::{Ring, active, attack_with, bytes, descriptor, fill, memory, run, signals};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const BUFFER: u64 = 0x20000;

/// A card whose tap is a socket, and the other end of that: both keep frames apart.
fn card() -> (Net, UnixDatagram) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    (Net::new(vec![tap.into()], MAC).unwrap(), wire)
}

fn frame(content: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES], content].concat()
}

#[test]
fn describes_itself() {
    let (net, _wire) = card();
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 7, 1, 0]);
    let bits = [0, 1, 5, 7, 8, 11, 12, 15, 16];
    assert_eq!(net.features(), bits.iter().map(|bit| 1u64 << bit).sum::<u64>());
}

/// A card with two pairs of queues over one socket, which is no tap: it has nothing to be set.
fn wide_card() -> (Net, UnixDatagram) {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    (Net::new(vec![tap.try_clone().unwrap().into(), tap.into()], MAC).unwrap(), wire)
}

#[test]
fn a_card_has_as_many_queues_as_its_tap() {
    let (net, _wire) = wide_card();
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 7, 1, 0, 2, 0]);
    assert_eq!(net.features(), card().0.features() | 1 << 17 | 1 << 22);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 16]);
    let none = Net::new(Vec::new(), MAC);
    assert!(matches!(none, Err(DeviceError::NetQueues(0))));
    let tap = || UnixDatagram::unbound().unwrap().into();
    let many = Net::new(std::iter::repeat_with(tap).take(9).collect(), MAC);
    assert!(matches!(many, Err(DeviceError::NetQueues(9))));
}

#[test]
fn a_driver_says_how_many_pairs_it_uses() {
    let command = |bytes: &[u8], features: u64, control: usize| {
        let memory = memory();
        let (mut net, _wire) = wide_card();
        let mut rings: Vec<Ring> = (0..5).map(|i| Ring::new(&memory, 0x1000 + 0x4000 * i, 16)).collect();
        fill(&memory, BUFFER, bytes);
        fill(&memory, BUFFER + 64, &[0xaa]);
        let length = u32::try_from(bytes.len()).unwrap();
        rings[control].offer(&[(BUFFER, length, false), (BUFFER + 64, 1, true)]);
        let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), features);
        net.activate(&mut active).unwrap();
        run(&mut net, &mut active, control).unwrap();
        (bytes_at(&memory), net.pairs.used())
    };
    let both = 1 << 17 | 1 << 22;
    assert_eq!(command(&[4, 0, 2, 0], both, 4), (0, 2));
    assert_eq!(command(&[4, 0, 1, 0], both, 4), (0, 1));
    for odd in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 0, 0, 1], &[4, 1, 2, 0], &[0, 0, 2, 0], &[4, 0, 2]] {
        assert_eq!(command(odd, both, 4), (1, 1), "{odd:?}");
    }
    // Who knows of one pair has its control queue behind that, and nothing to command.
    assert_eq!(command(&[4, 0, 2, 0], 1 << 17, 2), (1, 1));
}

fn bytes_at(memory: &crate::active::Memory) -> u8 {
    bytes(memory, BUFFER + 64, 1)[0]
}

#[test]
fn each_pair_has_frames_of_its_own() {
    let memory = memory();
    let (mut net, wire) = wide_card();
    let mut rings: Vec<Ring> = (0..5).map(|i| Ring::new(&memory, 0x1000 + 0x4000 * i, 16)).collect();
    fill(&memory, BUFFER, &[0; 12]);
    fill(&memory, BUFFER + 12, b"second");
    rings[3].offer(&[(BUFFER, 18, false)]);
    let head = rings[2].offer(&[(BUFFER + 0x1000, 1526, true)]);
    let (mut active, events) = active(&memory, &rings.iter().collect::<Vec<_>>(), 1 << 17 | 1 << 22);
    net.activate(&mut active).unwrap();
    run(&mut net, &mut active, 3).unwrap();
    let mut got = [0; 100];
    let length = wire.recv(&mut got).unwrap();
    assert_eq!(got[..length], frame(b"second"));
    wire.send(&frame(b"reply")).unwrap();
    net.backend_ready(&mut active, 1).unwrap();
    assert_eq!(rings[2].take(), Some((head, 17)));
    assert_eq!((signals(&events[2]), signals(&events[0])), (1, 0));
}

#[test]
fn sends_frames_under_a_header_of_its_own() {
    let memory = memory();
    let (mut net, wire) = card();
    let (receive, mut transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    // num_buffers means nothing here.
    fill(&memory, BUFFER + 10, &[0xff; 2]);
    fill(&memory, BUFFER + 12, b"first ");
    fill(&memory, BUFFER + 100, b"frame");
    let head = transmit.offer(&[(BUFFER, 18, false), (BUFFER + 100, 5, false)]);
    let (mut active, events) = active(&memory, &[&receive, &transmit], 0);
    run(&mut net, &mut active, TRANSMIT).unwrap();
    let mut got = [0xaa; 100];
    let length = wire.recv(&mut got).unwrap();
    assert_eq!(got[..length], frame(b"first frame"));
    assert_eq!((transmit.take(), signals(&events[TRANSMIT])), (Some((head, 0)), 1));
}

#[test]
fn leaves_to_the_host_what_was_negotiated() {
    let segment = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    let memory = memory();
    fill(&memory, BUFFER, &segment);
    fill(&memory, BUFFER + 12, &[5; 4000]);
    for (features, sent) in
        [(1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4, true), (1 << VIRTIO_NET_F_CSUM, false)]
    {
        fill(&memory, 0x1000, &[0; 0xa000]);
        let (mut net, wire) = card();
        let (receive, mut transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
        let head = transmit.offer(&[(BUFFER, 4012, false)]);
        let (mut active, _events) = active(&memory, &[&receive, &transmit], features);
        run(&mut net, &mut active, TRANSMIT).unwrap();
        let mut got = [0; 5000];
        let length = wire.recv(&mut got).unwrap_or(0);
        let expected = if sent { [&segment[..], &[5; 4000]].concat() } else { vec![] };
        assert_eq!(got[..length], expected);
        assert_eq!(transmit.take(), Some((head, 0)));
    }
}

#[test]
fn a_long_frame_takes_several_buffers() {
    const FEATURES: u64 =
        1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let memory = memory();
    let (mut net, wire) = card();
    let (mut receive, transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    let (mut active, events) = active(&memory, &[&receive, &transmit], FEATURES);
    let content: Vec<u8> = (0..4000u32).map(|n| n as u8).collect();
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    wire.send(&[&header[..], &content].concat()).unwrap();
    wire.send(&frame(b"short")).unwrap();
    // Few buffers might not be enough for what comes, so it waits for more.
    let mut heads: Vec<u16> = (0..3).map(|n| receive.offer(&[(BUFFER + n * 2048, 1526, true)])).collect();
    run(&mut net, &mut active, RECEIVE).unwrap();
    assert_eq!(receive.take(), None);
    heads.extend((3..8).map(|n| receive.offer(&[(BUFFER + n * 2048, 1526, true)])));
    run(&mut net, &mut active, RECEIVE).unwrap();
    let taken: Vec<_> = std::iter::from_fn(|| receive.take()).collect();
    assert_eq!(taken, [(heads[0], 1526), (heads[1], 1526), (heads[2], 960)], "and the short one waits again");
    assert_eq!(bytes(&memory, BUFFER, 12), [&header[..10], &[3, 0]].concat());
    let parts = [
        bytes(&memory, BUFFER + 12, 1514),
        bytes(&memory, BUFFER + 2048, 1526),
        bytes(&memory, BUFFER + 4096, 960),
    ];
    assert_eq!(parts.concat(), content);
    assert_eq!(signals(&events[RECEIVE]), 1);
    heads.extend((8..11).map(|n| receive.offer(&[(BUFFER + n * 2048, 1526, true)])));
    run(&mut net, &mut active, RECEIVE).unwrap();
    assert_eq!((receive.take(), receive.take()), (Some((heads[3], 17)), None));
    assert_eq!(bytes(&memory, BUFFER + 3 * 2048 + 10, 7), [&[1, 0][..], b"short"].concat());
    // A frame that fills all that there is may have been longer.
    wire.send(&frame(&[9; 8 * 1526])).unwrap();
    heads.extend((11..12).map(|n| receive.offer(&[(BUFFER + n * 2048, 1526, true)])));
    run(&mut net, &mut active, RECEIVE).unwrap();
    assert_eq!(receive.take(), None);
}

/// A card with 16 buffers of 1526 bytes, and features that let frames be long.
fn long_frames(memory: &crate::active::Memory) -> (Net, UnixDatagram, Ring, Active) {
    const FEATURES: u64 =
        1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    let (net, wire) = card();
    let (mut receive, transmit) = (Ring::new(memory, 0x1000, 16), Ring::new(memory, 0x8000, 16));
    for n in 0..16 {
        receive.offer(&[(BUFFER + n * 2048, 1526, true)]);
    }
    let (active, _events) = active(memory, &[&receive, &transmit], FEATURES);
    (net, wire, receive, active)
}

#[test]
fn a_long_frame_may_follow_a_short_one() {
    let memory = memory();
    let (mut net, wire, mut receive, mut active) = long_frames(&memory);
    let content: Vec<u8> = (0..4000u32).map(|n| (n % 251) as u8).collect();
    for frame in [frame(b"short"), frame(&content), frame(b"short again"), frame(&content)] {
        wire.send(&frame).unwrap();
    }
    run(&mut net, &mut active, RECEIVE).unwrap();
    let taken: Vec<_> = std::iter::from_fn(|| receive.take()).collect();
    let lengths = [17, 1526, 1526, 960, 23, 1526, 1526, 960];
    assert_eq!(taken, (0..).zip(lengths).collect::<Vec<_>>());
    for first in [1u64, 5] {
        let buffer = |n: u64, from: u64, length| bytes(&memory, BUFFER + (first + n) * 2048 + from, length);
        assert_eq!(buffer(0, 10, 2), [3, 0]);
        assert_eq!([buffer(0, 12, 1514), buffer(1, 0, 1526), buffer(2, 0, 960)].concat(), content);
    }
}

/// Else the driver would look for the second buffer in vain, and drop the frame.
#[test]
fn the_buffers_of_a_frame_are_given_back_together() {
    let memory = memory();
    let (mut net, wire, mut receive, mut active) = long_frames(&memory);
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let index = || u16::from_le_bytes(bytes(&memory, 0x3002, 2).try_into().unwrap());
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut seen = 0u32;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                seen |= 1 << (index() % 4);
            }
            seen
        });
        for _ in 0..4000 {
            wire.send(&frame(&[7; 1526 * 4 - HEADER_BYTES])).unwrap();
            run(&mut net, &mut active, RECEIVE).unwrap();
            while let Some((head, _)) = receive.take() {
                receive.make_available(head);
            }
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(watch.join().unwrap(), 1, "it was seen between the buffers of a frame");
    });
    assert_eq!(index(), 16_000);
}

/// However fast the driver offers buffers, and however many of them a turn takes.
#[test]
fn no_frame_is_lost_while_buffers_come_and_go() {
    const FRAMES: usize = 3000;
    let memory = memory();
    let (mut net, wire, mut receive, mut active) = long_frames(&memory);
    std::thread::scope(|scope| {
        let driver = scope.spawn(move || {
            let begun = std::time::Instant::now();
            let mut taken = 0;
            while taken < 4 * FRAMES && begun.elapsed().as_secs() < 20 {
                if let Some((head, _)) = receive.take() {
                    taken += 1;
                    receive.make_available(head);
                }
            }
            taken
        });
        let mut sent = 0;
        while sent < FRAMES || !driver.is_finished() {
            while sent < FRAMES && wire.send(&frame(&[7; 1526 * 4 - HEADER_BYTES])).is_ok() {
                sent += 1;
            }
            run(&mut net, &mut active, RECEIVE).unwrap();
        }
        assert_eq!(driver.join().unwrap(), 4 * FRAMES);
    });
}

#[test]
fn a_frame_that_the_tap_does_not_take_is_dropped() {
    let memory = memory();
    let (mut net, wire) = card();
    drop(wire);
    let (receive, mut transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    let head = transmit.offer(&[(BUFFER, 100, false)]);
    let (mut active, _events) = active(&memory, &[&receive, &transmit], 0);
    run(&mut net, &mut active, TRANSMIT).unwrap();
    assert_eq!(transmit.take(), Some((head, 0)));
}

#[test]
fn received_frames_wait_for_buffers() {
    let memory = memory();
    let (mut net, wire) = card();
    let (mut receive, transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    let (mut active, events) = active(&memory, &[&receive, &transmit], 0);
    wire.send(&frame(b"one")).unwrap();
    wire.send(&frame(b"two")).unwrap();
    assert_eq!(net.backend_ready(&mut active, 0).unwrap(), Progress::Idle);
    assert_eq!(receive.take(), None);

    fill(&memory, BUFFER, &[0xff; 2048]);
    let heads = [
        receive.offer(&[(BUFFER, 1526, true)]),
        receive.offer(&[(BUFFER + 2048, 12, true), (BUFFER, 1514, true)]),
    ];
    run(&mut net, &mut active, RECEIVE).unwrap();
    assert_eq!([receive.take(), receive.take()], heads.map(|head| Some((head, 15))));
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(bytes(&memory, BUFFER + 2048, 12), header);
    assert_eq!(bytes(&memory, BUFFER, 3), b"two");
    assert_eq!(signals(&events[RECEIVE]), 1, "the driver had not looked at the first");

    // A buffer that got nothing stays for the next frame.
    let head = receive.offer(&[(BUFFER, 1526, true)]);
    run(&mut net, &mut active, RECEIVE).unwrap();
    assert_eq!(receive.take(), None);
    wire.send(&frame(b"three")).unwrap();
    assert_eq!(net.backend_ready(&mut active, 0).unwrap(), Progress::Idle);
    assert_eq!(receive.take(), Some((head, 17)));
    assert_eq!(bytes(&memory, BUFFER, 17), [&header[..], b"three"].concat());
}

#[test]
fn a_flood_is_received_in_turns() {
    let memory = memory();
    let (mut net, wire) = card();
    let (mut receive, transmit) = (Ring::new(&memory, 0x1000, 128), Ring::new(&memory, 0x8000, 16));
    for _ in 0..128 {
        receive.offer(&[(BUFFER, 1526, true)]);
    }
    let (mut active, _events) = active(&memory, &[&receive, &transmit], 0);
    let mut sent = 0;
    while wire.send(&frame(b"flood")).is_ok() {
        sent += 1;
        if sent % 8 == 0 {
            run(&mut net, &mut active, RECEIVE).unwrap();
        }
        if sent == 120 {
            break;
        }
    }
    assert_eq!((sent, std::iter::from_fn(|| receive.take()).count()), (120, 120));
}

#[test]
fn buffers_without_room_stop_the_device() {
    let memory = memory();
    let (mut net, _wire) = card();
    let (mut receive, mut transmit) = (Ring::new(&memory, 0x1000, 16), Ring::new(&memory, 0x8000, 16));
    receive.offer(&[(BUFFER, 12, true)]);
    transmit.offer(&[(BUFFER, 12, false)]);
    let (mut active, _events) = active(&memory, &[&receive, &transmit], 0);
    assert!(matches!(run(&mut net, &mut active, RECEIVE), Err(Fault::Request(_))));
    assert!(matches!(run(&mut net, &mut active, TRANSMIT), Err(Fault::Request(_))));
}

proptest! {
    #[test]
    fn survives_any_driver(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0u16..18, 1..16),
        features: u64,
    ) {
        let (mut net, wire) = card();
        for _ in 0..4 {
            wire.send(&frame(&[7; 1514])).unwrap();
        }
        attack_with(&mut net, &table, &heads, 0, features);
    }
}
