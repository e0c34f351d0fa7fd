//! What devices the host has, and which of them a guest can have.

use casemate_broker::hands;
use casemate_host::{Host, Ledger, Life, PciFunction};
use casemate_spec::{PciAddress, Refusal};

use crate::{
    Paths,
    run::{host_file, step_down},
};

/// A PCI function of the host's.
#[derive(Clone, Debug)]
pub struct ListedDevice {
    /// What there is to know of it.
    pub function: PciFunction,
    /// Where in its life it is; only root can know.
    pub life: Option<Life>,
    /// The pool of the host file's that it is in.
    pub pool: Option<String>,
    /// Why no guest can have it, if none can.
    pub refusal: Option<Refusal>,
}

/// Lists them by address. Root's process has a broker look, and reads the host file as a user without rights, as it stays.
///
/// # Errors
/// `broker-gone`; what the host file is refused for; `host-unreadable`.
pub fn list_devices(paths: &Paths) -> Result<Vec<ListedDevice>, Refusal> {
    let stepped_down = step_down(paths)?;
    let host_file = host_file(stepped_down.as_ref(), paths)?;
    // For others than root what is claimed shows by its driver alone.
    let ledger = match stepped_down {
        Some(_) => None,
        None => Ledger::open(&paths.state).ok(),
    };
    let inventory = hands::Inventory::new(true, ledger, &host_file.pools)?;
    let pools = inventory.pools()?;
    let mut named = inventory.functions.clone();
    Host::live().name(&mut named);
    let addresses = named.iter().map(|function| function.address).collect();
    let mut lives = inventory.lives(addresses).ok().flatten().unwrap_or_default().into_iter();
    let listed = named.into_iter().map(|function| ListedDevice {
        life: lives.next(),
        pool: pools.pool_of(&function).map(|pool| pool.name.as_str().to_owned()),
        refusal: inventory.assignable(&whole_group(&inventory.functions, &function)).err(),
        function,
    });
    Ok(listed.collect())
}

/// The function with those of its group that a guest would have to get with it.
fn whole_group(functions: &[PciFunction], function: &PciFunction) -> Vec<PciAddress> {
    let mate =
        |address: &&PciAddress| functions.iter().any(|other| other.address == **address && !other.is_bridge);
    std::iter::once(function.address).chain(function.group_mates.iter().filter(mate).copied()).collect()
}
