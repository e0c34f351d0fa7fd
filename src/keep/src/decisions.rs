//! The log of decisions: what every policy was asked, and what it answered.
//!
//! A file is put aside before a line would take it past 16 MiB, and the oldest of eight is removed: the log takes at most 144 MiB. A
//! line is at most 1 MiB. Folder and files are root's alone, since command lines may hold secrets.
//!
//! A decision is on the disk (fdatasync) before the guest starts, and one that can't be kept refuses the guest.

use std::{fmt::Display, path::Path};

use casemate_broker::{Journal, Log, hands};
use casemate_policy::{Outcome, Record};
use casemate_spec::Refusal;

/// The log in a folder. Holds nothing open.
#[derive(Clone, Debug)]
pub struct Decisions(Journal);

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Records, oldest first.
    pub records: Vec<Record>,
    /// Lines that are none.
    pub unreadable_lines: u64,
}

impl Decisions {
    /// The log below a folder for state.
    pub fn below(state: &Path) -> Self {
        Self(Log::Decisions.below(state))
    }

    /// Adds a record. When this returns, it's on the disk.
    ///
    /// # Errors
    /// `decisions-unusable`.
    pub fn append(&self, record: &Record) -> Result<(), Refusal> {
        let line = self.line(record).map_err(|error| self.unusable(&error))?;
        hands::append(&self.0, &line).map_err(|error| self.unusable(&error))
    }

    fn line(&self, record: &Record) -> Result<Vec<u8>, String> {
        let line = |record: &Record| {
            let mut line = serde_json::to_vec(record).map_err(|error| error.to_string())?;
            line.push(b'\n');
            Ok::<_, String>(line)
        };
        let fits = |line: &[u8]| line.len() as u64 <= self.0.bounds.line_bytes;
        let full = line(record)?;
        if fits(&full) {
            return Ok(full);
        }
        // What plugins wrote to their logs decides nothing: it goes first.
        let mut lean = record.clone();
        if let Outcome::Decided(decision) = &mut lean.outcome {
            for run in &mut decision.plugins {
                let bytes: usize = run.log.drain(..).map(|line| line.message.len()).sum();
                run.log_dropped_bytes = run.log_dropped_bytes.saturating_add(bytes);
            }
        }
        let lean = line(&lean)?;
        if fits(&lean) {
            return Ok(lean);
        }
        Err(format!("a record of {} bytes is too long", lean.len()))
    }

    /// What was decided since then, oldest first.
    ///
    /// # Errors
    /// `decisions-unusable`; a log that was never written to is empty.
    pub fn since(&self, seconds: u64) -> Result<Reading, Refusal> {
        let mut reading = Reading::default();
        self.each(&mut |line| match serde_json::from_slice::<Record>(line) {
            Ok(record) if record.time_seconds >= seconds => reading.records.push(record),
            Ok(_) => {}
            Err(_) => reading.unreadable_lines += 1,
        })?;
        Ok(reading)
    }

    /// The decision whose name begins so, or the last one for `last`.
    ///
    /// # Errors
    /// `decisions-unusable`; `decision-unknown` when there is none, or more than one.
    pub fn find(&self, id: &str) -> Result<Record, Refusal> {
        let mut found: Vec<Record> = Vec::new();
        self.each(&mut |line| {
            let Ok(record) = serde_json::from_slice::<Record>(line) else { return };
            if id == "last" {
                found.clear();
            }
            if id == "last" || record.id.starts_with(id) {
                found.push(record);
            }
        })?;
        let unknown = |cause: String| {
            Refusal::new("decision-unknown", id, cause, "name one as `casemate policy decisions` lists it")
        };
        match found.len() {
            1 => found.pop().ok_or_else(|| unknown("there is none".into())),
            0 => Err(unknown("the log has no such decision; old ones are removed".into())),
            many => Err(unknown(format!("{many} decisions begin so"))),
        }
    }

    fn each(&self, take: &mut dyn FnMut(&[u8])) -> Result<(), Refusal> {
        self.0.each(take).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, error: &dyn Display) -> Refusal {
        let remedy = "see to rights and space there: no guest starts whose admission can't be kept";
        Refusal::new("decisions-unusable", self.0.folder.display(), error, remedy)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]

    use std::{fs, io::Write};

    use super::*;
    use casemate_broker::Bounds;
    use casemate_policy::Request;

    const BOUNDS: Bounds = Bounds { file_bytes: 16 << 20, older_files: 8, line_bytes: 1 << 20 };

    fn record(id: &str, time_seconds: u64) -> Record {
        let request: Request =
            serde_json::from_str(include_str!("../../policy/examples/request.json")).unwrap();
        Record {
            id: id.into(),
            time_seconds,
            uid: 0,
            bundle: "/etc/casemate/policies/default.toml".into(),
            bundle_sha256: None,
            override_why: None,
            request,
            outcome: Outcome::Failed { code: "policy-trap".into(), message: "it stopped".into() },
        }
    }

    fn log(folder: &Path, bounds: Bounds) -> Decisions {
        Decisions(Journal { folder: folder.join("decisions"), bounds, ..Decisions::below(folder).0 })
    }

    #[test]
    fn what_was_written_is_read_in_order_and_found_by_its_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let log = log(folder.path(), BOUNDS);
        assert_eq!(log.since(0).unwrap(), Reading::default());
        for (id, time) in [("0a-1", 10), ("0b-2", 20), ("0b-3", 30)] {
            log.append(&record(id, time)).unwrap();
        }
        let ids: Vec<_> = log.since(20).unwrap().records.into_iter().map(|record| record.id).collect();
        assert_eq!(ids, ["0b-2", "0b-3"]);
        assert_eq!(log.find("0a").unwrap(), record("0a-1", 10));
        assert_eq!(log.find("last").unwrap().id, "0b-3");
        assert_eq!(log.find("0b").unwrap_err().code, "decision-unknown");
        assert_eq!(log.find("0c").unwrap_err().code, "decision-unknown");
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let line = serde_json::to_vec(&record("00000", 0)).unwrap().len() as u64 + 1;
        let log = log(folder.path(), Bounds { file_bytes: 3 * line, older_files: 2, line_bytes: line });
        for number in 0..20 {
            log.append(&record(&format!("{number:05}"), 0)).unwrap();
        }
        let ids: Vec<_> = log.since(0).unwrap().records.into_iter().map(|record| record.id).collect();
        let newest: Vec<_> = (12..20).map(|number| format!("{number:05}")).collect();
        assert_eq!(ids, newest, "two in the file that is written to, three in each of two older ones");
        let files = fs::read_dir(folder.path().join("decisions")).unwrap();
        let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 9 * line);
    }

    #[test]
    fn half_a_line_of_a_crash_costs_nothing_but_itself() {
        let folder = tempfile::tempdir().unwrap();
        let log = log(folder.path(), BOUNDS);
        log.append(&record("a", 1)).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(log.0.file(0)).unwrap();
        file.write_all(b"{\"id\": \"b\", ").unwrap();
        log.append(&record("c", 3)).unwrap();
        let reading = log.since(0).unwrap();
        assert_eq!(reading.unreadable_lines, 1);
        assert_eq!(reading.records.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["a", "c"]);
        file.write_all(&vec![b'x'; 3 << 20]).unwrap();
        file.write_all(b"\n").unwrap();
        let reading = log.since(0).unwrap();
        assert_eq!((reading.records.len(), reading.unreadable_lines), (2, 2));
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let small = log(folder.path(), Bounds { line_bytes: 100, ..BOUNDS });
        assert_eq!(small.append(&record("a", 0)).unwrap_err().code, "decisions-unusable");
        fs::write(folder.path().join("file"), "").unwrap();
        let nowhere = Decisions::below(&folder.path().join("file"));
        assert_eq!(nowhere.append(&record("a", 0)).unwrap_err().code, "decisions-unusable");
    }

    #[test]
    fn writers_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let log = log(folder.path(), BOUNDS);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let log = &log;
                scope.spawn(move || {
                    for number in 0..10 {
                        log.append(&record(&format!("{writer}-{number}"), 0)).unwrap();
                    }
                });
            }
        });
        let reading = log.since(0).unwrap();
        assert_eq!((reading.records.len(), reading.unreadable_lines), (40, 0));
    }
}
