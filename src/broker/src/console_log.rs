//! A guest's console in a file that is bounded: when it is full it becomes `FILE.1`, what was that `FILE.2`, and so on; what
//! would be one too many is removed.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use casemate_spec::Refusal;

/// Where a guest's console is kept, and how much of it.
#[derive(Clone, Copy, Debug)]
pub struct ConsoleLog<'a> {
    /// The newest file. What is in it already stays, and counts.
    pub path: &'a Path,
    /// Most bytes of one file; at least 4 KiB.
    pub file_bytes: u64,
    /// Most files, the newest one among them; at least 1.
    pub files: u32,
}

/// Least bytes of one file: a write of the console's fits.
const FILE_BYTES_LEAST: u64 = 4096;

/// The files, as something that is written to.
#[derive(Debug)]
pub(crate) struct Rotating {
    path: PathBuf,
    file_bytes: u64,
    files: u32,
    /// `None` after it failed: the guest runs on without.
    file: Option<File>,
    written: u64,
}

impl Rotating {
    /// Opens the newest file, or makes it, readable for this user alone.
    ///
    /// # Errors
    /// `console-log` when it can't be had, or is no regular file.
    pub(crate) fn open(log: ConsoleLog<'_>) -> Result<Self, Refusal> {
        let refuse = |cause: &dyn std::fmt::Display| {
            let remedy = "name a file in a folder that this user may write to";
            Refusal::new("console-log", log.path.display(), cause, remedy)
        };
        let file = open(log.path).map_err(|error| refuse(&error))?;
        let metadata = file.metadata().map_err(|error| refuse(&error))?;
        if !metadata.is_file() {
            return Err(refuse(&"it is not a regular file"));
        }
        Ok(Self {
            path: log.path.to_owned(),
            file_bytes: log.file_bytes.max(FILE_BYTES_LEAST),
            files: log.files.max(1),
            file: Some(file),
            written: metadata.len(),
        })
    }

    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.written >= self.file_bytes {
                self.rotate()?;
            }
            let Some(file) = &mut self.file else { return Ok(()) };
            let room = usize::try_from(self.file_bytes - self.written).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            file.write_all(now)?;
            self.written += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.files).rev() {
            // One that isn't there yet.
            match fs::rename(self.numbered(number - 1), self.numbered(number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.files == 1 {
            fs::remove_file(&self.path)?;
        }
        self.file = Some(open(&self.path)?);
        self.written = 0;
        Ok(())
    }

    /// The file's name; the newest one's for 0.
    fn numbered(&self, number: u32) -> PathBuf {
        if number == 0 {
            return self.path.clone();
        }
        let mut name: OsString = self.path.clone().into();
        name.push(format!(".{number}"));
        name.into()
    }
}

/// Opens or makes a file to be written on at its end. A link in its place is not followed: the folder may be others' too.
fn open(path: &Path) -> io::Result<File> {
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
    File::options().append(true).create(true).mode(0o600).custom_flags(flags as i32).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(folder: &Path, files: u32) -> Rotating {
        let path = folder.join("console");
        Rotating::open(ConsoleLog { path: &path, file_bytes: 1, files }).unwrap()
    }

    /// The files of a folder, with their lengths.
    fn lengths(folder: &Path) -> Vec<(String, u64)> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut all: Vec<_> = entries
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn the_newest_bytes_are_kept_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = log(folder.path(), 3);
        let all: Vec<u8> = (0..50_000_u32).map(|n| (n % 251) as u8).collect();
        all.chunks(777).for_each(|part| log.put(part).unwrap());
        let names = ["console", "console.1", "console.2"];
        let lengths = lengths(folder.path());
        assert_eq!(lengths.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names);
        assert!(lengths.iter().all(|(_, length)| *length <= FILE_BYTES_LEAST), "{lengths:?}");
        let kept: Vec<u8> =
            names.iter().rev().flat_map(|name| fs::read(folder.path().join(name)).unwrap()).collect();
        assert!(all.ends_with(&kept) && kept.len() > 2 * 4096);
    }

    #[test]
    fn what_a_run_before_left_stays_and_counts() {
        let folder = tempfile::tempdir().unwrap();
        log(folder.path(), 2).put(b"before ").unwrap();
        let mut log = log(folder.path(), 2);
        log.put(b"after").unwrap();
        assert_eq!(fs::read(folder.path().join("console")).unwrap(), b"before after");
        assert_eq!(log.written, 12);
    }

    #[test]
    fn one_file_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = log(folder.path(), 1);
        log.put(&[b'a'; 5000]).unwrap();
        assert_eq!(lengths(folder.path()), [("console".to_owned(), 5000 - 4096)]);
    }

    #[test]
    fn what_is_no_file_or_leads_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (link, target) = (folder.path().join("link"), folder.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for path in [&link, folder.path(), Path::new("/dev/null"), Path::new("/nowhere/at/all")] {
            let refused = Rotating::open(ConsoleLog { path, file_bytes: 1 << 20, files: 2 });
            assert_eq!(refused.unwrap_err().code, "console-log", "{}", path.display());
        }
        assert!(!target.exists());
    }
}
