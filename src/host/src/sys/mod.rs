//! The calls into the kernel that need `unsafe`, each behind a safe function that reads its result.

pub(crate) mod child;
pub(crate) mod dma;
pub(crate) mod nvme;
pub(crate) mod probe;
pub(crate) mod tun;
pub(crate) mod vfio;

use std::{io, os::fd::AsFd, os::fd::AsRawFd};

use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// The result of a system call: -1 means errno.
fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// An ioctl that reads a `T` or nothing.
///
/// # Safety
/// `request` reads no more than a `T`, keeps no pointer to it, and writes no memory of this process.
unsafe fn ioctl_in<T>(fd: impl AsFd, request: libc::c_ulong, argument: &T) -> io::Result<libc::c_int> {
    // SAFETY: by this function's contract, `request` only reads `argument`, which lives through the call.
    checked(unsafe { ioctl_with_ref(&fd.as_fd().as_raw_fd(), request, argument) })
}

/// An ioctl that reads and writes a `T`.
///
/// # Safety
/// `request` writes no more than a `T`, leaves a valid one, and keeps no pointer to it.
unsafe fn ioctl_in_out<T>(
    fd: impl AsFd,
    request: libc::c_ulong,
    argument: &mut T,
) -> io::Result<libc::c_int> {
    // SAFETY: by this function's contract, `request` touches `argument` alone, which is borrowed through the call.
    checked(unsafe { ioctl_with_mut_ref(&fd.as_fd().as_raw_fd(), request, argument) })
}

/// An ioctl whose argument is a number.
///
/// # Safety
/// `request` takes `value` as a number, not as an address.
unsafe fn ioctl_value(
    fd: impl AsFd,
    request: libc::c_ulong,
    value: libc::c_ulong,
) -> io::Result<libc::c_int> {
    // SAFETY: by this function's contract no memory is involved.
    checked(unsafe { ioctl_with_val(&fd.as_fd().as_raw_fd(), request, value) })
}

/// An ioctl without argument.
///
/// # Safety
/// `request` takes no argument.
unsafe fn ioctl_none(fd: impl AsFd, request: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: by this function's contract no memory is involved.
    checked(unsafe { ioctl(&fd.as_fd().as_raw_fd(), request) })
}
