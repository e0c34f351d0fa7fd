//! How much a disk or a network card may do.

use crate::Refusal;

/// The most that any rate or burst may be.
const MOST: u64 = 1 << 40;
/// What to do about one that can't be.
const REMEDY: &str = "write 1 to 2^40 bytes (1 TiB) or operations, a burst only beside its rate; leave out what is not limited";

/// A rate, and how much may be done at once by who has done nothing for a while. Both are 1 to 2^40.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second.
    pub per_second: u64,
    /// At once.
    pub burst: u64,
}

impl Rate {
    /// A rate; without a burst, that of one second. None of both is no limit.
    ///
    /// # Errors
    /// `bad-limit` when one is out of range, or there is a burst of no rate.
    pub fn of(per_second: Option<u64>, burst: Option<u64>) -> Result<Option<Self>, Refusal> {
        let refuse = |cause: &dyn std::fmt::Display| Refusal::new("bad-limit", "", cause, REMEDY);
        let rate = match (per_second, burst) {
            (None, None) => return Ok(None),
            (None, Some(burst)) => return Err(refuse(&format_args!("{burst} is the burst of no rate"))),
            (Some(per_second), burst) => Self { per_second, burst: burst.unwrap_or(per_second) },
        };
        match [rate.per_second, rate.burst].iter().find(|number| !(1..=MOST).contains(*number)) {
            Some(number) => Err(refuse(&format_args!("{number} is out of range"))),
            None => Ok(Some(rate)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_without_a_burst_has_that_of_a_second() {
        assert_eq!(Rate::of(None, None).unwrap(), None);
        assert_eq!(Rate::of(Some(7), None).unwrap(), Some(Rate { per_second: 7, burst: 7 }));
        assert_eq!(Rate::of(Some(7), Some(9)).unwrap(), Some(Rate { per_second: 7, burst: 9 }));
    }

    #[test]
    fn what_would_stop_all_or_limit_nothing_is_refused() {
        for wrong in [(Some(0), None), (Some(1), Some(0)), (Some(MOST + 1), None), (None, Some(1))] {
            assert_eq!(Rate::of(wrong.0, wrong.1).unwrap_err().code, "bad-limit", "{wrong:?}");
        }
    }
}
