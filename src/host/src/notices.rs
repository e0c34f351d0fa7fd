//! What the kernel tells of devices that a guest has: the host wants one back, or one has failed.
//!
//! The triggers are the keep's, set before the guest's process gets its descriptors: they work whatever that process does. It
//! can take them away from itself, as it has the devices' descriptors too; then the host's request waits for the guest's end.
//! What an IOMMU stopped stands in the kernel's log, which no guest's process reaches.

use std::{
    fmt::Display,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use casemate_spec::{PciAddress, Refusal};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll},
    fs::inotify,
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{
    Host,
    kernel_log::{self, KernelLog},
    ledger::DeviceRecord,
    sys::vfio,
};

/// The kernel's log, among the numbers of the triggers.
const LOG: u64 = u64::MAX;
/// Lines of that log, on other things, that are read at most before others are heard again.
const LINES: usize = 64;
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Something that the kernel told of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Somebody unbinds it from VFIO's driver, or removes it: the request interrupt (`VFIO_PCI_REQ_IRQ_INDEX`).
    Wanted(PciAddress),
    /// It reported an error that the kernel could not correct (PCIe 6.2): the error interrupt (`VFIO_PCI_ERR_IRQ_INDEX`).
    Failed(PciAddress),
    /// Somebody has reset the physical function that it is a virtual one of, by sysfs: its state is gone, and no driver of the
    /// guest's knows. (A driver of the host's that resets its own card by other means is not heard of.)
    ParentReset(PciAddress),
    /// Its IOMMU stopped DMA of its: it asked for what the guest doesn't have.
    Faulted {
        /// Which.
        device: PciAddress,
        /// How often the kernel's log has told so by now. It leaves out most where there are many.
        count: u64,
    },
}

/// The ways on which the kernel tells of a claim's devices. Each trigger speaks once.
#[derive(Debug)]
pub struct Notices {
    any: OwnedFd,
    triggers: Vec<(Notice, OwnedFd)>,
    /// Absent where it can't be read, as in a container without the right.
    log: Option<KernelLog>,
    faults: Vec<(PciAddress, AtomicU64)>,
}

impl Notices {
    /// Has the kernel tell of these functions, which are open.
    pub(crate) fn of(host: &Host, records: &[DeviceRecord], fds: &[OwnedFd]) -> Result<Self, Refusal> {
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
            let parent = host.pci(*address).join("physfn");
            if parent.exists() {
                let told = notices.add_parent(*address, &parent);
                told.map_err(|error| refuse(address, &error))?;
            }
        }
        notices.faults = records.iter().map(|record| (record.address, AtomicU64::new(0))).collect();
        notices.log = KernelLog::from_now().ok();
        if let Some(log) = &notices.log {
            let added = epoll::add(&notices.any, log, epoll::EventData::new_u64(LOG), epoll::EventFlags::IN);
            added.map_err(|error| refuse("epoll", &error.into()))?;
        }
        Ok(notices)
    }

    fn none() -> io::Result<Self> {
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { any, triggers: Vec::new(), log: None, faults: Vec::new() })
    }

    /// What can be read of when there is a next one.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.any.as_fd()
    }

    /// What was told next, each once, but for faults; `None` when there is nothing new.
    pub fn next(&self) -> Option<Notice> {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let count = epoll::wait(&self.any, &mut events, Some(&NOW)).ok()?;
        let event = events.get(..count)?.first()?;
        if event.data.u64() == LOG {
            return self.next_fault();
        }
        let index = usize::try_from(event.data.u64()).ok()?;
        self.triggers.get(index).map(|(notice, _)| *notice)
    }

    fn next_fault(&self) -> Option<Notice> {
        let told = self.log.as_ref()?.next(LINES)?;
        let (device, count) = self.faults.iter().find(|(device, _)| kernel_log::is_of(*device, told))?;
        let count = count.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        Some(Notice::Faulted { device: *device, count })
    }

    /// How often the kernel's log has told by now that DMA of a function's was stopped; `None` where it can't be read.
    pub(crate) fn faults(&self, device: PciAddress) -> Option<u64> {
        self.log.as_ref()?;
        // What was told since anybody listened; the log may be full of other things, which are not waited for.
        for _ in 0..LINES {
            if self.next_fault().is_none() {
                break;
            }
        }
        let of = self.faults.iter().find(|(known, _)| *known == device);
        of.map(|(_, count)| count.load(Ordering::Relaxed))
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
        self.listen(notice, eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
    }

    /// The kernel tells nobody of a reset; but whoever asks for one writes to the function's file for that.
    fn add_parent(&mut self, device: PciAddress, parent: &Path) -> io::Result<()> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        match inotify::add_watch(&watch, parent.join("reset"), inotify::WatchFlags::MODIFY) {
            // It can't be reset so.
            Err(Errno::NOENT) => return Ok(()),
            added => added?,
        };
        self.listen(Notice::ParentReset(device), watch).map(drop)
    }

    fn listen(&mut self, notice: Notice, trigger: OwnedFd) -> io::Result<BorrowedFd<'_>> {
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
