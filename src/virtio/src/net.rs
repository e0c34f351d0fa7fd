//! The network device (virtio 1.3, 5.1) over a tap: one pair of queues, no offloads.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};

use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    vectored::{receive, send},
};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// struct virtio_net_hdr with num_buffers, as every frame has it in front since virtio 1.0.
const HEADER_BYTES: usize = 12;
/// Without offloads and mergeable buffers: no flags, no segmentation, and one buffer (num_buffers, at 10).
const HEADER_IN: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const HEADER_OUT: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
/// The longest frame passed on: an Ethernet header with VLAN tag, and what an interface can have as MTU.
const FRAME_MAX_BYTES: usize = 18 + 65535;
/// Frames handled before the other direction has its turn.
const BUDGET: usize = 64;

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
    /// bytes (TUNSETVNETHDRSZ), its offloads off (TUNSETOFFLOAD 0), and not blocking.
    pub fn new(tap: OwnedFd, mac: [u8; 6]) -> Self {
        // struct virtio_net_config up to status.
        let config = [&mac[..], &(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes()].concat();
        Self { tap, config }
    }

    fn transmit(&self, active: &mut Active) -> Result<Progress, Fault> {
        active.serve(TRANSMIT, BUDGET, |request| {
            let frame = HEADER_BYTES..request.readable.bytes();
            if frame.is_empty() {
                return Err(Fault::Request("has no frame"));
            }
            // The driver's header can only be zeros, so the host's kernel gets ours, not what the guest makes it.
            if frame.len() <= FRAME_MAX_BYTES {
                let _ = send(self.tap.as_fd(), &HEADER_OUT, &request.readable, frame);
            }
            Ok(Some(0))
        })
    }

    fn receive(&self, active: &mut Active) -> Result<Progress, Fault> {
        active.serve(RECEIVE, BUDGET, |request| {
            if request.writable.bytes() <= HEADER_BYTES {
                return Err(Fault::Request("has no room for a frame"));
            }
            let length = loop {
                match receive(self.tap.as_fd(), &request.writable) {
                    Ok(length) if length > HEADER_BYTES => break length,
                    // A header without a frame: none that a tap gives.
                    Ok(length) if length > 0 => {}
                    // Nothing there; or the tap is down or gone, and its readiness will tell when that changes.
                    Ok(_) | Err(_) => return Ok(None),
                }
            };
            if !request.writable.write(0, &HEADER_IN) {
                return Err(Fault::Request("has no room for a frame"));
            }
            Ok(Some(u32::try_from(length).unwrap_or(0)))
        })
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
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
