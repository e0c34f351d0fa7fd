//! System calls that move bytes between a file and guest memory, without a copy in between, or that give memory back.
//!
//! The one module of the crate with unsafe code: safe wrappers want references, and there must be none to memory that
//! a guest changes at any time.
#![allow(unsafe_code)]

use std::{
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
};

use libc::{c_int, iovec, off64_t};
use vm_memory::VolatileSlice;

use crate::{active::Memory, request::Buffers};

/// Parts that one call takes: the kernel's UIO_MAXIOV.
const PARTS_MAX: usize = 1024;
const NOTHING: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
/// As many buffers of a page as the longest frame takes, and some more: room for those is made at once.
pub(crate) const PARTS_USUAL: usize = 24;

/// Fills bytes `range` of `buffers` from `file`, from byte `offset` of it on.
///
/// # Errors
/// What the kernel says, or [`io::ErrorKind::UnexpectedEof`]; an unknown part of the buffers is then written.
pub(crate) fn read_at(
    file: BorrowedFd<'_>,
    buffers: &Buffers<'_>,
    range: Range<usize>,
    offset: u64,
) -> io::Result<()> {
    transfer(range, offset, io::ErrorKind::UnexpectedEof, |range, offset| {
        let parts = parts(buffers, range);
        // SAFETY: `parts` point to guest memory that `buffers` borrows, mapped and as long as they say; the kernel
        // writes there as the guest itself might, and no reference to that memory exists. The count fits.
        unsafe { libc::preadv64(file.as_raw_fd(), parts.as_ptr(), parts.len() as c_int, offset) }
    })
}

/// As [`read_at`], up to the end of the file; returns the number of bytes.
///
/// # Errors
/// What the kernel says.
pub(crate) fn read_at_most(
    file: BorrowedFd<'_>,
    buffers: &Buffers<'_>,
    range: Range<usize>,
    offset: u64,
) -> io::Result<usize> {
    let mut read = 0;
    let result = transfer(range, offset, io::ErrorKind::UnexpectedEof, |range, offset| {
        let parts = parts(buffers, range);
        // SAFETY: as in `read_at`.
        let moved = unsafe { libc::preadv64(file.as_raw_fd(), parts.as_ptr(), parts.len() as c_int, offset) };
        read += usize::try_from(moved).unwrap_or(0);
        moved
    });
    match result {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(read),
    }
}

/// Writes bytes `range` of `buffers` to `file`, from byte `offset` of it on.
///
/// # Errors
/// What the kernel says, or [`io::ErrorKind::WriteZero`]; an unknown part of the file is then written.
pub(crate) fn write_at(
    file: BorrowedFd<'_>,
    buffers: &Buffers<'_>,
    range: Range<usize>,
    offset: u64,
) -> io::Result<()> {
    transfer(range, offset, io::ErrorKind::WriteZero, |range, offset| {
        let parts = parts(buffers, range);
        // SAFETY: `parts` point to guest memory that `buffers` borrows, mapped and as long as they say; the kernel
        // only reads it. The count fits.
        unsafe { libc::pwritev64(file.as_raw_fd(), parts.as_ptr(), parts.len() as c_int, offset) }
    })
}

/// Parts of guest memory for a call that ends later: they stay mapped as long as this lives.
#[derive(Debug)]
pub(crate) struct Transfer {
    parts: Parts,
    bytes: usize,
    _memory: Memory,
}

/// Most transfers have one part, for which there is no list to be made.
#[derive(Debug)]
enum Parts {
    One(iovec),
    /// With the number of those that are done.
    Several(Vec<iovec>, usize),
}

/// What is left of a transfer, as far as one call takes it.
pub(crate) enum Left<'a> {
    One(iovec),
    /// They stay where they are when the transfer is moved.
    Several(&'a [iovec]),
}

// SAFETY: what `parts` point to is guest memory, a mapping that `_memory` keeps and that any thread may use; it is never
// read or written through them here, but by the kernel alone.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Bytes `range` of `buffers`.
    pub(crate) fn new(buffers: &Buffers<'_>, range: Range<usize>) -> Self {
        let mut parts = buffers.range(range).map(part);
        let (first, second) = (parts.next().unwrap_or(NOTHING), parts.next());
        let (parts, bytes) = match second {
            None => (Parts::One(first), first.iov_len),
            Some(second) => {
                let all: Vec<iovec> = [first, second].into_iter().chain(parts).collect();
                let bytes = all.iter().map(|part| part.iov_len).sum();
                (Parts::Several(all, 0), bytes)
            }
        };
        Self { parts, bytes, _memory: Memory::clone(buffers.memory()) }
    }

    /// Bytes that are left.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The parts that are left, as many as one call takes.
    pub(crate) fn left(&self) -> Left<'_> {
        match &self.parts {
            Parts::One(part) => Left::One(*part),
            Parts::Several(all, done) => {
                let rest = all.get(*done..).unwrap_or(&[]);
                Left::Several(rest.get(..PARTS_MAX).unwrap_or(rest))
            }
        }
    }

    /// The first `bytes` of what was left are done.
    pub(crate) fn advance(&mut self, mut bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
        let (all, done) = match &mut self.parts {
            Parts::Several(all, done) => (all, done),
            Parts::One(part) => {
                skip(part, bytes);
                return;
            }
        };
        while let Some(part) = all.get_mut(*done) {
            bytes = skip(part, bytes);
            if part.iov_len > 0 {
                return;
            }
            *done += 1;
        }
    }
}

/// Of `bytes`, those that are past the part, whose beginning is done.
fn skip(part: &mut iovec, bytes: usize) -> usize {
    let step = bytes.min(part.iov_len);
    // Within the part, or one past its end.
    part.iov_base = part.iov_base.wrapping_byte_add(step);
    part.iov_len -= step;
    bytes - step
}

/// Receives one message from `file` into the slices, one after the other, and what they have no room for into `rest`; returns its
/// length, cut to what all of them hold.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::WouldBlock`] when there is none.
pub(crate) fn receive<'m>(
    file: BorrowedFd<'_>,
    slices: impl Iterator<Item = VolatileSlice<'m>>,
    rest: &mut [u8],
) -> io::Result<usize> {
    let mut parts = Vec::with_capacity(PARTS_USUAL);
    parts.extend(slices.take(PARTS_MAX).map(part));
    // Behind buffers that were left out, it would be in their place.
    if parts.len() < PARTS_MAX && !rest.is_empty() {
        parts.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    }
    retry(|| {
        // SAFETY: as in `read_at`, and the last part may be `rest`, which nobody else has meanwhile.
        unsafe { libc::readv(file.as_raw_fd(), parts.as_ptr(), parts.len() as c_int) }
    })
}

/// Receives bytes from `file`, a stream, into bytes `range` of `buffers`; returns how many.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::WouldBlock`] when there are none.
pub(crate) fn receive_range(
    file: BorrowedFd<'_>,
    buffers: &Buffers<'_>,
    range: Range<usize>,
) -> io::Result<usize> {
    let parts = parts(buffers, range);
    retry(|| {
        // SAFETY: as in `read_at`.
        unsafe { libc::readv(file.as_raw_fd(), parts.as_ptr(), parts.len() as c_int) }
    })
}

/// Sends `header` and then bytes `range` of `buffers` to `file` as one message.
///
/// # Errors
/// What the kernel says; [`io::ErrorKind::WouldBlock`] when it would have to wait.
pub(crate) fn send(
    file: BorrowedFd<'_>,
    header: &[u8],
    buffers: &Buffers<'_>,
    range: Range<usize>,
) -> io::Result<usize> {
    // The kernel does not write through this pointer.
    let mut all = vec![iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() }];
    all.extend(parts(buffers, range));
    retry(|| {
        // SAFETY: the first part is `header`, the others are as in `write_at`; `writev` only reads them.
        unsafe { libc::writev(file.as_raw_fd(), all.as_ptr(), all.len() as c_int) }
    })
}

/// Sets what a tap may leave to who reads it (TUNSETOFFLOAD, `linux/if_tun.h`).
///
/// # Errors
/// What the kernel says.
pub(crate) fn set_offloads(tap: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
    // SAFETY: the call takes a number.
    tap_answer(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

/// Has the host give frames to one of a tap's queues, or no longer (TUNSETQUEUE). It fails when that is so already.
///
/// # Errors
/// What the kernel says.
pub(crate) fn set_queue(tap: BorrowedFd<'_>, is_used: bool) -> io::Result<()> {
    const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;
    let flags = if is_used { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let mut request = IfRequest { name: [0; 16], flags: 0, rest: [0; 22] };
    request.flags = i16::try_from(flags).unwrap_or(0);
    // SAFETY: the call reads one ifreq, of which this is one.
    tap_answer(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETQUEUE, &raw const request) })
}

/// `struct ifreq` (linux/if.h) with the flags of its union.
#[repr(C)]
struct IfRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// What an ioctl of a tap answered. What is no tap at all, as a socket in its place is none, has nothing to be set.
fn tap_answer(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOTTY) => Ok(()),
            error => Err(error),
        },
    }
}

/// Gives the whole pages in `buffers` back to the host; they read as zeros, and take memory again when touched. A page
/// that the kernel does not take stays as it is.
pub(crate) fn release(buffers: &Buffers<'_>) {
    buffers.range(0..buffers.bytes()).for_each(|slice| release_slice(&slice));
}

/// The same for one slice of guest memory.
pub(crate) fn release_slice(slice: &VolatileSlice<'_>) {
    const PAGE_BYTES: usize = 4096;
    let guard = slice.ptr_guard_mut();
    let start = guard.as_ptr() as usize;
    let end = start.saturating_add(slice.len()) / PAGE_BYTES * PAGE_BYTES;
    let head_bytes = start.next_multiple_of(PAGE_BYTES).saturating_sub(start);
    let Some(length @ 1..) = end.checked_sub(start.saturating_add(head_bytes)) else { return };
    // SAFETY: the pages lie in `slice`, guest memory that the caller borrows, so the pointer stays in its mapping.
    // That memory is private and anonymous, nothing but the guest gives its bytes a meaning, and no reference to it
    // exists: that they turn to zeros is no more than the guest could have written.
    unsafe { libc::madvise(guard.as_ptr().add(head_bytes).cast(), length, libc::MADV_DONTNEED) };
}

/// Repeats `call` until all of `range` is moved.
fn transfer(
    mut range: Range<usize>,
    mut offset: u64,
    none: io::ErrorKind,
    mut call: impl FnMut(Range<usize>, off64_t) -> isize,
) -> io::Result<()> {
    while !range.is_empty() {
        let at = off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = retry(|| call(range.clone(), at))?;
        if moved == 0 {
            return Err(none.into());
        }
        range.start = range.start.saturating_add(moved);
        offset = offset.saturating_add(moved as u64);
    }
    Ok(())
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// The first parts of bytes `range` of `buffers`, as the kernel takes them.
fn parts(buffers: &Buffers<'_>, range: Range<usize>) -> Vec<iovec> {
    buffers.range(range).take(PARTS_MAX).map(part).collect()
}

fn part(slice: VolatileSlice<'_>) -> iovec {
    iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}
