//! What a device has done, counted for whoever asks: relaxed atomics, so that the threads that do the work wait for nobody.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of one device, shared by the threads of its queues and by who reads them.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    bytes_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
    errors: AtomicU64,
}

/// What [`Counters`] hold at a moment. Requests under way may be in one number and not yet in another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that the guest was given, with the device's headers.
    pub bytes_to_guest: u64,
    /// Bytes that the guest gave, with its headers.
    pub bytes_from_guest: u64,
    /// Requests that failed, and stops because the driver broke a rule.
    pub errors: u64,
}

impl Counted {
    /// Bytes of both directions.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes_to_guest.wrapping_add(self.bytes_from_guest)
    }
}

impl Counters {
    /// Counts an answered request: `from_guest` bytes that the device could read, `to_guest` bytes that it wrote.
    pub fn request(&self, from_guest: u64, to_guest: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes_from_guest.fetch_add(from_guest, Ordering::Relaxed);
        self.bytes_to_guest.fetch_add(to_guest, Ordering::Relaxed);
    }

    /// Counts a request that failed, or a device that stopped.
    pub fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// The numbers now.
    pub fn read(&self) -> Counted {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            requests: of(&self.requests),
            bytes_to_guest: of(&self.bytes_to_guest),
            bytes_from_guest: of(&self.bytes_from_guest),
            errors: of(&self.errors),
        }
    }
}
