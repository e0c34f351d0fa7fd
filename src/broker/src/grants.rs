//! What operators want attached to a guest that runs: from when they say so until they are answered, the keep may open that, and
//! nothing else.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use casemate_host::TapRequest;
use casemate_spec::{PciAddress, Refusal};

use crate::Attachment;

/// All that is granted now.
#[derive(Debug, Default)]
pub(crate) struct Grants(Mutex<Granted>);

#[derive(Debug, Default)]
struct Granted {
    next: u64,
    attachments: BTreeMap<u64, Attachment>,
}

/// One grant; it ends when this is dropped.
pub(crate) struct Grant<'a> {
    of: &'a Grants,
    number: u64,
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        self.of.granted().attachments.remove(&self.number);
    }
}

impl Grants {
    pub(crate) fn give(&self, attachment: Attachment) -> Grant<'_> {
        let mut granted = self.granted();
        let number = granted.next;
        granted.next = granted.next.wrapping_add(1);
        granted.attachments.insert(number, attachment);
        Grant { of: self, number }
    }

    pub(crate) fn may_open(&self, wanted: &Path, reads_only: bool) -> bool {
        self.any(|granted| {
            matches!(granted, Attachment::Disk { path, read_only } if path == wanted && *read_only == reads_only)
        })
    }

    pub(crate) fn may_make(&self, wanted: &TapRequest) -> bool {
        let TapRequest { name, host_address, bridge, queues } = wanted;
        let is_so = |granted: &Attachment| {
            let Attachment::Net { tap, host_address: granted } = granted else { return false };
            let granted = granted.map(|(address, length)| (IpAddr::V4(address), length));
            tap == name && granted == *host_address
        };
        bridge.is_none() && *queues == 1 && self.any(is_so)
    }

    /// Whether a device of some pool is wanted.
    pub(crate) fn may_take_some(&self) -> bool {
        self.any(|granted| matches!(granted, Attachment::Devices { pool: Some(_), .. }))
    }

    /// Whether devices of this pool are wanted.
    pub(crate) fn may_take_of(&self, wanted: &str) -> bool {
        self.any(|granted| matches!(granted, Attachment::Devices { pool: Some(pool), .. } if pool == wanted))
    }

    /// Whether these are the devices that are wanted: those that were named, and one of the pool.
    pub(crate) fn may_claim(&self, wanted: &[PciAddress], is_of: &dyn Fn(PciAddress, &str) -> bool) -> bool {
        self.any(|granted| {
            let Attachment::Devices { addresses, pool } = granted else { return false };
            let (named, rest) = wanted.split_at(addresses.len().min(wanted.len()));
            let chosen = match (rest, pool) {
                ([], None) => true,
                ([one], Some(pool)) => is_of(*one, pool),
                _ => false,
            };
            named == addresses.as_slice() && chosen
        })
    }

    fn any(&self, is_so: impl Fn(&Attachment) -> bool) -> bool {
        self.granted().attachments.values().any(is_so)
    }

    fn granted(&self) -> MutexGuard<'_, Granted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// That a keep wants what nobody has granted it.
pub(crate) fn not_granted(subject: impl std::fmt::Display) -> Refusal {
    let cause = "its guest runs, and no operator wants this attached";
    Refusal::new("broker-not-granted", subject, cause, "use `casemate attach`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(name: &str, host_address: Option<(&str, u8)>) -> TapRequest {
        let host_address = host_address.map(|(address, length)| (address.parse().unwrap(), length));
        TapRequest { name: name.into(), host_address, bridge: None, queues: 1 }
    }

    #[test]
    fn what_an_operator_wants_is_granted_to_the_letter_until_he_is_answered() {
        let grants = Grants::default();
        let at = |text: &str| -> PciAddress { text.parse().unwrap() };
        let (drive, card, other) = (at("0000:01:00.0"), at("0000:02:00.0"), at("0000:03:00.0"));
        let of_pool = |address: PciAddress, pool: &str| address == card && pool == "cards";
        assert!(!grants.may_claim(&[], &of_pool) && !grants.may_claim(&[drive], &of_pool));
        let net = Attachment::Net { tap: "tap9".into(), host_address: Some(([10, 0, 0, 1].into(), 24)) };
        let net = grants.give(net);
        assert!(grants.may_make(&tap("tap9", Some(("10.0.0.1", 24)))));
        for wrong in [tap("tap8", Some(("10.0.0.1", 24))), tap("tap9", None)] {
            assert!(!grants.may_make(&wrong));
        }
        assert!(!grants.may_make(&TapRequest { queues: 2, ..tap("tap9", Some(("10.0.0.1", 24))) }));
        drop(net);
        assert!(!grants.may_make(&tap("tap9", Some(("10.0.0.1", 24)))));
        let both = Attachment::Devices { addresses: vec![drive], pool: Some("cards".into()) };
        let both = grants.give(both);
        assert!(grants.may_claim(&[drive, card], &of_pool) && grants.may_take_of("cards"));
        assert!(grants.may_take_some());
        for wrong in [&[drive][..], &[card, drive], &[drive, other], &[drive, card, other], &[card]] {
            assert!(!grants.may_claim(wrong, &of_pool), "{wrong:?}");
        }
        drop(both);
        let named = grants.give(Attachment::Devices { addresses: vec![drive], pool: None });
        assert!(grants.may_claim(&[drive], &of_pool) && !grants.may_claim(&[drive, card], &of_pool));
        assert!(
            !grants.may_take_of("cards")
                && !grants.may_take_some()
                && !grants.may_open(Path::new("/x"), true)
        );
        drop(named);
    }
}
