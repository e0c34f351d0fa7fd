//! A guest's physical devices: what the host has, what may be given, what was.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use casemate_host::{
    Choice, Choosing, Claim, ClaimRequest, DmaNeeds, Host, Notices, Owner, PciFunction, Pools, Returned,
    VfNetwork, assignable, claim, judge_dma, leave_virtual_functions, make_virtual_functions, set_vf_network,
};
use casemate_spec::{Name, PciAddress, Pool, Pooled, Refusal};
use casemate_wire::Channel;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{
    envelope,
    grants::not_granted,
    protocol::{ClaimThere, Claimed, ClaimedThere, Claiming, Refused, gone},
    server::Desk,
};

/// All of one guest's.
#[derive(Default)]
pub(crate) struct Devices(Mutex<Taken>);

#[derive(Default)]
struct Taken {
    /// By the host file.
    pools: Vec<Pool>,
    /// As they were when somebody looked last.
    functions: Vec<PciFunction>,
    choosing: Option<Choosing>,
    /// By slot; `None` is what the guest started with.
    claims: BTreeMap<Option<u8>, (Claim, bool)>,
    /// Slots for which virtual functions were made.
    made: BTreeSet<Option<u8>>,
    /// The guest's process.
    cell: Option<u32>,
}

impl Devices {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_pools(&self, pools: Vec<Pool>) {
        self.taken().pools = pools;
    }

    fn inventory(&self) -> (Vec<Pool>, Vec<PciFunction>) {
        let taken = self.taken();
        (taken.pools.clone(), taken.functions.clone())
    }

    /// The host's functions, with all that is to be known of them.
    pub(crate) fn survey(&self, host: &Host) -> Result<Vec<PciFunction>, Refusal> {
        let functions = host.functions()?;
        self.taken().functions.clone_from(&functions);
        Ok(functions)
    }

    pub(crate) fn choose(
        &self,
        desk: &Desk,
        tenant: &Name,
        named: &[PciAddress],
        pooled: &[Pooled],
    ) -> Result<Vec<(Pooled, PciAddress)>, Refusal> {
        let (pools, functions) = self.inventory();
        let choice = Choice { tenant: tenant.as_str(), named, pooled };
        Pools::new(&desk.host, &functions, &pools)?.choose(&desk.ledger()?, &choice)
    }

    pub(crate) fn assignable(&self, desk: &Desk, addresses: &[PciAddress]) -> Result<(), Refusal> {
        assignable(&desk.host, &self.inventory().1, Some(&desk.ledger()?), addresses)
    }

    pub(crate) fn judge_dma(
        &self,
        desk: &Desk,
        addresses: &[PciAddress],
        needs: &DmaNeeds,
    ) -> Result<(), Refusal> {
        judge_dma(&desk.host, &self.inventory().1, addresses, needs)
    }

    fn owner(desk: &Desk, slot: Option<u8>) -> Result<Owner, Refusal> {
        // Before it has a name a guest has virtual functions made, under the broker's.
        let owner = match desk.reserved() {
            Ok(reserved) => Owner::this_process(reserved.guest.as_str())?,
            Err(_) => Owner::this_process("")?,
        };
        Ok(slot.map_or(owner.clone(), |slot| owner.in_slot(slot)))
    }

    /// Has the virtual functions made that these pools are of; tells whether there are any.
    pub(crate) fn make_virtual(
        &self,
        desk: &Desk,
        slot: Option<u8>,
        pooled: &[Pooled],
    ) -> Result<bool, Refusal> {
        let unwanted = pooled.iter().find(|pooled| !desk.grants.may_take_of(pooled.pool.as_str()));
        if let Some(unwanted) = unwanted.filter(|_| desk.running.has_started()) {
            return Err(not_granted(&unwanted.pool));
        }
        let (pools, functions) = self.inventory();
        let wanted = Pools::new(&desk.host, &functions, &pools)?.to_be_made(pooled);
        if wanted.is_empty() {
            return Ok(false);
        }
        let (ledger, owner) = (desk.ledger()?, Self::owner(desk, slot)?);
        self.taken().made.insert(slot);
        for (address, virtual_functions) in wanted {
            let made = make_virtual_functions(&desk.host, &ledger, &owner, address, virtual_functions);
            made.inspect_err(|_| self.leave_virtual(desk, slot))?;
        }
        Ok(true)
    }

    /// They are no longer used; where nobody else uses them, they go.
    pub(crate) fn leave_virtual(&self, desk: &Desk, slot: Option<u8>) {
        if !self.taken().made.remove(&slot) {
            return;
        }
        let left = desk.ledger().and_then(|ledger| {
            let owner = Self::owner(desk, slot)?;
            Ok(leave_virtual_functions(&desk.host, &ledger, &owner).err().unwrap_or_default())
        });
        for refusal in left.unwrap_or_else(|refusal| vec![refusal]) {
            tracing::warn!("{refusal}");
        }
    }

    /// From here to [`Devices::end_choosing`] no other guest of this host chooses devices.
    pub(crate) fn begin_choosing(&self, desk: &Desk) -> Result<(), Refusal> {
        let choosing = desk.ledger()?.choosing()?;
        self.taken().choosing = Some(choosing);
        Ok(())
    }

    pub(crate) fn end_choosing(&self) {
        self.taken().choosing = None;
    }

    /// Takes devices for the guest, as their pools say, and makes them ready.
    pub(crate) fn claim(&self, desk: &Desk, claiming: Claiming) -> Result<(Claimed, Vec<OwnedFd>), Refusal> {
        let Claiming { slot, tenant, addresses, judged, needs, macs } = claiming;
        let (pools, functions) = self.inventory();
        let pools = Pools::new(&desk.host, &functions, &pools)?;
        let find = |address: PciAddress| functions.iter().find(|function| function.address == address);
        if desk.running.has_started() {
            let is_of = |address: PciAddress, pool: &str| {
                let of = find(address).and_then(|function| pools.pool_of(function));
                of.is_some_and(|of| of.name.as_str() == pool)
            };
            if slot.is_none() || !desk.grants.may_claim(&addresses, &is_of) {
                let names: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                return Err(not_granted(names.join(", ")));
            }
        }
        let ledger = desk.ledger()?;
        // That its tenant may have each of them; the claim judges the rest anew.
        pools.choose(&ledger, &Choice { tenant: tenant.as_str(), named: &addresses, pooled: &[] })?;
        let owner = Self::owner(desk, slot)?;
        let request = ClaimRequest {
            owner: owner.clone(),
            addresses: addresses.clone(),
            digests: pools.digested(&addresses),
            scrub: pools.scrubbed(&addresses),
            judged,
        };
        let claim = claim(&desk.host, &ledger, request)?;
        let ready = || -> Result<(), Refusal> {
            if let Some(first) = addresses.first() {
                claim.limits.judge(*first, &needs)?;
            }
            for (device, mac) in claim.devices.iter().zip(macs) {
                set_network(&desk.host, &pools, device.address, mac)?;
            }
            if let Some(pid) = self.taken().cell {
                ledger.note_cell(&owner, pid)?;
            }
            ledger.attach(&owner, tenant.as_str(), &pools.unchecked(&addresses))
        };
        if let Err(refusal) = ready() {
            let returned = claim.release(&desk.host, &ledger, &mut |_| None);
            return Ok((Claimed::Undone { returned, refusal: Refused::from(refusal) }, Vec::new()));
        }
        let (there, descriptors) = tell(&claim)?;
        self.taken().claims.insert(slot, (claim, judged));
        Ok((Claimed::Done(there), descriptors))
    }

    /// Writes down the process of the guest that has its devices.
    pub(crate) fn note_cell(&self, desk: &Desk, pid: u32) -> Result<(), Refusal> {
        let has_claim = {
            let mut taken = self.taken();
            taken.cell = Some(pid);
            taken.claims.contains_key(&None)
        };
        if !has_claim {
            return Ok(());
        }
        match desk.ledger()?.note_cell(&Self::owner(desk, None)?, pid) {
            // It has ended already; why is for it to say.
            Err(refusal) if refusal.code == "ledger-no-process" => Ok(()),
            noted => noted,
        }
    }

    /// Has devices proven, and gives them back.
    pub(crate) fn release(
        &self,
        desk: &Desk,
        slot: Option<u8>,
        runs_on: bool,
        rule: &mut dyn FnMut(&Returned) -> Option<String>,
    ) -> Vec<Returned> {
        let Some((claim, judged)) = self.taken().claims.remove(&slot) else { return Vec::new() };
        let Ok(ledger) = desk.ledger() else { return Vec::new() };
        let mut judge = |returned: &Returned| if judged { rule(returned) } else { None };
        if runs_on {
            claim.release_from_running(&desk.host, &ledger, &mut judge)
        } else {
            claim.release(&desk.host, &ledger, &mut judge)
        }
    }

    /// The keep has died with devices claimed.
    pub(crate) fn release_all(&self, desk: &Desk) {
        self.end_choosing();
        let (claimed, made) = {
            let taken = self.taken();
            (taken.claims.keys().copied().collect::<Vec<_>>(), taken.made.clone())
        };
        let why = "policies were to judge it, and its guest's keep has died before it could ask them";
        for slot in claimed {
            self.release(desk, slot, false, &mut |_| Some(why.to_owned()));
        }
        for slot in made {
            self.leave_virtual(desk, slot);
        }
    }
}

/// Says what a function may do on the network, if it is a virtual one of a pool's.
fn set_network(host: &Host, pools: &Pools<'_>, address: PciAddress, mac: [u8; 6]) -> Result<(), Refusal> {
    let Some(wanted) = pools.virtual_function(address) else { return Ok(()) };
    let network =
        VfNetwork { mac, vlan: wanted.vlan, rate_mbps: wanted.rate_mbps, spoof_check: true, trusted: false };
    set_vf_network(host, address, &network)
}

/// A claim, with descriptors for the keep, the last of which tells notices.
fn tell(claim: &Claim) -> Result<(ClaimThere, Vec<OwnedFd>), Refusal> {
    let devices = claim.devices.iter();
    let all = [&claim.container]
        .into_iter()
        .chain(claim.groups.iter().map(|group| &group.fd))
        .chain(devices.clone().map(|device| &device.fd));
    let copies = all.map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>();
    let mut descriptors = copies.map_err(gone)?;
    descriptors.push(tell_notices(Arc::clone(&claim.notices))?);
    let there = ClaimThere {
        groups: claim.groups.len(),
        devices: devices
            .map(|device| ClaimedThere {
                address: device.address,
                group: device.group,
                reset_method: device.reset_method.clone(),
                former_driver: device.former_driver.clone(),
            })
            .collect(),
        limits: claim.limits.clone(),
        scrubbed: claim.to_be_scrubbed(),
    };
    Ok((there, descriptors))
}

/// Passes on what the kernel tells of devices, until the keep closes its end.
fn tell_notices(notices: Arc<Notices>) -> Result<OwnedFd, Refusal> {
    let (ours, theirs) = envelope::pair().map_err(gone)?;
    let pass = move || {
        let keep = Channel::new(ours);
        loop {
            let mut polled = [
                PollFd::from_borrowed_fd(notices.wake(), PollFlags::IN),
                PollFd::from_borrowed_fd(keep.as_fd(), PollFlags::IN),
            ];
            match poll(&mut polled, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            }
            // A keep says nothing here; it is readable when its end is closed.
            let [_, gone] = &polled;
            if !gone.revents().is_empty() {
                return;
            }
            if let Some(notice) = notices.next()
                && envelope::send(&keep, &notice, &[]).is_err()
            {
                return;
            }
        }
    };
    thread::Builder::new().name("notices".into()).spawn(pass).map_err(gone)?;
    Ok(theirs)
}
