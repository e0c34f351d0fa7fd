//! Giving functions back: reset, verified, returned to the driver they came from, or put in quarantine.
//!
//! What a device stores is scrubbed where its pool says how: a reset and config space say nothing about it.

use std::os::fd::OwnedFd;

use casemate_spec::{PciAddress, Refusal};
use serde::{Deserialize, Serialize};

use crate::{
    claim::{ClaimedGroup, Opened, firmware_digest, open, read_config},
    config::{COMMAND, COMMAND_BUS_MASTER},
    driver,
    host::Host,
    judge::same_device,
    ledger::{DeviceRecord, Ledger, Owner, Quarantined},
    life::{DeviceState, Move},
    notices::{Notice, Notices},
    reset, scrub,
    sys::vfio,
    variant::is_vfio_driver,
};

/// What became of one function that a guest had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    /// Where it sits.
    pub address: PciAddress,
    /// The method that the kernel tries first.
    pub reset_method: String,
    /// The reset's result: `Ok` when the ioctl returned 0, else its error, or why there was none.
    pub reset: Result<(), String>,
    /// How often the kernel's log told that DMA of its was stopped, since it asked for what the guest doesn't have: at least so
    /// often it was, for the log leaves out most where there are many. `None` where nobody counted.
    pub iommu_faults: Option<u64>,
    /// Whether bus mastering was seen to be off after the reset.
    pub bus_master_off: bool,
    /// Whether config space was, in what must not change, as before the claim, with MSI and MSI-X off.
    pub config_as_first_seen: bool,
    /// Offsets at which it was not.
    pub config_differences: Vec<u16>,
    /// What was done to scrub it, or why that failed; `None` when its pool doesn't say how.
    pub scrubbed: Option<Result<String, String>>,
    /// Whether its option ROM is what it was before the guest; `None` when its pool doesn't ask for that.
    pub firmware_as_first_seen: Option<bool>,
    /// Why it needed no proof, and was not reset or looked at; then what stands above of both says nothing.
    pub untouched: Option<String>,
    /// The driver that has it now; `None` too when it had none before.
    pub returned_to: Option<String>,
    /// Why it is in quarantine.
    pub quarantined: Option<String>,
    /// What else went wrong.
    pub error: Option<String>,
}

/// A function after its reset.
pub(crate) struct Proof {
    record: DeviceRecord,
    returned: Returned,
    next: Next,
}

/// What is to be done with a function.
enum Next {
    /// It is clean: back to the host's driver.
    GiveBack,
    /// It is not, and this is why: to nobody.
    Quarantine(String),
    /// It is out of our hands already.
    Leave,
}

impl Proof {
    /// Of a function that no guest has had since it was last clean.
    pub(crate) fn not_needed(record: DeviceRecord, why: &str) -> Self {
        let returned = Returned {
            address: record.address,
            reset_method: record.reset_method.clone(),
            reset: Err(format!("no reset: {why}")),
            iommu_faults: None,
            bus_master_off: false,
            config_as_first_seen: false,
            config_differences: Vec::new(),
            scrubbed: None,
            firmware_as_first_seen: None,
            untouched: Some(why.to_owned()),
            returned_to: None,
            quarantined: None,
            error: None,
        };
        Self { record, returned, next: Next::GiveBack }
    }

    /// Of a function that is to be left as it is: the host was restarted, or another device is there.
    pub(crate) fn left_alone(host: &Host, record: DeviceRecord, why: &str, error: Option<String>) -> Self {
        let mut proof = Self::not_needed(record, why);
        proof.returned.returned_to = driver::current(host, proof.record.address);
        proof.returned.error = error;
        Self { next: Next::Leave, ..proof }
    }

    /// Of one that a guest had, and whose data nobody can scrub any more before the host has it.
    pub(crate) fn unscrubbed(host: &Host, record: DeviceRecord, why: &str) -> Self {
        let proof = Self::left_alone(host, record, why, None);
        let next = Next::Quarantine(format!("{why}, before what its guest has stored was scrubbed"));
        Self { next, ..proof }
    }

    /// Has somebody judge what was found, who can only be stricter.
    pub(crate) fn judge(&mut self, judge: &mut dyn FnMut(&Returned) -> Option<String>) {
        if let Next::Quarantine(why) = &self.next {
            self.returned.quarantined = Some(why.clone());
        }
        let ruling = judge(&self.returned);
        self.returned.quarantined = None;
        if let (Next::GiveBack, Some(why)) = (&self.next, ruling) {
            self.next = Next::Quarantine(why);
        }
    }

    /// A reset and config space say nothing about why a device reported an error: who has hands looks at it first.
    pub(crate) fn heed(&mut self, notices: &Notices) {
        self.returned.iommu_faults = notices.faults(self.record.address);
        let has_failed = notices.was_told(Notice::Failed(self.record.address));
        if has_failed && matches!(self.next, Next::GiveBack) {
            let why = "it reported an error that was not corrected (AER, see dmesg) while a guest had it";
            self.next = Next::Quarantine(why.into());
        }
    }

    /// Of one that was to be judged, and whoever would have judged it has died.
    pub(crate) fn unjudged(mut self) -> Self {
        if self.record.judged && self.record.state != DeviceState::Claimed {
            let why = "policies were to judge it, and its guest's keep has died before it could ask them";
            self.judge(&mut |_| Some(why.to_owned()));
        }
        self
    }
}

/// Writes down that the guest has these no longer, before anything is done about them.
pub(crate) fn take_back(ledger: &Ledger, owner: &Owner, addresses: &[PciAddress]) -> Result<(), Refusal> {
    ledger
        .change(|book| addresses.iter().try_for_each(|address| book.advance(owner, *address, Move::TakeBack)))
}

/// Writes down that these are being scrubbed, after they were taken back.
pub(crate) fn begin_scrub(ledger: &Ledger, owner: &Owner, addresses: &[PciAddress]) -> Result<(), Refusal> {
    ledger.change(|book| addresses.iter().try_for_each(|address| book.advance(owner, *address, Move::Scrub)))
}

impl DeviceRecord {
    /// Whether a guest may have stored something on it that is to be scrubbed.
    pub(crate) fn is_unscrubbed(&self) -> bool {
        let had = matches!(self.state, DeviceState::Attached | DeviceState::Dirty | DeviceState::Scrubbing);
        had && !self.scrub.is_empty()
    }
}

/// Adds to what went wrong.
pub(crate) fn add_error(returned: &mut Returned, error: &Refusal) {
    let text = returned.error.take().map_or_else(|| error.to_string(), |first| format!("{first}; {error}"));
    returned.error = Some(text);
}

/// Silences, resets, scrubs and looks at functions through VFIO. Their descriptors are still open, so nothing else can have them.
pub(crate) fn prove(
    host: &Host,
    records: Vec<DeviceRecord>,
    container: &OwnedFd,
    groups: &[ClaimedGroup],
    fds: &[OwnedFd],
) -> Vec<Proof> {
    fds.iter().for_each(vfio::disable_interrupts);
    let mut resets = reset::all(&records, groups, fds);
    if records.iter().any(|record| !record.scrub.is_empty()) {
        // None of the others writes to where one that is scrubbed reads. Whether it's off is seen when all are looked at.
        fds.iter().for_each(|fd| drop(vfio::clear_config_bits(fd, COMMAND, COMMAND_BUS_MASTER)));
    }
    let scrub = |((record, fd), reset): ((&DeviceRecord, &OwnedFd), &Result<(), String>)| {
        let steps = Some(&record.scrub).filter(|steps| !steps.is_empty())?;
        Some(match reset {
            // One that was never a guest's has nothing to scrub.
            Ok(()) => scrub::scrub(fd, container, steps),
            Err(_) => Err("it could not be reset".to_owned()),
        })
    };
    let scrubbed: Vec<_> = records.iter().zip(fds).zip(&resets).map(scrub).collect();
    if scrubbed.iter().any(Option::is_some) {
        // What the scrub left in registers goes too.
        let again = reset::all(&records, groups, fds);
        resets
            .iter_mut()
            .zip(again)
            .filter(|(first, _)| first.is_ok())
            .for_each(|(first, again)| *first = again);
    }
    let each = records.into_iter().zip(fds).zip(resets).zip(scrubbed);
    each.map(|(((record, fd), reset), scrubbed)| look_at(host, record, fd, reset, scrubbed)).collect()
}

/// Takes functions again that are closed by now, and proves them: the host wanted them back while a guest had them, or the
/// guest's process runs on and must be seen to have let go. `why` says so of what can't be opened. Whoever unbinds one has its lock,
/// under which nothing can reset it, until it is closed: so all are closed by now. Until they are proven no driver of the host's
/// takes them by itself, for `driver_override` still names VFIO's.
pub(crate) fn prove_closed(host: &Host, records: Vec<DeviceRecord>, why: &str) -> Vec<Proof> {
    let mut proofs = Vec::new();
    let mut used = Vec::new();
    for record in records {
        driver::wait_for_moves(host, record.address);
        match bind_again(host, &record) {
            Ok(()) => used.push(record),
            Err(error) => {
                proofs.push(Proof::left_alone(host, record, "the host took it from its guest", Some(error)));
            }
        }
    }
    if used.is_empty() {
        return proofs;
    }
    match open(host, &used) {
        Ok(Opened { container, groups, fds }) => {
            proofs.extend(prove(host, used, &container, &groups, &fds));
            drop((fds, groups, container));
        }
        Err(refusal) => proofs.extend(used.into_iter().map(|record| {
            let why = format!("{why}, and it could not be opened again: {refusal}");
            let proof = Proof::not_needed(record, "it could not be opened");
            Proof { next: Next::Quarantine(why), ..proof }
        })),
    }
    proofs
}

/// Why the function is not Casemate's any more: it is gone, as a virtual function of a card whose driver is, or somebody has
/// given it to another driver.
fn bind_again(host: &Host, record: &DeviceRecord) -> Result<(), String> {
    let is_there = || {
        same_device(host, record.address, (record.vendor, record.device))
            .map(drop)
            .map_err(|refusal| refusal.to_string())
    };
    is_there()?;
    if let Some(other) = driver::current(host, record.address).filter(|name| !is_vfio_driver(name)) {
        return Err(format!("{other} has it, and nobody has proven it clean"));
    }
    // It may go while it is looked at.
    driver::bind_vfio(host, record.address).map_err(|refusal| is_there().err().unwrap_or(refusal.to_string()))
}

fn look_at(
    host: &Host,
    record: DeviceRecord,
    fd: &OwnedFd,
    reset: Result<(), String>,
    scrubbed: Option<Result<String, String>>,
) -> Proof {
    // The kernel restores the command register after the reset, with the guest's bus mastering in it.
    let cleared = vfio::clear_config_bits(fd, COMMAND, COMMAND_BUS_MASTER);
    let mut returned =
        Returned { reset, scrubbed, untouched: None, ..Proof::not_needed(record.clone(), "").returned };
    let unreadable = match read_config(host, record.address) {
        Ok(config) => {
            returned.bus_master_off = !config.bus_master();
            returned.config_differences = record.config.differences(&config);
            returned.config_as_first_seen = returned.config_differences.is_empty();
            None
        }
        Err(error) => Some(error),
    };
    let firmware = record.firmware.as_ref().map(|first| match firmware_digest(record.address, fd) {
        Ok(now) if now == *first => Ok(()),
        Ok(now) => Err(format!("its option ROM has changed: it was {first}, and is {now}")),
        Err(refusal) => Err(refusal.cause),
    });
    returned.firmware_as_first_seen = firmware.as_ref().map(Result::is_ok);
    let failed = match &returned {
        Returned { reset: Err(error), reset_method, .. } => {
            Some(format!("its reset ({reset_method}) failed: {error}"))
        }
        Returned { scrubbed: Some(Err(error)), .. } => Some(format!("it could not be scrubbed: {error}")),
        _ if unreadable.is_some() => {
            unreadable.map(|error| format!("its config space cannot be read: {error}"))
        }
        Returned { bus_master_off: false, .. } => {
            let why = cleared.err().map_or_else(|| "it reads as on".to_owned(), |error| error.to_string());
            Some(format!("bus mastering cannot be turned off: {why}"))
        }
        Returned { config_as_first_seen: false, config_differences, .. } => {
            Some(format!("config space is not as first seen, at {config_differences:#x?}").replace('\n', ""))
        }
        _ => firmware.and_then(Result::err),
    };
    Proof { record, returned, next: failed.map_or(Next::GiveBack, Next::Quarantine) }
}

/// Writes down what is in quarantine, gives the rest back, and ends the ledger's entry, but for functions that VFIO's
/// driver does not let go of: those are tried again by [`recover`](crate::recover).
///
/// A group goes into quarantine as a whole: an unproven function could reach what the host gives its mates.
pub(crate) fn settle(host: &Host, ledger: &Ledger, owner: &Owner, proofs: Vec<Proof>) -> Vec<Returned> {
    let mut proofs = condemn_groups(proofs);
    let quarantined: Vec<Quarantined> = proofs.iter().filter_map(|proof| proof.quarantine(owner)).collect();
    let written = ledger.change(|book| {
        for proof in &proofs {
            let made = match (&proof.next, &proof.returned.reset) {
                (Next::Quarantine(_), _) => Move::Condemn,
                (Next::GiveBack, Ok(())) => Move::Prove,
                _ => continue,
            };
            book.advance(owner, proof.record.address, made)?;
        }
        book.quarantined.retain(|old| quarantined.iter().all(|new| new.address != old.address));
        book.quarantined.extend(quarantined);
        Ok(())
    });
    let mut kept = Vec::new();
    for proof in &mut proofs {
        match (&proof.next, &written) {
            (Next::Leave, _) => {}
            (Next::GiveBack, _) => match driver::give_back(host, &proof.record) {
                Ok(driver) => proof.returned.returned_to = driver,
                Err(not_returned) => {
                    kept.extend(not_returned.still_ours.then_some(proof.record.address));
                    proof.returned.error = Some(not_returned.why);
                }
            },
            (Next::Quarantine(why), Ok(())) => proof.returned.quarantined = Some(why.clone()),
            // Not in quarantine, but not free either: its entry stays.
            (Next::Quarantine(why), Err(refusal)) => {
                proof.returned.error =
                    Some(format!("{why}; and its quarantine could not be written down: {refusal}"));
                kept.push(proof.record.address);
            }
        }
    }
    let ended = ledger.change(|book| book.let_go(owner, &kept));
    let mut returned: Vec<Returned> = proofs.into_iter().map(|proof| proof.returned).collect();
    if let Err(refusal) = ended {
        for returned in returned.iter_mut().filter(|returned| returned.error.is_none()) {
            returned.error = Some(refusal.to_string());
        }
    }
    returned
}

impl Proof {
    fn quarantine(&self, owner: &Owner) -> Option<Quarantined> {
        let DeviceRecord { address, vendor, device, .. } = self.record;
        let Next::Quarantine(why) = &self.next else { return None };
        Some(Quarantined { address, vendor, device, guest: owner.guest.clone(), why: why.clone() })
    }
}

fn condemn_groups(mut proofs: Vec<Proof>) -> Vec<Proof> {
    let failed = proofs.iter().filter(|proof| matches!(proof.next, Next::Quarantine(_)));
    let bad: Vec<(u32, PciAddress)> =
        failed.map(|proof| (proof.record.group, proof.record.address)).collect();
    for proof in proofs.iter_mut().filter(|proof| matches!(proof.next, Next::GiveBack)) {
        if let Some((group, mate)) = bad.iter().find(|(group, _)| *group == proof.record.group) {
            proof.next =
                Next::Quarantine(format!("its mate {mate} in IOMMU group {group} did not prove clean"));
        }
    }
    proofs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixture::Fixture,
        ledger::tests::{entry, record},
    };

    fn proof(record: DeviceRecord, failed: Option<&str>) -> Proof {
        let next = failed.map_or(Next::GiveBack, |why| Next::Quarantine(why.to_owned()));
        Proof { next, ..Proof::not_needed(record, "a test") }
    }

    #[test]
    fn who_judges_can_only_be_stricter() {
        let mut clean = proof(record("0000:01:00.0", 8), None);
        clean.judge(&mut |returned| returned.quarantined.clone());
        assert!(matches!(clean.next, Next::GiveBack));
        clean.judge(&mut |_| Some("it was not scrubbed".into()));
        assert!(matches!(&clean.next, Next::Quarantine(why) if why == "it was not scrubbed"));
        let mut dirty = proof(record("0000:01:00.0", 8), Some("its reset failed"));
        dirty.judge(&mut |returned| {
            assert_eq!(returned.quarantined.as_deref(), Some("its reset failed"));
            None
        });
        assert!(matches!(&dirty.next, Next::Quarantine(why) if why == "its reset failed"));
        assert_eq!(dirty.returned.quarantined, None, "it is not written down yet");
    }

    #[test]
    fn what_was_to_be_judged_and_was_not_goes_to_nobody() {
        let unasked = proof(record("0000:01:00.0", 8), None).unjudged();
        assert!(matches!(unasked.next, Next::GiveBack));
        let judged = DeviceRecord { judged: true, ..record("0000:01:00.0", 8) };
        assert!(matches!(proof(judged, None).unjudged().next, Next::Quarantine(_)));
    }

    #[test]
    fn what_failed_is_quarantined_with_its_mates_and_the_rest_goes_home() {
        let machine = Fixture::typical();
        let ledger = machine.ledger();
        for (address, group) in [("0000:01:00.0", 8), ("0000:01:00.1", 8), ("0000:02:00.0", 9)] {
            machine.pci(address, &[("class", "0x020000")], None, Some(group));
            machine.write(&format!("sys/bus/pci/devices/{address}/driver_override"), "vfio-pci\n");
        }
        let mut home = record("0000:02:00.0", 9);
        home.former_driver = None;
        let records = vec![record("0000:01:00.0", 8), record("0000:01:00.1", 8), home.clone()];
        let entry = entry("web", records.clone());
        ledger.update(|book| book.entries.push(entry.clone())).unwrap();
        take_back(&ledger, &entry.owner, &records.iter().map(|record| record.address).collect::<Vec<_>>())
            .unwrap();

        let proofs = vec![
            proof(records[0].clone(), Some("its reset failed")),
            proof(records[1].clone(), None),
            proof(home, None),
        ];
        let returned = settle(&machine.host(), &ledger, &entry.owner, proofs);

        assert_eq!(returned[0].quarantined.as_deref(), Some("its reset failed"));
        assert!(returned[1].quarantined.as_ref().unwrap().contains("0000:01:00.0"));
        assert_eq!((&returned[2].quarantined, &returned[2].error), (&None, &None));
        let book = ledger.read().unwrap();
        assert_eq!((book.entries.len(), book.quarantined.len()), (0, 2));
        assert_eq!(book.quarantined[0].guest, "web");
        // Only the clean one was touched.
        assert_eq!(machine.read("sys/bus/pci/devices/0000:01:00.0/driver_override"), "vfio-pci\n");
        assert_eq!(machine.read("sys/bus/pci/devices/0000:02:00.0/driver_override"), "\n");
    }

    #[test]
    fn a_driver_that_does_not_take_it_back_is_told() {
        let machine = Fixture::typical();
        let ledger = machine.ledger();
        machine.pci("0000:01:00.0", &[("class", "0x020000")], None, Some(8));
        machine.write("sys/bus/pci/devices/0000:01:00.0/driver_override", "vfio-pci\n");
        let each = std::time::Duration::from_secs(1);
        let host =
            machine.host().with_deadlines(crate::Deadlines { unbind: each, bind: each, group_free: each });
        let entry = entry("web", vec![record("0000:01:00.0", 8)]);
        ledger.update(|book| book.entries.push(entry.clone())).unwrap();
        let returned = settle(&host, &ledger, &entry.owner, vec![proof(entry.devices[0].clone(), None)]);
        assert!(returned[0].error.as_ref().unwrap().contains("driver e1000e did not take it back"));
        assert_eq!(ledger.read().unwrap().entries, [], "it is free all the same");
    }
}
