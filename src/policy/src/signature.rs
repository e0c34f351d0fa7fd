//! Signatures of bundles, as minisign makes them: `minisign -S -m default.toml` writes `default.toml.minisig`.
//!
//! A bundle names each plugin by its digest, so that a signature over the bundle holds for all of it.

use std::path::{Path, PathBuf};

use minisign_verify::{PublicKey, Signature};

use crate::{Fault, PolicyError};

/// A key or a signature has some 300 bytes.
const MOST_BYTES: usize = 4 << 10;

/// Checks a bundle's text against the signature beside it.
pub(crate) fn check(bundle: &Path, text: &[u8], key: &Path) -> Result<(), PolicyError> {
    let refuse = |cause: String| PolicyError::new(Fault::Signature, bundle.display(), cause);
    let public = read_key(key).map_err(refuse)?;
    let signature = beside(bundle);
    let signed = read_text(&signature).map_err(refuse)?;
    let signed = Signature::decode(signed.trim_end())
        .map_err(|error| refuse(format!("{}: this is not a signature: {error}", signature.display())))?;
    public.verify(text, &signed, false).map_err(|error| {
        refuse(format!("{} is not a signature of it by {}: {error}", signature.display(), key.display()))
    })
}

/// A public key of minisign's; else what is wrong with it.
pub(crate) fn read_key(path: &Path) -> Result<PublicKey, String> {
    PublicKey::decode(read_text(path)?.trim_end())
        .map_err(|error| format!("{}: this is not a public key of minisign: {error}", path.display()))
}

/// A key's or a signature's text; else what is wrong with it.
pub(crate) fn read_text(path: &Path) -> Result<String, String> {
    let text =
        crate::engine::read(path, MOST_BYTES).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = text.and_then(|bytes| String::from_utf8(bytes).ok());
    text.ok_or_else(|| format!("{}: this is not of minisign", path.display()))
}

/// Where the signature of a file is.
pub(crate) fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".minisig");
    name.into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::fs;

    pub(crate) const KEY: &str = "untrusted comment: minisign public key of Casemate's tests\n\
        RWRjYXNlbWF0ZbDGP4N2T95XYHYS4pEAr8NoMnwLcNm4iQrjE/KcLCJd\n";
    pub(crate) const OTHER_KEY: &str = "untrusted comment: another\n\
        RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3\n";
    pub(crate) const TEXT: &[u8] = b"# A bundle.\n";
    pub(crate) const SIGNATURE: &str = "untrusted comment: signature of the tests\n\
        RURjYXNlbWF0ZZL+ifmDezq4hHJIzd7vhHAsR7K7tyeXuO5vo8eXwsxBdDRNDNtV9lDDfAGMROqLtPjbH0+bxNqx5ge0U9pvtgQ=\n\
        trusted comment: bundle of the tests\n\
        X1J10vIQgvPTctjgjIXKYg1Hgt8mhzirlFaFls6fCOhB8D858Td9XO1oFyFTHyKONdOULMMiTdDdbrJrg0E+Bg==\n";

    #[test]
    fn only_what_was_signed_by_this_key_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let (bundle, key) = (folder.path().join("b.toml"), folder.path().join("policy.pub"));
        let signature = folder.path().join("b.toml.minisig");
        fs::write(&key, KEY).unwrap();
        let code = |text: &[u8]| check(&bundle, text, &key).map_err(|error| error.code());
        assert_eq!(code(TEXT), Err("policy-signature"), "there is none");
        fs::write(&signature, SIGNATURE).unwrap();
        assert_eq!(code(TEXT), Ok(()));
        assert_eq!(code(b"# A bundle. \n"), Err("policy-signature"));
        assert_eq!(code(b""), Err("policy-signature"));
        for (from, to) in
            [("of the tests\nX1J1", "of others\nX1J1"), ("RURj", "RURk"), ("9lDD", "9lDE"), ("\n", "")]
        {
            assert!(SIGNATURE.contains(from));
            fs::write(&signature, SIGNATURE.replace(from, to)).unwrap();
            assert_eq!(code(TEXT), Err("policy-signature"), "{from}");
        }
        fs::write(&signature, SIGNATURE).unwrap();
        for other in [OTHER_KEY, "", "no key", &"x".repeat(5 << 10)] {
            fs::write(&key, other).unwrap();
            assert_eq!(code(TEXT), Err("policy-signature"), "{other}");
        }
    }
}
