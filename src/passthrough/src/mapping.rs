//! Which pages of a BAR the VMM maps into the guest.

use std::ops::Range;

/// The page of host and guest.
pub const PAGE_BYTES: u64 = 4096;

/// A run of whole pages of a BAR that the guest may reach without a trap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// BAR, 0 to 5.
    pub bar: u8,
    /// Bytes from the BAR's base.
    pub offset_in_bar: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the device's file: the offset for `mmap`.
    pub file_offset: u64,
}

/// The whole pages of `mappable` that hold no byte of `trapped`, ascending and apart from each other.
pub(crate) fn exposed(mappable: &[Range<u64>], trapped: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut areas = mappable.to_vec();
    areas.sort_by_key(|area| area.start);
    let mut traps = trapped.to_vec();
    traps.sort_by_key(|trap| trap.start);

    let mut pages = Vec::new();
    let mut cursor = 0;
    for area in areas {
        let Some(start) = area.start.checked_next_multiple_of(PAGE_BYTES) else { continue };
        let end = page_down(area.end);
        cursor = start.max(cursor);
        for trap in &traps {
            let hole = page_down(trap.start)..page_down(trap.end.saturating_add(PAGE_BYTES - 1));
            if hole.start < end && cursor < hole.end {
                if cursor < hole.start {
                    pages.push(cursor..hole.start);
                }
                cursor = hole.end;
            }
        }
        if cursor < end {
            pages.push(cursor..end);
            cursor = end;
        }
    }
    pages
}

fn page_down(address: u64) -> u64 {
    address & !(PAGE_BYTES - 1)
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cuts_out_the_pages_of_table_and_pending_bits() {
        assert_eq!(exposed(&[0..0x4000], &[0x2000..0x2410, 0x3000..0x3010]), [0..0x2000]);
        assert_eq!(exposed(&[0..0x4000], &[0x1ff8..0x2008]), [0..0x1000, 0x3000..0x4000]);
        assert_eq!(exposed(&[0..0x4000], &[]), [0..0x4000]);
        assert_eq!(exposed(&[0..0x800], &[]), []);
        assert_eq!(exposed(&[0x800..0x2800], &[]), [0x1000..0x2000]);
        assert_eq!(exposed(&[0x2000..0x4000, 0..0x3000], &[]), [0..0x3000, 0x3000..0x4000]);
        assert_eq!(exposed(&[0..u64::MAX], &[u64::MAX - 8..u64::MAX]), [0..u64::MAX - 0xfff]);
    }

    proptest! {
        #[test]
        fn a_page_is_exposed_exactly_when_it_may_be(
            mappable in proptest::collection::vec((0u64..0x8000, 0u64..0x8000), 0..4),
            trapped in proptest::collection::vec((0u64..0x8000, 1u64..0x2000), 0..4),
        ) {
            let areas: Vec<_> = mappable.iter().map(|(start, size)| *start..start + size).collect();
            let traps: Vec<_> = trapped.iter().map(|(start, size)| *start..start + size).collect();
            let pages = exposed(&areas, &traps);
            for pair in pages.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
            }
            for page in (0u64..0x10000).step_by(0x1000) {
                let shown = pages.iter().any(|run| run.start <= page && page + 0x1000 <= run.end);
                let touched = pages.iter().any(|run| run.start < page + 0x1000 && page < run.end);
                prop_assert_eq!(shown, touched, "whole pages only");
                let trap = traps.iter().any(|trap| trap.start < page + 0x1000 && page < trap.end);
                let whole = areas.iter().any(|area| area.start <= page && page + 0x1000 <= area.end);
                prop_assert_eq!(shown, whole && !trap, "page {:#x}", page);
            }
        }
    }
}
