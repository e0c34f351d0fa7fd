//! The network device (virtio 1.3, 5.1) over a tap: one pair of queues or several, with the offloads that a tap
//! has.

mod header;
mod kernel;
mod pairs;
mod receive;

use std::os::fd::{BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

use self::header::{HEADER_BYTES, Offloads};
pub use self::{kernel::KernelNet, pairs::PAIRS_MAX};
use self::{pairs::Pairs, receive::Receiver};
use crate::{
    active::Active,
    device::{Device, DeviceError, Fault, Kind, Progress},
    vectored::send,
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
    receiver: Receiver,
}

impl Net {
    /// A card with address `mac` over the queues of a tap, 1 to [`PAIRS_MAX`]: each opened with IFF_TAP, IFF_NO_PI and
    /// IFF_VNET_HDR, and IFF_MULTI_QUEUE when there is more than one, its header set to 12 bytes (TUNSETVNETHDRSZ), and not
    /// blocking.
    ///
    /// # Errors
    /// [`DeviceError::NetQueues`].
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6]) -> Result<Self, DeviceError> {
        Ok(Self { pairs: Pairs::new(taps, mac)?, receiver: Receiver::new() })
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

    fn receive(&mut self, active: &mut Active, pair: usize) -> Result<Progress, Fault> {
        let Some(tap) = self.pairs.tap(pair) else { return Ok(Progress::Idle) };
        self.receiver.receive(active, pair * 2, tap)
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

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
