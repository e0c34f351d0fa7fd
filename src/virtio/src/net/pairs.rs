//! The taps of a card, one for each pair of queues, and how many pairs the driver wants to use (virtio 1.3, 5.1.6.5.5).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK, VIRTIO_NET_S_LINK_UP,
};

use super::{BUDGET, FEATURES, QUEUE_SIZE, header::Offloads};
use crate::{
    active::Active,
    device::{DeviceError, Fault, Progress},
    vectored::{set_offloads, set_queue},
};

/// Pairs of queues that a card can have.
pub const PAIRS_MAX: usize = 8;
/// Of the control queue: one command at a time is usual.
const CONTROL_SIZE: u16 = 16;

/// What a card with so many taps is to its driver, and which of its taps the host gives frames to.
#[derive(Debug)]
pub(super) struct Pairs {
    taps: Vec<OwnedFd>,
    /// The first so many are used; a tap's queue that is not gets no frames.
    used: usize,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
}

impl Pairs {
    /// Taps as they are made: the host gives frames to each.
    pub(super) fn new(taps: Vec<OwnedFd>, mac: [u8; 6]) -> Result<Self, DeviceError> {
        let count = taps.len();
        if !(1..=PAIRS_MAX).contains(&count) {
            return Err(DeviceError::NetQueues(count));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; count * 2];
        // struct virtio_net_config up to status, and with more pairs up to their number.
        let mut config = [&mac[..], &(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes()].concat();
        if count > 1 {
            queue_sizes.push(CONTROL_SIZE);
            config.extend(u16::try_from(count).unwrap_or(1).to_le_bytes());
        }
        Ok(Self { used: count, taps, queue_sizes, config })
    }

    pub(super) fn features(&self) -> u64 {
        let more = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        if self.taps.len() > 1 { FEATURES | more } else { FEATURES }
    }

    pub(super) fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    pub(super) fn config(&self) -> &[u8] {
        &self.config
    }

    pub(super) fn taps(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.taps.iter().map(AsFd::as_fd)
    }

    pub(super) fn tap(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.taps.get(pair).map(AsFd::as_fd)
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Where the control queue is: behind all pairs, for a driver that knows of more than one (5.1.2).
    pub(super) fn control(&self, active: &Active) -> Option<usize> {
        let pairs = if active.has_feature(VIRTIO_NET_F_MQ) { self.taps.len() } else { 1 };
        active.has_feature(VIRTIO_NET_F_CTRL_VQ).then_some(pairs * 2)
    }

    /// Whether a queue can be the control queue, before a driver has said what it knows.
    pub(super) fn may_be_control(&self, index: usize) -> bool {
        self.taps.len() > 1 && (index == 2 || index == self.taps.len() * 2)
    }

    /// A driver begins: the tap gives it what it understands, in the first pair, until it asks for more.
    pub(super) fn begin(&mut self, active: &Active) -> io::Result<()> {
        if let Some(tap) = self.tap(0) {
            set_offloads(tap, Offloads::of_tap(active).flags())?;
        }
        self.use_first(1)
    }

    /// Has the host give frames to the first `count` taps.
    pub(super) fn use_first(&mut self, count: usize) -> io::Result<()> {
        if !(1..=self.taps.len()).contains(&count) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.used != count {
            // The last that is used, or the first that isn't.
            let (changed, is_used) =
                if self.used < count { (self.used, true) } else { (self.used.saturating_sub(1), false) };
            if let Some(tap) = self.taps.get(changed) {
                set_queue(tap.as_fd(), is_used)?;
            }
            self.used = if is_used { changed.saturating_add(1) } else { changed };
        }
        Ok(())
    }

    /// Does what the driver commands in the control queue.
    pub(super) fn obey(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        let knows = active.has_feature(VIRTIO_NET_F_MQ);
        active.serve(index, BUDGET, |request| {
            if request.writable.bytes() == 0 {
                return Err(Fault::Request("has no room for an answer"));
            }
            let mut command = [0; 4];
            let is_done = request.readable.read(0, &mut command) && knows && {
                let [class, what, low, high] = command;
                let is_known = u32::from(class) == VIRTIO_NET_CTRL_MQ
                    && u32::from(what) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
                is_known && self.use_first(u16::from_le_bytes([low, high]).into()).is_ok()
            };
            let answer = if is_done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            // A number below 256, and there is room.
            let is_told = request.writable.write(0, &[answer as u8]);
            Ok(Some(is_told.into()))
        })
    }
}
