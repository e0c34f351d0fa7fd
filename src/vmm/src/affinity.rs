//! On which of the host's processors a vCPU's thread runs.
//!
//! A thread inherits this from the one that makes it, so who makes the vCPUs' threads moves there first. No thread can move
//! once its narrow filter is on, and none can move another.

use casemate_wire::CpuRange;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{During, Error};

/// Where this thread may run by itself.
pub(crate) struct Placement(CpuSet);

impl Placement {
    /// Takes note of it.
    pub(crate) fn of_this_thread() -> Result<Self, Error> {
        sched_getaffinity(None).during("asking where this thread runs").map(Self)
    }

    /// Moves this thread to these processors.
    pub(crate) fn pin(&self, ranges: &[CpuRange]) -> Result<(), Error> {
        sched_setaffinity(None, &set_of(ranges)).during("pinning a vCPU to its processors")
    }

    /// Moves this thread back.
    pub(crate) fn restore(&self) -> Result<(), Error> {
        sched_setaffinity(None, &self.0).during("letting this thread run where it did")
    }
}

/// The processors of these ranges, as far as there can be such.
fn set_of(ranges: &[CpuRange]) -> CpuSet {
    let mut set = CpuSet::new();
    for cpu in ranges.iter().flat_map(|range| range.first..=range.last).map(usize::from) {
        if cpu < CpuSet::MAX_CPU {
            set.set(cpu);
        }
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_moves_and_moves_back() {
        let before = Placement::of_this_thread().unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.0.is_set(*cpu)).unwrap() as u16;
        before.pin(&[CpuRange { first, last: first }]).unwrap();
        assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        before.restore().unwrap();
        assert!(sched_getaffinity(None).unwrap() == before.0);
        // Nowhere at all.
        assert!(before.pin(&[]).is_err());
        assert_eq!(set_of(&[CpuRange { first: 1020, last: u16::MAX }]).count(), 4);
    }
}
