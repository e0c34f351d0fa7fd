//! The network device (virtio 1.3, 5.1) over a tap: one pair of queues, with the offloads that a tap has.

mod header;
mod kernel;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::header::{HEADER_BYTES, Offloads};
pub use self::kernel::KernelNet;
use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    request::Request,
    vectored::{receive, send, set_offloads},
};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
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

/// struct virtio_net_config up to status.
fn config(mac: [u8; 6]) -> Vec<u8> {
    [&mac[..], &(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes()].concat()
}

/// A network card.
///
/// A received frame waits in the tap while the driver has no buffers, and the tap drops what is too much. A frame
/// that the tap does not take is dropped.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    config: Vec<u8>,
}

impl Net {
    /// A card with address `mac` over `tap`: opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, its header set to 12
    /// bytes (TUNSETVNETHDRSZ), and not blocking.
    pub fn new(tap: OwnedFd, mac: [u8; 6]) -> Self {
        Self { tap, config: config(mac) }
    }

    fn transmit(&self, active: &mut Active) -> Result<Progress, Fault> {
        let offloads = Offloads::of_driver(active);
        active.serve(TRANSMIT, BUDGET, |request| {
            let frame = HEADER_BYTES..request.readable.bytes();
            let mut header = [0; HEADER_BYTES];
            if frame.is_empty() || !request.readable.read(0, &mut header) {
                return Err(Fault::Request("has no frame"));
            }
            // The host's kernel gets a header of ours, with what was negotiated and makes sense for the frame.
            if frame.len() <= FRAME_MAX_BYTES
                && let Some(header) = offloads.header_out(&header, frame.len())
            {
                let _ = send(self.tap.as_fd(), &header, &request.readable, frame);
            }
            Ok(Some(0))
        })
    }

    fn receive(&self, active: &mut Active) -> Result<Progress, Fault> {
        let offloads = Offloads::of_tap(active);
        if active.has_feature(VIRTIO_NET_F_MRG_RXBUF) {
            let room = if offloads.segments() { FRAME_MAX_BYTES } else { 18 + 1500 } + HEADER_BYTES;
            return active.serve_together(RECEIVE, BUDGET, room, |requests| {
                // The tap cuts what does not fit, so a frame that fills all the room may lack its end.
                let all: usize = requests.iter().map(|request| request.writable.bytes()).sum();
                self.receive_into(offloads, requests, |length| length < all || all >= room)
            });
        }
        active.serve(RECEIVE, BUDGET, |request| {
            let length = self.receive_into(offloads, std::slice::from_ref(request), |_| true)?;
            Ok(length.map(|length| u32::try_from(length).unwrap_or(0)))
        })
    }

    /// Receives the next frame that is `good` into `requests`, from the first on; returns its length with header.
    fn receive_into(
        &self,
        offloads: Offloads,
        requests: &[Request<'_>],
        good: impl Fn(usize) -> bool,
    ) -> Result<Option<usize>, Fault> {
        let Some(first) = requests.first() else { return Ok(None) };
        if requests.iter().any(|request| request.writable.bytes() <= HEADER_BYTES) {
            return Err(Fault::Request("has no room for a frame"));
        }
        let length = loop {
            match receive(self.tap.as_fd(), requests.iter().map(|request| &request.writable)) {
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
        let is_told = first.writable.read(0, &mut header)
            && first.writable.write(0, &offloads.header_in(&header, buffers));
        if is_told { Ok(Some(length)) } else { Err(Fault::Request("has no room for a frame")) }
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.tap.as_fd())
    }
    /// The tap gives the driver what it understands, and does the rest itself.
    fn activate(&mut self, active: &mut Active) -> Result<(), Fault> {
        set_offloads(self.tap.as_fd(), Offloads::of_tap(active).flags()).map_err(Fault::Host)
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        match index {
            RECEIVE => self.receive(active),
            _ => self.transmit(active),
        }
    }
    fn backend_ready(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        self.receive(active)
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
