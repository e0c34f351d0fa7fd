//! What a keep does on the host: by its broker, where it has one; else with this process's own rights, as for a rehearsal or a test.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
};

use casemate_host::{
    Choice, DmaNeeds, Host, Image, Ledger, Life, PciFunction, Pools, Tap, TapRequest, assignable, judge_dma,
};
use casemate_spec::{Name, PciAddress, Pool, Pooled, Refusal};

use crate::{Broker, Kept, Knob, Seen, What, broker, files, journal::Journal, running::write_knob, sockets};

/// Puts what is told of a guest in its place, whole.
///
/// # Errors
/// When it can't be written.
pub fn put(runtime: &Path, guest: &Name, kind: Kept, text: &str) -> io::Result<()> {
    match broker() {
        Some(broker) => broker.put(kind, text),
        None => files::put(runtime, guest, kind, text),
    }
}

/// It is told no longer.
pub fn remove(runtime: &Path, guest: &Name, kind: Kept) {
    match broker() {
        Some(broker) => broker.remove(kind),
        None => files::remove(runtime, guest, kind),
    }
}

/// What is told of all guests.
pub fn read_all(runtime: &Path, kind: Kept) -> Vec<Seen> {
    match broker() {
        Some(broker) => broker.read_all(kind),
        None => files::read_all(runtime, kind),
    }
}

/// Adds a line to a log.
///
/// # Errors
/// When it can't be written.
pub fn append(journal: &Journal, line: &[u8]) -> io::Result<()> {
    match broker() {
        Some(broker) => broker.append(journal.log, line),
        None => journal.write(line),
    }
}

/// The user who wants what is done.
pub fn operator_uid() -> u32 {
    broker().map_or_else(|| rustix::process::getuid().as_raw(), Broker::operator_uid)
}

/// Turns a knob of the cell's cgroup.
///
/// # Errors
/// In words.
pub fn turn(cgroup: &Path, knob: Knob) -> Result<(), String> {
    match broker() {
        Some(broker) => broker.turn(knob),
        None => write_knob(cgroup, knob, u32::MAX),
    }
}

/// Listens at a path, for root alone, until [`unlisten`].
///
/// # Errors
/// A refusal of this code.
pub fn listen(path: &Path, code: &'static str) -> Result<UnixListener, Refusal> {
    match broker() {
        Some(broker) => broker.listen(path, code),
        None => sockets::listen(path, code),
    }
}

/// Nobody listens there any more.
pub fn unlisten(path: &Path) {
    match broker() {
        Some(broker) => broker.unlisten(path),
        None => drop(std::fs::remove_file(path)),
    }
}

/// Connects to who listens beside one of the guest's sockets, for this port: at its path, `_` and the port.
///
/// # Errors
/// When nobody does.
pub fn speak(path: &Path, port: u32) -> io::Result<OwnedFd> {
    match broker() {
        Some(broker) => broker.speak(path, port),
        None => sockets::speak(path, port),
    }
}

/// Opens a file that a guest is to have.
///
/// # Errors
/// As [`casemate_host::open_image`] and its like.
pub fn open(what: What, path: &Path) -> Result<Image, Refusal> {
    match broker() {
        Some(broker) => broker.open(what, path),
        None => files::open(what, path),
    }
}

/// Makes a tap.
///
/// # Errors
/// As [`Tap::create`].
pub fn tap(request: &TapRequest) -> Result<Tap, Refusal> {
    match broker() {
        Some(broker) => broker.tap(request),
        None => Tap::create(request),
    }
}

/// The host's devices, as a guest's start or an attachment looks at them.
pub struct Inventory<'a> {
    host: Host,
    /// What there is; nothing where nobody looked.
    pub functions: Vec<PciFunction>,
    whole: bool,
    /// None where there is no ledger that this process may read.
    ledger: Option<Ledger>,
    pools: &'a [Pool],
}

impl<'a> Inventory<'a> {
    /// Looks at all that is to be known of each function; or, for a guest without devices, at nothing yet: what a whole survey costs on a large
    /// host is for those who want devices. Without a ledger, nobody has anything.
    ///
    /// # Errors
    /// As [`Host::functions`].
    pub fn new(whole: bool, ledger: Option<Ledger>, pools: &'a [Pool]) -> Result<Self, Refusal> {
        let host = Host::live();
        let functions = match broker() {
            _ if !whole => Vec::new(),
            Some(broker) => broker.functions()?,
            None => host.functions()?,
        };
        Ok(Self { host, functions, whole, ledger, pools })
    }

    /// Those of the functions at `addresses` that are there.
    ///
    /// # Errors
    /// As [`Host::outline`].
    pub fn at(&self, addresses: BTreeSet<PciAddress>) -> Result<Vec<PciFunction>, Refusal> {
        if self.whole {
            let of = self.functions.iter().filter(|function| addresses.contains(&function.address));
            return Ok(of.cloned().collect());
        }
        match broker() {
            _ if addresses.is_empty() => Ok(Vec::new()),
            Some(broker) => broker.outline(addresses),
            None => self.host.outline(&addresses),
        }
    }

    /// Where in their lives those devices are that aren't free; none where nobody may know.
    ///
    /// # Errors
    /// `ledger-*`.
    pub fn taken(&self) -> Result<Option<BTreeMap<PciAddress, Life>>, Refusal> {
        match (broker(), &self.ledger) {
            (Some(broker), _) => broker.taken().map(Some),
            (None, Some(ledger)) => ledger.taken().map(Some),
            (None, None) => Ok(None),
        }
    }

    /// The pools, found sound against these functions.
    ///
    /// # Errors
    /// As [`Pools::new`].
    pub fn pools(&self) -> Result<Pools<'_>, Refusal> {
        Pools::new(&self.host, &self.functions, self.pools)
    }

    /// Where in their lives devices are; none where nobody may know.
    ///
    /// # Errors
    /// `ledger-*`.
    pub fn lives(&self, addresses: Vec<PciAddress>) -> Result<Option<Vec<Life>>, Refusal> {
        match (broker(), &self.ledger) {
            (Some(broker), _) => broker.lives(addresses).map(Some),
            (None, Some(ledger)) => ledger.lives(addresses).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// Chooses devices of pools.
    ///
    /// # Errors
    /// As [`Pools::choose`].
    pub fn choose(
        &self,
        tenant: &Name,
        named: &[PciAddress],
        pooled: &[Pooled],
    ) -> Result<Vec<(Pooled, PciAddress)>, Refusal> {
        match (broker(), &self.ledger) {
            (Some(broker), _) => broker.choose(tenant, named, pooled),
            (None, Some(ledger)) => {
                self.pools()?.choose(ledger, &Choice { tenant: tenant.as_str(), named, pooled })
            }
            (None, None) => Ok(Vec::new()),
        }
    }

    /// Whether these can be given to one guest.
    ///
    /// # Errors
    /// As [`assignable`].
    pub fn assignable(&self, addresses: &[PciAddress]) -> Result<(), Refusal> {
        match broker() {
            Some(broker) => broker.assignable(addresses),
            None => assignable(&self.host, &self.functions, self.ledger.as_ref(), addresses),
        }
    }

    /// Whether the host has what their DMA asks of it.
    ///
    /// # Errors
    /// As [`judge_dma`].
    pub fn judge_dma(&self, addresses: &[PciAddress], needs: &DmaNeeds) -> Result<(), Refusal> {
        match broker() {
            Some(broker) => broker.judge_dma(addresses, needs),
            None => judge_dma(&self.host, &self.functions, addresses, needs),
        }
    }
}
