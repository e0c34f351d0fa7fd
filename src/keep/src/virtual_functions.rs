//! Virtual functions that are made for one guest, and what they may do on the network.

use casemate_host::{
    Claim, Host, Ledger, Owner, Pools, VfNetwork, leave_virtual_functions, make_virtual_functions,
    set_vf_network,
};
use casemate_spec::{Located, PciAddress, Pooled, Refusal};

use crate::{cell, run::at_device};

/// Virtual functions that a guest uses. Dropped, after its devices were given back, they go when nobody else uses them.
pub(crate) struct Virtual<'a> {
    host: &'a Host,
    ledger: &'a Ledger,
    owner: Owner,
}

impl<'a> Virtual<'a> {
    /// Has those made that these pools are of; `None` when there are none.
    pub(crate) fn make(
        host: &'a Host,
        ledger: &'a Ledger,
        owner: &Owner,
        pooled: &[Pooled],
        pools: &Pools<'_>,
    ) -> Result<Option<Self>, Refusal> {
        let wanted = pools.to_be_made(pooled);
        if wanted.is_empty() {
            return Ok(None);
        }
        let this = Self { host, ledger, owner: owner.clone() };
        for (address, virtual_functions) in wanted {
            make_virtual_functions(host, ledger, owner, address, virtual_functions)?;
        }
        Ok(Some(this))
    }

    /// They go on being used, until their owner leaves them.
    pub(crate) fn stay(self) {
        std::mem::forget(self);
    }
}

impl Drop for Virtual<'_> {
    fn drop(&mut self) {
        for refusal in
            leave_virtual_functions(self.host, self.ledger, &self.owner).err().into_iter().flatten()
        {
            tracing::warn!("{refusal}");
        }
    }
}

/// Says what the guest's virtual functions may do on the network, before it sees them.
pub(crate) fn set_networks(
    located: &Located,
    host: &Host,
    pools: &Pools<'_>,
    claim: &Claim,
) -> Result<(), Refusal> {
    for (number, device) in claim.devices.iter().enumerate() {
        // Numbered behind its emulated cards.
        let mac = cell::mac(located.guest.name.as_str(), located.guest.nets.len() + number);
        set_network(host, pools, device.address, mac).map_err(|refusal| at_device(located, refusal))?;
    }
    Ok(())
}

/// Says what a function may do on the network, if it is a virtual one of a pool's.
pub(crate) fn set_network(
    host: &Host,
    pools: &Pools<'_>,
    address: PciAddress,
    mac: [u8; 6],
) -> Result<(), Refusal> {
    let Some(wanted) = pools.virtual_function(address) else { return Ok(()) };
    let network =
        VfNetwork { mac, vlan: wanted.vlan, rate_mbps: wanted.rate_mbps, spoof_check: true, trusted: false };
    set_vf_network(host, address, &network)
}
