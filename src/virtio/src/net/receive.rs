//! Frames from the tap to the driver.

use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::VolatileSlice;

use super::{
    BUDGET, FRAME_MAX_BYTES,
    header::{HEADER_BYTES, Offloads},
};
use crate::{
    active::Active,
    device::{Fault, Progress},
    gather::{Filled, Gathering, Room},
    vectored::receive,
};

/// An Ethernet frame with VLAN tag, as long as an interface usually has them.
const USUAL_BYTES: usize = 18 + 1500 + HEADER_BYTES;
/// The longest frame, with header.
const MOST_BYTES: usize = FRAME_MAX_BYTES + HEADER_BYTES;

/// Receives frames for all pairs of a card.
///
/// A frame's length is known only when it was read, so there has to be room for the longest. To look through all the buffers that this
/// takes costs more than a short frame itself: so as many are looked at as the last frame took, and what a longer one has more is read
/// into memory of our own and copied.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Length of the last frame, with header.
    last: usize,
    rest: Vec<u8>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { last: 0, rest: vec![0; MOST_BYTES] }
    }

    pub(super) fn receive(
        &mut self,
        active: &mut Active,
        index: usize,
        tap: BorrowedFd<'_>,
    ) -> Result<Progress, Fault> {
        let offloads = Offloads::of_tap(active);
        if active.has_feature(VIRTIO_NET_F_MRG_RXBUF) {
            let most = if offloads.segments() { MOST_BYTES } else { USUAL_BYTES };
            return active
                .serve_together(index, BUDGET, |chains| self.next_in_several(tap, offloads, chains, most));
        }
        active.serve(index, BUDGET, |request| {
            let room = &request.writable;
            if room.bytes() <= HEADER_BYTES {
                return Err(NO_ROOM);
            }
            let Some(length) = next_frame(tap, room.slices(), &mut []) else { return Ok(None) };
            let mut header = [0; HEADER_BYTES];
            if !room.read(0, &mut header) || !room.write(0, &offloads.header_in(&header, 1)) {
                return Err(NO_ROOM);
            }
            Ok(Some(u32::try_from(length).unwrap_or(0)))
        })
    }

    /// Receives a frame of at most `most` bytes, with header, into as many buffers as it takes.
    fn next_in_several(
        &mut self,
        tap: BorrowedFd<'_>,
        offloads: Offloads,
        chains: &mut Gathering<'_>,
        most: usize,
    ) -> Result<Filled, Fault> {
        // With few buffers on offer, the longest frame might not find room; the tap keeps it until there are more.
        let are_many = chains.is_half_full()?;
        let wanted = if are_many { self.last.clamp(HEADER_BYTES + 1, most) } else { most };
        match chains.gather(wanted)? {
            Room::Later => return Ok(Filled::Later),
            Room::Short if !are_many => return Ok(Filled::Nothing),
            Room::Short | Room::Enough => {}
        }
        if !chains.have_each_more_than(HEADER_BYTES) {
            return Err(NO_ROOM);
        }
        let (parts, room) = (chains.parts().count(), chains.room());
        let Some(length) = next_frame(tap, chains.parts(), &mut self.rest) else {
            return Ok(Filled::Nothing);
        };
        // What the driver has no room for, or did not say that it understands, is dropped.
        if length > most || chains.gather(length)? != Room::Enough {
            return Ok(Filled::Bytes(0));
        }
        self.last = length;
        let rest = self.rest.get(..length.saturating_sub(room)).unwrap_or(&[]);
        let mut header = [0; HEADER_BYTES];
        if !chains.write_behind(parts, rest) || !chains.read(&mut header) {
            return Err(NO_ROOM);
        }
        // In the first of them stands how many there are, and what is left to be done to the frame.
        let buffers = u16::try_from(chains.filled_by(length)).unwrap_or(u16::MAX);
        if !chains.write_behind(0, &offloads.header_in(&header, buffers)) {
            return Err(NO_ROOM);
        }
        Ok(Filled::Bytes(length))
    }
}

const NO_ROOM: Fault = Fault::Request("has no room for a frame");

/// Reads the next frame, with header, into `parts`, and what they have no room for into `rest`; returns its length.
fn next_frame<'m>(
    tap: BorrowedFd<'_>,
    parts: impl Iterator<Item = VolatileSlice<'m>> + Clone,
    rest: &mut [u8],
) -> Option<usize> {
    loop {
        match receive(tap, parts.clone(), rest) {
            Ok(length) if length > HEADER_BYTES => return Some(length),
            // A header without a frame: none that a tap gives.
            Ok(length) if length > 0 => {}
            // Nothing there; or the tap is down or gone, and its readiness will tell when that changes.
            Ok(_) | Err(_) => return None,
        }
    }
}
