//! Files that a keep has: what it tells others of its guest, and the images that the guest gets.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use casemate_host::{Image, open_image, open_initrd, open_kernel, open_qcow2, open_rom};
use casemate_spec::{Name, Refusal};

use crate::{Kept, Node, Seen, What};

/// A record has some KB, the others some hundred bytes.
pub(crate) const KEPT_BYTES: u64 = 256 << 10;
/// Guests on a host, and some that died badly.
const FILES_MAX: usize = 8192;

fn path_of(runtime: &Path, guest: &Name, kind: Kept) -> PathBuf {
    runtime.join(format!("{guest}.{}", kind.extension()))
}

/// Puts what is told of a guest in its place. Whoever reads it sees the one or the other, never half of one.
pub(crate) fn put(runtime: &Path, guest: &Name, kind: Kept, text: &str) -> io::Result<()> {
    if text.len() as u64 > KEPT_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let path = path_of(runtime, guest, kind);
    let beside = path.with_extension(format!("{}-new", kind.extension()));
    let _ = fs::remove_file(&beside);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&beside, path)
}

pub(crate) fn remove(runtime: &Path, guest: &Name, kind: Kept) {
    let _ = fs::remove_file(path_of(runtime, guest, kind));
}

/// What is told of all guests. What can't be read is passed over.
pub(crate) fn read_all(runtime: &Path, kind: Kept) -> Vec<Seen> {
    let Ok(entries) = fs::read_dir(runtime) else { return Vec::new() };
    let of_kind = |path: &PathBuf| path.extension().is_some_and(|extension| extension == kind.extension());
    let files = entries.flatten().map(|entry| entry.path()).filter(of_kind).take(FILES_MAX);
    files.filter_map(|path| see(&path)).collect()
}

fn see(path: &Path) -> Option<Seen> {
    let file = File::open(path).ok()?;
    let changed = file.metadata().ok()?.modified().ok()?;
    let age = SystemTime::now().duration_since(changed).unwrap_or_default();
    let mut text = String::new();
    file.take(KEPT_BYTES).read_to_string(&mut text).ok()?;
    let guest = path.file_stem()?.to_str()?.to_owned();
    Some(Seen { guest, text, age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX) })
}

/// Opens a file that a guest is to have.
pub(crate) fn open(what: What, path: &Path) -> Result<Image, Refusal> {
    match what {
        What::Kernel => open_kernel(path),
        What::Initrd => open_initrd(path),
        What::Rom => open_rom(path),
        What::Raw { read_only } => open_image(path, read_only),
        What::Qcow2 { read_only } => open_qcow2(path, read_only),
    }
}

/// Opens a device node.
pub(crate) fn open_node(node: Node) -> Result<File, Refusal> {
    let (path, code, remedy) = match node {
        Node::Kvm => (
            "/dev/kvm",
            "kvm-missing",
            "load kvm_amd or kvm_intel, or turn virtualisation on in the firmware; see `casemate doctor`",
        ),
        Node::VhostNet => ("/dev/vhost-net", "vhost-missing", "modprobe vhost_net, or take vhost = true out"),
    };
    let opened = File::options().read(true).write(true).open(path);
    opened.map_err(|error| Refusal::new(code, path, format_args!("it cannot be opened: {error}"), remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_there_whole_under_its_name_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let (web, db) = (Name::new("web").unwrap(), Name::new("db").unwrap());
        put(folder.path(), &web, Kept::Account, "one").unwrap();
        put(folder.path(), &web, Kept::Account, "two").unwrap();
        put(folder.path(), &db, Kept::Account, "three").unwrap();
        put(folder.path(), &db, Kept::Sample, "four").unwrap();
        let mut seen: Vec<_> = read_all(folder.path(), Kept::Account)
            .into_iter()
            .map(|seen| (seen.guest, seen.text, seen.age_ms < 60_000))
            .collect();
        seen.sort();
        assert_eq!(seen, [("db".into(), "three".into(), true), ("web".into(), "two".into(), true)]);
        remove(folder.path(), &db, Kept::Account);
        assert_eq!(read_all(folder.path(), Kept::Account).len(), 1);
        let long = "x".repeat(KEPT_BYTES as usize + 1);
        assert!(put(folder.path(), &web, Kept::Record, &long).is_err());
        assert!(read_all(Path::new("/nowhere"), Kept::Record).is_empty());
    }
}
