//! What the kernel tells of devices that a guest has: the host wants one back, or one has failed.
//!
//! The triggers are the keep's, set before the guest's process gets its descriptors: they work whatever that process does. It
//! can take them away from itself, as it has the devices' descriptors too; then the host's request waits for the guest's end.

use std::{
    fmt::Display,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use casemate_spec::{PciAddress, Refusal};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll},
    io::Errno,
};

use crate::{ledger::DeviceRecord, sys::vfio};

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Something that the kernel told of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Somebody unbinds it from VFIO's driver, or removes it: the request interrupt (`VFIO_PCI_REQ_IRQ_INDEX`).
    Wanted(PciAddress),
    /// It reported an error that the kernel could not correct (PCIe 6.2): the error interrupt (`VFIO_PCI_ERR_IRQ_INDEX`).
    Failed(PciAddress),
}

/// The ways on which the kernel tells of a claim's devices. Each speaks once.
#[derive(Debug)]
pub struct Notices {
    any: OwnedFd,
    triggers: Vec<(Notice, OwnedFd)>,
}

impl Notices {
    /// Has the kernel tell of these functions, which are open.
    pub(crate) fn of(records: &[DeviceRecord], fds: &[OwnedFd]) -> Result<Self, Refusal> {
        let mut notices = Self::none().map_err(|error| refuse("epoll", &error))?;
        for (DeviceRecord { address, .. }, fd) in records.iter().zip(fds) {
            let told = notices.add(Notice::Wanted(*address)).and_then(|event| vfio::tell_requests(fd, event));
            told.map_err(|error| refuse(address, &error))?;
            let told = notices.add(Notice::Failed(*address)).and_then(|event| vfio::tell_errors(fd, event));
            match told {
                // A conventional PCI function reports none.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
                told => told.map_err(|error| refuse(address, &error))?,
            }
        }
        Ok(notices)
    }

    fn none() -> io::Result<Self> {
        Ok(Self { any: epoll::create(epoll::CreateFlags::CLOEXEC)?, triggers: Vec::new() })
    }

    /// What can be read of when there is a next one.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.any.as_fd()
    }

    /// What was told next, each once; `None` when there is nothing new.
    pub fn next(&self) -> Option<Notice> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let count = epoll::wait(&self.any, &mut events, Some(&NOW)).ok()?;
        let event = events.get(..count)?.first()?;
        let index = usize::try_from(event.data.u64()).ok()?;
        self.triggers.get(index).map(|(notice, _)| *notice)
    }

    /// Whether this was told, however long ago.
    pub fn was_told(&self, notice: Notice) -> bool {
        let told = self.triggers.iter().find(|(known, _)| *known == notice);
        told.is_some_and(|(_, trigger)| {
            let mut polled = [PollFd::new(trigger, PollFlags::IN)];
            // Nobody reads it, so it stays as it was set.
            matches!(poll(&mut polled, Some(&NOW)), Ok(1))
        })
    }

    fn add(&mut self, notice: Notice) -> io::Result<BorrowedFd<'_>> {
        let trigger = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let index = u64::try_from(self.triggers.len()).map_err(|_| Errno::NOSPC)?;
        // Once: it is not read, and would be ready for ever.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ONESHOT;
        epoll::add(&self.any, &trigger, epoll::EventData::new_u64(index), flags)?;
        self.triggers.push((notice, trigger));
        self.triggers.last().map(|(_, trigger)| trigger.as_fd()).ok_or_else(|| Errno::NOSPC.into())
    }
}

fn refuse(subject: impl Display, error: &io::Error) -> Refusal {
    let cause = format!("what the kernel tells of devices cannot be listened to: {error}");
    Refusal::new("vfio-failed", subject, cause, "see the kernel's log: dmesg")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::at;

    #[test]
    fn each_is_told_once_and_a_failure_stays() {
        let (drive, card) = (at("0000:03:00.0"), at("0000:01:00.0"));
        let mut notices = Notices::none().unwrap();
        for notice in
            [Notice::Wanted(drive), Notice::Failed(drive), Notice::Wanted(card), Notice::Failed(card)]
        {
            notices.add(notice).unwrap();
        }
        assert_eq!(notices.next(), None);
        // As the kernel does.
        for index in [2, 1, 1] {
            rustix::io::write(&notices.triggers[index].1, &1u64.to_ne_bytes()).unwrap();
        }
        let mut polled = [PollFd::from_borrowed_fd(notices.wake(), PollFlags::IN)];
        assert_eq!(poll(&mut polled, Some(&NOW)).unwrap(), 1);
        let mut told = vec![notices.next().unwrap(), notices.next().unwrap()];
        told.sort_by_key(|notice| matches!(notice, Notice::Failed(_)));
        assert_eq!(told, [Notice::Wanted(card), Notice::Failed(drive)]);
        rustix::io::write(&notices.triggers[1].1, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(notices.next(), None, "it is told once, however often the kernel says it");
        assert!(notices.was_told(Notice::Failed(drive)) && !notices.was_told(Notice::Failed(card)));
        assert!(!Notices::none().unwrap().was_told(Notice::Failed(drive)));
    }
}
