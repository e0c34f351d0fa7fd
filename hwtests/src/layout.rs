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

    /// The directory of a kernel that guests are tried with beside the lab's own: `6.1`, `6.1-cloud`, `6.12-cloud`.
    pub(crate) fn other_kernel(&self, name: &str) -> PathBuf {
        self.root.join("kernels").join(name)
    }

    /// The image of such a kernel, and the initramfs that goes with it.
    pub fn other_guest(&self, name: &str) -> (PathBuf, PathBuf) {
        let directory = self.other_kernel(name);
        (directory.join("kernel"), directory.join("guest.cpio"))
    }

    /// The guests' initramfs, to which a test's own files are appended as a second archive.
    pub fn guest_initramfs(&self) -> PathBuf {
        self.root.join("guest.cpio")
    }

    /// A read-only ext4 file system with fio, iperf3, socat and stress-ng, and what they need, for a guest to have as a disk.
    pub fn guest_tools(&self) -> PathBuf {
        self.root.join("tools.img")
    }

    /// A program of another VMM that the benchmark was given, by its name.
    pub fn peer(&self, name: &str) -> PathBuf {
        self.root.join("peers").join(name)
    }

    /// The QEMU of a lab that counts instructions, as `hwtests/qemu/build` makes it.
    pub(crate) fn counting_qemu(&self) -> PathBuf {
        self.root.join("qemu/qemu-system-x86_64")
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

    /// The kernel that the lab boots: its own, or the one that CASEMATE_LAB_KERNEL names (`6.1`).
    pub(crate) fn lab_kernel(&self) -> LabKernel {
        match std::env::var("CASEMATE_LAB_KERNEL") {
            Ok(name) if !name.is_empty() => {
                let directory = self.other_kernel(&name);
                LabKernel {
                    tree: directory.join("tree"),
                    release: directory.join("release"),
                    initramfs: directory.join("host.cpio"),
                    name: Some(name),
                }
            }
            _ => LabKernel {
                tree: self.kernel_tree(),
                release: self.kernel_release(),
                initramfs: self.root.join("host.cpio"),
                name: None,
            },
        }
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

/// What the lab boots.
pub(crate) struct LabKernel {
    /// Holds `boot`.
    pub(crate) tree: PathBuf,
    /// The file that holds the release.
    pub(crate) release: PathBuf,
    /// The lab's own initramfs, with drivers of this kernel.
    pub(crate) initramfs: PathBuf,
    /// Another than usual, by its name.
    pub(crate) name: Option<String>,
}

/// The root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}
