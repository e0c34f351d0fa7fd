//! One port: what it is connected to on the host.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, read, write};

use super::PortBackend;
use crate::request::Request;

/// Bytes carried at a time.
const CHUNK_BYTES: usize = 4096;
/// Bytes of one request that are carried before others have their turn.
const TURN_BYTES: usize = 16 * CHUNK_BYTES;

pub(super) struct Port {
    name: String,
    source: Option<OwnedFd>,
    sink: OwnedFd,
    /// Bytes of the request at the head of the queue that have been written.
    written: usize,
    /// The request at the head of the queue has more, and waits for its turn alone.
    has_more: bool,
}

impl Port {
    pub(super) fn new(backend: PortBackend) -> Self {
        let PortBackend { name, input, output } = backend;
        Self { name, source: input, sink: output, written: 0, has_more: false }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.source.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn output(&self) -> BorrowedFd<'_> {
        self.sink.as_fd()
    }

    /// A driver begins anew.
    pub(super) fn begin(&mut self) {
        (self.written, self.has_more) = (0, false);
    }

    /// Whether what the guest writes goes on without waiting.
    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }

    /// Fills a request with what there is to read; `None` when there is nothing yet.
    pub(super) fn fill(&self, request: &Request<'_>) -> Option<u32> {
        let source = self.source.as_ref()?;
        let mut bytes = [0; CHUNK_BYTES];
        let room = bytes.get_mut(..CHUNK_BYTES.min(request.writable.bytes()))?;
        if room.is_empty() {
            return Some(0);
        }
        let count = loop {
            match read(source, &mut *room) {
                Err(Errno::INTR) => {}
                // At its end, or broken: nothing comes any more.
                Ok(0) | Err(_) => return None,
                Ok(count) => break count,
            }
        };
        let given = room.get(..count).is_some_and(|given| request.writable.write(0, given));
        Some(if given { count as u32 } else { 0 })
    }

    /// Writes what is in a request; `None` while there is some left. What nobody can have is lost.
    pub(super) fn drain(&mut self, request: &Request<'_>) -> Option<u32> {
        self.has_more = false;
        let mut bytes = [0; CHUNK_BYTES];
        let mut turn = 0;
        loop {
            let left = request.readable.bytes().saturating_sub(self.written);
            let Some(part) = bytes.get_mut(..left.min(CHUNK_BYTES)).filter(|part| !part.is_empty()) else {
                break;
            };
            if !request.readable.read(self.written, part) {
                break;
            }
            if turn >= TURN_BYTES {
                self.has_more = true;
                return None;
            }
            match write(&self.sink, part) {
                Ok(count) => {
                    self.written = self.written.saturating_add(count);
                    turn += count;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(_) => break,
            }
        }
        self.written = 0;
        Some(0)
    }
}
