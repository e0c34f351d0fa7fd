//! Whether a disk's thread lets others have its processor before it tells of what has ended.
//!
//! Where a guest's processor and its disk's thread share one of the host's, the thread is woken by the first of several requests, and the
//! others come one at a time, with an interrupt and a wake-up each, since each has ended before the guest can ask for the next. A thread that
//! yields first finds them all. With one request at a time there is nothing to be found, and yielding makes each take longer; so it's done as
//! long as it helps, and tried now and then.

use std::time::{Duration, Instant};

/// Turns until it is tried again, at most: where nothing is found, each time twice as many.
const TURNS_MAX: u32 = 256;
/// Turns after a time in which somebody computed, as a guest that doesn't wait for its disk.
const TURNS_AFTER_LONG: u32 = 1024;
/// Longer than a guest takes to ask for as much as fits into a queue.
const LONG: Duration = Duration::from_millis(1);

pub(super) struct Patience {
    /// Turns before the next try.
    left: u32,
    /// And before the one after that, if it finds nothing.
    next: u32,
}

/// What a turn learns.
#[derive(Default)]
pub(super) struct Lesson {
    tried: bool,
    found: bool,
    longest: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { left: 0, next: 1 }
    }
}

impl Patience {
    /// Whether to yield in a turn that begins.
    pub(super) fn begins(&mut self) -> bool {
        let yields = self.left == 0;
        self.left = self.left.saturating_sub(1);
        yields
    }

    /// The turn ended, with this.
    pub(super) fn ends(&mut self, lesson: &Lesson) {
        if !lesson.tried {
            return;
        }
        (self.left, self.next) = match lesson {
            Lesson { longest, .. } if *longest > LONG => (TURNS_AFTER_LONG, TURNS_MAX),
            Lesson { found: true, .. } => (0, 1),
            _ => (self.next, self.next.saturating_mul(2).min(TURNS_MAX)),
        };
    }
}

impl Lesson {
    /// Lets others have the processor.
    pub(super) fn yields(&mut self) {
        let begun = Instant::now();
        std::thread::yield_now();
        self.tried = true;
        self.longest = self.longest.max(begun.elapsed());
    }

    /// So many requests were there when the queues were looked at.
    pub(super) fn finds(&mut self, requests: usize) {
        self.found |= self.tried && requests > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many turns out of so many try it.
    fn tries(patience: &mut Patience, turns: u32, lesson: &Lesson) -> usize {
        let turn = |_: &u32| {
            let tries = patience.begins();
            if tries {
                patience.ends(lesson);
            }
            tries
        };
        (0..turns).filter(turn).count()
    }

    #[test]
    fn it_is_tried_as_long_as_it_helps() {
        let (found, nothing) =
            (Lesson { tried: true, found: true, longest: LONG }, Lesson { tried: true, ..Lesson::default() });
        let mut patience = Patience::default();
        assert_eq!(tries(&mut patience, 100, &found), 100);
        assert_eq!(tries(&mut patience, 10_000, &nothing), 9 + 37);
        assert!(tries(&mut patience, TURNS_MAX + 1, &found) > 0, "it is tried again");
        assert_eq!(tries(&mut patience, 100, &found), 100);
    }

    #[test]
    fn who_computes_is_not_waited_for() {
        let long = Lesson { tried: true, found: true, longest: LONG * 2 };
        let mut patience = Patience::default();
        assert_eq!(tries(&mut patience, TURNS_AFTER_LONG + 1, &long), 1);
    }
}
