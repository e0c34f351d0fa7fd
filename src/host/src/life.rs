//! A device's life: one table of states and moves. What is not in it cannot happen.

use std::{collections::BTreeMap, fmt};

use casemate_spec::{PciAddress, Refusal};
use serde::{Deserialize, Serialize};

use crate::ledger::{Book, Ledger, Owner, Quarantined};

/// Where in its life a device is. Kept in the ledger, so that it survives a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// The host has it.
    Free,
    /// It is taken, or being taken, from the host for a guest; no guest has reached it.
    Claimed,
    /// A guest has it, or may have. What the ledger does not tell is taken for this.
    #[default]
    Attached,
    /// A guest had it, and nothing has been done about it yet.
    Dirty,
    /// What its guest has stored on it is being erased.
    Scrubbing,
    /// It was reset and proved itself clean; it is on its way back to the host.
    Verified,
    /// It failed to prove itself clean, or an operator wants it so. Nobody gets it.
    Quarantined,
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Free => "free",
            Self::Claimed => "claimed",
            Self::Attached => "attached",
            Self::Dirty => "dirty",
            Self::Scrubbing => "scrubbing",
            Self::Verified => "verified",
            Self::Quarantined => "quarantined",
        })
    }
}

/// What happens to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// It is written down for a guest.
    Claim,
    /// The claim failed, or was not needed; no guest has reached the device.
    Undo,
    /// The guest gets it.
    Attach,
    /// The guest has ended, or never began.
    TakeBack,
    /// What it stores is erased now.
    Scrub,
    /// It was reset and found as first seen.
    Prove,
    /// It was not.
    Condemn,
    /// The host has it again.
    GiveBack,
    /// The host was restarted, and its boot has the device; or the device is gone.
    Restart,
    /// An operator wants it kept from everybody.
    Quarantine,
    /// An operator says that it is sound.
    Pardon,
}

/// Every move there is.
pub static MOVES: &[(DeviceState, Move, DeviceState)] = &[
    (DeviceState::Free, Move::Claim, DeviceState::Claimed),
    (DeviceState::Claimed, Move::Undo, DeviceState::Free),
    (DeviceState::Claimed, Move::Attach, DeviceState::Attached),
    (DeviceState::Claimed, Move::TakeBack, DeviceState::Dirty),
    (DeviceState::Attached, Move::TakeBack, DeviceState::Dirty),
    (DeviceState::Dirty, Move::TakeBack, DeviceState::Dirty),
    // Proven, but the driver did not let go of it: it is looked at again.
    (DeviceState::Verified, Move::TakeBack, DeviceState::Dirty),
    // Who scrubbed it has died: it is scrubbed again. No restart makes it free.
    (DeviceState::Scrubbing, Move::TakeBack, DeviceState::Dirty),
    (DeviceState::Dirty, Move::Scrub, DeviceState::Scrubbing),
    (DeviceState::Scrubbing, Move::Prove, DeviceState::Verified),
    (DeviceState::Scrubbing, Move::Condemn, DeviceState::Quarantined),
    (DeviceState::Dirty, Move::Prove, DeviceState::Verified),
    (DeviceState::Dirty, Move::Condemn, DeviceState::Quarantined),
    (DeviceState::Verified, Move::GiveBack, DeviceState::Free),
    (DeviceState::Claimed, Move::Restart, DeviceState::Free),
    (DeviceState::Attached, Move::Restart, DeviceState::Free),
    (DeviceState::Dirty, Move::Restart, DeviceState::Free),
    (DeviceState::Verified, Move::Restart, DeviceState::Free),
    (DeviceState::Free, Move::Quarantine, DeviceState::Quarantined),
    (DeviceState::Quarantined, Move::Pardon, DeviceState::Free),
];

impl DeviceState {
    /// The state after a move; `None` when it can't happen now.
    pub fn after(self, made: Move) -> Option<Self> {
        MOVES.iter().find(|(from, by, _)| (*from, *by) == (self, made)).map(|(_, _, to)| *to)
    }
}

/// What the ledger tells of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Life {
    /// Where in its life it is.
    pub state: DeviceState,
    /// The guest that has it, or the one that had it when it went into quarantine.
    pub guest: Option<String>,
    /// Why it is in quarantine.
    pub why: Option<String>,
    /// Whose guest had it last, as far back as Casemate knows.
    pub last_tenant: Option<String>,
}

impl Book {
    /// What is told of the device at an address.
    pub(crate) fn life(&self, address: PciAddress) -> Life {
        let last_tenant =
            self.tenants.iter().find(|last| last.address == address).map(|last| last.tenant.clone());
        if let Some(device) = self.quarantined.iter().find(|device| device.address == address) {
            let guest = Some(device.guest.clone()).filter(|guest| !guest.is_empty());
            let why = Some(device.why.clone());
            return Life { state: DeviceState::Quarantined, guest, why, last_tenant };
        }
        for entry in &self.entries {
            if let Some(device) = entry.devices.iter().find(|device| device.address == address) {
                let guest = Some(entry.owner.guest.clone());
                return Life { state: device.state, guest, why: None, last_tenant };
            }
        }
        Life { state: DeviceState::Free, guest: None, why: None, last_tenant }
    }

    /// Makes a move of one of the owner's devices.
    pub(crate) fn advance(&mut self, owner: &Owner, address: PciAddress, made: Move) -> Result<(), Refusal> {
        let device = self
            .entry(owner)
            .and_then(|entry| entry.devices.iter_mut().find(|device| device.address == address))
            .ok_or_else(|| out_of_turn(address, DeviceState::Free, made))?;
        device.state = device.state.after(made).ok_or_else(|| out_of_turn(address, device.state, made))?;
        Ok(())
    }
}

fn out_of_turn(address: PciAddress, state: DeviceState, made: Move) -> Refusal {
    let word = format!("{made:?}").to_lowercase();
    let remedy =
        "casemate devices shows where it is; a running guest's device is the guest's until it has ended";
    Refusal::new("device-state", address, format!("it is {state}, and {word} cannot happen then"), remedy)
}

impl Ledger {
    /// What the ledger tells of the device at each address, in their order.
    ///
    /// # Errors
    /// `ledger-unusable`, `ledger-damaged`.
    pub fn lives(&self, addresses: impl IntoIterator<Item = PciAddress>) -> Result<Vec<Life>, Refusal> {
        let book = self.read()?;
        Ok(addresses.into_iter().map(|address| book.life(address)).collect())
    }

    /// What the ledger tells of each device that isn't free.
    ///
    /// # Errors
    /// `ledger-unusable`, `ledger-damaged`.
    pub fn taken(&self) -> Result<BTreeMap<PciAddress, Life>, Refusal> {
        let book = self.read()?;
        let given = book.entries.iter().flat_map(|entry| &entry.devices).map(|device| device.address);
        let addresses = given.chain(book.quarantined.iter().map(|device| device.address));
        let lives = addresses.map(|address| (address, book.life(address)));
        Ok(lives.filter(|(_, life)| life.state != DeviceState::Free).collect())
    }

    /// Puts a device into quarantine on an operator's word: no guest gets it. The host's driver, if it has one, keeps it.
    ///
    /// # Errors
    /// `device-state` when it isn't free, `ledger-*`.
    pub fn quarantine(&self, address: PciAddress, ids: (u16, u16), why: &str) -> Result<(), Refusal> {
        self.change(|book| {
            let state = book.life(address).state;
            state.after(Move::Quarantine).ok_or_else(|| out_of_turn(address, state, Move::Quarantine))?;
            let (vendor, device) = ids;
            book.quarantined.push(Quarantined {
                address,
                vendor,
                device,
                guest: String::new(),
                why: why.to_owned(),
            });
            Ok(())
        })
    }

    /// Takes an operator's word that a device is sound: its quarantine ends, and the tenant who had it last is forgotten.
    /// Tells what was known of it.
    ///
    /// # Errors
    /// `device-state` when it is neither in quarantine nor free with a last tenant, `ledger-*`.
    pub fn pardon(&self, address: PciAddress) -> Result<Life, Refusal> {
        self.change(|book| {
            let life = book.life(address);
            let is_known = life.state == DeviceState::Free && life.last_tenant.is_some();
            if !is_known && life.state.after(Move::Pardon).is_none() {
                return Err(out_of_turn(address, life.state, Move::Pardon));
            }
            book.quarantined.retain(|device| device.address != address);
            book.tenants.retain(|last| last.address != address);
            Ok(life)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixture::{Fixture, at},
        ledger::tests::{entry, record},
    };
    use proptest::prelude::*;

    const ALL: [Move; 11] = [
        Move::Claim,
        Move::Undo,
        Move::Attach,
        Move::TakeBack,
        Move::Scrub,
        Move::Prove,
        Move::Condemn,
        Move::GiveBack,
        Move::Restart,
        Move::Quarantine,
        Move::Pardon,
    ];
    const ADDRESS: &str = "0000:01:00.0";

    proptest! {
        /// However a device is pushed about: once a guest may have reached it, it comes to the host, or to another guest,
        /// by a proof, an operator's word or a restart, and by nothing else.
        #[test]
        fn nothing_unproven_is_given_away(tries in prop::collection::vec(0usize..ALL.len(), 0..200)) {
            let mut state = DeviceState::Free;
            let mut touched = false;
            for made in tries.into_iter().map(|index| ALL[index]) {
                let Some(next) = state.after(made) else { continue };
                touched |= next == DeviceState::Attached;
                if matches!(made, Move::Prove | Move::Pardon | Move::Restart) {
                    touched = false;
                }
                prop_assert!(!touched || !matches!(next, DeviceState::Free | DeviceState::Claimed), "{state} {made:?}");
                state = next;
            }
        }
    }

    #[test]
    fn a_move_leads_to_one_state_and_every_state_has_a_way_home() {
        for (index, (from, made, _)) in MOVES.iter().enumerate() {
            let same = MOVES.iter().position(|(other, by, _)| (other, by) == (from, made));
            assert_eq!(same, Some(index), "{from} {made:?} twice");
        }
        let mut home = vec![DeviceState::Free];
        for _ in MOVES {
            home.extend(
                MOVES
                    .iter()
                    .filter(|(_, _, to)| home.contains(to))
                    .map(|(from, _, _)| *from)
                    .collect::<Vec<_>>(),
            );
            home.dedup();
        }
        assert!(MOVES.iter().all(|(from, _, to)| home.contains(from) && home.contains(to)));
    }

    #[test]
    fn an_operators_word_moves_what_is_free_or_in_quarantine() {
        let machine = Fixture::typical();
        let ledger = machine.ledger();
        let life = || ledger.lives([at(ADDRESS)]).unwrap().remove(0);
        assert_eq!(life().state, DeviceState::Free);
        assert_eq!(ledger.pardon(at(ADDRESS)).unwrap_err().code, "device-state");

        ledger.quarantine(at(ADDRESS), (1, 2), "it smells of smoke").unwrap();
        assert_eq!(
            (life().state, life().why.as_deref()),
            (DeviceState::Quarantined, Some("it smells of smoke"))
        );
        assert_eq!(ledger.quarantine(at(ADDRESS), (1, 2), "again").unwrap_err().code, "device-state");
        assert_eq!(ledger.pardon(at(ADDRESS)).unwrap().why.as_deref(), Some("it smells of smoke"));
        assert_eq!(life().state, DeviceState::Free);

        let entry = entry("web", vec![record(ADDRESS, 8)]);
        ledger.update(|book| book.entries.push(entry.clone())).unwrap();
        assert_eq!(life().guest.as_deref(), Some("web"));
        assert_eq!(ledger.quarantine(at(ADDRESS), (1, 2), "").unwrap_err().code, "device-state");
        assert_eq!(ledger.pardon(at(ADDRESS)).unwrap_err().code, "device-state");
        let prove = |book: &mut Book| book.advance(&entry.owner, at(ADDRESS), Move::Prove);
        assert_eq!(ledger.change(prove).unwrap_err().code, "device-state", "not before it is taken back");
        ledger.change(|book| book.advance(&entry.owner, at(ADDRESS), Move::TakeBack)).unwrap();
        ledger.change(prove).unwrap();
        assert_eq!(life().state, DeviceState::Verified);
    }
}
