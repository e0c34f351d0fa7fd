//! An eventfd as a borrowed descriptor, which `vmm-sys-util` shows as a number only.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// The descriptor of `event`.
pub(crate) fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's, which lives as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
