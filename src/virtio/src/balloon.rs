//! The memory balloon (virtio 1.3, 5.5), of which one thing is offered: free page reporting (5.5.6.7). The guest tells
//! of memory that it does not use, and it goes back to the host until the guest touches it again.

use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    vectored::release,
};

/// Feature bit (`linux/virtio_balloon.h`).
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
/// The first two queues inflate and deflate. By the specification the reporting queue is the fifth; Linux before 6.11
/// leaves no gaps for the queues of features that are not offered, and takes the third. So all from here on report.
const FIRST_REPORTING: usize = 2;
/// What Linux reports in one request (`PAGE_REPORTING_CAPACITY`, `include/linux/page_reporting.h`), and room for it.
const QUEUE_SIZE: u16 = 32;
/// Requests handled before others have their turn; each may name a hundred megabytes.
const BUDGET: usize = 4;

/// A balloon that is never inflated: it takes nothing that the guest does not offer.
#[derive(Debug, Default)]
pub struct Balloon;

impl Balloon {
    /// A balloon for memory that is private and anonymous, and that nobody has pinned: what a device of the host's
    /// reaches by DMA must not be given back, for the device would go on using the old page.
    pub fn new() -> Self {
        Self
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_REPORTING
    }
    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5]
    }
    /// `num_pages`, what the driver should inflate to, and `actual`, which is lost when it is written.
    fn config(&self) -> &[u8] {
        &[0; 8]
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        let reports = index >= FIRST_REPORTING && active.has_feature(VIRTIO_BALLOON_F_REPORTING);
        active.serve(index, BUDGET, |request| {
            // Inflating is answered and does nothing: nobody asked for it. A page that cannot be given back stays.
            if reports {
                release(&request.writable);
            }
            Ok(Some(0))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Ring, active, attack, bytes, descriptor, fill, memory, run};

    const REPORTING: u64 = 1 << VIRTIO_BALLOON_F_REPORTING;

    /// Offers two buffers in queue `index`; returns which pages from 0x10000 to 0x18000 still hold what they held.
    fn kept(index: usize, features: u64, write: bool) -> Vec<u64> {
        let memory = memory();
        let pages: Vec<u64> = (0x10..0x18).map(|page| page << 12).collect();
        pages.iter().for_each(|page| fill(&memory, *page, &[0xAA; 4096]));
        let mut rings: Vec<Ring> = (0..5).map(|n| Ring::new(&memory, 0x20000 + n * 0x8000, 16)).collect();
        // From within a page to within another, and one whole page.
        let head = rings[index].offer(&[(0x10800, 0x3000, write), (0x16000, 0x1000, write)]);
        let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), features);
        run(&mut Balloon::new(), &mut active, index).unwrap();
        assert_eq!(rings[index].take(), Some((head, 0)));
        let holds = |page: &u64| match bytes(&memory, *page, 4096) {
            all if all == [0xAA; 4096] => true,
            all if all == [0; 4096] => false,
            _ => panic!("page {page:#x} was given back in part"),
        };
        pages.into_iter().filter(holds).map(|page| page >> 12).collect()
    }

    #[test]
    fn whole_pages_that_are_reported_are_given_back() {
        let all: Vec<u64> = (0x10..0x18).collect();
        for queue in FIRST_REPORTING..5 {
            assert_eq!(kept(queue, REPORTING, true), [0x10, 0x13, 0x14, 0x15, 0x17]);
        }
        for (queue, features, write) in [(0, REPORTING, true), (1, REPORTING, true), (4, 0, true)] {
            assert_eq!(kept(queue, features, write), all, "queue {queue}");
        }
        assert_eq!(kept(4, REPORTING, false), all, "what the device may only read");
    }

    proptest! {
        #[test]
        fn survives_any_driver(
            table in prop::collection::vec(descriptor(), 16),
            heads in prop::collection::vec(0u16..18, 1..16),
        ) {
            attack(&mut Balloon::new(), &table, &heads, 0);
        }
    }
}
