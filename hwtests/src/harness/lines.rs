//! Files on a lab's share of a JSON value a line, by which its inside and outside talk.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Adds a line to such a file.
pub(crate) fn add(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    OpenOptions::new().create(true).append(true).open(path)?.write_all(line.as_bytes())
}

/// Such a file, read as it grows.
pub(crate) struct Growing {
    path: PathBuf,
    /// How much of it was taken in; always at a line's start.
    taken: u64,
}

impl Growing {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, taken: 0 }
    }

    /// What was added since the last time.
    pub(crate) fn new_ones<T: DeserializeOwned>(&mut self) -> Vec<T> {
        let mut text = String::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.taken))?;
            file.read_to_string(&mut text)
        });
        // A line that is not complete yet is taken next time.
        let (Ok(_), Some(end)) = (read, text.rfind('\n')) else { return Vec::new() };
        text.truncate(end + 1);
        self.taken += text.len() as u64;
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::protocol::Event;
    use std::fs;

    #[test]
    fn lines_are_taken_once_and_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let mut events = Growing::new(path.clone());
        assert_eq!(events.new_ones::<Event>(), vec![]);
        let started = serde_json::to_string(&Event::Started { name: "a".into() }).unwrap();
        let (front, back) = started.split_at(5);
        let mut file = fs::File::create(&path).unwrap();
        write!(file, "\"Ready\"\n{front}").unwrap();
        assert_eq!(events.new_ones::<Event>(), vec![Event::Ready]);
        assert_eq!(events.new_ones::<Event>(), vec![]);
        writeln!(file, "{back}").unwrap();
        assert_eq!(events.new_ones::<Event>(), vec![Event::Started { name: "a".into() }]);
        add(&path, &Event::Ready).unwrap();
        assert_eq!(events.new_ones::<Event>(), vec![Event::Ready]);
    }
}
