//! The capability list of a physical function, which may say anything.

use crate::regs;

/// A capability where a function's list has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundCapability {
    /// Capability ID.
    pub id: u8,
    /// Where it stands: a multiple of 4, 0x40 to 0xfc.
    pub offset: u8,
    /// Bytes up to the next capability or the end of the 256: its body can't be longer, whatever it says of itself.
    pub room: u16,
}

/// Why a capability list is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// A link that points into the header or past the end.
    #[error("a capability link points to {0:#04x}")]
    OutOfRange(u8),
    /// A link that points back.
    #[error("the capability list loops at {0:#04x}")]
    Loop(u8),
}

/// Walks the list in `space`, of which the first 256 bytes count, in the order of its links. At most 48 capabilities
/// fit, as each needs 4 bytes, so the walk is bounded.
///
/// # Errors
/// On a link that leaves the space or comes back to a capability already seen: who links wrongly is not believed at all.
pub fn capabilities(space: &[u8]) -> Result<Vec<FoundCapability>, CapabilityError> {
    let at = |offset: u16| space.get(usize::from(offset)).copied().unwrap_or(0);
    let mut found: Vec<FoundCapability> = Vec::new();
    if u16::from(at(regs::STATUS)) & regs::STATUS_CAP_LIST == 0 {
        return Ok(found);
    }
    // The two lowest bits of a link are reserved and to be ignored.
    let mut offset = at(regs::CAPABILITY_LIST) & !3;
    while offset != 0 {
        if offset < regs::CAPABILITIES_START || usize::from(offset) + 2 > space.len() {
            return Err(CapabilityError::OutOfRange(offset));
        }
        if found.iter().any(|seen| seen.offset == offset) {
            return Err(CapabilityError::Loop(offset));
        }
        found.push(FoundCapability { id: at(offset.into()), offset, room: 0 });
        offset = at(u16::from(offset) + 1) & !3;
    }
    let starts: Vec<u16> = found.iter().map(|capability| capability.offset.into()).collect();
    let space_end = u16::try_from(space.len()).unwrap_or(u16::MAX).min(0x100);
    for capability in &mut found {
        let start = u16::from(capability.offset);
        let end = starts.iter().copied().filter(|other| *other > start).min().unwrap_or(space_end);
        capability.room = end.saturating_sub(start);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(links: &[(u8, u8, u8)]) -> [u8; 256] {
        let mut space = [0; 256];
        space[usize::from(regs::STATUS)] = 0x10;
        space[usize::from(regs::CAPABILITY_LIST)] = links.first().map_or(0, |first| first.0);
        for (offset, id, next) in links {
            space[usize::from(*offset)] = *id;
            space[usize::from(*offset) + 1] = *next;
        }
        space
    }

    #[test]
    fn walks_in_the_order_of_links_and_measures_by_place() {
        let found = capabilities(&space(&[(0x80, 0x11, 0x43), (0x40, 0x01, 0xe0), (0xe0, 0x10, 0)])).unwrap();
        let plain: Vec<_> = found.iter().map(|c| (c.id, c.offset, c.room)).collect();
        assert_eq!(plain, [(0x11, 0x80, 0x60), (0x01, 0x40, 0x40), (0x10, 0xe0, 0x20)]);
    }

    #[test]
    fn refuses_broken_lists() {
        assert_eq!(
            capabilities(&space(&[(0x40, 1, 0x80), (0x80, 5, 0x40)])),
            Err(CapabilityError::Loop(0x40))
        );
        assert_eq!(capabilities(&space(&[(0x40, 1, 0x40)])), Err(CapabilityError::Loop(0x40)));
        assert_eq!(capabilities(&space(&[(0x40, 1, 0x10)])), Err(CapabilityError::OutOfRange(0x10)));
        assert_eq!(capabilities(&[0xff; 256]), Err(CapabilityError::Loop(0xfc)));
        assert_eq!(capabilities(&space(&[(0x40, 1, 0x80)])[..0x80]), Err(CapabilityError::OutOfRange(0x80)));
    }

    #[test]
    fn finds_none_where_status_says_none() {
        let mut space = space(&[(0x40, 1, 0)]);
        space[usize::from(regs::STATUS)] = 0;
        assert_eq!(capabilities(&space), Ok(Vec::new()));
        assert_eq!(capabilities(&[]), Ok(Vec::new()));
    }

    proptest! {
        #[test]
        fn is_bounded_and_stays_inside(bytes in proptest::collection::vec(any::<u8>(), 0..=4096)) {
            if let Ok(found) = capabilities(&bytes) {
                prop_assert!(found.len() <= 48);
                for capability in found {
                    prop_assert!(capability.offset >= 0x40 && capability.offset % 4 == 0 && capability.room >= 2);
                    let end = usize::from(capability.offset) + usize::from(capability.room);
                    prop_assert!(end <= bytes.len().min(256));
                }
            }
        }
    }
}
