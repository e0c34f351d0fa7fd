//! The network device (virtio 1.3, 5.1) over a tap: one pair of queues or several, with the offloads that a tap
//! has.

mod header;
mod kernel;
mod pairs;

use std::os::fd::{BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

use self::header::{HEADER_BYTES, Offloads};
use self::pairs::Pairs;
pub use self::{kernel::KernelNet, pairs::PAIRS_MAX};
use crate::{
    active::Active,
    device::{Device, DeviceError, Fault, Kind, Progress},
    request::Request,
    vectored::{receive, send},
};

const QUEUE_SIZE: u16 = 256;
/// The first of each pair.
#[cfg(test)]
const RECEIVE: usize = 0;
/// The second.
#[cfg(test)]
const TRANSMIT: usize = 1;
/// The longest frame passed on: an Ethernet header with VLAN tag, and what an interface can have as MTU, or what a
/// segmented packet has at most.
const FRAME_MAX_BYTES: usize = 18 + 65535;
/// Frames handled before the other direction has its turn.
const BUDGET: usize = 64;

/// What every card offers.
const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS;

/// A network card.
///
/// A received frame waits in the tap while the driver has no buffers, and the tap drops what is too much. A frame
/// that the tap does not take is dropped. One thread serves all pairs: more of them spare the guest's processors from
/// waiting for each other, no more.
#[derive(Debug)]
pub struct Net {
    pairs: Pairs,
}

impl Net {
    /// A card with address `mac` over the queues of a tap, 1 to [`PAIRS_MAX`]: each opened with IFF_TAP, IFF_NO_PI and
    /// IFF_VNET_HDR, and IFF_MULTI_QUEUE when there is more than one, its header set to 12 bytes (TUNSETVNETHDRSZ), and not
    /// blocking.
    ///
    /// # Errors
    /// [`DeviceError::NetQueues`].
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6]) -> Result<Self, DeviceError> {
        Ok(Self { pairs: Pairs::new(taps, mac)? })
    }

    fn transmit(&self, active: &mut Active, pair: usize) -> Result<Progress, Fault> {
        let Some(tap) = self.pairs.tap(pair) else { return Ok(Progress::Idle) };
        let offloads = Offloads::of_driver(active);
        active.serve(pair * 2 + 1, BUDGET, |request| {
            let frame = HEADER_BYTES..request.readable.bytes();
            let mut header = [0; HEADER_BYTES];
            if frame.is_empty() || !request.readable.read(0, &mut header) {
                return Err(Fault::Request("has no frame"));
            }
            // The host's kernel gets a header of ours, with what was negotiated and makes sense for the frame.
            if frame.len() <= FRAME_MAX_BYTES
                && let Some(header) = offloads.header_out(&header, frame.len())
            {
                let _ = send(tap, &header, &request.readable, frame);
            }
            Ok(Some(0))
        })
    }

    fn receive(&self, active: &mut Active, pair: usize) -> Result<Progress, Fault> {
        let Some(tap) = self.pairs.tap(pair) else { return Ok(Progress::Idle) };
        let (index, offloads) = (pair * 2, Offloads::of_tap(active));
        if active.has_feature(VIRTIO_NET_F_MRG_RXBUF) {
            let room = if offloads.segments() { FRAME_MAX_BYTES } else { 18 + 1500 } + HEADER_BYTES;
            return active.serve_together(index, BUDGET, room, |requests| {
                // The tap cuts what does not fit, so a frame that fills all the room may lack its end.
                let all: usize = requests.iter().map(|request| request.writable.bytes()).sum();
                receive_into(tap, offloads, requests, |length| length < all || all >= room)
            });
        }
        active.serve(index, BUDGET, |request| {
            let length = receive_into(tap, offloads, std::slice::from_ref(request), |_| true)?;
            Ok(length.map(|length| u32::try_from(length).unwrap_or(0)))
        })
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }
    fn features(&self) -> u64 {
        self.pairs.features()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.pairs.queue_sizes()
    }
    fn config(&self) -> &[u8] {
        self.pairs.config()
    }
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        self.pairs.taps().collect()
    }
    /// The tap gives the driver what it understands, and does the rest itself.
    fn activate(&mut self, active: &mut Active) -> Result<(), Fault> {
        self.pairs.begin(active).map_err(Fault::Host)
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        match index {
            _ if self.pairs.control(active) == Some(index) => self.pairs.obey(active, index),
            _ if index.is_multiple_of(2) => self.receive(active, index / 2),
            _ => self.transmit(active, index / 2),
        }
    }
    fn backend_ready(&mut self, active: &mut Active, backend: usize) -> Result<Progress, Fault> {
        self.receive(active, backend)
    }
}

/// Receives the next frame that is `good` into `requests`, from the first on; returns its length with header.
fn receive_into(
    tap: BorrowedFd<'_>,
    offloads: Offloads,
    requests: &[Request<'_>],
    good: impl Fn(usize) -> bool,
) -> Result<Option<usize>, Fault> {
    let Some(first) = requests.first() else { return Ok(None) };
    if requests.iter().any(|request| request.writable.bytes() <= HEADER_BYTES) {
        return Err(Fault::Request("has no room for a frame"));
    }
    let length = loop {
        match receive(tap, requests.iter().map(|request| &request.writable)) {
            Ok(length) if length > HEADER_BYTES && good(length) => break length,
            // A header without a frame: none that a tap gives.
            Ok(length) if length > 0 => {}
            // Nothing there; or the tap is down or gone, and its readiness will tell when that changes.
            Ok(_) | Err(_) => return Ok(None),
        }
    };
    let mut header = [0; HEADER_BYTES];
    let mut room = 0usize;
    let buffers = requests.iter().take_while(|request| {
        let needed = room < length;
        room = room.saturating_add(request.writable.bytes());
        needed
    });
    let buffers = u16::try_from(buffers.count()).unwrap_or(u16::MAX);
    let is_told =
        first.writable.read(0, &mut header) && first.writable.write(0, &offloads.header_in(&header, buffers));
    if is_told { Ok(Some(length)) } else { Err(Fault::Request("has no room for a frame")) }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
