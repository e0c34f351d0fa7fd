//! Free page hinting (virtio 1.3, 5.5.6.7): asked once, the driver names all memory that it has free, and holds it until it is told that
//! this is done. Each time it is asked under another number.

/// The driver ends its list by this in place of the number it was asked under (`VIRTIO_BALLOON_CMD_ID_STOP`).
const STOP: u32 = 0;
/// The driver may use the pages again (`VIRTIO_BALLOON_CMD_ID_DONE`).
pub(super) const DONE: u32 = 1;
/// The first number to ask under.
const FIRST: u32 = 2;

/// How far a driver is with what it was asked.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// The number it was asked under last.
    asked: u32,
    /// It has begun its list.
    is_under_way: bool,
    /// What was given back of it.
    bytes: u64,
    /// What was given back of the last list that was ended, and the number that it was for.
    ended: Option<(u32, u64)>,
}

impl Hints {
    /// Asks anew. The driver has to be told this number.
    pub(super) fn ask(&mut self) -> u32 {
        self.asked = self.asked.checked_add(1).unwrap_or(FIRST).max(FIRST);
        (self.is_under_way, self.bytes) = (false, 0);
        self.asked
    }

    /// The driver's word: the number that it answers to, or that it has named all. Returns whether that was the end of what it was asked.
    pub(super) fn hear(&mut self, word: u32) -> bool {
        let is_end = word == STOP && self.is_under_way;
        if is_end {
            self.ended = Some((self.asked, self.bytes));
        }
        self.is_under_way = word == self.asked && word >= FIRST;
        is_end
    }

    /// Whether what is named now is what was asked for.
    pub(super) fn is_under_way(&self) -> bool {
        self.is_under_way
    }

    /// So much of it was given back.
    pub(super) fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// What was given back of the list under this number, once it was ended.
    pub(super) fn ended(&self, number: u32) -> Option<u64> {
        self.ended.filter(|(ended, _)| *ended == number).map(|(_, bytes)| bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_a_beginning_and_an_end() {
        let mut hints = Hints::default();
        assert!(!hints.hear(STOP) && !hints.hear(DONE) && !hints.is_under_way(), "nobody asked");
        let number = hints.ask();
        assert!(number >= FIRST && !hints.is_under_way());
        assert!(!hints.hear(number + 1) && !hints.hear(STOP) && !hints.is_under_way(), "not what was asked");
        assert!(!hints.hear(number) && hints.is_under_way());
        hints.add(4096);
        assert_eq!(hints.ended(number), None);
        assert!(hints.hear(STOP) && !hints.is_under_way() && !hints.hear(STOP));
        assert_eq!((hints.ended(number), hints.ended(number + 1)), (Some(4096), None));
    }

    #[test]
    fn numbers_go_round_and_leave_out_those_that_mean_something() {
        let mut hints = Hints { asked: u32::MAX, ..Hints::default() };
        assert_eq!((hints.ask(), hints.ask()), (FIRST, FIRST + 1));
    }
}
