//! The root bus: configuration space by ECAM, and who answers at which address.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use casemate_pci::{BarKind, DecodedBar, EcamAddress, Function};

use crate::{
    control::{Change, Requests},
    error::Error,
    layout::{Range, WINDOW32},
};

/// Device numbers on a bus.
const DEVICES: usize = 32;
const PAGE_BYTES: u64 = 4096;

/// One BAR at the place where it answers.
#[derive(Clone, Copy)]
struct Answer {
    function: usize,
    bar: DecodedBar,
}

/// The root bus with its functions, numbered from 0 in the order they were added; all are function 0 of their device.
pub(crate) struct RootBus {
    functions: Vec<Mutex<Box<dyn Function>>>,
    answers: RwLock<Vec<Answer>>,
    windows: [Range; 2],
    requests: Arc<Requests>,
}

impl RootBus {
    /// Puts the functions on a bus and places every BAR: there is no firmware that would.
    ///
    /// # Errors
    /// When there are too many functions, or the windows are too small for their BARs.
    pub(crate) fn new(
        mut functions: Vec<Box<dyn Function>>,
        window64: Range,
        requests: Arc<Requests>,
    ) -> Result<Self, Error> {
        if functions.len() > DEVICES {
            return Err(Error::Layout(format!("{} devices; a bus has {DEVICES}", functions.len())));
        }
        let windows = [WINDOW32, window64];
        place_bars(&mut functions, windows)?;
        let functions = functions.into_iter().map(Mutex::new).collect();
        Ok(Self { functions, answers: RwLock::default(), windows, requests })
    }

    /// A read of configuration space, `offset` bytes into ECAM.
    pub(crate) fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((function, register)) = self.function_at(offset) {
            self.with(function, |function| function.config_read(register, data));
        }
    }

    /// A write to configuration space. BARs that answer elsewhere afterwards are moved before it returns.
    pub(crate) fn config_write(&self, offset: u64, data: &[u8]) {
        let Some((number, register)) = self.function_at(offset) else { return };
        self.with(number, |function| {
            let before = function.decoded();
            function.config_write(register, data);
            let after = function.decoded();
            if before != after {
                self.relocate(number, &after);
            }
        });
    }

    /// A read at a guest physical address; all ones where nobody answers.
    pub(crate) fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((answer, offset)) = self.answer_at(address, data.len()) {
            self.with(answer.function, |function| function.bar_read(answer.bar.index, offset, data));
        }
    }

    /// A write at a guest physical address; lost where nobody answers.
    pub(crate) fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((answer, offset)) = self.answer_at(address, data.len()) {
            self.with(answer.function, |function| function.bar_write(answer.bar.index, offset, data));
        }
    }

    fn with<T>(&self, function: usize, act: impl FnOnce(&mut dyn Function) -> T) -> Option<T> {
        let function = self.functions.get(function)?;
        Some(act(function.lock().unwrap_or_else(PoisonError::into_inner).as_mut()))
    }

    fn function_at(&self, offset: u64) -> Option<(usize, u16)> {
        let address = EcamAddress::decode(offset, 1)?;
        let number = usize::from(address.device);
        (address.function == 0 && number < self.functions.len()).then_some((number, address.register))
    }

    fn answer_at(&self, address: u64, length: usize) -> Option<(Answer, u64)> {
        let answers = self.answers.read().unwrap_or_else(PoisonError::into_inner);
        answers.iter().find_map(|answer| {
            let range = Range { start: answer.bar.base, size: answer.bar.size };
            range.offset(address, length).map(|offset| (*answer, offset))
        })
    }

    /// Takes note of what a function answers to now. What lies outside the windows, or over another's BAR, is not
    /// answered: real bridges would not route the one, and the other is the guest's mistake.
    fn relocate(&self, function: usize, decoded: &[DecodedBar]) {
        let mut answers = self.answers.write().unwrap_or_else(PoisonError::into_inner);
        let (was, others): (Vec<Answer>, Vec<Answer>) =
            answers.iter().copied().partition(|answer| answer.function == function);
        let mut now: Vec<DecodedBar> = Vec::new();
        for bar in decoded {
            let routed = self.windows.iter().any(|window| window.holds(bar.base, bar.size));
            let free =
                |other: &DecodedBar| bar.base >= other.base + other.size || other.base >= bar.base + bar.size;
            if routed && others.iter().all(|other| free(&other.bar)) && now.iter().all(free) {
                now.push(*bar);
            }
        }
        let gone: Vec<_> = was.iter().map(|answer| answer.bar).filter(|bar| !now.contains(bar)).collect();
        let come: Vec<_> =
            now.iter().filter(|bar| !was.iter().any(|was| was.bar == **bar)).copied().collect();
        if let Err(error) = self.requests.change(Change::Move { function, gone, come }) {
            eprintln!("casemate-vmm: device {function}: {error}");
        }
        *answers = others.into_iter().chain(now.into_iter().map(|bar| Answer { function, bar })).collect();
    }
}

/// Gives every BAR an address: in each window the largest first, so that alignment wastes nothing.
fn place_bars(functions: &mut [Box<dyn Function>], windows: [Range; 2]) -> Result<(), Error> {
    let mut wanted: Vec<_> = functions
        .iter()
        .enumerate()
        .flat_map(|(number, function)| function.bars().into_iter().map(move |bar| (number, bar)))
        .collect();
    wanted.sort_by_key(|(_, bar)| std::cmp::Reverse(bar.size));
    let mut next = windows.map(|window| window.start);
    for (number, bar) in wanted {
        let which = usize::from(bar.kind == BarKind::Memory64);
        let (Some(next), Some(window)) = (next.get_mut(which), windows.get(which)) else { continue };
        let full = || Error::Layout(format!("no room for a BAR of {:#x} bytes", bar.size));
        // A page of its own for each: pages are what KVM maps.
        let size = bar.size.max(PAGE_BYTES);
        let base = next.checked_next_multiple_of(size).ok_or_else(full)?;
        if !window.holds(base, size) {
            return Err(full());
        }
        *next = base + size;
        if let Some(function) = functions.get_mut(number) {
            function.place_bar(bar.index, base).map_err(|error| Error::Layout(error.to_string()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
