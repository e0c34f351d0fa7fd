//! A network card whose queues the kernel serves (vhost-net): no frame comes by here.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::eventfd::EventFd;

use super::pairs::Pairs;
use crate::{
    active::Active,
    device::{Device, DeviceError, Fault, Kind, Progress},
    vhost::{RingEvents, VhostNet},
};

/// Features that are between driver and kernel: all of the transport's, and buffers that are merged.
const KERNEL_FEATURES: u64 = !0 << 24 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A network card with a kernel's thread for each pair of queues.
#[derive(Debug)]
pub struct KernelNet {
    pairs: Pairs,
    vhosts: Vec<VhostNet>,
    kernel_features: u64,
    doorbells: Option<Arc<[EventFd]>>,
    /// An eventfd, by which the kernel tells of a broken ring.
    error: OwnedFd,
}

impl KernelNet {
    /// A card as [`super::Net::new`] makes it, whose frames the threads of `vhosts` carry, one a tap: each an open
    /// `/dev/vhost-net` of its own.
    ///
    /// # Errors
    /// [`DeviceError::NetQueues`] also when there are more of one than of the other; what the kernel says.
    pub fn new(taps: Vec<OwnedFd>, vhosts: Vec<OwnedFd>, mac: [u8; 6]) -> Result<Self, DeviceError> {
        if vhosts.len() != taps.len() {
            return Err(DeviceError::NetQueues(vhosts.len()));
        }
        let pairs = Pairs::new(taps, mac)?;
        let of_kernel = || -> io::Result<_> {
            let vhosts = vhosts.into_iter().map(VhostNet::new).collect::<io::Result<Vec<_>>>()?;
            let mut kernel_features = !0;
            for vhost in &vhosts {
                kernel_features &= vhost.features()?;
            }
            if kernel_features & 1 << VIRTIO_NET_F_MRG_RXBUF == 0 {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let error = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
            Ok((vhosts, kernel_features, error))
        };
        let (vhosts, kernel_features, error) = of_kernel().map_err(DeviceError::Vhost)?;
        Ok(Self { pairs, vhosts, kernel_features, doorbells: None, error })
    }

    /// Whether the kernel told of a broken ring since this was last asked.
    fn is_broken(&self) -> bool {
        rustix::io::read(&self.error, &mut [0; 8]).is_ok()
    }

    fn start(&self, active: &Active) -> io::Result<()> {
        let features = active.features() & KERNEL_FEATURES & self.kernel_features;
        let doorbells = self.doorbells.as_deref().unwrap_or_default();
        let cards = self.vhosts.iter().zip(self.pairs.taps()).zip(doorbells.chunks(2));
        for (pair, ((vhost, tap), kicks)) in cards.enumerate() {
            vhost.set_features(features)?;
            vhost.set_memory(active.memory())?;
            for (number, kick) in (0..).zip(kicks) {
                let index = pair * 2 + number as usize;
                // That of a driver which knows of one pair only.
                let is_control = self.pairs.control(active) == Some(index);
                let Some(place) = active.place(index).filter(|_| !is_control) else { continue };
                let call = active.interrupt().queue_event(index);
                let events = RingEvents { kick, call, error: self.error.as_fd() };
                vhost.start(number, active.memory(), place, &events, tap)?;
            }
        }
        Ok(())
    }
}

impl Device for KernelNet {
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
    fn take_doorbells(&mut self, doorbells: &Arc<[EventFd]>) {
        self.doorbells = Some(Arc::clone(doorbells));
    }
    fn hears(&self, index: usize) -> bool {
        self.pairs.may_be_control(index)
    }
    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.error.as_fd()]
    }
    fn activate(&mut self, active: &mut Active) -> Result<(), Fault> {
        let _ = self.is_broken();
        self.pairs.begin(active).map_err(Fault::Host)?;
        self.start(active).map_err(|error| {
            self.quiesce();
            Fault::Host(error)
        })
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        if self.pairs.control(active) == Some(index) {
            return self.pairs.obey(active, index);
        }
        Ok(Progress::Idle)
    }
    /// The kernel found a ring broken.
    fn backend_ready(&mut self, _active: &mut Active, _backend: usize) -> Result<Progress, Fault> {
        if self.is_broken() {
            return Err(Fault::Request("was none that the kernel could follow"));
        }
        Ok(Progress::Idle)
    }
    fn quiesce(&mut self) {
        for vhost in &self.vhosts {
            for index in 0..2 {
                // It fails for a queue that was never started.
                let _ = vhost.stop(index);
            }
        }
    }
}
