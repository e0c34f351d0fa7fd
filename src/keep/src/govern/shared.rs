//! What keeps tell each other of their guests: `NAME.sample` in the folder of sockets and locks, replaced as a whole at each look.

use std::path::{Path, PathBuf};

use casemate_broker::{Kept, hands};
use casemate_host::{Host, Owner, Process};
use casemate_policy::GuestSample;
use casemate_spec::Name;
use serde::{Deserialize, Serialize};

/// Guests on a host that are told of at most.
const GUESTS_MAX: usize = 4096;
/// One that was not replaced for so long tells nothing any more.
const STALE_MS: u64 = 120_000;

#[derive(Serialize, Deserialize)]
struct Told {
    sample: GuestSample,
    /// Who tells.
    keep: Process,
}

/// What this guest's keep tells, and what others tell. It is told no longer when this is dropped.
pub(super) struct Shared {
    runtime: PathBuf,
    guest: Option<Name>,
    keep: Option<Process>,
}

impl Shared {
    pub(super) fn new(runtime: &Path, guest: &str) -> Self {
        let keep = Owner::this_process(guest).ok().map(|owner| owner.keep);
        Self { runtime: runtime.to_owned(), guest: Name::new(guest), keep }
    }

    /// Tells the others. One that can't be told is not seen by them for a while.
    pub(super) fn tell(&self, sample: &GuestSample) {
        let (Some(keep), Some(guest)) = (self.keep.clone(), &self.guest) else { return };
        let told = Told { sample: GuestSample { governed: false, ..sample.clone() }, keep };
        if let Ok(text) = serde_json::to_string(&told) {
            let _ = hands::put(&self.runtime, guest, Kept::Sample, &text);
        }
    }

    /// What the others tell.
    pub(super) fn others(&self) -> Vec<GuestSample> {
        let host = Host::live();
        let own = self.guest.as_ref().map_or("", Name::as_str);
        hands::read_all(&self.runtime, Kept::Sample)
            .into_iter()
            .filter(|seen| seen.guest != own && seen.age_ms <= STALE_MS)
            .take(GUESTS_MAX)
            .filter_map(|seen| {
                let told: Told = serde_json::from_str(&seen.text).ok()?;
                (seen.guest == told.sample.name && told.keep.is_alive(&host)).then_some(told.sample)
            })
            .collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(guest) = &self.guest {
            hands::remove(&self.runtime, guest, Kept::Sample);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn sample(name: &str) -> GuestSample {
        GuestSample { name: name.into(), governed: true, ..GuestSample::default() }
    }

    #[test]
    fn guests_are_told_of_while_their_keeps_live() {
        let folder = tempfile::tempdir().unwrap();
        let (web, db) = (Shared::new(folder.path(), "web"), Shared::new(folder.path(), "db"));
        assert!(web.others().is_empty());
        web.tell(&sample("web"));
        db.tell(&sample("db"));
        let seen = web.others();
        assert_eq!(seen, [GuestSample { governed: false, ..sample("db") }], "one's own is not among them");
        fs::write(folder.path().join("liar.sample"), fs::read(folder.path().join("db.sample")).unwrap())
            .unwrap();
        fs::write(folder.path().join("broken.sample"), "{").unwrap();
        assert_eq!(web.others().len(), 1);
        drop(db);
        assert!(web.others().is_empty());
    }
}
