//! What keeps tell each other of their guests: `NAME.sample` in the folder of sockets and locks, replaced as a whole at each look.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use casemate_host::{Host, Owner, Process};
use casemate_policy::GuestSample;
use serde::{Deserialize, Serialize};

/// A sample has some hundred bytes.
const BYTES_MAX: u64 = 64 << 10;
/// Guests on a host that are told of at most.
const GUESTS_MAX: usize = 4096;
/// One that was not replaced for so long tells nothing any more.
const STALE: Duration = Duration::from_secs(120);

#[derive(Serialize, Deserialize)]
struct Told {
    sample: GuestSample,
    /// Who tells.
    keep: Process,
}

/// This guest's file, and those of others. The file is gone when this is dropped.
pub(super) struct Shared {
    runtime: PathBuf,
    path: PathBuf,
    keep: Option<Process>,
}

impl Shared {
    pub(super) fn new(runtime: &Path, guest: &str) -> Self {
        let keep = Owner::this_process(guest).ok().map(|owner| owner.keep);
        Self { runtime: runtime.to_owned(), path: runtime.join(format!("{guest}.sample")), keep }
    }

    /// Tells the others. One that can't be told is not seen by them for a while.
    pub(super) fn tell(&self, sample: &GuestSample) {
        let Some(keep) = self.keep.clone() else { return };
        let new = self.path.with_extension("sample-new");
        let told = Told { sample: GuestSample { governed: false, ..sample.clone() }, keep };
        if let Ok(text) = serde_json::to_vec(&told) {
            let _ = fs::write(&new, text).and_then(|()| fs::rename(&new, &self.path));
        }
    }

    /// What the others tell.
    pub(super) fn others(&self) -> Vec<GuestSample> {
        let Ok(entries) = fs::read_dir(&self.runtime) else { return Vec::new() };
        let host = Host::live();
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.extension().is_some_and(|extension| extension == "sample") && *path != self.path
            })
            .take(GUESTS_MAX)
            .filter_map(|path| {
                let told = read(&path)?;
                let named = path.file_stem().is_some_and(|stem| stem == told.sample.name.as_str());
                (named && told.keep.is_alive(&host)).then_some(told.sample)
            })
            .collect()
    }
}

fn read(path: &Path) -> Option<Told> {
    let file = File::open(path).ok()?;
    let changed = file.metadata().ok()?.modified().ok()?;
    if SystemTime::now().duration_since(changed).is_ok_and(|age| age > STALE) {
        return None;
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
