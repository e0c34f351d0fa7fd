//! Virtual functions that are made for one guest, and what they may do on the network.

use casemate_host::{
    Claim, Host, Ledger, Owner, PciFunction, Pools, VfNetwork, leave_virtual_functions,
    make_virtual_functions, set_vf_network,
};
use casemate_spec::{Located, Pool, Refusal};

use crate::{cell, run::at_device};

/// Virtual functions that a guest uses. Dropped, after its devices were given back, they go when nobody else uses them.
pub(crate) struct Virtual<'a> {
    host: &'a Host,
    ledger: &'a Ledger,
    owner: Owner,
}

impl<'a> Virtual<'a> {
    /// Has those made that the guest's pools are of; `None` when there are none.
    pub(crate) fn make(
        host: &'a Host,
        ledger: &'a Ledger,
        located: &Located,
        functions: &[PciFunction],
        pools: &[Pool],
    ) -> Result<Option<Self>, Refusal> {
        let wanted = Pools::new(host, functions, pools)?.to_be_made(&located.guest.pooled);
        if wanted.is_empty() {
            return Ok(None);
        }
        let this = Self { host, ledger, owner: Owner::this_process(located.guest.name.as_str())? };
        let first = located.guest.pooled.first().map_or(0, |pooled| pooled.table);
        for (address, virtual_functions) in wanted {
            make_virtual_functions(host, ledger, &this.owner, address, virtual_functions)
                .map_err(|refusal| refusal.at(located.device_location(first)))?;
        }
        Ok(Some(this))
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
        let Some(wanted) = pools.virtual_function(device.address) else { continue };
        let network = VfNetwork {
            // Numbered behind its emulated cards.
            mac: cell::mac(located.guest.name.as_str(), located.guest.nets.len() + number),
            vlan: wanted.vlan,
            rate_mbps: wanted.rate_mbps,
            spoof_check: true,
            trusted: false,
        };
        set_vf_network(host, device.address, &network).map_err(|refusal| at_device(located, refusal))?;
    }
    Ok(())
}
