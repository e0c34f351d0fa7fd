//! Which devices belong to the operator's pools, and which of a pool a guest gets.

use std::collections::BTreeSet;

use casemate_spec::{Firmware, NumaPolicy, PciAddress, Pool, Pooled, Refusal, ScrubStep, VirtualFunctions};

use crate::{
    Ledger, PciFunction,
    host::{Host, attribute},
    judge,
    ledger::Book,
};

/// How many devices a refusal tells about one by one.
const TOLD_MAX: usize = 8;

/// The pools of this host, found sound against its devices.
#[derive(Clone, Copy, Debug)]
pub struct Pools<'a> {
    host: &'a Host,
    functions: &'a [PciFunction],
    pools: &'a [Pool],
}

/// What one guest has and wants.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// Whose guest it is.
    pub tenant: &'a str,
    /// Devices that it asks for by address.
    pub named: &'a [PciAddress],
    /// What it wants of pools.
    pub pooled: &'a [Pooled],
}

impl<'a> Pools<'a> {
    /// The pools, with the inventory of the same moment.
    ///
    /// # Errors
    /// `pool-overlap` when a device is in two pools, or a physical function is in one and its virtual functions are in one:
    /// who has the one rules the others.
    pub fn new(host: &'a Host, functions: &'a [PciFunction], pools: &'a [Pool]) -> Result<Self, Refusal> {
        let this = Self { host, functions, pools };
        for function in functions {
            // A physical function is its pool's, whether guests get it or its virtual ones.
            let mut of =
                pools.iter().filter(|pool| this.is_in(pool, function) || is_described(pool, function));
            let Some(first) = of.next() else { continue };
            if let Some(second) = of.next() {
                let cause = format!("it is in pool {} and in pool {}", first.name, second.name);
                let remedy = "make one of them say more exactly which devices it means";
                return Err(Refusal::new("pool-overlap", function.address, cause, remedy)
                    .at(Some(second.location.clone())));
            }
            let physical = function.physical_function.and_then(|address| this.find(address));
            if let Some((physical, pool)) =
                physical.and_then(|physical| Some((physical, this.pool_of(physical)?)))
            {
                let cause = format!(
                    "it is in pool {}, and its physical function {} is in pool {}",
                    first.name, physical.address, pool.name
                );
                let remedy = "leave one of them out: who has the physical function rules the virtual ones";
                return Err(Refusal::new("pool-overlap", function.address, cause, remedy)
                    .at(Some(first.location.clone())));
            }
        }
        Ok(this)
    }

    /// The pool that a function is in.
    pub fn pool_of(&self, function: &PciFunction) -> Option<&'a Pool> {
        self.pools.iter().find(|pool| self.is_in(pool, function))
    }

    /// Chooses a device for each of `choice.pooled`, in their order, and looks at all of the guest's devices: those named
    /// by address must be ones that its tenant may have, too. Nothing is taken by this; the claim judges again.
    ///
    /// # Errors
    /// `pool-unknown`, `pool-empty`, `device-of-another-tenant`, `host-acs-override`, `host-iommu-passthrough`, `ledger-*`.
    pub fn choose(&self, ledger: &Ledger, choice: &Choice<'_>) -> Result<Vec<(Pooled, PciAddress)>, Refusal> {
        let book = ledger.read()?;
        for function in choice.named.iter().filter_map(|address| self.find(*address)) {
            self.may_have(&book, function, choice.tenant)?;
        }
        let search = Search { pools: self, book: &book, choice };
        // The guest's devices decide together which node is the near one, so each is tried.
        let mut best: Option<(usize, Vec<PciAddress>)> = None;
        let mut first_refusal = None;
        for near in search.nodes() {
            match search.near(near) {
                Ok(found) if best.as_ref().is_none_or(|best| found.0 < best.0) => best = Some(found),
                Ok(_) => {}
                Err(refusal) => first_refusal = first_refusal.or(Some(refusal)),
            }
        }
        match (best, first_refusal) {
            (Some((_, addresses)), _) => Ok(choice.pooled.iter().cloned().zip(addresses).collect()),
            (None, Some(refusal)) => Err(refusal),
            (None, None) => Ok(Vec::new()),
        }
    }

    fn find(&self, address: PciAddress) -> Option<&'a PciFunction> {
        self.functions.iter().find(|function| function.address == address)
    }

    /// That the host may give this function to a guest of `tenant`.
    fn may_have(&self, book: &Book, function: &PciFunction, tenant: &str) -> Result<(), Refusal> {
        let pool = self.pool_of(function);
        if !pool.is_some_and(|pool| pool.trusted) {
            contains_strangers(self.host, function)?;
        }
        if pool.is_none_or(|pool| pool.firmware != Firmware::Unchecked) {
            return Ok(());
        }
        let last = book.tenants.iter().find(|last| {
            last.address == function.address
                && (last.vendor, last.device) == (function.vendor, function.device)
        });
        last.filter(|last| last.tenant != tenant).map_or(Ok(()), |last| Err(last.refusal()))
    }

    /// Whether guests who ask for the pool can get this function.
    fn is_in(&self, pool: &Pool, function: &PciFunction) -> bool {
        if pool.virtual_functions.is_none() {
            return is_described(pool, function);
        }
        let physical = function.physical_function.and_then(|address| self.find(address));
        physical.is_some_and(|physical| is_described(pool, physical))
    }

    /// The physical functions that make the virtual ones of these pools, with what their pools want.
    pub fn to_be_made(&self, wanted: &[Pooled]) -> Vec<(PciAddress, &'a VirtualFunctions)> {
        let is_wanted = |pool: &&'a Pool| wanted.iter().any(|wanted| wanted.pool == pool.name);
        let of = |pool: &'a Pool| {
            let physical = |function: &&PciFunction| {
                is_described(pool, function)
                    && function.physical_function.is_none()
                    && function.details.virtual_functions_most.is_some()
            };
            let all = self.functions.iter().filter(physical).map(|function| function.address);
            pool.virtual_functions.as_ref().map(|wanted| all.map(move |address| (address, wanted)))
        };
        self.pools.iter().filter(is_wanted).filter_map(of).flatten().collect()
    }

    /// What the pool of a virtual function wants of it; `None` for other devices.
    pub fn virtual_function(&self, address: PciAddress) -> Option<&'a VirtualFunctions> {
        self.pool_of(self.find(address)?)?.virtual_functions.as_ref()
    }

    /// Those of which nobody checks the firmware, for [`Ledger::attach`].
    pub fn unchecked(&self, addresses: &[PciAddress]) -> Vec<PciAddress> {
        self.with_firmware(addresses, Firmware::Unchecked)
    }

    /// Those of which the option ROM is compared before and after each guest.
    pub fn digested(&self, addresses: &[PciAddress]) -> Vec<PciAddress> {
        self.with_firmware(addresses, Firmware::Digest)
    }

    /// Those that are scrubbed after each guest, and how.
    pub fn scrubbed(&self, addresses: &[PciAddress]) -> Vec<(PciAddress, Vec<ScrubStep>)> {
        let of = |address: &PciAddress| {
            let pool = self.find(*address).and_then(|function| self.pool_of(function))?;
            (!pool.scrub.is_empty()).then(|| (*address, pool.scrub.clone()))
        };
        addresses.iter().filter_map(of).collect()
    }

    fn with_firmware(&self, addresses: &[PciAddress], firmware: Firmware) -> Vec<PciAddress> {
        let is_so = |address: &PciAddress| {
            let pool = self.find(*address).and_then(|function| self.pool_of(function));
            pool.is_some_and(|pool| pool.firmware == firmware)
        };
        addresses.iter().copied().filter(is_so).collect()
    }
}

/// Whether a function is all that a pool says. Bridges are in no pool.
fn is_described(pool: &Pool, function: &PciFunction) -> bool {
    !function.is_bridge
        && pool.vendor.is_none_or(|vendor| vendor == function.vendor)
        && pool.id.is_none_or(|id| id == function.id())
        && pool.subsystem.is_none_or(|subsystem| subsystem == function.subsystem())
        && pool.class.is_none_or(|class| class.holds(function.class))
        && (pool.addresses.is_empty() || pool.addresses.contains(&function.address))
        && (pool.serials.is_empty() || pool.serials.iter().any(|serial| function.serials.contains(serial)))
}

/// That the host can hold a device of a guest whose tenant the operator doesn't trust.
fn contains_strangers(host: &Host, function: &PciFunction) -> Result<(), Refusal> {
    if acs_is_overridden(host) {
        return Err(Refusal::new(
            "host-acs-override",
            function.address,
            "the kernel was told that devices are apart which are not (pcie_acs_override): one guest's could reach another's",
            "remove pcie_acs_override from the kernel's command line; or say trusted = true of the device's pool",
        ));
    }
    let domain = attribute(host.pci(function.address).join("iommu_group/type"));
    if domain.as_deref() == Some("identity") {
        return Err(Refusal::new(
            "host-iommu-passthrough",
            function.address,
            "while no guest has it, it reaches all of the host's memory: its IOMMU group is in passthrough mode",
            "remove iommu=pt from the kernel's command line; or say trusted = true of the device's pool",
        ));
    }
    Ok(())
}

/// Whether the kernel was told to make groups that the hardware doesn't keep apart.
pub(crate) fn acs_is_overridden(host: &Host) -> bool {
    let command_line = host.table("proc/cmdline").unwrap_or_default();
    command_line.split_whitespace().any(|word| word.starts_with("pcie_acs_override="))
}

/// The choice for one guest.
struct Search<'a> {
    pools: &'a Pools<'a>,
    book: &'a Book,
    choice: &'a Choice<'a>,
}

impl Search<'_> {
    /// Nodes that could be the near one: that of the named devices, else each that has devices; `None` where the host
    /// tells of none.
    fn nodes(&self) -> BTreeSet<Option<u32>> {
        let named =
            self.choice.named.iter().filter_map(|address| self.pools.find(*address)?.numa_node).next();
        if named.is_some() {
            return BTreeSet::from([named]);
        }
        let told: BTreeSet<_> =
            self.pools.functions.iter().map(|function| function.numa_node).filter(Option::is_some).collect();
        if told.is_empty() { BTreeSet::from([None]) } else { told }
    }

    /// Devices for all that is wanted when `near` is the near node, and how many of them are far though near ones are
    /// preferred.
    fn near(&self, near: Option<u32>) -> Result<(usize, Vec<PciAddress>), Refusal> {
        let mut chosen = Vec::new();
        let mut far = 0;
        for wanted in self.choice.pooled {
            let function = self.one(wanted, near, &chosen)?;
            let prefers = self.pools.pool_of(function).is_some_and(|pool| pool.numa == NumaPolicy::Preferred);
            far += usize::from(prefers && is_far(function, near));
            chosen.push(function.address);
        }
        Ok((far, chosen))
    }

    fn one(
        &self,
        wanted: &Pooled,
        near: Option<u32>,
        chosen: &[PciAddress],
    ) -> Result<&PciFunction, Refusal> {
        let pools = self.pools;
        let pool = pools.pools.iter().find(|pool| pool.name == wanted.pool).ok_or_else(|| {
            let names: Vec<_> = pools.pools.iter().map(|pool| pool.name.as_str()).collect();
            let remedy = match names.as_slice() {
                [] => "this host has no pools: write some into its host.toml, or name a device by address"
                    .into(),
                names => format!("name one of {}", names.join(", ")),
            };
            Refusal::new("pool-unknown", &wanted.pool, "this host has no pool of this name", remedy)
        })?;
        let mut members: Vec<&PciFunction> =
            pools.functions.iter().filter(|function| pools.is_in(pool, function)).collect();
        let by_node = |function: &PciFunction| pool.numa != NumaPolicy::Ignored && is_far(function, near);
        members.sort_by_key(|function| (by_node(function), function.address));
        let mut whys = Vec::new();
        for function in members {
            match self.is_free(pool, function, near, chosen) {
                Ok(()) => return Ok(function),
                Err(why) => whys.push(format!("{} {why}", function.address)),
            }
        }
        let cause = match whys.len() {
            0 => "no device of this host is in the pool".to_owned(),
            count => {
                whys.truncate(TOLD_MAX);
                format!("none of its {count} devices can be had: {}", whys.join(", "))
            }
        };
        let remedy = "wait until a guest gives one back; casemate devices tells more of each";
        Err(Refusal::new("pool-empty", &wanted.pool, cause, remedy))
    }

    /// Whether this guest can have this one too, or why not, in a word.
    fn is_free(
        &self,
        pool: &Pool,
        function: &PciFunction,
        near: Option<u32>,
        chosen: &[PciAddress],
    ) -> Result<(), &'static str> {
        let mut all: Vec<PciAddress> = self.choice.named.iter().chain(chosen).copied().collect();
        if all.contains(&function.address) {
            return Err("(this guest has it already)");
        }
        if pool.numa == NumaPolicy::Required && is_far(function, near) {
            return Err("(far from the guest's other devices)");
        }
        self.pools.may_have(self.book, function, self.choice.tenant).map_err(|refusal| refusal.code)?;
        all.push(function.address);
        judge::judge(self.pools.host, self.pools.functions, self.book, &all).map_err(|refusal| refusal.code)
    }
}

/// Where the host tells no node for either, nothing is far.
fn is_far(function: &PciFunction, near: Option<u32>) -> bool {
    near.is_some_and(|near| function.numa_node.is_some_and(|node| node != near))
}

#[cfg(test)]
#[path = "pools_tests.rs"]
mod tests;
