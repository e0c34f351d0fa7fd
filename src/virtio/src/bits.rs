//! Sets of small numbers, a bit each.

/// The numbers of the bits that are set, the lowest first.
pub(crate) fn bits(of: u64) -> impl Iterator<Item = usize> {
    let lowest = |bits: &u64| bits & bits.wrapping_neg();
    let each = std::iter::successors(Some(of), move |left| Some(left ^ lowest(left)));
    each.take_while(|left| *left != 0).map(|left| left.trailing_zeros() as usize)
}

/// Whether a number below 64 is in the set.
pub(crate) fn is_in(bits: u64, number: usize) -> bool {
    bits >> number & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_each_number_once() {
        assert_eq!(bits(0).count(), 0);
        assert_eq!(bits(1 << 63 | 1 << 5 | 1).collect::<Vec<_>>(), [0, 5, 63]);
        assert_eq!(bits(u64::MAX).count(), 64);
        assert!(is_in(4, 2) && !is_in(4, 1));
    }
}
