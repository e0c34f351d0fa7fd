//! Where the machine's files are, and bounded ways to read them.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_spec::PciAddress;

/// The most that is read of one sysfs attribute.
const ATTRIBUTE_BYTES_MAX: u64 = 64 << 10;
/// Nearly all of them have a page at most, and are read by one call with room for that.
const SYSFS_BYTES: usize = 4096;
/// The most that is read of one table under /proc (a host with thousands of containers has long mount tables).
const TABLE_BYTES_MAX: u64 = 4 << 20;
/// The most entries that are read of one directory.
const ENTRIES_MAX: usize = 65_536;

/// How long each step may take before it is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// For a driver to let go of a function.
    pub unbind: Duration,
    /// For a driver to take a function.
    pub bind: Duration,
    /// For an IOMMU group to be free after the process that held it has ended.
    pub group_free: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let each = Duration::from_secs(10);
        Self { unbind: each, bind: each, group_free: each }
    }
}

/// A machine, seen through its sysfs and procfs. Holds no open file.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    live: bool,
    /// The bounds that its claims keep.
    pub(crate) deadlines: Deadlines,
}

impl Host {
    /// The machine this program runs on.
    pub fn live() -> Self {
        Self { root: "/".into(), live: true, deadlines: Deadlines::default() }
    }

    /// A machine kept as files: `{root}/sys`, `{root}/proc`. Its device nodes are never opened.
    pub fn with_root(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), live: false, deadlines: Deadlines::default() }
    }

    /// The same machine with other bounds.
    #[must_use]
    pub fn with_deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// Whether device nodes can be opened.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// `path` (relative, as in `sys/class/net`) on this machine.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The sysfs directory of a function.
    pub(crate) fn pci(&self, address: PciAddress) -> PathBuf {
        self.path(format!("sys/bus/pci/devices/{address}"))
    }

    /// A table under /proc; `path` is relative to the root.
    pub(crate) fn table(&self, path: &str) -> io::Result<String> {
        read_text(&self.path(path), TABLE_BYTES_MAX)
    }
}

/// The bytes of the file at `path`; an error when there are more than `bytes_max`.
pub(crate) fn read_bytes(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(SYSFS_BYTES);
    File::open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > bytes_max {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// The text of the file at `path`; what is not UTF-8 (a mount point may be anything) is replaced.
pub(crate) fn read_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&read_bytes(path, bytes_max)?).into_owned())
}

/// A sysfs attribute, trimmed. `None` when it is absent or cannot be read.
pub(crate) fn attribute(path: impl AsRef<Path>) -> Option<String> {
    let text = read_text(path.as_ref(), ATTRIBUTE_BYTES_MAX).ok()?;
    Some(text.trim_matches(['\0', '\n', ' ', '\t']).to_owned())
}

/// A sysfs attribute that is a number in hexadecimal, with or without `0x`.
pub(crate) fn hex_attribute(path: impl AsRef<Path>) -> Option<u64> {
    let text = attribute(path)?;
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok()
}

/// The last part of what the link at `path` points to: the name of a driver, a group.
pub(crate) fn link_name(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

/// The names in a directory, sorted; empty when there is no such directory.
pub(crate) fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.take(ENTRIES_MAX).filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The PCI function that the sysfs object at `path` hangs from: the last address in its real path. A disk on a USB
/// controller hangs from the controller.
pub(crate) fn pci_parent(path: &Path) -> Option<PciAddress> {
    let real = fs::canonicalize(path).ok()?;
    real.components().rev().find_map(|part| {
        let part = part.as_os_str().to_str()?;
        let address: PciAddress = part.parse().ok()?;
        // Only the full form: `03:00.0` would be the name of something else.
        (address.to_string() == part).then_some(address)
    })
}
