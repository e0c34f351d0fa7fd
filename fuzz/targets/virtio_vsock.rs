//! A hostile guest of the socket device, whose host answers every second wish, and has visitors.
#![no_main]

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use casemate_virtio::{Arrival, Vsock, VsockHost, hostile};
use libfuzzer_sys::fuzz_target;

struct Host {
    arrivals: Vec<Arrival>,
    others: Vec<UnixStream>,
    events: OwnedFd,
}

impl Host {
    fn stream(&mut self) -> io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        self.others.push(theirs);
        Ok(ours.into())
    }
}

impl VsockHost for Host {
    fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
    fn arrival(&mut self) -> io::Result<Option<Arrival>> {
        Ok(self.arrivals.pop())
    }
    fn connect(&mut self, number: u64, _port: u32) -> io::Result<()> {
        let stream = if number % 2 == 0 { Some(self.stream()?) } else { None };
        self.arrivals.push(Arrival::Answer { number, stream });
        Ok(())
    }
}

fuzz_target!(|script: &[u8]| {
    // A socket whose other end is gone always has something to tell.
    let Ok((events, _)) = UnixStream::pair() else { return };
    let mut host = Host { arrivals: Vec::new(), others: Vec::new(), events: events.into() };
    let Ok(stream) = host.stream() else { return };
    host.arrivals.push(Arrival::Stream { port: 1, stream });
    if let Ok(device) = Vsock::new(3, Box::new(host)) {
        hostile::play(Box::new(device), script);
    }
});
