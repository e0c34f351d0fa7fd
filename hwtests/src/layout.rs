//! Where the lab keeps its files.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The directory of everything the lab builds and leaves: `target/lab` of the workspace, outside of version control.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The lab of this workspace, or the directory that `CASEMATE_LAB_DIR` names.
    pub fn of_workspace() -> Self {
        let root = match std::env::var_os("CASEMATE_LAB_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => workspace().join("target/lab"),
        };
        Self { root: std::path::absolute(&root).unwrap_or(root) }
    }

    /// The lab's directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The guests' kernel: an ELF image with the PVH entry, uncompressed.
    pub fn guest_kernel(&self) -> PathBuf {
        self.root.join("vmlinux")
    }

    /// The same kernel as its package ships it: a bzImage.
    pub fn guest_bzimage(&self) -> io::Result<PathBuf> {
        let release = fs::read_to_string(self.kernel_release())?;
        Ok(self.kernel_tree().join("boot").join(format!("vmlinuz-{release}")))
    }

    /// The guests' initramfs, to which a test's own files are appended as a second archive.
    pub fn guest_initramfs(&self) -> PathBuf {
        self.root.join("guest.cpio")
    }

    /// One log a test: `NAME.log`; one console log a lab run: `console-N.log`.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// The unpacked Debian kernel package, with `boot` and `lib/modules`.
    pub(crate) fn kernel_tree(&self) -> PathBuf {
        self.root.join("kernel")
    }

    /// The file that holds the release (`uname -r`) of the unpacked kernel; written last.
    pub(crate) fn kernel_release(&self) -> PathBuf {
        self.root.join("kernel.release")
    }

    /// The lab's own initramfs.
    pub(crate) fn host_initramfs(&self) -> PathBuf {
        self.root.join("host.cpio")
    }

    /// The template of the disk that shares the RTL8139's group, copied for each run.
    pub(crate) fn shared_disk(&self) -> PathBuf {
        self.root.join("shared.img")
    }

    /// One directory for each lab run that is under way: disks, share, console.
    pub(crate) fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }
}

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}
