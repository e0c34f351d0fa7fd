//! A hostile guest of a network card, on whose other side something is always there to be received.
#![no_main]

use std::os::unix::net::UnixDatagram;

use casemate_virtio::{Net, hostile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| {
    let Ok((tap, wire)) = UnixDatagram::pair() else { return };
    if tap.set_nonblocking(true).is_err() || wire.set_nonblocking(true).is_err() {
        return;
    }
    for length in [20, 1526, 9000, 65000] {
        let _ = wire.send(&vec![7; length]);
    }
    let Ok(second) = tap.try_clone() else { return };
    let Ok(card) = Net::new(vec![tap.into(), second.into()], [2, 0, 0, 0, 0, 1]) else { return };
    hostile::play(Box::new(card), script);
});
