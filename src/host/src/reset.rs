//! Resets, and reading their results.

use std::{
    io,
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use casemate_spec::PciAddress;

use crate::{
    PciFunction,
    claim::ClaimedGroup,
    host::{Host, pci_parent},
    ledger::DeviceRecord,
    sys::vfio,
};

/// What the ledger says of a function that is reset together with all others of its card.
pub(crate) const WITH_ITS_CARD: &str = "card";
/// The kernel answers EAGAIN when somebody else has the device's lock for a moment.
const AGAIN_MAX: Duration = Duration::from_secs(2);

/// How a function is to be reset: the method that the kernel tries first, or, where it knows none for the function alone,
/// its whole bus.
pub(crate) fn method_of(function: &PciFunction) -> String {
    function.reset_methods.first().cloned().unwrap_or_else(|| WITH_ITS_CARD.to_owned())
}

/// The other functions of a function's bus, which a reset of the bus resets too; `None` on a root bus, which has no reset.
pub(crate) fn card_mates(
    host: &Host,
    functions: &[PciFunction],
    function: &PciFunction,
) -> Option<Vec<PciAddress>> {
    // Sysfs nests what is behind a bridge in the bridge.
    let real = std::fs::canonicalize(host.pci(function.address)).ok()?;
    pci_parent(real.parent()?)?;
    let mates = functions.iter().map(|other| other.address);
    Some(
        mates
            .filter(|other| other.is_on_the_bus_of(function.address) && *other != function.address)
            .collect(),
    )
}

/// Resets each function once, those of one card together, and tells each result.
pub(crate) fn all(
    records: &[DeviceRecord],
    groups: &[ClaimedGroup],
    fds: &[OwnedFd],
) -> Vec<Result<(), String>> {
    let mut cards: Vec<(PciAddress, Result<(), String>)> = Vec::new();
    let one = |(record, fd): (&DeviceRecord, &OwnedFd)| {
        if record.reset_method != WITH_ITS_CARD {
            return again_while_locked(|| vfio::reset(fd)).map_err(|error| error.to_string());
        }
        if let Some((_, result)) = cards.iter().find(|(card, _)| card.is_on_the_bus_of(record.address)) {
            return result.clone();
        }
        let of_card = records.iter().filter(|other| other.address.is_on_the_bus_of(record.address));
        let mut descriptors = Vec::new();
        for group in groups.iter().filter(|group| of_card.clone().any(|other| other.group == group.id)) {
            descriptors.push(&group.fd);
        }
        let result =
            again_while_locked(|| vfio::hot_reset(fd, &descriptors)).map_err(|error| error.to_string());
        cards.push((record.address, result.clone()));
        result
    };
    records.iter().zip(fds).map(one).collect()
}

/// The same of functions that were just opened: the kernel resets each when it's opened, and says whether that worked. What it
/// didn't reset, or can't alone, is reset here with all others.
pub(crate) fn all_opened(
    records: &[DeviceRecord],
    groups: &[ClaimedGroup],
    fds: &[OwnedFd],
) -> Vec<Result<(), String>> {
    let is_reset = |(record, fd): (&DeviceRecord, &OwnedFd)| {
        record.reset_method != WITH_ITS_CARD && vfio::was_reset(fd).unwrap_or(false)
    };
    if records.iter().zip(fds).all(is_reset) {
        return vec![Ok(()); records.len()];
    }
    all(records, groups, fds)
}

/// Asks again while the kernel says that the device is locked.
fn again_while_locked(mut reset: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let until = Instant::now() + AGAIN_MAX;
    loop {
        match reset() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && Instant::now() < until => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}
