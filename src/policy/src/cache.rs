//! The cache of compiled plugins.
//!
//! What lies in it is machine code that `casemate-policy-engine` will run, so nothing is taken from it that Casemate did not put
//! there: the folder belongs to this user alone (0700), a key made here and kept here (0600) authenticates each entry
//! together with the name under which it lies, and an entry that fails is an error, never a miss. Everything is opened
//! relative to the folder's descriptor and without following links, so that the folder that was checked is the one used.
//!
//! An entry is the code, its tag, and a last line that says what it is: the code comes first, so that the file can be mapped.
//! What is mapped can still change when the file does. So an entry's own file is given away only when, before it was read, the
//! kernel granted a read lease on it: then no process had it open for writing, and who opens it later is this user.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use hmac::{Hmac, KeyInit, Mac};
use rustix::{
    fs::{
        AtFlags, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fstat, linkat, memfd_create, mkdir,
        open, openat, renameat, unlinkat,
    },
    io::Errno,
    process::geteuid,
    rand::{GetRandomFlags, getrandom},
};
use sha2::Sha256;

use crate::{Fault, PolicyError, limits::HOST_LIMITS, text::hex};

type Hmac256 = Hmac<Sha256>;

const MAGIC: &[u8] = b"casemate compiled plugin 2\n";
const KEY_NAME: &str = "key";
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 32;
/// What is behind the code.
const TRAILER_BYTES: usize = TAG_BYTES + MAGIC.len();

/// What an entry is compiled from and for.
pub(crate) struct EntryKey<'a> {
    /// The component's SHA-256, in hexadecimal.
    pub(crate) digest: &'a str,
    /// Engine version, its settings, and what the processor can do.
    pub(crate) engine: &'a str,
}

/// An open cache.
pub(crate) struct Cache {
    path: PathBuf,
    folder: OwnedFd,
    key: Hmac256,
}

impl Cache {
    /// Opens the cache at `path`, which is made when it isn't there.
    pub(crate) fn open(path: &Path) -> Result<Self, PolicyError> {
        let fault = |cause: String| PolicyError::new(Fault::Cache, path.display(), cause);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)
                .map_err(|error| fault(format!("its parent can't be made: {error}")))?;
        }
        match mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(fault(format!("the folder can't be made: {error}"))),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = open(path, flags, Mode::empty())
            .map_err(|error| fault(format!("it can't be opened: {error}")))?;
        let stat = fstat(&folder).map_err(|error| fault(error.to_string()))?;
        if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
            let mode = stat.st_mode & 0o7777;
            return Err(fault(format!("others may get in: its owner is {}, its mode {mode:o}", stat.st_uid)));
        }
        let key = read_or_make_key(&folder).map_err(fault)?;
        let key = Hmac256::new_from_slice(&key).map_err(|error| fault(error.to_string()))?;
        Ok(Self { path: path.to_owned(), folder, key })
    }

    /// A file that begins with the compiled code for `key`, and to which nobody can write; none when it was never compiled for this
    /// engine and this processor. It may be the cache's own, where `may_be_shared` says so; else it's a copy in memory.
    pub(crate) fn load(&self, key: &EntryKey<'_>, may_be_shared: bool) -> Result<Option<File>, PolicyError> {
        let name = self.entry_name(key);
        let fault = |fault, cause: String| PolicyError::new(fault, self.path.join(&name).display(), cause);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut file = match openat(&self.folder, name.as_str(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(fault(Fault::Tampered, "it's a link".into())),
            Err(error) => return Err(fault(Fault::Cache, format!("it can't be opened: {error}"))),
        };
        let unread = |error: io::Error| fault(Fault::Cache, format!("it can't be read: {error}"));
        let foreign = |why: &str| fault(Fault::Tampered, format!("it isn't what Casemate put there: {why}"));
        let shared = may_be_shared && has_no_writer(&file);
        let length = file.metadata().map_err(unread)?.len().checked_sub(TRAILER_BYTES as u64);
        let length = length.filter(|length| *length <= HOST_LIMITS.compiled_bytes as u64);
        let length = length.ok_or_else(|| foreign("it's cut off or has another form"))?;
        let mut kept = Vec::new();
        let mut tag = self.tag(&name, length);
        let mut chunk = [0; 16 << 10];
        let mut left = length;
        while left > 0 {
            let most = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = chunk.get_mut(..most).map_or(Ok(0), |part| file.read(part)).map_err(unread)?;
            let part = chunk.get(..read).filter(|part| !part.is_empty());
            let part = part.ok_or_else(|| foreign("it was cut off just now"))?;
            tag.update(part);
            if !shared {
                kept.extend_from_slice(part);
            }
            left = left.saturating_sub(read as u64);
        }
        let mut trailer = Vec::new();
        Read::by_ref(&mut file).take(TRAILER_BYTES as u64 + 1).read_to_end(&mut trailer).map_err(unread)?;
        let Some((found, MAGIC)) = trailer.split_first_chunk::<TAG_BYTES>() else {
            return Err(foreign("it's cut off or has another form"));
        };
        tag.verify_slice(found).map_err(|_| foreign("its tag doesn't match"))?;
        if shared {
            return Ok(Some(file));
        }
        let copy = sealed(&kept).map_err(|error| fault(Fault::Cache, format!("no copy in memory: {error}")));
        copy.map(Some)
    }

    /// Keeps compiled code. A reader sees all of it or nothing.
    pub(crate) fn store(&self, key: &EntryKey<'_>, code: &[u8]) -> Result<(), PolicyError> {
        let name = self.entry_name(key);
        let mut tag = self.tag(&name, code.len() as u64);
        tag.update(code);
        let tag = tag.finalize().into_bytes();
        write_new(&self.folder, &[code, &tag, MAGIC])
            .and_then(|temporary| renameat(&self.folder, temporary.as_str(), &self.folder, name.as_str()))
            .map_err(|error| {
                PolicyError::new(
                    Fault::Cache,
                    self.path.join(&name).display(),
                    format!("it can't be written: {error}"),
                )
            })
    }

    /// The name of an entry depends on the key too: with another key, an entry is absent and not wrong.
    fn entry_name(&self, key: &EntryKey<'_>) -> String {
        let mut mac = self.key.clone();
        for part in ["name", key.digest, key.engine] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        format!("{}.cwasm", hex(&mac.finalize().into_bytes()))
    }

    /// An entry's tag, up to the code, of which there are so many bytes.
    fn tag(&self, name: &str, length: u64) -> Hmac256 {
        let mut mac = self.key.clone();
        for part in ["code", name] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        mac.update(&length.to_le_bytes());
        mac
    }
}

/// A file in memory that nobody can change.
fn sealed(code: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy = File::from(memfd_create("casemate-policy", flags)?);
    copy.write_all(code)?;
    fcntl_add_seals(&copy, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(copy)
}

/// Whether no process has this file open for writing, nor mapped so: the kernel grants a read lease to its owner only then
/// (fcntl(2), `F_SETLEASE`). False as well where the file system has no leases.
fn has_no_writer(file: &File) -> bool {
    let set = |kind: libc::c_int| {
        // SAFETY: the descriptor is open for as long as `file` is borrowed, and the kernel is given a number, no memory. The lease
        // belongs to the open file and ends with it, or right here.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) == 0 }
    };
    let granted = set(libc::F_RDLCK);
    // It has told what it was taken for; held on, it would have the kernel signal this process.
    granted && set(libc::F_UNLCK)
}

fn read_or_make_key(folder: &OwnedFd) -> Result<[u8; KEY_BYTES], String> {
    if let Some(key) = read_key(folder)? {
        return Ok(key);
    }
    let key = random().map_err(|error| format!("no random bytes: {error}"))?;
    let made = write_new(folder, &[&key]).and_then(|temporary| {
        // Two processes that make a key at once agree on the one that came first.
        let linked = linkat(folder, temporary.as_str(), folder, KEY_NAME, AtFlags::empty());
        unlinkat(folder, temporary.as_str(), AtFlags::empty())?;
        match linked {
            Err(Errno::EXIST) => Ok(()),
            other => other,
        }
    });
    made.map_err(|error| format!("its key can't be written: {error}"))?;
    read_key(folder)?.ok_or_else(|| "its key vanished".into())
}

fn read_key(folder: &OwnedFd) -> Result<Option<[u8; KEY_BYTES]>, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match openat(folder, KEY_NAME, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(format!("its key can't be opened: {error}")),
    };
    let stat = fstat(&file).map_err(|error| error.to_string())?;
    if stat.st_uid != geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
        return Err(format!("others may read its key: mode {:o}", stat.st_mode & 0o7777));
    }
    let mut bytes = Vec::new();
    let read = File::from(file).take(KEY_BYTES as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| format!("its key can't be read: {error}"))?;
    bytes
        .try_into()
        .map(Some)
        .map_err(|_| format!("its key hasn't {KEY_BYTES} bytes; remove the whole folder"))
}

/// Writes a new file of mode 0600 under a name that nobody knows, and gives that name.
fn write_new(folder: &OwnedFd, parts: &[&[u8]]) -> rustix::io::Result<String> {
    let name = format!("new-{}", hex(&random()?));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR)?);
    let written = parts.iter().try_for_each(|part| file.write_all(part)).and_then(|()| file.sync_all());
    if let Err(error) = written {
        unlinkat(folder, name.as_str(), AtFlags::empty())?;
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(name)
}

fn random() -> rustix::io::Result<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    // Up to 256 bytes come whole and without interruption, once the kernel's generator is seeded (random(4)).
    match getrandom(&mut bytes, GetRandomFlags::empty())? {
        KEY_BYTES => Ok(bytes),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

    const ENTRY: EntryKey<'_> = EntryKey { digest: "aa", engine: "e" };

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("a/cache")).unwrap();
        (folder, cache)
    }

    fn all_of(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn code(error: PolicyError) -> &'static str {
        error.code()
    }

    fn refused(cache: &Cache) -> &'static str {
        let [shared, copied] = [true, false].map(|shared| code(cache.load(&ENTRY, shared).err().unwrap()));
        assert_eq!(shared, copied);
        copied
    }

    #[test]
    fn gives_back_what_was_kept_and_nothing_else() {
        let (_folder, cache) = cache();
        let load =
            |cache: &Cache, key: &EntryKey<'_>| cache.load(key, false).unwrap().map(|file| all_of(&file));
        assert_eq!(load(&cache, &ENTRY), None);
        cache.store(&ENTRY, b"code").unwrap();
        assert_eq!(load(&cache, &ENTRY).unwrap(), b"code");
        assert_eq!(load(&Cache::open(&cache.path).unwrap(), &ENTRY).unwrap(), b"code");
        for other in [EntryKey { digest: "ab", engine: "e" }, EntryKey { digest: "aa", engine: "f" }] {
            assert_eq!(load(&cache, &other), None);
        }
    }

    #[test]
    fn an_entry_that_somebody_can_write_to_is_not_shared() {
        let (_folder, cache) = cache();
        cache.store(&ENTRY, b"code").unwrap();
        let path = cache.path.join(cache.entry_name(&ENTRY));
        let entry = || cache.load(&ENTRY, true).unwrap().unwrap();
        let is_the_caches = |file: &File| file.metadata().unwrap().ino() == path.metadata().unwrap().ino();
        assert!(
            is_the_caches(&entry()) && all_of(&entry()).starts_with(b"code"),
            "a file begins with the code"
        );
        let writer = File::options().append(true).open(&path).unwrap();
        let mut copy = entry();
        assert!(!is_the_caches(&copy) && all_of(&copy) == b"code", "it has a writer");
        assert!(copy.write_all(b"x").is_err());
        drop(writer);
        assert!(is_the_caches(&entry()));
    }

    #[test]
    fn folder_and_files_are_private() {
        let (_folder, cache) = cache();
        cache.store(&ENTRY, b"code").unwrap();
        assert_eq!(std::fs::metadata(&cache.path).unwrap().permissions().mode() & 0o777, 0o700);
        let mut files = 0;
        for file in std::fs::read_dir(&cache.path).unwrap() {
            assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
            files += 1;
        }
        assert_eq!(files, 2, "the key and one entry, and nothing left over");
    }

    #[test]
    fn each_changed_byte_is_found() {
        let (_folder, cache) = cache();
        cache.store(&ENTRY, b"code").unwrap();
        let path = cache.path.join(cache.entry_name(&ENTRY));
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(refused(&cache), "policy-cache-tampered", "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert_eq!(refused(&cache), "policy-cache-tampered", "cut at {at}");
        }
    }

    #[test]
    fn an_entry_in_anothers_place_is_found() {
        let (_folder, cache) = cache();
        let other = EntryKey { digest: "ab", engine: "e" };
        cache.store(&other, b"other").unwrap();
        let path = |key| cache.path.join(cache.entry_name(key));
        std::fs::copy(path(&other), path(&ENTRY)).unwrap();
        assert_eq!(refused(&cache), "policy-cache-tampered");
    }

    #[test]
    fn an_entry_made_with_another_key_is_absent() {
        let (folder, cache) = cache();
        let other = Cache::open(&folder.path().join("other")).unwrap();
        assert_ne!(cache.entry_name(&ENTRY), other.entry_name(&ENTRY));
        cache.store(&ENTRY, b"code").unwrap();
        let path = other.path.join(other.entry_name(&ENTRY));
        std::fs::copy(cache.path.join(cache.entry_name(&ENTRY)), path).unwrap();
        assert_eq!(refused(&other), "policy-cache-tampered");
    }

    #[test]
    fn refuses_a_folder_or_key_that_others_can_get_at() {
        let (_folder, cache) = cache();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        set(&cache.path, 0o750);
        assert_eq!(Cache::open(&cache.path).err().map(code), Some("policy-cache"));
        set(&cache.path, 0o700);
        set(&cache.path.join(KEY_NAME), 0o640);
        assert_eq!(Cache::open(&cache.path).err().map(code), Some("policy-cache"));
        set(&cache.path.join(KEY_NAME), 0o600);
        assert!(Cache::open(&cache.path).is_ok());
        std::fs::write(cache.path.join(KEY_NAME), "short").unwrap();
        assert_eq!(Cache::open(&cache.path).err().map(code), Some("policy-cache"));
    }

    #[test]
    fn follows_no_links() {
        let (folder, cache) = cache();
        let link = folder.path().join("link");
        symlink(&cache.path, &link).unwrap();
        assert_eq!(Cache::open(&link).err().map(code), Some("policy-cache"));
        symlink("/etc/passwd", cache.path.join(cache.entry_name(&ENTRY))).unwrap();
        assert_eq!(refused(&cache), "policy-cache-tampered");
    }
}
