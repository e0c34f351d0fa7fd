//! The cache of compiled plugins.
//!
//! What lies in it is machine code that this process will run, so nothing is taken from it that Casemate did not put
//! there: the folder belongs to this user alone (0700), a key made here and kept here (0600) authenticates each entry
//! together with the name under which it lies, and an entry that fails is an error, never a miss. Everything is opened
//! relative to the folder's descriptor and without following links, so that the folder that was checked is the one used.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use hmac::{Hmac, KeyInit, Mac};
use rustix::{
    fs::{AtFlags, Mode, OFlags, fstat, linkat, mkdir, open, openat, renameat, unlinkat},
    io::Errno,
    process::geteuid,
    rand::{GetRandomFlags, getrandom},
};
use sha2::Sha256;

use crate::{Fault, PolicyError, limits::HOST_LIMITS};

type Hmac256 = Hmac<Sha256>;

const MAGIC: &[u8] = b"casemate compiled plugin 1\n";
const KEY_NAME: &str = "key";
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 32;

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

    /// The compiled code for `key`, or none when it was never compiled for this engine and this processor.
    pub(crate) fn load(&self, key: &EntryKey<'_>) -> Result<Option<Vec<u8>>, PolicyError> {
        let name = self.entry_name(key);
        let fault =
            |fault, cause: String| Err(PolicyError::new(fault, self.path.join(&name).display(), cause));
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match openat(&self.folder, name.as_str(), flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return fault(Fault::Tampered, "it's a link".into()),
            Err(error) => return fault(Fault::Cache, format!("it can't be opened: {error}")),
        };
        let mut bytes = Vec::new();
        let most = HOST_LIMITS.compiled_bytes.saturating_add(MAGIC.len() + TAG_BYTES);
        if let Err(error) = File::from(file).take(most as u64).read_to_end(&mut bytes) {
            return fault(Fault::Cache, format!("it can't be read: {error}"));
        }
        let parts = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(TAG_BYTES));
        let Some((tag, code)) = parts else {
            return fault(
                Fault::Tampered,
                "it isn't what Casemate put there: it's cut off or has another form".into(),
            );
        };
        if self.tag(&name, code).verify_slice(tag).is_err() {
            return fault(Fault::Tampered, "it isn't what Casemate put there: its tag doesn't match".into());
        }
        Ok(Some(code.to_vec()))
    }

    /// Keeps compiled code. A reader sees all of it or nothing.
    pub(crate) fn store(&self, key: &EntryKey<'_>, code: &[u8]) -> Result<(), PolicyError> {
        let name = self.entry_name(key);
        let tag = self.tag(&name, code).finalize().into_bytes();
        write_new(&self.folder, &[MAGIC, &tag, code])
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

    fn tag(&self, name: &str, code: &[u8]) -> Hmac256 {
        let mut mac = self.key.clone();
        for part in ["code".as_bytes(), name.as_bytes(), code] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
    use std::os::unix::fs::{PermissionsExt, symlink};

    const ENTRY: EntryKey<'_> = EntryKey { digest: "aa", engine: "e" };

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("a/cache")).unwrap();
        (folder, cache)
    }

    fn code(error: PolicyError) -> &'static str {
        error.code()
    }

    #[test]
    fn gives_back_what_was_kept_and_nothing_else() {
        let (_folder, cache) = cache();
        assert_eq!(cache.load(&ENTRY).unwrap(), None);
        cache.store(&ENTRY, b"code").unwrap();
        assert_eq!(cache.load(&ENTRY).unwrap().unwrap(), b"code");
        assert_eq!(Cache::open(&cache.path).unwrap().load(&ENTRY).unwrap().unwrap(), b"code");
        for other in [EntryKey { digest: "ab", engine: "e" }, EntryKey { digest: "aa", engine: "f" }] {
            assert_eq!(cache.load(&other).unwrap(), None);
        }
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
            assert_eq!(code(cache.load(&ENTRY).unwrap_err()), "policy-cache-tampered", "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert_eq!(code(cache.load(&ENTRY).unwrap_err()), "policy-cache-tampered", "cut at {at}");
        }
    }

    #[test]
    fn an_entry_in_anothers_place_is_found() {
        let (_folder, cache) = cache();
        let other = EntryKey { digest: "ab", engine: "e" };
        cache.store(&other, b"other").unwrap();
        let path = |key| cache.path.join(cache.entry_name(key));
        std::fs::copy(path(&other), path(&ENTRY)).unwrap();
        assert_eq!(code(cache.load(&ENTRY).unwrap_err()), "policy-cache-tampered");
    }

    #[test]
    fn an_entry_made_with_another_key_is_absent() {
        let (folder, cache) = cache();
        let other = Cache::open(&folder.path().join("other")).unwrap();
        assert_ne!(cache.entry_name(&ENTRY), other.entry_name(&ENTRY));
        cache.store(&ENTRY, b"code").unwrap();
        let path = other.path.join(other.entry_name(&ENTRY));
        std::fs::copy(cache.path.join(cache.entry_name(&ENTRY)), path).unwrap();
        assert_eq!(code(other.load(&ENTRY).unwrap_err()), "policy-cache-tampered");
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
        assert_eq!(code(cache.load(&ENTRY).unwrap_err()), "policy-cache-tampered");
    }
}
