//! The host's devices in a guest's slots: judged and claimed as for a guest that starts, and proven when they come back.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use casemate_host::{
    Choice, Claim, ClaimRequest, Host, Ledger, Notices, Owner, PciFunction, Pools, assignable, claim,
    judge_dma, leave_virtual_functions,
};
use casemate_policy::Kind;
use casemate_spec::{Guest, Name, PciAddress, Pooled, Refusal};
use casemate_wire::{Assigned, AssignedCard, Card, Slot};

use crate::{
    DeviceReport, Events, Paths,
    admission::Inventory,
    admitted::Admitted,
    attach::windows::fit,
    cell,
    operator_socket::first,
    record::{self, GivenDevice},
    releasing::Releasing,
    virtual_functions::{Virtual, set_network},
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
        self.claim.devices.iter().map(|device| GivenDevice::of(device, self.claim.owner().slot)).collect()
    }

    /// What is asked of the cell, with the descriptors for it.
    pub(super) fn card(&self) -> std::io::Result<(Card, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut add = |fd: &OwnedFd| {
            fds.push(fd.try_clone()?);
            Ok::<_, std::io::Error>(Slot(u8::try_from(fds.len() - 1).unwrap_or(u8::MAX)))
        };
        let container = add(&self.claim.container)?;
        let groups = self.claim.groups.iter().map(|group| add(&group.fd)).collect::<Result<_, _>>()?;
        let function = |(device, function): (&casemate_host::ClaimedDevice, u8)| {
            let (fd, address) = (add(&device.fd)?, device.address.to_string());
            Ok(Assigned { device: fd, address, card: 0, function, rom: None })
        };
        let functions =
            self.claim.devices.iter().zip(0..).map(function).collect::<Result<_, std::io::Error>>()?;
        Ok((Card::Assigned(AssignedCard { container, groups, functions }), fds))
    }
}

impl Devices {
    pub(super) fn new(paths: &Paths, guest: &Guest, admitted: Arc<Admitted>) -> Self {
        Self { paths: paths.clone(), guest: guest.clone(), admitted }
    }

    /// Judges devices and claims them for a slot, as if the guest were about to start with them. Of its memory `there_bytes` take room
    /// on the host already.
    ///
    /// # Errors
    /// What a guest that starts with them would be refused for; `hotplug-window` when they don't fit into a slot's
    /// windows.
    pub(super) fn take(&self, slot: u8, wanted: Wanted<'_>, there_bytes: u64) -> Result<Plugged, Refusal> {
        let (host, ledger) = (Host::live(), Ledger::open(&self.paths.state)?);
        let owner = Owner::this_process(self.guest.name.as_str())?.in_slot(slot);
        let host_file = self.paths.read_host_file()?;
        let pooled = pooled(wanted)?;
        let functions = host.functions()?;
        let made = Virtual::make(
            &host,
            &ledger,
            &owner,
            &pooled,
            &Pools::new(&host, &functions, &host_file.pools)?,
        )?;
        let functions = if made.is_some() { host.functions()? } else { functions };
        let pools = Pools::new(&host, &functions, &host_file.pools)?;
        let plugged = self.choose_and_take(
            &Taking { host: &host, ledger: &ledger, owner, pools, functions: &functions, there_bytes },
            wanted,
            &pooled,
        )?;
        // They go when the devices have come back.
        Ok(Plugged { are_virtual: made.map(Virtual::stay).is_some(), ..plugged })
    }

    fn choose_and_take(
        &self,
        taking: &Taking<'_>,
        wanted: Wanted<'_>,
        pooled: &[Pooled],
    ) -> Result<Plugged, Refusal> {
        let Taking { host, ledger, pools, functions, .. } = taking;
        let choosing = (!pooled.is_empty()).then(|| ledger.choosing()).transpose()?;
        let choice = Choice { tenant: self.guest.tenant.as_str(), named: wanted.addresses, pooled };
        let chosen = pools.choose(ledger, &choice)?.into_iter().map(|(_, address)| address);
        let addresses: Vec<PciAddress> = wanted.addresses.iter().copied().chain(chosen).collect();
        assignable(host, functions, Some(ledger), &addresses)?;
        let of = |address: &PciAddress| functions.iter().find(|function| function.address == *address);
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
        let inventory = Inventory {
            functions: taking.functions,
            pools: Some(&taking.pools),
            ledger: Some(taking.ledger),
        };
        let mut spec = self.admitted.spec();
        spec.devices.extend(given.iter().map(|function| inventory.describe(function)));
        let names: Vec<_> = given.iter().map(|function| function.address.to_string()).collect();
        let change = format!("add device {}", names.join(" "));
        self.admitted.ask_for_devices(spec, &change, inventory).map(drop).map_err(first)
    }

    fn claim(&self, taking: &Taking<'_>, addresses: &[PciAddress]) -> Result<Claim, Refusal> {
        let Taking { host, ledger, owner, pools, functions, there_bytes } = taking;
        let mut needs = cell::dma_needs(&self.guest);
        needs.set_aside_bytes = needs.set_aside_bytes.max(*there_bytes);
        // With those that come: the policies have been asked.
        let all: Vec<PciAddress> = self.admitted.spec().devices.iter().map(|device| device.address).collect();
        judge_dma(host, functions, &all, &needs)?;
        let request = ClaimRequest {
            owner: owner.clone(),
            addresses: addresses.to_vec(),
            digests: pools.digested(addresses),
            scrub: pools.scrubbed(addresses),
            judged: self.admitted.policies().current().has(Kind::Device),
        };
        let claim = claim(host, ledger, request)?;
        match self.make_ready(taking, addresses, &claim, &needs) {
            Ok(()) => Ok(claim),
            Err(refusal) => {
                claim.release(host, ledger, &mut |_| None);
                Err(refusal)
            }
        }
    }

    /// Writes down that the guest gets what was claimed, and says what virtual functions may do.
    fn make_ready(
        &self,
        taking: &Taking<'_>,
        addresses: &[PciAddress],
        claim: &Claim,
        needs: &casemate_host::DmaNeeds,
    ) -> Result<(), Refusal> {
        let Taking { host, ledger, owner, pools, .. } = taking;
        if let Some(first) = addresses.first() {
            claim.limits.judge(*first, needs)?;
        }
        let guest = self.guest.name.as_str();
        let slot = owner.slot.unwrap_or_default();
        for (number, device) in claim.devices.iter().enumerate() {
            set_network(host, pools, device.address, cell::mac_in_slot(guest, slot, number))?;
        }
        if let Some(cell) = record::cell_of(&self.paths, guest) {
            ledger.note_cell(owner, cell.pid)?;
        }
        ledger.attach(owner, self.guest.tenant.as_str(), &pools.unchecked(addresses))
    }

    /// Has devices that the guest let go of, or lost with its end, proven, and gives them back.
    pub(super) fn give_back(&self, plugged: Plugged, runs_on: bool) -> Vec<DeviceReport> {
        let (host, addresses) = (Host::live(), plugged.addresses());
        let Plugged { claim, functions, are_virtual, listener } = plugged;
        drop(listener);
        let owner = claim.owner().clone();
        let engine = self.admitted.policies().current();
        let releasing = Releasing {
            engine: &engine,
            guest: &self.guest,
            functions,
            events: Events::below(&self.paths.state),
        };
        let returned = Ledger::open(&self.paths.state).map(|ledger| {
            let mut judge = |returned: &casemate_host::Returned| releasing.judge(returned);
            let returned = match runs_on {
                true => claim.release_from_running(&host, &ledger, &mut judge),
                false => claim.release(&host, &ledger, &mut judge),
            };
            let left = are_virtual.then(|| leave_virtual_functions(&host, &ledger, &owner));
            for refusal in left.into_iter().filter_map(Result::err).flatten() {
                tracing::warn!("{refusal}");
            }
            returned
        });
        self.forget(&addresses);
        returned.unwrap_or_default().into_iter().map(DeviceReport::from).collect()
    }

    /// The guest has them no longer.
    fn forget(&self, addresses: &[PciAddress]) {
        self.admitted.becomes(|spec| spec.devices.retain(|device| !addresses.contains(&device.address)));
    }
}

/// The host as it is while devices are taken.
struct Taking<'a> {
    host: &'a Host,
    ledger: &'a Ledger,
    owner: Owner,
    pools: Pools<'a>,
    functions: &'a [PciFunction],
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
