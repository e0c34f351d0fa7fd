//! What an operator has done with a device that no guest has: taken from the host's driver, or given back to it.

use casemate_spec::{PciAddress, Refusal, ScrubStep};

use crate::{
    ClaimRequest, DeviceState, Host, Ledger, Owner, Returned, claim, driver, judge, variant::is_vfio_driver,
};

/// Takes a free function, and the mates of its group that have drivers, from the host to VFIO's driver. There they stay, also between guests,
/// until they are [given back](give_to_host): the host does nothing with them, and a guest that starts needs not wait
/// for a driver to let go. Tells which functions were taken.
///
/// # Errors
/// Those of [`assignable`](crate::assignable); `device-unbind-timeout`, `device-bind-failed`, `vfio-missing`, `ledger-*`.
pub fn keep_for_guests(
    host: &Host,
    ledger: &Ledger,
    address: PciAddress,
) -> Result<Vec<PciAddress>, Refusal> {
    let functions = host.functions()?;
    let function = functions.iter().find(|function| function.address == address);
    let mates = function.map(|function| function.group_mates.as_slice()).unwrap_or_default();
    let is_taken = |mate: &&PciAddress| {
        functions.iter().any(|other| other.address == **mate && !other.is_bridge && other.driver.is_some())
    };
    let all: Vec<_> = std::iter::once(address).chain(mates.iter().filter(is_taken).copied()).collect();
    judge::assignable(host, &functions, Some(ledger), &all)?;
    driver::load_vfio(host)?;
    for (index, address) in all.iter().enumerate() {
        if let Err(refusal) = driver::bind_vfio(host, *address) {
            // All or none: what was taken goes home, as far as it can.
            for taken in all.iter().take(index + 1) {
                let _ = to_any_driver(host, *taken);
            }
            return Err(refusal);
        }
    }
    Ok(all)
}

/// Erases what a free function stores, by these steps, and gives it back to where it was. Its group's mates are taken with it, and not
/// scrubbed.
///
/// # Errors
/// All of [`claim`](crate::claim). What became of the functions stands in the answer.
pub fn scrub(
    host: &Host,
    ledger: &Ledger,
    address: PciAddress,
    steps: &[ScrubStep],
) -> Result<Vec<Returned>, Refusal> {
    let functions = host.functions()?;
    let function = functions.iter().find(|function| function.address == address);
    let mates = function.map(|function| function.group_mates.as_slice()).unwrap_or_default();
    let is_no_bridge =
        |mate: &&PciAddress| functions.iter().any(|other| other.address == **mate && !other.is_bridge);
    let addresses = std::iter::once(address).chain(mates.iter().filter(is_no_bridge).copied()).collect();
    let request = ClaimRequest {
        // No guest's: theirs begin with a letter.
        owner: Owner::this_process(&format!("-scrub-{address}"))?,
        addresses,
        digests: Vec::new(),
        scrub: vec![(address, steps.to_vec())],
        judged: false,
    };
    Ok(claim(host, ledger, request)?.scrub(host, ledger))
}

/// Gives a free function that VFIO's driver has to whichever driver of the host's takes it. Tells which that is; none when none
/// does. It is not proven again: what is free was, when its last guest gave it back, or an operator has vouched for it.
///
/// # Errors
/// `device-state` when a guest has it or it is in quarantine, or VFIO's driver doesn't have it; `device-unbind-timeout`,
/// `device-bind-failed`, `ledger-*`.
pub fn give_to_host(host: &Host, ledger: &Ledger, address: PciAddress) -> Result<Option<String>, Refusal> {
    let life = ledger.lives([address])?.pop();
    let state = life.map_or(DeviceState::Attached, |life| life.state);
    if state != DeviceState::Free {
        let cause = format_args!("it is {state}, and only a free device is given back");
        let remedy = "end its guest, or say `casemate devices free` of one in quarantine that is sound";
        return Err(Refusal::new("device-state", address, cause, remedy));
    }
    let now = driver::current(host, address);
    if !now.as_deref().is_some_and(is_vfio_driver) {
        let cause = now.map_or_else(|| "no driver has it".to_owned(), |driver| format!("{driver} has it"));
        let remedy = "leave it: only what vfio-pci has is given back";
        return Err(Refusal::new("device-state", address, cause, remedy));
    }
    to_any_driver(host, address)?;
    Ok(driver::current(host, address))
}

/// Takes it from VFIO's driver, if that has it, and has whichever driver of the host's wants it take it.
fn to_any_driver(host: &Host, address: PciAddress) -> Result<(), Refusal> {
    driver::set_driver_override(host, address, None)?;
    if driver::current(host, address).as_deref().is_some_and(is_vfio_driver) {
        driver::unbind(host, address)?;
    }
    driver::probe(host, address);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};

    const NVME: &str = "0000:03:00.0";

    #[test]
    fn only_what_is_free_and_with_vfio_is_given_back() {
        let machine = Fixture::typical();
        let (host, ledger) = (machine.host(), machine.ledger());
        let refused = give_to_host(&host, &ledger, at(NVME)).unwrap_err();
        assert_eq!(refused.code, "device-state");
        assert!(refused.cause.contains("nvme has it"), "{refused}");
        ledger.quarantine(at(NVME), (0, 0), "a test").unwrap();
        let refused = give_to_host(&host, &ledger, at(NVME)).unwrap_err();
        assert!(refused.cause.contains("quarantined"), "{refused}");
    }

    #[test]
    fn what_no_guest_could_have_is_not_taken() {
        let machine = Fixture::typical();
        machine.mounts(&["259:1 / /mnt rw - ext4 /dev/nvme0n1p1 rw"]);
        let refused = keep_for_guests(&machine.host(), &machine.ledger(), at(NVME)).unwrap_err();
        assert_eq!(refused.code, "device-in-use");
        let missing = keep_for_guests(&machine.host(), &machine.ledger(), at("0000:00:1e.7")).unwrap_err();
        assert_eq!(missing.code, "device-missing");
    }
}
