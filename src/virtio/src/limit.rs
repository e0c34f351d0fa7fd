//! How much a device may do: token buckets of bytes and of operations.
//!
//! A bucket fills at its rate up to its burst. Whoever finds something in it has a turn, whatever that takes; it may so run
//! into debt, and the next turn waits until that is paid. So a request larger than the burst gets through, and the rate
//! holds over time. What a turn took is read off the device's counters: the devices know nothing of limits.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// What a bucket is filled with, and how much it holds; both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens a second.
    pub per_second: u64,
    /// Tokens that a bucket which was left alone holds.
    pub burst: u64,
}

/// The limits of one device; what is `None` is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of data, of both directions.
    pub bytes: Option<Rate>,
    /// Requests, or frames.
    pub operations: Option<Rate>,
}

/// Tokens are counted in billionths, so that no time is too short to count.
const UNIT: i128 = 1_000_000_000;

/// One bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    /// Billionths of a token; below zero is debt.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full bucket.
    fn new(rate: Rate, now: Instant) -> Self {
        let rate = Rate { per_second: rate.per_second.max(1), burst: rate.burst.max(1) };
        Self { rate, level: i128::from(rate.burst) * UNIT, filled: now }
    }

    /// How long to wait until there is something in it.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let nanoseconds = i128::from(now.saturating_duration_since(self.filled).as_nanos() as u64);
        // Nanoseconds times tokens a second are billionths of tokens.
        let gained = nanoseconds.saturating_mul(self.rate.per_second.into());
        self.level = (self.level.saturating_add(gained)).min(i128::from(self.rate.burst) * UNIT);
        self.filled = self.filled.max(now);
        if self.level > 0 {
            return None;
        }
        // Until one whole token is there, so that a wait is never of no time.
        let missing = UNIT.saturating_sub(self.level);
        let nanoseconds = missing / i128::from(self.rate.per_second) + 1;
        Some(Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * UNIT);
    }
}

#[derive(Debug, Default)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// The limits of a device in force, shared by the threads of its queues and by who changes them. Where there are none, it
/// costs one load.
#[derive(Debug, Default)]
pub struct Limiter {
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
}

impl Limiter {
    /// Changes the limits. A bucket whose rate stays as it is keeps what is in it; another one is full.
    pub fn set(&self, limits: Limits, now: Instant) {
        let mut buckets = self.lock();
        let renew = |bucket: &mut Option<Bucket>, rate: Option<Rate>| {
            let kept = bucket.filter(|bucket| Some(bucket.rate) == rate);
            *bucket = kept.or(rate.map(|rate| Bucket::new(rate, now)));
        };
        renew(&mut buckets.bytes, limits.bytes);
        renew(&mut buckets.operations, limits.operations);
        let limited = buckets.bytes.is_some() || buckets.operations.is_some();
        self.limited.store(limited, Ordering::Release);
    }

    /// `None` when a turn may be had now; otherwise how long to wait before asking again.
    pub fn wait(&self) -> Option<Duration> {
        if !self.is_limited() {
            return None;
        }
        self.wait_at(Instant::now())
    }

    fn wait_at(&self, now: Instant) -> Option<Duration> {
        let mut buckets = self.lock();
        let bytes = buckets.bytes.as_mut().and_then(|bucket| bucket.wait(now));
        let operations = buckets.operations.as_mut().and_then(|bucket| bucket.wait(now));
        bytes.max(operations)
    }

    /// Whether there are limits.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Ordering::Acquire)
    }

    /// Charges what was done.
    pub fn charge(&self, bytes: u64, operations: u64) {
        let mut buckets = self.lock();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut buckets.operations {
            bucket.take(operations);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>) -> (Limiter, Instant) {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        let limits = Limits { bytes: bytes.map(rate), operations: operations.map(rate) };
        let (limiter, now) = (Limiter::default(), Instant::now());
        limiter.set(limits, now);
        (limiter, now)
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate_holds() {
        let (limiter, mut now) = limiter(None, Some((100, 10)));
        let begun = now;
        let mut done = 0;
        while now < begun + Duration::from_secs(3) {
            match limiter.wait_at(now) {
                None => {
                    limiter.charge(0, 1);
                    done += 1;
                }
                Some(wait) => now += wait,
            }
            assert!(done >= 10 || now == begun, "the burst is not waited for");
        }
        assert!((309..=311).contains(&done), "{done}");
    }

    #[test]
    fn what_is_larger_than_the_burst_gets_through_and_is_paid_for() {
        let (limiter, now) = limiter(Some((1000, 100)), None);
        assert_eq!(limiter.wait_at(now), None);
        limiter.charge(5100, 1);
        let wait = limiter.wait_at(now).unwrap();
        assert!((5.0..5.01).contains(&wait.as_secs_f64()), "{wait:?}");
        assert_eq!(limiter.wait_at(now + wait), None);
    }

    #[test]
    fn the_tighter_of_two_limits_decides_and_both_can_be_lifted() {
        let (limiter, now) = limiter(Some((1 << 40, 1 << 40)), Some((1, 1)));
        limiter.charge(1, 1);
        assert!(limiter.wait_at(now).is_some());
        limiter.set(Limits::default(), now);
        assert_eq!(limiter.wait(), None);
        limiter.charge(u64::MAX, u64::MAX);
    }

    #[test]
    fn a_limit_that_is_set_again_is_no_new_burst() {
        let (limiter, now) = limiter(None, Some((1, 5)));
        for _ in 0..5 {
            limiter.charge(0, 1);
        }
        let same = Limits { bytes: None, operations: Some(Rate { per_second: 1, burst: 5 }) };
        limiter.set(same, now);
        assert!(limiter.wait_at(now).is_some());
    }

    proptest! {
        #[test]
        fn no_numbers_overflow_and_no_wait_is_of_no_time(
            rate in (any::<u64>(), any::<u64>()),
            steps in prop::collection::vec((any::<u64>(), 0u64..1 << 40), 1..50),
        ) {
            let (limiter, mut now) = limiter(Some(rate), Some(rate));
            for (bytes, nanoseconds) in steps {
                limiter.charge(bytes, bytes);
                now += Duration::from_nanos(nanoseconds);
                if let Some(wait) = limiter.wait_at(now) {
                    prop_assert!(wait > Duration::ZERO);
                }
            }
        }

        #[test]
        fn over_time_never_more_than_rate_and_burst_and_one(
            per_second in 1u64..10_000,
            burst in 1u64..1000,
            sizes in prop::collection::vec(1u64..500, 10..200),
        ) {
            let (limiter, begun) = limiter(Some((per_second, burst)), None);
            let (mut now, mut taken) = (begun, 0);
            for size in sizes {
                while let Some(wait) = limiter.wait_at(now) {
                    now += wait;
                }
                limiter.charge(size, 1);
                taken += size;
                let allowed = (now - begun).as_secs_f64() * per_second as f64 + (burst + size) as f64;
                prop_assert!(taken as f64 <= allowed + 1.0);
            }
        }
    }
}
