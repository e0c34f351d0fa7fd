//! The hardware lab, and the harness of the tests that need KVM and VFIO.
//!
//! The lab is a QEMU machine with an emulated AMD-V processor, an Intel IOMMU with interrupt remapping, and PCIe
//! devices ([`devices`]). The Linux in it has a real KVM, a real VFIO and real IOMMU groups, so assignment is tested
//! for real on a machine that has none of them. Principles:
//!
//! - **Nothing is taken on trust from the machine below.** [`prepare`] installs and builds all that the lab needs, says
//!   so, and is idempotent; what can't be had is one line with a remedy ([`LabError`]).
//! - **The lab's root is this machine's root**, read-only under a tmpfs: what was built here runs there from the same
//!   path, and nothing that happens there reaches this machine, except files under `/lab/out`.
//! - **One lab run carries many tests** ([`harness`]), for its start costs as much as several tests. Each is still a
//!   test of its own to the ordinary runner: a name, an outcome, a log file, a deadline, a process and a cgroup.
//! - **The program outside and the program inside are one executable**, so they can't drift apart.
//! - **Times measured in the lab are emulated.** Compare them only within one run; counts are exact.

mod command;
mod cpio;
mod error;
pub mod harness;
mod images;
mod kernel;
mod layout;
mod machine;
mod packages;
mod prepare;
mod tools;

pub use cpio::Archive;
pub use error::LabError;
pub use layout::Layout;
pub use machine::{COUNTED, Console, Lab, LabEnd, RunningLab, is_counted};
pub use prepare::prepare;

/// The addresses of the lab's PCI functions, as its root ports are laid out in [`Lab`].
pub mod devices {
    /// Intel 82574L behind a root port: MSI-X, INTx; no FLR (reset methods `pm bus`).
    pub const E1000E: &str = "0000:01:00.0";
    /// Intel 82576 behind a root port: MSI-X, FLR, SR-IOV with 8 functions.
    pub const IGB: &str = "0000:02:00.0";
    /// NVMe controller behind a root port: MSI-X, FLR, SR-IOV; 64 MiB whose first 16 MiB hold a fixed pattern.
    pub const NVME: &str = "0000:03:00.0";
    /// SHA-256 of that pattern. The SATA disk and the drive's second namespace are nothing else.
    pub const PATTERN_SHA256: &str = "fffbd2b9d0196749b49a8acb5bfda88626cc338a7832cc0a09a0a4e411d38801";
    /// The PCIe-to-PCI bridge whose children share one IOMMU group.
    pub const BRIDGE: &str = "0000:04:00.0";
    /// Realtek 8139 behind that bridge: INTx only.
    pub const RTL8139: &str = "0000:05:01.0";
    /// virtio disk behind that bridge, mounted at [`SHARED_DISK_MOUNT`]: the RTL8139's group is in use.
    pub const SHARED_DISK: &str = "0000:05:02.0";
    /// Where the lab mounts [`SHARED_DISK`].
    pub const SHARED_DISK_MOUNT: &str = "/mnt/lab-disk";
    /// QEMU's teaching device (1234:11e8) on the root bus: MSI, DMA, no reset method. It is the first of its kind.
    pub const EDU_ID: &str = "1234:11e8";
    /// The same behind a root port: it is reset with its bus.
    pub const EDU: &str = "0000:06:00.0";
    /// Shared memory of QEMU's, as a BAR of 8 GiB.
    pub const LARGE_BAR: &str = "0000:07:00.0";
    /// A display (bochs-display): a framebuffer, registers, an option ROM.
    pub const DISPLAY: &str = "0000:08:00.0";
    /// A virtio network card behind the IOMMU.
    pub const VIRTIO_NET: &str = "0000:09:00.0";
    /// A SATA controller with a disk of 16 MiB that hold the pattern: MSI and no MSI-X, an I/O BAR.
    pub const SATA: &str = "0000:0a:00.0";
    /// Two functions of one card, each a teaching device; they can only be reset together.
    pub const CARD: [&str; 2] = ["0000:0b:00.0", "0000:0b:00.1"];
    /// Another NVMe drive, whose one namespace is its own: 16 MiB that hold the pattern until a test has them erased. It has other IDs than
    /// [`NVME`], and the host's driver leaves it alone.
    pub const ERASED_NVME: &str = "0000:0c:00.0";
    /// A virtio graphics card behind the IOMMU.
    pub const VIRTIO_GPU: &str = "0000:0d:00.0";
    /// The NVMe drive's second namespace belongs to no controller at first: 16 MiB that hold the pattern.
    pub const NVME_SECOND_NAMESPACE: u32 = 2;
}
