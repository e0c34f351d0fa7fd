//! Who signed a file that a guest boots from, as minisign signs: `minisign -S -m vmlinux` writes `vmlinux.minisig`.
//!
//! The host has a folder of public keys, and calls each signer as its key's file is called: `release.pub` is `release`.

use std::path::Path;

use minisign_verify::{PublicKey, Signature, StreamVerifier};

use crate::{
    Fault, PolicyError,
    signature::{beside, read_key, read_text},
};

/// More keys than that nobody looks after.
const MOST_KEYS: usize = 256;

/// The signers that a host knows.
#[derive(Default)]
pub struct Signers(Vec<(String, PublicKey)>);

/// A signature that lies beside a file, by the key of a known signer; whether it's right is to be seen.
pub struct Claim<'a> {
    signer: &'a str,
    key: &'a PublicKey,
    signature: Signature,
}

/// Looks at a file's bytes as they are read.
pub struct Witness<'a> {
    signer: &'a str,
    verifier: StreamVerifier<'a>,
}

impl Signers {
    /// Reads the keys in a folder: all files `NAME.pub`. Without the folder there are none.
    ///
    /// # Errors
    /// `policy-signature`: one of them is no key, or can't be read.
    pub fn read(folder: &Path) -> Result<Self, PolicyError> {
        let refuse = |cause: String| PolicyError::new(Fault::Signature, folder.display(), cause);
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(refuse(format!("its keys can't be read: {error}"))),
        };
        let mut signers = Vec::new();
        for file in files {
            let path = file.map_err(|error| refuse(error.to_string()))?.path();
            if path.extension().is_none_or(|extension| extension != "pub") {
                continue;
            }
            let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            signers.push((name, read_key(&path).map_err(refuse)?));
            if signers.len() > MOST_KEYS {
                return Err(refuse(format!("there are more than {MOST_KEYS} keys")));
            }
        }
        signers.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Self(signers))
    }

    /// The signature beside a file (`FILE.minisig`), when it says that it's of a key that is known.
    pub fn claim(&self, file: &Path) -> Option<Claim<'_>> {
        if self.0.is_empty() {
            return None;
        }
        let signature = Signature::decode(read_text(&beside(file)).ok()?.trim_end()).ok()?;
        let (signer, key) = self.0.iter().find(|(_, key)| key.verify_stream(&signature).is_ok())?;
        Some(Claim { signer, key, signature })
    }
}

impl Claim<'_> {
    /// One who is to see all of the file's bytes.
    pub fn witness(&self) -> Option<Witness<'_>> {
        let verifier = self.key.verify_stream(&self.signature).ok()?;
        Some(Witness { signer: self.signer, verifier })
    }
}

impl Witness<'_> {
    /// The next bytes of the file.
    pub fn see(&mut self, bytes: &[u8]) {
        self.verifier.update(bytes);
    }

    /// The signer, when these were the bytes that were signed.
    pub fn signer(mut self) -> Option<String> {
        self.verifier.finalize().is_ok().then(|| self.signer.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::signature::tests::{KEY, OTHER_KEY, SIGNATURE, TEXT};

    fn signer(signers: &Signers, file: &Path, pieces: &[&[u8]]) -> Option<String> {
        let claim = signers.claim(file)?;
        let mut witness = claim.witness()?;
        pieces.iter().for_each(|piece| witness.see(piece));
        witness.signer()
    }

    #[test]
    fn a_signer_is_named_when_these_very_bytes_were_signed() {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys");
        let file = folder.path().join("vmlinux");
        fs::write(folder.path().join("vmlinux.minisig"), SIGNATURE).unwrap();
        let who = |pieces: &[&[u8]]| signer(&Signers::read(&keys).unwrap(), &file, pieces);
        assert_eq!(who(&[TEXT]), None, "no folder, no keys");
        fs::create_dir(&keys).unwrap();
        fs::write(keys.join("other.pub"), OTHER_KEY).unwrap();
        fs::write(keys.join("README"), "no key").unwrap();
        assert_eq!(who(&[TEXT]), None);
        fs::write(keys.join("release.pub"), KEY).unwrap();
        assert_eq!(who(&[TEXT]).as_deref(), Some("release"));
        assert_eq!(who(&[&TEXT[..5], &TEXT[5..]]).as_deref(), Some("release"), "in pieces");
        assert_eq!(who(&[TEXT, b" "]), None);
        assert_eq!(who(&[]), None);
        fs::write(folder.path().join("vmlinux.minisig"), "no signature").unwrap();
        assert_eq!(who(&[TEXT]), None);
        fs::write(keys.join("broken.pub"), "no key").unwrap();
        let error = Signers::read(&keys).err().unwrap();
        assert_eq!(error.code(), "policy-signature");
        assert!(error.to_string().contains("broken.pub"), "{error}");
    }
}
