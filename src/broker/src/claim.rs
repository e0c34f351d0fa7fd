//! Devices that were claimed, as the keep has them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use casemate_host::{IommuLimits, Notice, Returned};
use casemate_spec::{PciAddress, Refusal};
use casemate_wire::Channel;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    client::Broker,
    envelope,
    protocol::{Claimed, gone},
};

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Why devices were not had, and what became of those that were taken meanwhile.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub refusal: Refusal,
    /// What was given back.
    pub returned: Vec<Returned>,
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self { refusal, returned: Vec::new() }
    }
}

/// One function of a claim.
#[derive(Debug)]
pub struct ClaimedDevice {
    /// Where it sits.
    pub address: PciAddress,
    /// VFIO's descriptor of it.
    pub fd: OwnedFd,
    /// Its IOMMU group.
    pub group: u32,
    /// How it was reset.
    pub reset_method: String,
    /// The driver that it goes back to.
    pub former_driver: Option<String>,
}

/// Functions that the broker has taken for the guest, with descriptors for its VMM. Dropped, they are released when the keep ends.
pub struct Claim {
    broker: &'static Broker,
    /// The slot that they are for; none for what the guest starts with.
    pub slot: Option<u8>,
    /// The IOMMU container.
    pub container: OwnedFd,
    /// Its groups, each once.
    pub groups: Vec<OwnedFd>,
    /// The functions, in the order in which they were wanted.
    pub devices: Vec<ClaimedDevice>,
    /// What the container can map.
    pub limits: IommuLimits,
    /// Those that are scrubbed when they come back.
    pub scrubbed: Vec<PciAddress>,
    /// What the kernel tells of them.
    pub notices: std::sync::Arc<Notices>,
}

impl Claim {
    pub(crate) fn new(
        broker: &'static Broker,
        slot: Option<u8>,
        claimed: Claimed,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Failed> {
        let there = match claimed {
            Claimed::Done(there) => there,
            Claimed::Undone { returned, refusal } => {
                return Err(Failed { refusal: refusal.into(), returned });
            }
        };
        let short = || Failed::from(gone("descriptors of devices did not come"));
        let mut descriptors = descriptors.into_iter();
        let container = descriptors.next().ok_or_else(short)?;
        let groups: Vec<_> = descriptors.by_ref().take(there.groups).collect();
        let devices: Vec<_> = there
            .devices
            .into_iter()
            .zip(descriptors.by_ref())
            .map(|(device, fd)| ClaimedDevice {
                address: device.address,
                fd,
                group: device.group,
                reset_method: device.reset_method,
                former_driver: device.former_driver,
            })
            .collect();
        // `zip` may have taken one too many only where too few came.
        let way = descriptors.next().ok_or_else(short)?;
        Ok(Self {
            broker,
            slot,
            container,
            groups,
            devices,
            limits: there.limits,
            scrubbed: there.scrubbed,
            notices: std::sync::Arc::new(Notices(Channel::new(way))),
        })
    }

    /// Has each proven and given back, or put into quarantine; `judge` can say why one goes there that was found clean.
    pub fn release(self, judge: &mut dyn FnMut(&Returned) -> Option<String>) -> Vec<Returned> {
        self.give_back(false, judge)
    }

    /// The same while the guest's process runs on, which has to have let go of all.
    pub fn release_from_running(self, judge: &mut dyn FnMut(&Returned) -> Option<String>) -> Vec<Returned> {
        self.give_back(true, judge)
    }

    fn give_back(self, runs_on: bool, judge: &mut dyn FnMut(&Returned) -> Option<String>) -> Vec<Returned> {
        let Self { broker, slot, container, groups, devices, notices, .. } = self;
        // A group that is open yet could not be opened anew.
        drop((devices, groups, container, notices));
        broker.release(slot, runs_on, judge).unwrap_or_else(|refusal| {
            tracing::warn!("{refusal}");
            Vec::new()
        })
    }
}

/// What the kernel tells of a claim's devices.
#[derive(Debug)]
pub struct Notices(Channel);

impl Notices {
    /// What can be read of when there is a next one.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// What was told next; `None` when there is nothing new.
    pub fn next(&self) -> Option<Notice> {
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        if !matches!(poll(&mut polled, Some(&NOW)), Ok(1)) {
            return None;
        }
        envelope::receive(&self.0).ok().map(|(notice, _)| notice)
    }
}
