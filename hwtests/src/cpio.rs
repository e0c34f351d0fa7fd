//! The archive format of an initramfs: "newc" cpio, as Linux's `Documentation/driver-api/early-userspace/buffer-format`
//! describes it. Archives may follow one another in one file; a later one overwrites files of an earlier one.

/// An archive that is being written. Parents must be added before what they hold.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory with mode 0755. Paths are relative: `lib/modules`.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    /// Adds a regular file with the given permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, contents: &[u8]) -> &mut Self {
        self.entry(path, REGULAR | (permissions & 0o7777), contents)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.entry(path, SYMLINK | 0o777, target.as_bytes())
    }

    /// Closes the archive. Its length is a multiple of 4, so another may follow directly.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) -> &mut Self {
        self.entries += 1;
        // Header fields: ino, mode, uid, gid, nlink, mtime, filesize, maj, min, rmaj, rmin, namesize, check.
        let length = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let name_length = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.entries, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{io::Write, process::Command, process::Stdio};

    /// Reads an archive back by the format's own rules.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + n * 8..at + 14 + n * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            at = (data + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(at, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[data..data + size].to_vec()));
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(files in proptest::collection::vec(("[a-z]{1,20}", proptest::collection::vec(any::<u8>(), 0..50)), 0..8)) {
            let mut archive = Archive::new();
            for (name, contents) in &files {
                archive.file(name, 0o644, contents);
            }
            let expected: Vec<_> = files.into_iter().map(|(name, contents)| (name, 0o100_644, contents)).collect();
            prop_assert_eq!(read(&archive.finish()), expected);
        }
    }

    #[test]
    fn another_reader_understands_it() {
        let mut archive = Archive::new();
        archive.directory("a").file("a/b", 0o755, b"hello").link("a/c", "b");
        let bytes = archive.finish();
        let Ok(mut child) = Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        else {
            eprintln!("busybox is not here: `cargo xtask lab prepare` installs it");
            return;
        };
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = child.wait_with_output().unwrap().stdout;
        assert_eq!(String::from_utf8(listing).unwrap(), "a\na/b\na/c\n");
    }
}
