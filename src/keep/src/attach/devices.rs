//! The host's devices in a guest's slots: judged and claimed as for a guest that starts, and proven when they come back.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use casemate_broker::{Broker, Choosing, Claim, ClaimedDevice, Claiming, Notices, hands};
use casemate_host::PciFunction;
use casemate_policy::Kind;
use casemate_spec::{Guest, Name, PciAddress, Pooled, Refusal};
use casemate_wire::{Assigned, AssignedCard, Card, Slot};

use crate::{
    DeviceReport, Events, Paths, admission::Inventory, admitted::Admitted, attach::windows::fit, cell,
    operator_socket::first, record::GivenDevice, releasing::Releasing,
};

/// Functions of a card.
const FUNCTIONS_MOST: usize = 8;

/// Which devices are to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) addresses: &'a [PciAddress],
    pub(super) pool: Option<&'a str>,
}

/// Who brings devices into one guest's slots, and takes them back.
pub(super) struct Devices {
    paths: Paths,
    broker: &'static Broker,
    guest: Guest,
    admitted: Arc<Admitted>,
}

/// Devices in a slot.
pub(super) struct Plugged {
    claim: Claim,
    /// As they were before, each with its pool.
    functions: Vec<(PciFunction, Option<String>)>,
    /// Virtual functions were made for this slot.
    are_virtual: bool,
    /// While this is open, somebody listens to what the kernel tells of them.
    listener: Option<UnixStream>,
}

impl Plugged {
    pub(super) fn addresses(&self) -> Vec<PciAddress> {
        self.claim.devices.iter().map(|device| device.address).collect()
    }

    pub(super) fn notices(&self) -> Arc<Notices> {
        Arc::clone(&self.claim.notices)
    }

    pub(super) fn heard_by(&mut self, listener: UnixStream) {
        self.listener = Some(listener);
    }

    pub(super) fn given(&self) -> Vec<GivenDevice> {
        self.claim.devices.iter().map(|device| GivenDevice::of(device, self.claim.slot)).collect()
    }

    /// What is asked of the cell, with the descriptors for it.
    pub(super) fn card(&self) -> std::io::Result<(Card, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut add = |fd: &OwnedFd| {
            fds.push(fd.try_clone()?);
            Ok::<_, std::io::Error>(Slot(u8::try_from(fds.len() - 1).unwrap_or(u8::MAX)))
        };
        let container = add(&self.claim.container)?;
        let groups = self.claim.groups.iter().map(&mut add).collect::<Result<_, _>>()?;
        let function = |(device, function): (&ClaimedDevice, u8)| {
            let (fd, address) = (add(&device.fd)?, device.address.to_string());
            Ok(Assigned { device: fd, address, card: 0, function, rom: None })
        };
        let functions =
            self.claim.devices.iter().zip(0..).map(function).collect::<Result<_, std::io::Error>>()?;
        Ok((Card::Assigned(AssignedCard { container, groups, functions }), fds))
    }
}

impl Devices {
    pub(super) fn new(
        paths: &Paths,
        broker: &'static Broker,
        guest: &Guest,
        admitted: Arc<Admitted>,
    ) -> Self {
        Self { paths: paths.clone(), broker, guest: guest.clone(), admitted }
    }

    /// Judges devices and claims them for a slot, as if the guest were about to start with them. Of its memory `there_bytes` take room
    /// on the host already.
    ///
    /// # Errors
    /// What a guest that starts with them would be refused for; `hotplug-window` when they don't fit into a slot's
    /// windows.
    pub(super) fn take(&self, slot: u8, wanted: Wanted<'_>, there_bytes: u64) -> Result<Plugged, Refusal> {
        let pooled = pooled(wanted)?;
        let pools = &self.admitted.host_file().pools;
        let mut host = hands::Inventory::new(true, None, pools)?;
        let made = self.broker.make_virtual(Some(slot), &pooled)?;
        let taken = (|| {
            if made {
                host = hands::Inventory::new(true, None, pools)?;
            }
            let taking =
                Taking { inventory: Inventory { host: &host, pools: &host.pools()? }, slot, there_bytes };
            self.choose_and_take(&taking, wanted, &pooled)
        })();
        // They go when the devices have come back.
        if made && taken.is_err() {
            self.broker.leave_virtual(Some(slot));
        }
        Ok(Plugged { are_virtual: made, ..taken? })
    }

    fn choose_and_take(
        &self,
        taking: &Taking<'_>,
        wanted: Wanted<'_>,
        pooled: &[Pooled],
    ) -> Result<Plugged, Refusal> {
        let Inventory { host, pools } = taking.inventory;
        let choosing: Option<Choosing> =
            (!pooled.is_empty()).then(|| self.broker.begin_choosing()).transpose()?;
        let chosen = host.choose(&self.guest.tenant, wanted.addresses, pooled)?;
        let chosen = chosen.into_iter().map(|(_, address)| address);
        let addresses: Vec<PciAddress> = wanted.addresses.iter().copied().chain(chosen).collect();
        host.assignable(&addresses)?;
        let of = |address: &PciAddress| host.functions.iter().find(|function| function.address == *address);
        let given: Vec<&PciFunction> = addresses.iter().filter_map(of).collect();
        let bars: Vec<_> = given.iter().flat_map(|function| function.bars.iter().copied()).collect();
        addresses.first().map_or(Ok(()), |first| fit(*first, &bars, &self.guest.hotplug))?;
        self.ask(taking, &given)?;
        let taken = self.claim(taking, &addresses).inspect_err(|_| self.forget(&addresses))?;
        drop(choosing);
        let pool = |function: &PciFunction| pools.pool_of(function).map(|pool| pool.name.to_string());
        let functions = given.into_iter().map(|function| (function.clone(), pool(function))).collect();
        Ok(Plugged { claim: taken, functions, are_virtual: false, listener: None })
    }

    /// Asks the policies whether the guest may have them too.
    fn ask(&self, taking: &Taking<'_>, given: &[&PciFunction]) -> Result<(), Refusal> {
        let mut spec = self.admitted.spec();
        spec.devices.extend(given.iter().map(|function| taking.inventory.describe(function)));
        let names: Vec<_> = given.iter().map(|function| function.address.to_string()).collect();
        let change = format!("add device {}", names.join(" "));
        self.admitted.ask_for_devices(spec, &change, taking.inventory).map(drop).map_err(first)
    }

    fn claim(&self, taking: &Taking<'_>, addresses: &[PciAddress]) -> Result<Claim, Refusal> {
        let mut needs = cell::dma_needs(&self.guest);
        needs.set_aside_bytes = needs.set_aside_bytes.max(taking.there_bytes);
        // With those that come: the policies have been asked.
        let all: Vec<PciAddress> = self.admitted.spec().devices.iter().map(|device| device.address).collect();
        taking.inventory.host.judge_dma(&all, &needs)?;
        let guest = self.guest.name.as_str();
        let macs = (0..addresses.len()).map(|number| cell::mac_in_slot(guest, taking.slot, number));
        let claiming = Claiming {
            slot: Some(taking.slot),
            tenant: self.guest.tenant.clone(),
            addresses: addresses.to_vec(),
            judged: self.admitted.policies().current().has(Kind::Device),
            needs,
            macs: macs.collect(),
        };
        self.broker.claim(claiming).map_err(|failed| failed.refusal)
    }

    /// Has devices that the guest let go of, or lost with its end, proven, and gives them back.
    pub(super) fn give_back(&self, plugged: Plugged, runs_on: bool) -> Vec<DeviceReport> {
        let addresses = plugged.addresses();
        let Plugged { claim, functions, are_virtual, listener } = plugged;
        drop(listener);
        let slot = claim.slot;
        let engine = self.admitted.policies().current();
        let releasing = Releasing {
            engine: &engine,
            guest: &self.guest,
            functions,
            events: Events::below(&self.paths.state),
        };
        let mut judge = |returned: &casemate_host::Returned| releasing.judge(returned);
        let returned = match runs_on {
            true => claim.release_from_running(&mut judge),
            false => claim.release(&mut judge),
        };
        if are_virtual {
            self.broker.leave_virtual(slot);
        }
        self.forget(&addresses);
        returned.into_iter().map(DeviceReport::from).collect()
    }

    /// The guest has them no longer.
    fn forget(&self, addresses: &[PciAddress]) {
        self.admitted.becomes(|spec| spec.devices.retain(|device| !addresses.contains(&device.address)));
    }
}

/// The host as it is while devices are taken.
struct Taking<'a> {
    inventory: Inventory<'a>,
    slot: u8,
    there_bytes: u64,
}

/// What is wanted of a pool; it is checked here that something is wanted at all.
fn pooled(wanted: Wanted<'_>) -> Result<Vec<Pooled>, Refusal> {
    let count = wanted.addresses.len() + usize::from(wanted.pool.is_some());
    if !(1..=FUNCTIONS_MOST).contains(&count) {
        let cause = format_args!("{count} devices are named for one slot");
        let remedy = "name 1 to 8, which become the functions of one card";
        return Err(Refusal::new("claim-empty", "the slot", cause, remedy));
    }
    let of = |pool: &str| {
        let unknown = || {
            let cause = "this is no pool's name";
            Refusal::new("pool-unknown", pool, cause, "casemate devices shows the pools of this host")
        };
        Ok(Pooled { pool: Name::new(pool).ok_or_else(unknown)?, table: 0 })
    };
    wanted.pool.into_iter().map(of).collect()
}
