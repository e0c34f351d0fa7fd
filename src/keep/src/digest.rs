//! SHA-256 of what a guest boots, and who signed it, where a policy asks for it. A kernel and an initrd are copied into sealed memory as
//! they are read, and that copy is what the guest gets: nobody can change it after the policy has seen its digest.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use casemate_host::{Image, ROM_BYTES_MAX};
use casemate_policy::{Attrs, Claim, Signers, Witness};
use casemate_spec::Refusal;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sha2::{Digest, Sha256};

/// A larger kernel or initrd is not copied.
const MOST_BYTES: u64 = 1 << 30;
/// A larger disk is not read: it would take minutes.
const MOST_DISK_BYTES: u64 = 64 << 30;

/// What is known of a file's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// In lower-case hexadecimal.
    pub(crate) sha256: String,
    /// Who signed it, of those that the host knows.
    pub(crate) signer: Option<String>,
}

impl Known {
    /// As policies are told of it besides.
    pub(crate) fn attrs(known: Option<&Self>) -> Attrs {
        let signer = known.and_then(|known| known.signer.clone());
        signer.map(|signer| ("signer".to_owned(), signer)).into_iter().collect()
    }
}

/// Puts a sealed copy in an image's place; tells what it is. `what` is how a refusal calls it.
pub(crate) fn seal(what: &str, image: &mut Image, signers: &Signers) -> Result<Known, Refusal> {
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
    let mut copy = memory().map_err(failed)?;
    let from = File::from(image.fd.try_clone().map_err(failed)?);
    let (size_bytes, known) =
        read(&from, MOST_BYTES, signers.claim(&image.path).as_ref(), &mut |piece| copy.write_all(piece))
            .map_err(failed)?;
    image.fd = sealed(copy).map_err(failed)?;
    image.size_bytes = size_bytes;
    Ok(known)
}

/// A file in memory that can be sealed.
fn memory() -> std::io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let made = memfd_create("casemate-image", flags)
        // Linux before 6.3 does not know the last flag.
        .or_else(|_| memfd_create("casemate-image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING))?;
    Ok(File::from(made))
}

/// Seals such a file: nobody changes it from now on.
fn sealed(mut file: File) -> std::io::Result<OwnedFd> {
    file.seek(SeekFrom::Start(0))?;
    fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(OwnedFd::from(file))
}

/// Puts a sealed copy of an option ROM in its place, of a size that its register can say and of whole pages, when it is what
/// `sha256` says.
pub(crate) fn seal_rom(image: &mut Image, sha256: &str) -> Result<(), Refusal> {
    let refuse = |cause: String| {
        let remedy = "see to the file; if it was changed on purpose, write its new digest (sha256sum)";
        Refusal::new("rom-digest", image.path.display(), cause, remedy)
    };
    let failed = |error: std::io::Error| refuse(error.to_string());
    let mut copy = memory().map_err(failed)?;
    let from = File::from(image.fd.try_clone().map_err(failed)?);
    let (size_bytes, known) =
        read(&from, ROM_BYTES_MAX, None, &mut |piece| copy.write_all(piece)).map_err(failed)?;
    if known.sha256 != sha256 {
        return Err(refuse(format!("its SHA-256 is {}, and the guest's file says {sha256}", known.sha256)));
    }
    let size_bytes = size_bytes.max(4096).next_power_of_two();
    copy.set_len(size_bytes).map_err(failed)?;
    (image.fd, image.size_bytes) = (sealed(copy).map_err(failed)?, size_bytes);
    Ok(())
}

/// What a disk is that the guest only reads; none when it's larger than is read.
pub(crate) fn disk(image: &Image, signers: &Signers) -> Result<Option<Known>, Refusal> {
    if image.file_bytes > MOST_DISK_BYTES {
        return Ok(None);
    }
    let file = image.fd.try_clone().map(File::from);
    let claim = signers.claim(&image.path);
    let known = file.and_then(|file| read(&file, MOST_DISK_BYTES, claim.as_ref(), &mut |_| Ok(())));
    known.map(|(_, known)| Some(known)).map_err(|error| {
        Refusal::new("image-digest", "a disk", error, "see to the file; a policy wants its digest")
    })
}

/// Reads a file once, for its size, its digest, and whether a signature that is claimed is right.
fn read(
    file: &File,
    most: u64,
    claim: Option<&Claim<'_>>,
    take: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<(u64, Known)> {
    let mut hash = Sha256::new();
    let mut witness = claim.and_then(Claim::witness);
    let size_bytes = pieces(file, most, &mut |piece| {
        hash.update(piece);
        if let Some(witness) = &mut witness {
            witness.see(piece);
        }
        take(piece)
    })?;
    Ok((size_bytes, Known { sha256: hex(hash), signer: witness.and_then(Witness::signer) }))
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
        let none = Signers::default();
        let known = Known { sha256: sum(b"kernel"), signer: None };
        assert_eq!(disk(&image, &none).unwrap().as_ref(), Some(&known));
        assert_eq!(seal("boot.kernel", &mut image, &none).unwrap(), known);
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
    fn a_rom_is_what_its_digest_says_and_as_large_as_a_register_can_say() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vbios");
        let rom = [&[0x55, 0xaa][..], &[7; 5000]].concat();
        fs::write(&path, &rom).unwrap();
        let open = || casemate_host::open_rom(&path).unwrap();
        assert_eq!(seal_rom(&mut open(), &sum(b"another")).unwrap_err().code, "rom-digest");
        let mut image = open();
        seal_rom(&mut image, &sum(&rom)).unwrap();
        assert_eq!(image.size_bytes, 8192);
        let mut bytes = Vec::new();
        File::from(image.fd).read_to_end(&mut bytes).unwrap();
        assert!(bytes.len() == 8192 && bytes.starts_with(&rom));
        for wrong in [&b"55aa"[..], b"", &[0x55]] {
            fs::write(&path, wrong).unwrap();
            assert_eq!(casemate_host::open_rom(&path).unwrap_err().code, "rom-format");
        }
    }

    #[test]
    fn what_is_too_large_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        let file = File::create(&path).unwrap();
        file.set_len(MOST_BYTES + 1).unwrap();
        let fd = File::open(&path).unwrap().into();
        let none = Signers::default();
        let mut image = Image { fd, size_bytes: MOST_BYTES + 1, file_bytes: 0, path: path.clone() };
        assert_eq!(seal("boot.kernel", &mut image, &none).unwrap_err().code, "image-digest");
        let fd = File::open(&path).unwrap().into();
        let large = Image { fd, size_bytes: 0, file_bytes: MOST_DISK_BYTES + 1, path };
        assert_eq!(disk(&large, &none).unwrap(), None);
    }
}
