//! Debian's kernel: downloaded, unpacked, and its ELF image taken out of the bzImage for guests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    LabError, Layout,
    command::{decompressed, output_of},
    packages::Apt,
};

/// A kernel that lies unpacked in the lab's directory.
pub(crate) struct Kernel {
    /// As `uname -r` prints it.
    pub(crate) release: String,
    /// Holds `boot` and `lib/modules`.
    pub(crate) tree: PathBuf,
}

impl Kernel {
    /// The kernel that is there, or the newest of Debian's after a download. One that is there stays until the lab's
    /// directory is removed, so that test results of one checkout compare.
    pub(crate) fn ensure(
        layout: &Layout,
        apt: &mut Apt,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, LabError> {
        let tree = layout.kernel_tree();
        if let Ok(release) = fs::read_to_string(layout.kernel_release()) {
            return Ok(Self { release, tree });
        }
        let package = apt.newest_kernel()?;
        say(&format!("downloads and unpacks {package} (about 105 MB)"));
        let downloads = layout.root().join("downloads");
        let file = apt.download(&package, &downloads)?;
        let _ = fs::remove_dir_all(&tree);
        output_of(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&tree))?;
        fs::remove_dir_all(&downloads).map_err(|error| LabError::io("remove", &downloads, error))?;
        let release = package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").to_owned();
        output_of(Command::new("depmod").arg("-b").arg(&tree).arg(&release))?;
        let kernel = Self { release, tree };
        kernel.extract_elf(&layout.guest_kernel())?;
        let marker = layout.kernel_release();
        fs::write(&marker, &kernel.release).map_err(|error| LabError::io("write", &marker, error))?;
        Ok(kernel)
    }

    /// The bzImage, which boots the lab itself.
    pub(crate) fn bzimage(&self) -> PathBuf {
        self.tree.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// `lib/modules/RELEASE` of the unpacked package.
    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    fn extract_elf(&self, target: &Path) -> Result<(), LabError> {
        let path = self.bzimage();
        let image = fs::read(&path).map_err(|error| LabError::io("read", &path, error))?;
        let broken =
            |what: &str| LabError::new(format_args!("{} {what}", path.display()), "remove target/lab");
        let payload = payload_of(&image).ok_or_else(|| broken("is no bzImage"))?;
        let stream = target.with_extension("zst");
        fs::write(&stream, payload).map_err(|error| LabError::io("write", &stream, error))?;
        let elf = decompressed("zstd", &stream)?;
        let _ = fs::remove_file(&stream);
        if !elf.starts_with(b"\x7fELF") {
            return Err(broken("holds no ELF image compressed by zstd"));
        }
        fs::write(target, elf).map_err(|error| LabError::io("write", target, error))
    }
}

/// The compressed kernel in a bzImage, found by the setup header of Linux's `Documentation/arch/x86/boot.rst`. The four
/// bytes of size that the build appends to the stream are left off.
fn payload_of(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = image.get(at..at.checked_add(4)?)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match image.get(0x1f1)? {
        0 => 4,
        count => usize::from(*count),
    };
    let start = (setup_sectors + 1).checked_mul(512)?.checked_add(word(0x248)?)?;
    let end = start.checked_add(word(0x24c)?)?.checked_sub(4)?;
    image.get(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bzimage(offset: u32, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
        image.resize(0x400 + offset as usize, 0);
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 4]);
        image
    }

    #[test]
    fn payload_is_found() {
        assert_eq!(payload_of(&bzimage(16, b"zstd stream")), Some(&b"zstd stream"[..]));
    }

    proptest! {
        #[test]
        fn no_image_makes_it_panic(cut in 0_usize..0x440, offset: u32, length: u32) {
            let mut image = bzimage(16, b"zstd stream");
            image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
            image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
            image.truncate(cut);
            let _ = payload_of(&image);
        }
    }
}
