use std::{cell::RefCell, collections::BTreeSet};

use casemate_pci::Space;

use super::*;
use crate::assigned::Registers;

/// A KVM that has what it was given, refuses what no KVM takes, and fails when it is told to.
#[derive(Default)]
struct Host {
    slots: RefCell<BTreeMap<u32, MemorySlot>>,
    bells: RefCell<BTreeSet<u64>>,
    reached: RefCell<BTreeMap<u64, u64>>,
    fails: RefCell<bool>,
}

impl Host {
    fn failing(&self, fails: bool) {
        *self.fails.borrow_mut() = fails;
    }

    fn mapped(&self) -> Vec<u64> {
        self.slots.borrow().values().map(|slot| slot.guest_address).collect()
    }
}

impl Vm for Host {
    fn set_slot(&self, slot: MemorySlot) -> Result<(), Error> {
        let mut slots = self.slots.borrow_mut();
        if *self.fails.borrow() {
            return Err(Error::Lacks("memory slots today"));
        }
        if slot.size_bytes == 0 {
            let gone = slots.remove(&slot.slot).expect("only what is mapped is unmapped");
            assert!(!self.reached.borrow().contains_key(&gone.guest_address), "devices reach it still");
            return Ok(());
        }
        let apart = |other: &MemorySlot| {
            slot.guest_address + slot.size_bytes <= other.guest_address
                || other.guest_address + other.size_bytes <= slot.guest_address
        };
        assert!(slots.values().all(apart), "slots may not overlap");
        assert!(slots.insert(slot.slot, slot).is_none(), "slot {} is in use", slot.slot);
        Ok(())
    }

    fn reach(&self, slot: MemorySlot, on: bool) -> Result<(), Error> {
        if *self.fails.borrow() {
            return Err(Error::Lacks("mappings today"));
        }
        let mut reached = self.reached.borrow_mut();
        if on {
            assert!(self.slots.borrow().contains_key(&slot.slot), "only what is mapped is reached");
            assert_eq!(reached.insert(slot.guest_address, slot.host_address), None);
        } else {
            assert_eq!(reached.remove(&slot.guest_address), Some(slot.host_address));
        }
        Ok(())
    }

    fn ring(&self, _event: &EventFd, address: u64, on: bool) -> Result<(), Error> {
        if *self.fails.borrow() {
            return Err(Error::Lacks("doorbells today"));
        }
        let mut bells = self.bells.borrow_mut();
        let changed = if on { bells.insert(address) } else { bells.remove(&address) };
        assert!(changed, "{address:#x} is as asked already");
        Ok(())
    }
}

const FIRST: Place = Place { bus: 0, device: 1, function: 0 };
const SECOND: Place = Place { bus: 0, device: 2, function: 0 };
const BAR_BYTES: u64 = 0x2000;

fn maps() -> Maps {
    let mut maps = Maps::new(2);
    for place in [FIRST, SECOND] {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let doorbells = vec![Doorbell { bar: 0, offset: 0x1800, event }];
        let regions = vec![DirectRegion {
            bar: 0,
            offset: 0,
            registers: Registers::of_test(0x1000).into(),
            read_only: false,
            reachable: place == SECOND,
        }];
        maps.attach(place, Attachments { doorbells, regions });
    }
    maps
}

fn at(place: Place, base: u64) -> Answers {
    Answers { place, bars: vec![DecodedBar { index: 0, space: Space::Memory, base, size: BAR_BYTES }] }
}

fn nowhere(place: Place) -> Answers {
    Answers { place, bars: Vec::new() }
}

#[test]
fn functions_change_places() {
    let (host, mut maps) = (Host::default(), maps());
    maps.answer(&host, &[at(FIRST, 0x1_0000), at(SECOND, 0x2_0000)]).unwrap();
    assert_eq!(host.slots.borrow().keys().copied().collect::<Vec<_>>(), [2, 3]);
    maps.answer(&host, &[at(FIRST, 0x2_0000), at(SECOND, 0x1_0000)]).unwrap();
    assert_eq!(host.mapped().len(), 2);
    assert_eq!(*host.bells.borrow(), BTreeSet::from([0x1_1800, 0x2_1800]));
    maps.answer(&host, &[at(FIRST, 0x2_0000)]).unwrap();
    maps.answer(&host, &[nowhere(FIRST), nowhere(SECOND)]).unwrap();
    assert!(host.mapped().is_empty() && host.bells.borrow().is_empty());
    maps.answer(&host, &[at(SECOND, 0x3_0000)]).unwrap();
    assert!(host.slots.borrow().keys().all(|slot| *slot < 4), "numbers are used again");
}

#[test]
fn what_could_not_be_made_is_made_by_the_next_change() {
    let (host, mut maps) = (Host::default(), maps());
    host.failing(true);
    maps.answer(&host, &[at(FIRST, 0x1_0000)]).unwrap_err();
    assert!(host.mapped().is_empty());
    host.failing(false);
    // Nothing of the first try is in the books: this neither unmaps nor leaks a number.
    maps.answer(&host, &[nowhere(FIRST)]).unwrap();
    maps.answer(&host, &[at(FIRST, 0x1_0000)]).unwrap();
    assert_eq!(host.slots.borrow().keys().copied().collect::<Vec<_>>(), [2]);
}

#[test]
fn what_could_not_be_taken_away_is_taken_away_by_the_next_change() {
    let (host, mut maps) = (Host::default(), maps());
    maps.answer(&host, &[at(FIRST, 0x1_0000)]).unwrap();
    host.failing(true);
    maps.answer(&host, &[nowhere(FIRST)]).unwrap_err();
    assert_eq!(host.mapped(), [0x1_0000], "KVM has it still");
    host.failing(false);
    maps.answer(&host, &[at(FIRST, 0x4_0000)]).unwrap();
    assert_eq!((host.mapped(), host.bells.borrow().len()), (vec![0x4_0000], 1));
}

#[test]
fn what_devices_reach_moves_with_its_bar() {
    let (host, mut maps) = (Host::default(), maps());
    let reached = || host.reached.borrow().keys().copied().collect::<Vec<_>>();
    maps.answer(&host, &[at(FIRST, 0x1_0000), at(SECOND, 0x2_0000)]).unwrap();
    assert_eq!(reached(), [0x2_0000], "the first one is nobody's peer");
    maps.answer(&host, &[at(FIRST, 0x2_0000), at(SECOND, 0x1_0000)]).unwrap();
    assert_eq!(reached(), [0x1_0000]);
    // What the IOMMU keeps stays mapped, until it lets it go.
    host.failing(true);
    maps.answer(&host, &[nowhere(SECOND)]).unwrap_err();
    assert_eq!((reached(), host.mapped().len()), (vec![0x1_0000], 2));
    host.failing(false);
    maps.answer(&host, &[nowhere(SECOND)]).unwrap();
    assert_eq!((reached(), host.mapped()), (vec![], vec![0x2_0000]));
}

#[test]
fn a_function_that_goes_leaves_nothing() {
    let (host, mut maps) = (Host::default(), maps());
    maps.answer(&host, &[at(FIRST, 0x1_0000), at(SECOND, 0x2_0000)]).unwrap();
    maps.detach(&host, FIRST).unwrap();
    assert_eq!(host.mapped(), [0x2_0000]);
    maps.detach(&host, FIRST).unwrap();
    maps.answer(&host, &[at(FIRST, 0x1_0000)]).unwrap();
    assert_eq!(host.mapped(), [0x2_0000], "nobody is there any more");
    host.failing(true);
    maps.detach(&host, SECOND).unwrap_err();
}
