//! What a balloon gives back, and what it does not.

use proptest::prelude::*;

use super::*;
use crate::{
    active::Memory,
    testing::{MEMORY_BYTES, Ring, active, attack_with, bytes, descriptor, fill, memory, run},
};

const REPORTING: u64 = 1 << VIRTIO_BALLOON_F_REPORTING;
const POISON: u64 = 1 << VIRTIO_BALLOON_F_PAGE_POISON;
const STATS: u64 = 1 << VIRTIO_BALLOON_F_STATS_VQ;
const HINT: u64 = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT;

/// Where the buffers are that tests write into.
const BUFFER: u64 = 0xF_0000;

/// Memory whose pages 0x10 to 0x17 are filled, and five rings.
fn guest() -> (Memory, Vec<Ring>) {
    let memory = memory();
    (0x10..0x18).for_each(|page| fill(&memory, page << 12, &[0xAA; 4096]));
    let rings = (0..5).map(|n| Ring::new(&memory, 0x20000 + n * 0x8000, 16)).collect();
    (memory, rings)
}

/// Which of the filled pages still hold what they held; none may be given back in part.
fn kept(memory: &Memory) -> Vec<u64> {
    let holds = |page: &u64| match bytes(memory, page << 12, 4096) {
        all if all == [0xAA; 4096] => true,
        all if all == [0; 4096] => false,
        _ => panic!("page {page:#x} was given back in part"),
    };
    (0x10..0x18).filter(holds).collect()
}

/// Offers two buffers in queue `index`; returns which pages are kept.
fn reported(balloon: &mut Balloon, index: usize, features: u64, write: bool) -> Vec<u64> {
    let (memory, mut rings) = guest();
    // From within a page to within another, and one whole page.
    let head = rings[index].offer(&[(0x10800, 0x3000, write), (0x16000, 0x1000, write)]);
    let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), features);
    run(balloon, &mut active, index).unwrap();
    assert_eq!(rings[index].take(), Some((head, 0)));
    kept(&memory)
}

#[test]
fn whole_pages_that_are_reported_are_given_back() {
    let (all, some) = ((0x10..0x18).collect::<Vec<u64>>(), [0x10, 0x13, 0x14, 0x15, 0x17]);
    for queue in STATISTICS..5 {
        assert_eq!(reported(&mut Balloon::new().unwrap(), queue, REPORTING, true), some);
    }
    assert_eq!(reported(&mut Balloon::new().unwrap(), 3, REPORTING | STATS, true), some);
    for (queue, features, write) in [(1, REPORTING, true), (4, 0, true), (4, REPORTING, false)] {
        assert_eq!(reported(&mut Balloon::new().unwrap(), queue, features, write), all, "queue {queue}");
    }
}

#[test]
fn pages_that_the_guest_poisons_stay_as_they_were() {
    let all: Vec<u64> = (0x10..0x18).collect();
    let mut balloon = Balloon::new().unwrap();
    balloon.0.config.driver_writes(POISON_VALUE, &[0xAA; 4]);
    assert_eq!(reported(&mut balloon, 4, REPORTING | POISON, true), all);
    balloon.0.config.driver_writes(POISON_VALUE, &[0; 4]);
    assert_ne!(
        reported(&mut balloon, 4, REPORTING | POISON, true),
        all,
        "zeros are what a page given back has"
    );
}

/// Names pages in the inflate queue; returns which pages are kept.
fn inflated(balloon: &mut Balloon, numbers: &[u32]) -> Result<Vec<u64>, Fault> {
    let (memory, mut rings) = guest();
    let named: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    fill(&memory, BUFFER, &named);
    rings[INFLATE].offer(&[(BUFFER, named.len() as u32, false)]);
    let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), STATS);
    run(balloon, &mut active, INFLATE)?;
    assert!(rings[INFLATE].take().is_some());
    Ok(kept(&memory))
}

#[test]
fn pages_that_the_guest_gives_up_are_given_back() {
    assert_eq!(
        inflated(&mut Balloon::new().unwrap(), &[0x12]).unwrap(),
        [0x10, 0x11, 0x13, 0x14, 0x15, 0x16, 0x17]
    );
    // In any order, twice, and beside what is not there: at the end of memory, and beyond all addresses.
    let end = (MEMORY_BYTES >> 12) as u32;
    let numbers = [0x14, end, 0x13, 0x12, 0x13, u32::MAX, u32::MAX - 1, end + 1, 0x16];
    assert_eq!(inflated(&mut Balloon::new().unwrap(), &numbers).unwrap(), [0x10, 0x11, 0x15, 0x17]);
    // More than are handled at a time, with the filled ones among the last.
    let many: Vec<u32> = (0x80..0x80 + 3).cycle().take(CHUNK + 5).chain([0x10, 0x11]).collect();
    assert_eq!(inflated(&mut Balloon::new().unwrap(), &many).unwrap(), [0x12, 0x13, 0x14, 0x15, 0x16, 0x17]);
}

#[test]
fn a_run_that_ends_outside_memory_is_given_as_far_as_it_is_there() {
    let memory = memory();
    let last = (MEMORY_BYTES >> 12) as u64 - 1;
    fill(&memory, last << 12, &[0xAA; 4096]);
    assert!(!give_run(&memory, last, 2 * BALLOON_PAGE_BYTES as usize));
    assert!(give_run(&memory, last, BALLOON_PAGE_BYTES as usize));
    assert_eq!(bytes(&memory, last << 12, 4096), [0; 4096]);
}

#[test]
fn a_request_that_names_too_many_pages_is_a_fault() {
    let fault = inflated(&mut Balloon::new().unwrap(), &vec![0x10; PAGES_MOST + 1]).unwrap_err();
    assert!(matches!(fault, Fault::Request(_)), "{fault}");
}

/// Says these words, naming pages after each; returns which pages are kept.
fn hinted(balloon: &mut Balloon, words: &[u32]) -> Vec<u64> {
    let (memory, mut rings) = guest();
    for (index, word) in words.iter().enumerate() {
        let at = BUFFER + 16 * index as u64;
        fill(&memory, at, &word.to_le_bytes());
        rings[HINTS].offer(&[(at, 4, false)]);
        rings[HINTS].offer(&[(0x10000 + 0x2000 * index as u64, 0x2000, true)]);
    }
    let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), HINT | REPORTING);
    run(balloon, &mut active, HINTS).unwrap();
    kept(&memory)
}

#[test]
fn free_memory_is_named_when_it_is_asked_for() {
    let all: Vec<u64> = (0x10..0x18).collect();
    let mut balloon = Balloon::new().unwrap();
    let control = balloon.control();
    assert_eq!(hinted(&mut balloon, &[2, 0]), all, "nobody asked");
    let number = control.ask_for_free_memory();
    assert_eq!(balloon.0.config.u32_at(HINT_NUMBER), number);
    // Pages named under another number, under this one, and after the end.
    assert_eq!(hinted(&mut balloon, &[number + 1, number, 0]), [0x10, 0x11, 0x14, 0x15, 0x16, 0x17]);
    assert_eq!(control.free_memory_given(number), Some(0x2000));
    assert_eq!(balloon.0.config.u32_at(HINT_NUMBER), hints::DONE, "the driver may use them again");
    let next = control.ask_for_free_memory();
    assert_eq!(control.free_memory_given(next), None);
    control.hold(true);
    assert_eq!(hinted(&mut balloon, &[next, 0]), all, "a device of the host's may reach it");
    assert_eq!(control.free_memory_given(next), Some(0));
}

#[test]
fn held_memory_is_not_given_back() {
    let all: Vec<u64> = (0x10..0x18).collect();
    let mut balloon = Balloon::new().unwrap();
    balloon.control().hold(true);
    assert_eq!(inflated(&mut balloon, &[0x12]).unwrap(), all);
    assert_eq!(reported(&mut balloon, 4, REPORTING, true), all);
}

#[test]
fn the_guests_statistics_are_heard_and_asked_for_again() {
    let (memory, mut rings) = guest();
    let statistic = |tag: u16, number: u64| [&tag.to_le_bytes()[..], &number.to_le_bytes()].concat();
    fill(&memory, BUFFER, &[statistic(4, 5000), statistic(5, 9000), statistic(77, 1)].concat());
    let head = rings[STATISTICS].offer(&[(BUFFER, 30, false)]);
    let (mut active, events) = active(&memory, &rings.iter().collect::<Vec<_>>(), STATS);
    let mut balloon = Balloon::new().unwrap();
    let control = balloon.control();
    run(&mut balloon, &mut active, STATISTICS).unwrap();
    let told = control.told();
    assert_eq!((told.free_bytes, told.total_bytes, told.available_bytes), (Some(5000), Some(9000), None));
    assert_eq!(rings[STATISTICS].take(), None, "the buffer stays until news are wanted");
    assert!(control.ask_for_news());
    run(&mut balloon, &mut active, STATISTICS).unwrap();
    assert_eq!(rings[STATISTICS].take(), Some((head, 0)));
    assert!(events[STATISTICS].read().is_ok(), "the driver is told");
    // A driver that comes with less than one number, and with more than there are.
    rings[STATISTICS].offer(&[(BUFFER, 9, false)]);
    run(&mut balloon, &mut active, STATISTICS).unwrap();
    assert!(control.ask_for_news());
    rings[STATISTICS].offer(&[(0x1_0000, 0x8000, false)]);
    run(&mut balloon, &mut active, STATISTICS).unwrap();
    assert_eq!(control.told().free_bytes, Some(5000));
}

#[test]
fn the_target_is_shown_and_the_guests_size_is_heard() {
    let balloon = Balloon::new().unwrap();
    let (control, config) = (balloon.control(), Arc::clone(&balloon.0.config));
    control.set_target(1234);
    config.driver_writes(ACTUAL, &77u32.to_le_bytes());
    config.driver_writes(NUM_PAGES, &[0; 4]);
    assert_eq!((control.target(), control.actual(), config.generation()), (1234, 77, 1));
    config.reset();
    assert_eq!((control.target(), control.actual()), (1234, 0));
}

proptest! {
    #[test]
    fn survives_any_driver(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0u16..18, 1..16),
        features in any::<u64>(),
    ) {
        attack_with(&mut Balloon::new().unwrap(), &table, &heads, 0, features);
    }
}
