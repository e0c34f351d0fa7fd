//! SHA-256 of what a guest boots, where a policy asks for it. A kernel and an initrd are copied into sealed memory as
//! they are read, and that copy is what the guest gets: nobody can change it after the policy has seen its digest.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use casemate_host::Image;
use casemate_spec::Refusal;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sha2::{Digest, Sha256};

/// A larger kernel or initrd is not copied.
const MOST_BYTES: u64 = 1 << 30;
/// A larger disk is not read: it would take minutes.
const MOST_DISK_BYTES: u64 = 64 << 30;

/// Puts a sealed copy in an image's place; gives its digest. `what` is how a refusal calls it.
pub(crate) fn seal(what: &str, image: &mut Image) -> Result<String, Refusal> {
    let refuse = |cause: String| {
        Refusal::new(
            "image-digest",
            what,
            cause,
            "see to the file; a policy wants its digest before it boots",
        )
    };
    if image.size_bytes > MOST_BYTES {
        return Err(refuse(format!("it has {} bytes, and at most {MOST_BYTES} are read", image.size_bytes)));
    }
    let failed = |error: std::io::Error| refuse(error.to_string());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let copy = memfd_create("casemate-image", flags)
        // Linux before 6.3 does not know the last flag.
        .or_else(|_| memfd_create("casemate-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))
        .map_err(|error| failed(error.into()))?;
    let mut copy = File::from(copy);
    let from = File::from(image.fd.try_clone().map_err(failed)?);
    let mut hash = Sha256::new();
    let size_bytes = pieces(&from, MOST_BYTES, &mut |piece| {
        hash.update(piece);
        copy.write_all(piece)
    })
    .map_err(failed)?;
    copy.seek(SeekFrom::Start(0)).map_err(failed)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&copy, seals).map_err(|error| failed(error.into()))?;
    image.fd = OwnedFd::from(copy);
    image.size_bytes = size_bytes;
    Ok(hex(hash))
}

/// The digest of a disk that the guest only reads; none when it's larger than is read.
pub(crate) fn disk(image: &Image) -> Result<Option<String>, Refusal> {
    if image.file_bytes > MOST_DISK_BYTES {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    let read = image.fd.try_clone().and_then(|fd| {
        pieces(&File::from(fd), MOST_DISK_BYTES, &mut |piece| {
            hash.update(piece);
            Ok(())
        })
    });
    read.map_err(|error| {
        Refusal::new("image-digest", "a disk", error, "see to the file; a policy wants its digest")
    })?;
    Ok(Some(hex(hash)))
}

/// Takes a file in pieces, from its start, without moving its offset.
fn pieces(
    file: &File,
    most: u64,
    take: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<u64> {
    struct From<'a>(&'a File, u64);
    impl Read for From<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let read = self.0.read_at(buffer, self.1)?;
            self.1 = self.1.saturating_add(read as u64);
            Ok(read)
        }
    }
    let mut from = From(file, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(from.1),
            // It grew while it was read.
            _ if from.1 > most => return Err(std::io::Error::other("it grows")),
            read => take(buffer.get(..read).unwrap_or_default())?,
        }
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use std::fs;

    #[test]
    fn what_was_hashed_is_what_boots() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, "kernel").unwrap();
        let mut image =
            Image { fd: File::open(&path).unwrap().into(), size_bytes: 6, file_bytes: 6, path: path.clone() };
        assert_eq!(disk(&image).unwrap().unwrap(), sum(b"kernel"));
        assert_eq!(seal("boot.kernel", &mut image).unwrap(), sum(b"kernel"));
        fs::write(&path, "virus!").unwrap();
        let mut file = File::from(image.fd);
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "kernel");
        assert!(file.write_all(b"x").is_err(), "it is sealed");
    }

    fn sum(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let file = File::create(&path).unwrap();
        file.set_len(MOST_BYTES + 1).unwrap();
        let fd = File::open(&path).unwrap().into();
        let mut image = Image { fd, size_bytes: MOST_BYTES + 1, file_bytes: 0, path: path.clone() };
        assert_eq!(seal("boot.kernel", &mut image).unwrap_err().code, "image-digest");
        let fd = File::open(&path).unwrap().into();
        assert_eq!(disk(&Image { fd, size_bytes: 0, file_bytes: MOST_DISK_BYTES + 1, path }).unwrap(), None);
    }
}
