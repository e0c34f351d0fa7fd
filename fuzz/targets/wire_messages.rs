//! A captured cell sends any packet to its keep, or a stranger to a cell: it is a message to its last byte, or an error.
//! What was a message is the same one when it is sent on.
#![no_main]

use casemate_wire::{Channel, FromCell, FromVsock, ToCell, ToVsock};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use serde::{Serialize, de::DeserializeOwned};

fn take<M: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(packet: &[u8]) {
    let pair = || {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("sockets are there")
    };
    let (ours, theirs) = pair();
    if send(&ours, packet, SendFlags::DONTWAIT).is_err() {
        return;
    }
    let Ok((message, descriptors)) = Channel::new(theirs).receive::<M>() else { return };
    assert!(descriptors.finish().is_ok(), "descriptors came out of nowhere");
    let (ours, theirs) = pair();
    if Channel::new(ours).send_now(&message, &[]).is_ok() {
        let again = Channel::new(theirs).receive::<M>().expect("what was sent is a message").0;
        assert_eq!(message, again);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, packet)) = bytes.split_first() else { return };
    if packet.is_empty() {
        return;
    }
    match kind % 4 {
        0 | 1 => take::<FromCell>(packet),
        2 => take::<ToCell>(packet),
        _ => {
            take::<FromVsock>(packet);
            take::<ToVsock>(packet);
        }
    }
});
