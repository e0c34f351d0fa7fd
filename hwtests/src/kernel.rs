//! Debian's kernels: downloaded, unpacked, and their ELF images taken out of the bzImages for guests.

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

/// A kernel of Debian's, by its package: the newest whose name has a number between these two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Series {
    /// How the lab calls it.
    pub(crate) name: &'static str,
    /// What stands before the number.
    pub(crate) prefix: &'static str,
    /// What stands behind it and what belongs to it, flavour included. Unsigned: the modules load all the same.
    pub(crate) suffix: &'static str,
}

/// The lab's own, and that of most guests.
pub(crate) const OWN: Series =
    Series { name: "6.12", prefix: "linux-image-6.12.", suffix: "-amd64-unsigned" };

/// Those that guests are tried with beside it. The first can be the lab's own, too.
pub(crate) const OTHERS: [Series; 3] = [
    Series { name: "6.1", prefix: "linux-image-6.1.0-", suffix: "-amd64-unsigned" },
    Series { name: "6.1-cloud", prefix: "linux-image-6.1.0-", suffix: "-cloud-amd64-unsigned" },
    Series { name: "6.12-cloud", prefix: "linux-image-6.12.", suffix: "-cloud-amd64-unsigned" },
];

/// A kernel that lies unpacked in the lab's directory.
pub(crate) struct Kernel {
    /// As `uname -r` prints it.
    pub(crate) release: String,
    /// Holds `boot` and `lib/modules`.
    pub(crate) tree: PathBuf,
    /// The image that guests boot: ELF, or the package's own where that is packed in a way that the lab can't undo.
    guest_image: PathBuf,
    /// Holds the release; written last.
    marker: PathBuf,
}

impl Kernel {
    /// The lab's own kernel.
    pub(crate) fn own(layout: &Layout, apt: &mut Apt, say: &mut dyn FnMut(&str)) -> Result<Self, LabError> {
        let kernel = Self {
            release: String::new(),
            tree: layout.kernel_tree(),
            guest_image: layout.guest_kernel(),
            marker: layout.kernel_release(),
        };
        kernel.ensure(OWN, &layout.root().join("downloads"), apt, say)
    }

    /// One of the others.
    pub(crate) fn other(
        layout: &Layout,
        series: Series,
        apt: &mut Apt,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, LabError> {
        let directory = layout.other_kernel(series.name);
        fs::create_dir_all(&directory).map_err(|error| LabError::io("create", &directory, error))?;
        let kernel = Self {
            release: String::new(),
            tree: directory.join("tree"),
            guest_image: directory.join("kernel"),
            marker: directory.join("release"),
        };
        kernel.ensure(series, &directory.join("downloads"), apt, say)
    }

    /// The kernel that is there, or the newest of Debian's after a download. One that is there stays until the lab's
    /// directory is removed, so that test results of one checkout compare.
    fn ensure(
        mut self,
        series: Series,
        downloads: &Path,
        apt: &mut Apt,
        say: &mut dyn FnMut(&str),
    ) -> Result<Self, LabError> {
        if let Ok(release) = fs::read_to_string(&self.marker) {
            return Ok(Self { release, ..self });
        }
        let package = apt.newest_kernel(series)?;
        say(&format!("downloads and unpacks {package}"));
        let file = apt.download(&package, downloads)?;
        let _ = fs::remove_dir_all(&self.tree);
        output_of(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&self.tree))?;
        fs::remove_dir_all(downloads).map_err(|error| LabError::io("remove", downloads, error))?;
        self.release = package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").to_owned();
        output_of(Command::new("depmod").arg("-b").arg(&self.tree).arg(&self.release))?;
        self.make_guest_image()?;
        fs::write(&self.marker, &self.release).map_err(|error| LabError::io("write", &self.marker, error))?;
        Ok(self)
    }

    /// The bzImage, which boots the lab itself.
    pub(crate) fn bzimage(&self) -> PathBuf {
        self.tree.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// `lib/modules/RELEASE` of the unpacked package.
    pub(crate) fn modules(&self) -> PathBuf {
        self.tree.join("lib/modules").join(&self.release)
    }

    /// Takes the ELF image out of the bzImage, since unpacking it costs an emulated processor seconds.
    fn make_guest_image(&self) -> Result<(), LabError> {
        let path = self.bzimage();
        let image = fs::read(&path).map_err(|error| LabError::io("read", &path, error))?;
        let broken =
            |what: &str| LabError::new(format_args!("{} {what}", path.display()), "remove target/lab");
        let payload = payload_of(&image).ok_or_else(|| broken("is no bzImage"))?;
        let unpacked = match payload {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => self.unpacked("zstd", payload)?,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => self.unpacked("xz", payload)?,
            // LZ4, as cloud kernels had it: quick to unpack in the guest, and so the way of bzImages is tried as well.
            _ => image,
        };
        let is_kernel = unpacked.starts_with(b"\x7fELF") || unpacked.get(0x202..0x206) == Some(b"HdrS");
        if !is_kernel {
            return Err(broken("holds no ELF image"));
        }
        fs::write(&self.guest_image, unpacked)
            .map_err(|error| LabError::io("write", &self.guest_image, error))
    }

    fn unpacked(&self, program: &str, payload: &[u8]) -> Result<Vec<u8>, LabError> {
        let stream = self.guest_image.with_extension("packed");
        fs::write(&stream, payload).map_err(|error| LabError::io("write", &stream, error))?;
        let unpacked = decompressed(program, &stream);
        let _ = fs::remove_file(&stream);
        unpacked
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
