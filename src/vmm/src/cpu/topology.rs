//! How processors are arranged: threads in cores, cores in packages, and the APIC ids that say so.
//!
//! An APIC id is packed from package, core and thread, each in bits of its own (Intel SDM volume 3, 10.9.1), so ids have
//! gaps where a count is no power of two.

/// An arrangement in which every package has as many cores, and every core as many threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    vcpus: u8,
    sockets: u8,
    threads: u8,
}

/// Bits that number `count` things.
fn bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

impl Topology {
    /// `vcpus` processors, 1 to 64, in `sockets` packages, `threads` to a core; `None` when that does not come out even, or
    /// when an APIC id would not be a byte.
    pub(crate) fn new(vcpus: u8, sockets: u8, threads: u8) -> Option<Self> {
        let per_step = sockets.checked_mul(threads).filter(|step| *step > 0)?;
        let even = (1..=64).contains(&vcpus) && vcpus.is_multiple_of(per_step) && threads <= 2;
        even.then_some(Self { vcpus, sockets, threads })
    }

    /// The processors' APIC ids, in order.
    pub(crate) fn apic_ids(self) -> impl Iterator<Item = u8> {
        (0..self.vcpus).map(move |vcpu| self.apic_id(vcpu))
    }

    /// The APIC id of processor `vcpu`.
    pub(crate) fn apic_id(self, vcpu: u8) -> u8 {
        let thread = vcpu % self.threads;
        let socket = vcpu / (self.threads * self.cores());
        socket << self.package_shift() | self.core_id(vcpu) << self.thread_bits() | thread
    }

    /// The number of its core within the package.
    pub(crate) fn core_id(self, vcpu: u8) -> u8 {
        vcpu / self.threads % self.cores()
    }

    /// The number of its package.
    pub(crate) fn socket(self, vcpu: u8) -> u8 {
        vcpu / (self.threads * self.cores())
    }

    /// Threads of a core.
    pub(crate) fn threads(self) -> u8 {
        self.threads
    }

    /// Cores of a package.
    fn cores(self) -> u8 {
        self.vcpus / (self.sockets * self.threads)
    }

    /// Processors of a package.
    pub(crate) fn per_package(self) -> u8 {
        self.vcpus / self.sockets
    }

    /// Low bits of an APIC id that number the thread of a core.
    pub(crate) fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    /// Bits that number the core of a package.
    pub(crate) fn core_bits(self) -> u32 {
        bits(self.cores())
    }

    /// Where an APIC id's package begins.
    pub(crate) fn package_shift(self) -> u32 {
        self.thread_bits() + self.core_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_arrangement_has_distinct_ids_that_tell_it() {
        for vcpus in 1..=64 {
            for (sockets, threads) in (1..=64).flat_map(|sockets| [(sockets, 1), (sockets, 2)]) {
                let Some(topology) = Topology::new(vcpus, sockets, threads) else { continue };
                let ids: BTreeSet<u8> = topology.apic_ids().collect();
                // 255 is the broadcast.
                assert!(ids.len() == usize::from(vcpus) && !ids.contains(&255), "{topology:?}");
                let packages: BTreeSet<u8> = ids.iter().map(|id| id >> topology.package_shift()).collect();
                let cores: BTreeSet<u8> = ids.iter().map(|id| id >> topology.thread_bits()).collect();
                assert_eq!(packages.len(), usize::from(sockets), "{topology:?}");
                assert_eq!(cores.len(), usize::from(vcpus / threads), "{topology:?}");
            }
        }
    }

    #[test]
    fn what_does_not_come_out_even_is_none() {
        for (vcpus, sockets, threads) in [(0, 1, 1), (65, 1, 1), (3, 2, 1), (2, 1, 0), (2, 0, 1), (6, 2, 2)] {
            assert_eq!(Topology::new(vcpus, sockets, threads), None);
        }
        assert_eq!(Topology::new(4, 1, 4), None);
        assert_eq!(Topology::new(64, 128, 2), None);
        let ids: Vec<u8> = Topology::new(6, 1, 2).map(|t| t.apic_ids().collect()).unwrap_or_default();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
        let apart: Vec<u8> = Topology::new(6, 2, 1).map(|t| t.apic_ids().collect()).unwrap_or_default();
        assert_eq!(apart, [0, 1, 2, 4, 5, 6]);
    }
}
