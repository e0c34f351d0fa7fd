//! A log on disk: a folder of files of JSON lines.
//!
//! `NAME.jsonl` is written to, `NAME.1.jsonl` and so on are older ones. A file is put aside before a line would take it past its
//! bound, and the oldest is removed. Folder and files are root's alone. Writers hold a lock (flock) for the moment. A crash can leave
//! half a line at the end: the next writer begins a new one, and readers count what they can't read.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one file.
    pub file_bytes: u64,
    /// Files beside the one that is written to.
    pub older_files: u32,
    /// Of one line.
    pub line_bytes: u64,
}

/// The logs that keeps write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Log {
    /// What every policy was asked, and what it answered. A line is on the disk when it was written.
    Decisions,
    /// What happened to guests while they ran.
    Events,
}

impl Log {
    /// The log below a folder for state.
    pub fn below(self, state: &Path) -> Journal {
        match self {
            Self::Decisions => Journal {
                folder: state.join("decisions"),
                name: "decisions",
                bounds: Bounds { file_bytes: 16 << 20, older_files: 8, line_bytes: 1 << 20 },
                log: self,
            },
            Self::Events => Journal {
                folder: state.join("events"),
                name: "events",
                bounds: Bounds { file_bytes: 4 << 20, older_files: 4, line_bytes: 64 << 10 },
                log: self,
            },
        }
    }
}

/// The log in a folder. Holds nothing open.
#[derive(Clone, Debug)]
pub struct Journal {
    /// Where it is.
    pub folder: PathBuf,
    /// How its files are called.
    pub name: &'static str,
    /// How much is kept.
    pub bounds: Bounds,
    /// Which it is.
    pub log: Log,
}

impl Journal {
    /// Adds a line, which ends with its newline and has no other.
    pub(crate) fn write(&self, line: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let open =
            |path: &Path| OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path);
        let lock = open(&self.folder.join("lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        let path = self.file(0);
        let mut file = open(&path)?;
        let size = file.metadata()?.len();
        if size > 0 && size.saturating_add(line.len() as u64) > self.bounds.file_bytes {
            drop(file);
            self.rotate()?;
            file = open(&path)?;
        } else if size > 0 && !ends_a_line(&mut file)? {
            file.write_all(b"\n")?;
        }
        file.write_all(line)?;
        if self.log != Log::Decisions {
            return Ok(());
        }
        file.sync_data()?;
        // A file that is new may be lost with its folder's entry.
        if size == 0 || file.metadata()?.len() == line.len() as u64 {
            File::open(&self.folder)?.sync_all()?;
        }
        Ok(())
    }

    fn rotate(&self) -> io::Result<()> {
        for number in (0..self.bounds.older_files).rev() {
            match fs::rename(self.file(number), self.file(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The file that is written to (0), or an older one.
    pub fn file(&self, number: u32) -> PathBuf {
        match number {
            0 => self.folder.join(format!("{}.jsonl", self.name)),
            _ => self.folder.join(format!("{}.{number}.jsonl", self.name)),
        }
    }

    /// Each line, oldest first. A log that was never written to has none.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn each(&self, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let lock = match File::open(self.folder.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            lock => lock?,
        };
        flock(&lock, FlockOperation::LockShared)?;
        for number in (0..=self.bounds.older_files).rev() {
            match File::open(self.file(number)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(file) => lines(file, self.bounds.line_bytes, take)?,
            }
        }
        Ok(())
    }
}

fn ends_a_line(file: &mut File) -> io::Result<bool> {
    let mut last = [0u8; 1];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Each line of a file that has one, without its end; a longer one than `most` comes as nothing.
fn lines(file: File, most: u64, take: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(most + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() as u64 > most && line.last() != Some(&b'\n') {
            reader.skip_until(b'\n')?;
            line.clear();
        }
        take(line.strip_suffix(b"\n").unwrap_or(&line));
    }
}
