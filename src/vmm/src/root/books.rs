//! Who answers at which address.

use std::collections::{BTreeMap, BTreeSet};

use casemate_pci::{DecodedBar, DecodedBars, Forwarding, Space};

use super::Place;
use crate::{
    layout::{self, Range},
    maps::Answers,
};

/// One BAR at the place where it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    place: Place,
    bar: DecodedBar,
}

/// What each function would answer to, what each port lets through, and what is answered because of both.
///
/// What is not routed to a function, or lies over what another answers to, is not answered: real bridges would not route
/// the one, and the other is the guest's mistake. It is answered once what stood in the way has gone.
pub(super) struct Books {
    windows: [Range; 2],
    wanted: BTreeMap<Place, DecodedBars>,
    ports: Vec<Forwarding>,
    answers: Vec<Answer>,
    /// Buses and devices with more than one function.
    several: BTreeSet<(u8, u8)>,
}

impl Books {
    pub(super) fn new(windows: [Range; 2], ports: usize, several: BTreeSet<(u8, u8)>) -> Self {
        Self {
            windows,
            wanted: BTreeMap::new(),
            ports: vec![Forwarding::default(); ports],
            answers: Vec::new(),
            several,
        }
    }

    /// Whether a function is one of several of its device.
    pub(super) fn has_several(&self, place: Place) -> bool {
        self.several.contains(&(place.bus, place.device))
    }

    /// Takes note of whether the device of a place has more than one function.
    pub(super) fn set_several(&mut self, place: Option<Place>, several: bool) {
        let Some(device) = place.map(|place| (place.bus, place.device)) else { return };
        if several {
            self.several.insert(device);
        } else {
            self.several.remove(&device);
        }
    }

    /// Which of our buses a bus of the guest's numbering is.
    pub(super) fn bus_behind(&self, number: u8) -> Option<u8> {
        let starts = |port: &Forwarding| port.buses.as_ref().is_some_and(|buses| *buses.start() == number);
        let port = self.ports.iter().position(starts)?;
        u8::try_from(port + 1).ok()
    }

    /// Who answers to the `length` bytes at `address`: the function, its BAR, and where in it.
    pub(super) fn answer_at(&self, space: Space, address: u64, length: usize) -> Option<(Place, u8, u64)> {
        self.answers.iter().filter(|answer| answer.bar.space == space).find_map(|answer| {
            let range = Range { start: answer.bar.base, size: answer.bar.size };
            let offset = range.offset(address, length)?;
            Some((answer.place, answer.bar.index, offset))
        })
    }

    /// Takes note of what a function would answer to.
    pub(super) fn want(&mut self, place: Place, decoded: DecodedBars) {
        self.wanted.insert(place, decoded);
    }

    /// Takes note of what a port lets through.
    pub(super) fn forward(&mut self, port: usize, forwarding: Forwarding) {
        if let Some(known) = self.ports.get_mut(port) {
            *known = forwarding;
        }
    }

    /// Works out who answers now. What answered before comes first, so that a newcomer displaces nobody. Returns each
    /// function whose answers have changed, with all that it answers to.
    pub(super) fn settle(&mut self) -> Vec<Answers> {
        let wanted: Vec<Answer> = (self.wanted.iter())
            .flat_map(|(place, bars)| bars.iter().map(|bar| Answer { place: *place, bar: *bar }))
            .filter(|answer| self.routes(answer))
            .collect();
        let (old, new): (Vec<Answer>, Vec<Answer>) =
            wanted.into_iter().partition(|answer| self.answers.contains(answer));
        let mut now: Vec<Answer> = Vec::new();
        for answer in old.into_iter().chain(new) {
            let bar = answer.bar;
            let apart = |other: &Answer| {
                bar.space != other.bar.space
                    || bar.base >= other.bar.base + other.bar.size
                    || other.bar.base >= bar.base + bar.size
            };
            if now.iter().all(apart) {
                now.push(answer);
            }
        }
        let before = std::mem::replace(&mut self.answers, now);
        let of = |answers: &[Answer], place: Place| -> Vec<DecodedBar> {
            answers.iter().filter(|answer| answer.place == place).map(|answer| answer.bar).collect()
        };
        let places: BTreeSet<Place> = before.iter().chain(&self.answers).map(|answer| answer.place).collect();
        let mut changed = Vec::new();
        for place in places {
            let (was, bars) = (of(&before, place), of(&self.answers, place));
            let same = was.len() == bars.len() && was.iter().all(|bar| bars.contains(bar));
            if !same {
                changed.push(Answers { place, bars });
            }
        }
        changed
    }

    /// Whether accesses to a BAR reach the function.
    fn routes(&self, answer: &Answer) -> bool {
        let DecodedBar { base, size, space, .. } = answer.bar;
        if space == Space::Ports {
            // No port of ours has a window for them.
            return answer.place.bus == 0 && layout::PORTS.holds(base, size);
        }
        let Some(last) = base.checked_add(size - 1) else { return false };
        let through = |port: &Forwarding| {
            port.windows.iter().flatten().any(|window| window.contains(&base) && window.contains(&last))
        };
        let forwarded = match answer.place.bus.checked_sub(1) {
            None => true,
            Some(port) => self.ports.get(usize::from(port)).is_some_and(through),
        };
        forwarded && self.windows.iter().any(|window| window.holds(base, size))
    }
}
