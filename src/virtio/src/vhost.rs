//! vhost (`linux/vhost.h`): a thread of the kernel's that serves a device's queues.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use libc::Ioctl;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::ring::RingPlace;

const SET_OWNER: Ioctl = 0xaf01;
const GET_FEATURES: Ioctl = 0x8008_af00_u32 as Ioctl;
const SET_FEATURES: Ioctl = 0x4008_af00;
const SET_MEM_TABLE: Ioctl = 0x4008_af03;
const SET_VRING_NUM: Ioctl = 0x4008_af10;
const SET_VRING_ADDR: Ioctl = 0x4028_af11;
const SET_VRING_BASE: Ioctl = 0x4008_af12;
const SET_VRING_KICK: Ioctl = 0x4008_af20;
const SET_VRING_CALL: Ioctl = 0x4008_af21;
const SET_VRING_ERR: Ioctl = 0x4008_af22;
const NET_SET_BACKEND: Ioctl = 0x4008_af30;

/// Pieces of memory that the kernel takes (`max_mem_regions` of the module vhost); guests have one or two.
const REGIONS_MAX: usize = 64;

/// `struct vhost_vring_state` and `struct vhost_vring_file`.
#[repr(C)]
struct Number {
    index: u32,
    value: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory` with its regions.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; REGIONS_MAX],
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest_address: u64,
    size_bytes: u64,
    user_address: u64,
    flags: u64,
}

/// The events of a queue.
pub(crate) struct RingEvents<'a> {
    /// The driver rings.
    pub(crate) kick: &'a EventFd,
    /// The driver is interrupted, if it wants to be.
    pub(crate) call: Option<&'a EventFd>,
    /// The driver broke the ring.
    pub(crate) error: BorrowedFd<'a>,
}

/// An open `/dev/vhost-net` that is this process's.
#[derive(Debug)]
pub(crate) struct VhostNet(OwnedFd);

impl VhostNet {
    /// Takes the device for this process; the kernel makes its thread.
    pub(crate) fn new(device: OwnedFd) -> io::Result<Self> {
        // SAFETY: the call takes no argument.
        checked(unsafe { libc::ioctl(device.as_raw_fd(), SET_OWNER) })?;
        Ok(Self(device))
    }

    /// Feature bits that the kernel knows.
    pub(crate) fn features(&self) -> io::Result<u64> {
        let mut features = 0u64;
        // SAFETY: the call writes eight bytes.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), GET_FEATURES, &raw mut features) })?;
        Ok(features)
    }

    pub(crate) fn set_features(&self, features: u64) -> io::Result<()> {
        // SAFETY: the call reads eight bytes.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_FEATURES, &raw const features) })
    }

    /// Shows the guest's memory to the kernel's thread. `memory` must stay mapped until all queues are stopped.
    pub(crate) fn set_memory(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        let mut table = MemoryTable { count: 0, padding: 0, regions: [MemoryRegion::default(); REGIONS_MAX] };
        if memory.num_regions() > REGIONS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, region) in table.regions.iter_mut().zip(memory.iter()) {
            *place = MemoryRegion {
                guest_address: region.start_addr().raw_value(),
                size_bytes: region.len(),
                user_address: host_address(memory, region.start_addr())?,
                flags: 0,
            };
            table.count += 1;
        }
        // SAFETY: the call reads the head and as many regions as it says, all of which the structure has.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_MEM_TABLE, &raw const table) })
    }

    /// Lets the kernel's thread serve queue `index` between the ring and `tap`.
    pub(crate) fn start(
        &self,
        index: u32,
        memory: &GuestMemoryMmap,
        place: RingPlace,
        events: &RingEvents<'_>,
        tap: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let at = |address| host_address(memory, GuestAddress(address));
        let addresses = Addresses {
            index,
            flags: 0,
            descriptors: at(place.descriptors)?,
            used: at(place.used)?,
            available: at(place.available)?,
            log: 0,
        };
        self.set(SET_VRING_NUM, index, place.size.into())?;
        self.set(SET_VRING_BASE, index, 0)?;
        // SAFETY: the call reads the structure. The addresses are in guest memory, which the kernel checks against its
        // table, and which its thread may write as a device may.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_VRING_ADDR, &raw const addresses) })?;
        self.set(SET_VRING_KICK, index, events.kick.as_raw_fd())?;
        self.set(SET_VRING_CALL, index, events.call.map_or(-1, AsRawFd::as_raw_fd))?;
        self.set(SET_VRING_ERR, index, events.error.as_raw_fd())?;
        self.set(NET_SET_BACKEND, index, tap.as_raw_fd())
    }

    /// Returns when the kernel's thread no longer serves queue `index`.
    pub(crate) fn stop(&self, index: u32) -> io::Result<()> {
        self.set(NET_SET_BACKEND, index, -1)
    }

    fn set(&self, request: Ioctl, index: u32, value: RawFd) -> io::Result<()> {
        let number = Number { index, value };
        // SAFETY: each of these calls reads an index and a number or descriptor, eight bytes.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw const number) })
    }
}

fn host_address(memory: &GuestMemoryMmap, at: GuestAddress) -> io::Result<u64> {
    let pointer = memory.get_host_address(at).map_err(io::Error::other)?;
    Ok(pointer as u64)
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
