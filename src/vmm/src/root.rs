//! The PCI buses: configuration space by ECAM, and who answers at which address.
//!
//! Bus 0 has the functions that a guest starts with, and root ports. Behind each root port is a bus of one slot, which a
//! card can be put into and taken out of while the guest runs. The guest may number those buses and set the ports'
//! windows as it likes; what goes through is what the ports say.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use casemate_pci::{DecodedBars, EcamAddress, Forwarding, Function, RootPort, Space, regs};

use crate::{
    control::{Change, Requests},
    error::Error,
    layout::Range,
    memory::MemorySlot,
};

mod books;
mod mirror;
mod placement;

use books::Books;
use mirror::Mirror;
pub(crate) use placement::PortWindows;

/// Functions of a device.
const FUNCTIONS: u8 = 8;
/// Devices of a bus.
const DEVICES: u8 = 32;
/// Functions of a bus.
pub(crate) const FUNCTIONS_PER_BUS: u32 = DEVICES as u32 * FUNCTIONS as u32;

/// Where a function sits. Bus 0 is the root bus; bus `n` is the one behind the `n`th root port, whatever number the guest
/// gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// 0, or the number of the port, from 1.
    pub(crate) bus: u8,
    /// 0 to 31; behind a port, only 0.
    pub(crate) device: u8,
    /// 0 to 7.
    pub(crate) function: u8,
}

/// What sits at a place.
pub(crate) enum Body {
    /// A function.
    Function(Box<dyn Function>),
    /// A root port.
    Port(Box<RootPort>),
}

impl Body {
    fn function(&mut self) -> &mut dyn Function {
        match self {
            Self::Function(function) => function.as_mut(),
            Self::Port(port) => port.as_mut(),
        }
    }

    /// What others need to know of it.
    fn state(&mut self) -> State {
        let decoded = self.function().decoded();
        match self {
            Self::Function(_) => State { decoded, port: None },
            Self::Port(port) => State { decoded, port: Some((port.forwarding(), port.let_go())) },
        }
    }
}

#[derive(PartialEq)]
struct State {
    decoded: DecodedBars,
    /// Of a port: what goes through, and whether the guest has let the card go.
    port: Option<(Forwarding, bool)>,
}

/// What a [`RootBus`] is made of.
pub(crate) struct BusParts {
    /// The functions of the root bus, root ports among them, each at a place of its own.
    pub(crate) functions: Vec<(Place, Body)>,
    /// What each port's windows have room for.
    pub(crate) port_windows: PortWindows,
    /// Where memory BARs lie: below 4 GiB, and above.
    pub(crate) windows: [Range; 2],
    /// Who makes the changes.
    pub(crate) requests: Arc<Requests>,
    /// Hears when the guest has let the card behind a port go; ports are counted from 0.
    pub(crate) let_go: LetGo,
}

/// Who hears of a port, counted from 0, that its card may go.
pub(crate) type LetGo = Box<dyn Fn(usize) + Send + Sync>;

type Cell = Mutex<Option<Body>>;

/// All buses with their functions.
///
/// A function's lock is taken before that of the books, never after. Who holds either may wait for the control thread.
pub(crate) struct RootBus {
    cells: BTreeMap<Place, Cell>,
    /// Of the functions whose configuration space the guest can read without them.
    mirrors: BTreeMap<Place, Mirror>,
    /// The root ports, in the order of the buses behind them.
    ports: Vec<Place>,
    books: RwLock<Books>,
    requests: Arc<Requests>,
    let_go: LetGo,
}

impl RootBus {
    /// Puts the functions on their buses, and places every BAR and window: there is no firmware that would.
    ///
    /// # Errors
    /// When two sit at one place, or the windows are too small.
    pub(crate) fn new(parts: BusParts) -> Result<Self, Error> {
        let BusParts { mut functions, port_windows, windows, requests, let_go } = parts;
        placement::place(&mut functions, windows, port_windows)?;
        let mut cells = BTreeMap::new();
        let mut ports = Vec::new();
        let mut several = BTreeSet::new();
        for (place, body) in functions {
            if place.bus != 0 || place.device >= DEVICES || place.function >= FUNCTIONS {
                return Err(Error::Layout(format!("there is no place {place:?} on the root bus")));
            }
            if matches!(body, Body::Port(_)) {
                ports.push(place);
            }
            if place.function != 0 {
                several.insert((place.bus, place.device));
            }
            if cells.insert(place, Mutex::new(Some(body))).is_some() {
                return Err(Error::Layout(format!("two functions at {place:?}")));
            }
        }
        for (bus, _) in (1..).zip(&ports) {
            for function in 0..FUNCTIONS {
                cells.insert(Place { bus, device: 0, function }, Mutex::new(None));
            }
        }
        let books = RwLock::new(Books::new(windows, ports.len(), several));
        Ok(Self { cells, mirrors: BTreeMap::new(), ports, books, requests, let_go })
    }

    /// Has the configuration space of the root bus's functions in memory as well, of those where a read is nothing but a copy.
    /// Returns how KVM is to map it, in slots from `first_slot` on, at most [`FUNCTIONS_PER_BUS`]; the memory is there as
    /// long as the bus.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn mirror(&mut self, first_slot: u32) -> Result<Vec<MemorySlot>, Error> {
        let can = |place: &Place| {
            place.bus == 0 && self.with(*place, |body| body.function().config_image().is_some()) == Some(true)
        };
        let places = self.cells.keys().copied().filter(can).collect();
        self.mirrors = Mirror::make(places, first_slot)?.into_iter().collect();
        for place in self.mirrors.keys() {
            self.with(*place, |body| self.show(*place, body));
        }
        Ok(self.mirrors.values().filter_map(Mirror::slot).collect())
    }

    /// How many buses configuration space has room for.
    pub(crate) fn buses(&self) -> u16 {
        1 + self.ports.len() as u16
    }

    /// A read of configuration space, `offset` bytes into ECAM.
    pub(crate) fn config_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let Some((place, register)) = self.route(offset) else { return };
        self.with(place, |body| body.function().config_read(register, data));
        // Which functions are beside it, a function does not know.
        let header = usize::from(regs::HEADER_TYPE).checked_sub(usize::from(register));
        if let Some(byte) = header.and_then(|at| data.get_mut(at))
            && *byte != 0xFF
            && self.books().has_several(place)
        {
            *byte |= regs::HEADER_TYPE_MULTIFUNCTION;
        }
    }

    /// A write to configuration space. BARs that answer elsewhere afterwards are moved before it returns.
    pub(crate) fn config_write(&self, offset: u64, data: &[u8]) {
        let Some((place, register)) = self.route(offset) else { return };
        let port = self.ports.iter().position(|port| *port == place);
        let states = self.with(place, |body| {
            let before = body.state();
            body.function().config_write(register, data);
            let after = body.state();
            if before != after {
                self.note(place, port, &after);
            }
            // Another processor that reads of it finds it answer there.
            self.changed(place, body);
            (before.port, after.port)
        });
        let (Some(port), Some((Some(before), Some(after)))) = (port, states) else { return };
        if after.0.reset && !before.0.reset {
            self.reset_behind(port);
        }
        if after.1 && !before.1 {
            (self.let_go)(port);
        }
    }

    /// A read of memory or ports; all ones where nobody answers.
    pub(crate) fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let answer = self.books().answer_at(space, address, data.len());
        if let Some((place, bar, offset)) = answer {
            self.with(place, |body| body.function().bar_read(bar, offset, data));
        }
    }

    /// A write to memory or ports; lost where nobody answers.
    pub(crate) fn write(&self, space: Space, address: u64, data: &[u8]) {
        let answer = self.books().answer_at(space, address, data.len());
        if let Some((place, bar, offset)) = answer {
            self.with(place, |body| body.function().bar_write(bar, offset, data));
        }
    }

    /// Puts a card into the empty slot of a port, counted from 0. Its functions sit there at once, and the guest is told.
    pub(crate) fn insert(&self, port: usize, functions: Vec<Box<dyn Function>>) {
        if functions.len() > 1 {
            let mut books = self.books.write().unwrap_or_else(PoisonError::into_inner);
            books.set_several(self.behind(port).next(), true);
        }
        for (place, function) in self.behind(port).zip(functions) {
            if let Some(mut cell) = self.lock(place) {
                *cell = Some(Body::Function(function));
            }
        }
        self.with_port(port, |port| port.set_card(true));
    }

    /// Takes the card out of a port's slot: it answers to nothing and reaches no memory once this returns. The guest is told.
    pub(crate) fn remove(&self, port: usize) -> Vec<Box<dyn Function>> {
        let mut functions = Vec::new();
        for place in self.behind(port) {
            let Some(mut cell) = self.lock(place) else { continue };
            if let Some(body) = cell.as_mut() {
                body.function().reset();
                self.note(place, None, &State { decoded: DecodedBars::default(), port: None });
            }
            if let Some(Body::Function(function)) = cell.take() {
                functions.push(function);
            }
        }
        self.books
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .set_several(self.behind(port).next(), false);
        self.with_port(port, |port| port.set_card(false));
        functions
    }

    /// Asks the guest to let the card in a port's slot go, unless it is just about to bring one up or to let it go: to press
    /// the button then would take back what was asked. Returns whether it was asked.
    pub(crate) fn ask_to_let_go(&self, port: usize) -> bool {
        let asked = self.with_port(port, |port| {
            let asks = !port.let_go() && !port.is_undecided();
            if asks {
                port.press_button();
            }
            asks
        });
        asked.unwrap_or(false)
    }

    /// Whether the guest says that the card in a port's slot may go.
    pub(crate) fn has_let_go(&self, port: usize) -> bool {
        self.with_port(port, |port| port.let_go()).unwrap_or(false)
    }

    fn with_port<T>(&self, port: usize, act: impl FnOnce(&mut RootPort) -> T) -> Option<T> {
        let place = *self.ports.get(port)?;
        self.with(place, |body| match body {
            Body::Port(port) => {
                let done = act(port);
                self.changed(place, body);
                Some(done)
            }
            Body::Function(_) => None,
        })?
    }

    /// What comes after each change of a function's: the guest can read it, and is then told.
    fn changed(&self, place: Place, body: &mut Body) {
        self.show(place, body);
        if let Body::Port(port) = body {
            port.tell();
        }
    }

    /// Has a function's mirror follow it, or KVM forget it where a read is no copy any more.
    fn show(&self, place: Place, body: &mut Body) {
        let Some(mirror) = self.mirrors.get(&place) else { return };
        let Some(slot) = mirror.slot() else { return };
        if let Some(image) = body.function().config_image() {
            mirror.show(image, self.books().has_several(place));
        } else {
            match self.requests.change(Change::Forget(slot)) {
                Ok(()) => mirror.forget(),
                Err(error) => {
                    eprintln!("casemate-vmm: a function's configuration space stays mapped: {error}")
                }
            }
        }
    }

    fn lock(&self, place: Place) -> Option<MutexGuard<'_, Option<Body>>> {
        self.cells.get(&place).map(|cell| cell.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn with<T>(&self, place: Place, act: impl FnOnce(&mut Body) -> T) -> Option<T> {
        self.lock(place)?.as_mut().map(act)
    }

    fn books(&self) -> std::sync::RwLockReadGuard<'_, Books> {
        self.books.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose register an offset into ECAM names.
    fn route(&self, offset: u64) -> Option<(Place, u16)> {
        let address = EcamAddress::decode(offset, self.buses())?;
        let bus = if address.bus == 0 { 0 } else { self.books().bus_behind(address.bus)? };
        let place = Place { bus, device: address.device, function: address.function };
        Some((place, address.register))
    }

    /// Takes note of what a function answers to now, or a port lets through, and moves what must move. Its caller has
    /// the function's lock, so that what is noted last is what holds.
    fn note(&self, place: Place, port: Option<usize>, state: &State) {
        let mut books = self.books.write().unwrap_or_else(PoisonError::into_inner);
        books.want(place, state.decoded);
        if let (Some(port), Some((forwarding, _))) = (port, &state.port) {
            books.forward(port, forwarding.clone());
        }
        let answers = books.settle();
        if answers.is_empty() {
            return;
        }
        if let Err(error) = self.requests.change(Change::Answer(answers)) {
            // What KVM did not take over is reached by exits.
            eprintln!("casemate-vmm: moving the registers of devices: {error}");
        }
    }

    /// Resets the card behind a port.
    fn reset_behind(&self, port: usize) {
        for place in self.behind(port) {
            self.with(place, |body| {
                body.function().reset();
                self.note(place, None, &body.state());
            });
        }
    }

    /// The places behind a port.
    fn behind(&self, port: usize) -> impl Iterator<Item = Place> + use<> {
        let bus = u8::try_from(port + 1).unwrap_or(u8::MAX);
        (0..FUNCTIONS).map(move |function| Place { bus, device: 0, function })
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
