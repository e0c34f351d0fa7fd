//! A network card whose queues the kernel serves (vhost-net): no frame comes by here.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;

use super::{QUEUE_SIZE, header::Offloads};
use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    net,
    vectored::set_offloads,
    vhost::{RingEvents, VhostNet},
};

const QUEUES: [u16; 2] = [QUEUE_SIZE; 2];
/// Features that are between driver and kernel: all of the transport's, and buffers that are merged.
const KERNEL_FEATURES: u64 = !0 << 24 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A network card with a kernel's thread.
#[derive(Debug)]
pub struct KernelNet {
    tap: OwnedFd,
    vhost: VhostNet,
    kernel_features: u64,
    config: Vec<u8>,
    doorbells: Option<Arc<[EventFd]>>,
    /// An eventfd, by which the kernel tells of a broken ring.
    error: OwnedFd,
}

impl KernelNet {
    /// A card as [`super::Net::new`] makes it, whose frames the thread of `vhost`, an open `/dev/vhost-net`, carries.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(tap: OwnedFd, vhost: OwnedFd, mac: [u8; 6]) -> io::Result<Self> {
        let vhost = VhostNet::new(vhost)?;
        let kernel_features = vhost.features()?;
        if kernel_features & 1 << VIRTIO_NET_F_MRG_RXBUF == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let error = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { tap, vhost, kernel_features, config: net::config(mac), doorbells: None, error })
    }

    /// Whether the kernel told of a broken ring since this was last asked.
    fn is_broken(&self) -> bool {
        rustix::io::read(&self.error, &mut [0; 8]).is_ok()
    }

    fn start(&self, active: &Active) -> io::Result<()> {
        let features = active.features() & KERNEL_FEATURES & self.kernel_features;
        self.vhost.set_features(features)?;
        self.vhost.set_memory(active.memory())?;
        let doorbells = self.doorbells.iter().flat_map(|doorbells| doorbells.iter());
        for (index, kick) in (0..).zip(doorbells) {
            let Some(place) = active.place(index as usize) else { continue };
            let call = active.interrupt().queue_event(index as usize);
            let events = RingEvents { kick, call, error: self.error.as_fd() };
            self.vhost.start(index, active.memory(), place, &events, self.tap.as_fd())?;
        }
        Ok(())
    }
}

impl Device for KernelNet {
    fn kind(&self) -> Kind {
        Kind::Net
    }
    fn features(&self) -> u64 {
        net::FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn take_doorbells(&mut self, doorbells: &Arc<[EventFd]>) -> bool {
        self.doorbells = Some(Arc::clone(doorbells));
        true
    }
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.error.as_fd())
    }
    fn activate(&mut self, active: &mut Active) -> Result<(), Fault> {
        let _ = self.is_broken();
        set_offloads(self.tap.as_fd(), Offloads::of_tap(active).flags()).map_err(Fault::Host)?;
        self.start(active).map_err(|error| {
            self.quiesce();
            Fault::Host(error)
        })
    }
    fn queue_ready(&mut self, _active: &mut Active, _index: usize) -> Result<Progress, Fault> {
        Ok(Progress::Idle)
    }
    /// The kernel found a ring broken.
    fn backend_ready(&mut self, _active: &mut Active) -> Result<Progress, Fault> {
        if self.is_broken() {
            return Err(Fault::Request("was none that the kernel could follow"));
        }
        Ok(Progress::Idle)
    }
    fn quiesce(&mut self) {
        for index in 0..QUEUES.len() as u32 {
            // It fails for a queue that was never started.
            let _ = self.vhost.stop(index);
        }
    }
}
