//! How much a disk or a network card may do.

use serde::Deserialize;
use toml::Spanned;

use crate::{
    ByteSize, Location, Refusal,
    guest::{Reader, short},
};

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

/// What a device may do from its start on; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Bytes, of both directions together.
    pub bytes: Option<Rate>,
    /// Requests of a disk, frames of a network card.
    pub operations: Option<Rate>,
}

/// The key `limit` of a disk or a network card.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawLimit {
    bytes_per_second: Option<Spanned<String>>,
    burst_bytes: Option<Spanned<String>>,
    operations_per_second: Option<Spanned<u64>>,
    burst_operations: Option<Spanned<u64>>,
}

impl Reader<'_> {
    pub(crate) fn limits(&mut self, raw: Option<RawLimit>) -> Result<IoLimits, Refusal> {
        let Some(raw) = raw else { return Ok(IoLimits::default()) };
        let at = self.note_limit(&raw);
        let (bytes, burst) = (self.size(raw.bytes_per_second)?, self.size(raw.burst_bytes)?);
        let located = |refusal: Refusal| refusal.at(at.clone());
        let number = |raw: Option<Spanned<u64>>| raw.map(Spanned::into_inner);
        Ok(IoLimits {
            bytes: Rate::of(bytes, burst).map_err(located)?,
            operations: Rate::of(number(raw.operations_per_second), number(raw.burst_operations))
                .map_err(located)?,
        })
    }

    /// Where the first of its keys stands.
    pub(crate) fn note_limit(&mut self, raw: &RawLimit) -> Option<Location> {
        let texts =
            [&raw.bytes_per_second, &raw.burst_bytes].map(|raw| raw.as_ref().map(|raw| self.note(raw)));
        let numbers = [&raw.operations_per_second, &raw.burst_operations]
            .map(|raw| raw.as_ref().map(|raw| self.note(raw)));
        texts.into_iter().chain(numbers).flatten().next()
    }

    fn size(&mut self, raw: Option<Spanned<String>>) -> Result<Option<u64>, Refusal> {
        let Some(raw) = raw else { return Ok(None) };
        let location = self.note(&raw);
        let size: Result<ByteSize, _> = raw.get_ref().parse();
        size.map(|size| Some(size.bytes())).map_err(|_| {
            let cause = format!("{:?} is not a size", short(raw.get_ref()));
            Refusal::new("bad-limit", "", cause, "write it as \"10 MiB\"").at(Some(location))
        })
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
