//! A hostile guest of a virtio console: a terminal, or ports with names.
#![no_main]

use std::{io::Write, os::unix::net::UnixStream};

use casemate_virtio::{Console, PortBackend, hostile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| {
    let Some((first, script)) = script.split_first() else { return };
    let port = |name: &str| -> Option<(PortBackend, UnixStream)> {
        let (ours, mut theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        theirs.write_all(&[7; 300]).ok()?;
        let input = ours.try_clone().ok()?;
        Some((PortBackend { name: name.into(), input: Some(input.into()), output: ours.into() }, theirs))
    };
    let Some(((one, _its_host), (other, _others_host))) = port("one").zip(port("other")) else { return };
    let device =
        if first % 2 == 0 { Console::terminal(one) } else { Console::named(vec![one, other]) };
    hostile::play(Box::new(device), script);
});
