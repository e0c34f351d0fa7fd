//! Undoing the claims of processes that died.

use std::time::Duration;

use casemate_spec::Refusal;
use serde::{Deserialize, Serialize};

use crate::{
    Host, Returned,
    claim::{Opened, open},
    driver,
    give_back::{self, Proof},
    judge,
    ledger::{DeviceRecord, Entry, Ledger, Owner, this_process},
    sriov::recover_virtual_functions,
    variant::is_vfio_driver,
};

/// For a guest whose keeper is gone to end after SIGKILL.
const KILL_MAX: Duration = Duration::from_secs(10);

/// What was done about one claim of a process that died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// Whose it was.
    pub owner: Owner,
    /// The guest's process, which still ran and was ended.
    pub killed_cell: Option<u32>,
    /// What became of the devices.
    pub devices: Vec<Returned>,
    /// Why it could not be done, or not for all devices; the rest is tried again next time.
    pub error: Option<String>,
}

/// Gives back what dead owners had: ends a guest that outlived its keeper, waits for the groups to be free, resets,
/// verifies, returns, as a release does. Claims of living owners are left alone.
///
/// # Errors
/// `ledger-*`, `host-unreadable`. What goes wrong with one claim stands in its [`Recovered`].
pub fn recover(host: &Host, ledger: &Ledger) -> Result<Vec<Recovered>, Refusal> {
    let adopted = adopt(host, ledger)?;
    let one = |(owner, entry): (Owner, Entry)| {
        let adopted = entry.owner.clone();
        let mut recovered = undo(host, ledger, owner, entry);
        // What could not be done is for the next command, whoever's: this process may live as long as its guest.
        let disowned = ledger.change(|book| {
            if let Some(left) = book.entry(&adopted) {
                left.owner = recovered.owner.clone();
            }
            Ok(())
        });
        recovered.error = recovered.error.or(disowned.err().map(|refusal| refusal.to_string()));
        recovered
    };
    let recovered = adopted.into_iter().map(one).collect();
    // What could not be removed is tried again by the next command.
    let _ = recover_virtual_functions(host, ledger);
    Ok(recovered)
}

/// Makes this process the owner of what dead ones had, so that no other command does the same work. Tells the former
/// owner with each.
fn adopt(host: &Host, ledger: &Ledger) -> Result<Vec<(Owner, Entry)>, Refusal> {
    if ledger.read()?.entries.is_empty() {
        return Ok(Vec::new());
    }
    let keep = this_process(host)?;
    ledger.change(|book| {
        let mut adopted = Vec::new();
        for entry in &mut book.entries {
            let mine_to_try_again = entry.recovering && entry.owner.keep == keep;
            if mine_to_try_again || !entry.owner.keep.is_alive(host) {
                let former = entry.owner.clone();
                entry.owner.keep = keep.clone();
                entry.recovering = true;
                adopted.push((former, entry.clone()));
            }
        }
        Ok(adopted)
    })
}

fn undo(host: &Host, ledger: &Ledger, owner: Owner, entry: Entry) -> Recovered {
    let mut recovered = Recovered { owner, killed_cell: None, devices: Vec::new(), error: None };
    let now = entry.owner.clone();
    if !recovered.owner.keep.is_of_this_boot(host) {
        // The restart undid the claim: drivers are where the boot put them.
        let unscrubbed: Vec<_> = entry.devices.iter().filter(|record| record.is_unscrubbed()).collect();
        let addresses: Vec<_> = unscrubbed.iter().map(|record| record.address).collect();
        if let Err(refusal) = give_back::take_back(ledger, &now, &addresses) {
            recovered.error = Some(refusal.to_string());
            return recovered;
        }
        let why = "the host was restarted since";
        let proofs = entry.devices.into_iter().map(|record| match record.is_unscrubbed() {
            true => Proof::unscrubbed(host, record, why),
            false => Proof::left_alone(host, record, why, None),
        });
        recovered.devices = give_back::settle(host, ledger, &now, proofs.collect());
        return recovered;
    }
    if let Some(cell) = &entry.cell {
        match cell.kill(host, KILL_MAX) {
            Ok(killed) => recovered.killed_cell = killed.then_some(cell.pid),
            Err(error) => {
                recovered.error = Some(format!("its process {} cannot be ended: {error}", cell.pid));
                return recovered;
            }
        }
    }
    match prove_all(host, ledger, &now, entry.devices) {
        Ok(proofs) => recovered.devices = give_back::settle(host, ledger, &now, proofs),
        Err(refusal) => recovered.error = Some(refusal.to_string()),
    }
    recovered
}

/// Opens all that a guest may have had and proves it; what no guest had needs no proof.
fn prove_all(
    host: &Host,
    ledger: &Ledger,
    owner: &Owner,
    records: Vec<DeviceRecord>,
) -> Result<Vec<Proof>, Refusal> {
    let mut proofs = Vec::new();
    let mut used = Vec::new();
    for record in records.iter() {
        match judge::same_device(host, record.address, (record.vendor, record.device)) {
            Err(refusal) => {
                let proof = Proof::left_alone(host, record.clone(), "it is gone", Some(refusal.to_string()));
                proofs.push(proof);
            }
            // A function at home while its group was VFIO's cannot be: the claim did not get so far, or the return had
            // begun, for which all of it was proven.
            Ok(_) if records.iter().any(|mate| mate.group == record.group && is_at_home(host, mate)) => {
                proofs.push(Proof::not_needed(record.clone(), "no guest had it, or it was proven before"));
            }
            Ok(_) => used.push(record.clone()),
        }
    }
    if used.is_empty() {
        return Ok(proofs);
    }
    let addresses: Vec<_> = used.iter().map(|record| record.address).collect();
    give_back::take_back(ledger, owner, &addresses)?;
    // What no guest has reached isn't scrubbed.
    used.iter_mut().filter(|record| !record.is_unscrubbed()).for_each(|record| record.scrub.clear());
    let scrubbed: Vec<_> =
        used.iter().filter(|record| !record.scrub.is_empty()).map(|record| record.address).collect();
    give_back::begin_scrub(ledger, owner, &scrubbed)?;
    driver::load_vfio(host)?;
    for record in &used {
        driver::bind_vfio(host, record.address)?;
    }
    let Opened { container, groups, fds } = open(host, &used)?;
    proofs.extend(give_back::prove(host, used, &container, &groups, &fds).into_iter().map(Proof::unjudged));
    drop((fds, groups, container));
    Ok(proofs)
}

/// With the host's driver that it came from.
fn is_at_home(host: &Host, record: &DeviceRecord) -> bool {
    let former = record.former_driver.as_deref();
    former.is_some_and(|former| !is_vfio_driver(former))
        && driver::current(host, record.address).as_deref() == former
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        DeviceState,
        fixture::Fixture,
        ledger::tests::{entry, record},
        process::Process,
    };

    const E1000E: &str = "0000:01:00.0";

    /// A machine whose e1000e a dead process had claimed.
    fn after_a_crash(change: impl FnOnce(&mut Entry)) -> (Fixture, Ledger) {
        let machine = Fixture::typical();
        let ledger = machine.ledger();
        let mut left = entry("web", vec![record(E1000E, 8)]);
        left.owner.keep.start_ticks += 1;
        change(&mut left);
        ledger.update(|book| book.entries.push(left)).unwrap();
        (machine, ledger)
    }

    /// Processes are looked up in the fixture.
    fn with_processes(machine: &Fixture) {
        let this = Process::with_pid(&Host::live(), std::process::id()).unwrap();
        let pid = this.pid;
        machine.write("proc/sys/kernel/random/boot_id", &this.boot_id);
        let zeros = "0 ".repeat(18);
        machine
            .write(&format!("proc/{pid}/stat"), &format!("{pid} (test) S {zeros}{} 0\n", this.start_ticks));
    }

    #[test]
    fn a_claim_that_was_only_written_down_is_taken_back() {
        let (machine, ledger) = after_a_crash(|_| ());
        with_processes(&machine);
        machine.bind(E1000E, "e1000e");
        machine.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci\n");
        let recovered = recover(&machine.host(), &ledger).unwrap();
        assert_eq!(recovered.len(), 1);
        assert_eq!((&recovered[0].error, recovered[0].killed_cell), (&None, None));
        assert_eq!(recovered[0].devices[0].returned_to.as_deref(), Some("e1000e"));
        assert_eq!(machine.read("sys/bus/pci/devices/0000:01:00.0/driver_override"), "\n");
        assert_eq!(ledger.read().unwrap().entries, []);
        assert_eq!(recover(&machine.host(), &ledger).unwrap(), []);
    }

    #[test]
    fn a_living_owner_is_left_alone() {
        let (machine, ledger) = after_a_crash(|entry| entry.owner.keep.start_ticks -= 1);
        with_processes(&machine);
        assert_eq!(recover(&machine.host(), &ledger).unwrap(), []);
        assert_eq!(ledger.read().unwrap().entries.len(), 1);
    }

    #[test]
    fn after_a_restart_nothing_is_touched() {
        let (machine, ledger) = after_a_crash(|entry| entry.owner.keep.boot_id = "another".into());
        with_processes(&machine);
        machine.bind(E1000E, "e1000e");
        machine.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "mine\n");
        let recovered = recover(&machine.host(), &ledger).unwrap();
        assert_eq!(recovered[0].devices[0].returned_to.as_deref(), Some("e1000e"));
        assert_eq!(machine.read("sys/bus/pci/devices/0000:01:00.0/driver_override"), "mine\n");
        assert_eq!(ledger.read().unwrap().entries, []);
    }

    #[test]
    fn after_a_restart_what_was_not_scrubbed_goes_to_nobody() {
        for (state, is_kept) in [
            (DeviceState::Claimed, false),
            (DeviceState::Attached, true),
            (DeviceState::Dirty, true),
            (DeviceState::Scrubbing, true),
            (DeviceState::Verified, false),
        ] {
            let (machine, ledger) = after_a_crash(|entry| {
                entry.owner.keep.boot_id = "another".into();
                entry.devices[0].state = state;
                entry.devices[0].scrub = vec![casemate_spec::ScrubStep::NvmeFormat];
            });
            with_processes(&machine);
            machine.bind(E1000E, "e1000e");
            let recovered = recover(&machine.host(), &ledger).unwrap();
            let why = recovered[0].devices[0].quarantined.as_deref();
            assert_eq!(
                why.is_some_and(|why| why.contains("was scrubbed")),
                is_kept,
                "{state}: {recovered:?}"
            );
            let book = ledger.read().unwrap();
            assert_eq!((book.entries.len(), book.quarantined.len()), (0, usize::from(is_kept)), "{state}");
        }
    }

    #[test]
    fn another_device_at_the_address_is_not_touched() {
        let (machine, ledger) = after_a_crash(|entry| entry.devices[0].device = 0x1234);
        with_processes(&machine);
        machine.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "mine\n");
        let recovered = recover(&machine.host(), &ledger).unwrap();
        assert!(recovered[0].devices[0].error.as_ref().unwrap().contains("here is 8086:10d3 now"));
        assert_eq!(machine.read("sys/bus/pci/devices/0000:01:00.0/driver_override"), "mine\n");
        assert_eq!(ledger.read().unwrap().entries, []);
    }

    #[test]
    fn what_fails_is_tried_again() {
        let (machine, ledger) = after_a_crash(|_| ());
        with_processes(&machine);
        // Bound to VFIO, but no /dev/vfio.
        machine.bind(E1000E, "vfio-pci");
        for _ in 0..2 {
            let recovered = recover(&machine.host(), &ledger).unwrap();
            assert!(recovered[0].error.as_ref().unwrap().contains("[vfio-missing]"), "{recovered:?}");
        }
        let [left] = &ledger.read().unwrap().entries[..] else { panic!("one entry") };
        assert!(
            !left.owner.keep.is_alive(&machine.host()),
            "what is left is for any command, not for this one"
        );
    }
}
