//! The lab is what the tests take it for.

use std::{fs, fs::File, path::Path, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, GuestImage},
};

/// `KVM_GET_API_VERSION`, `_IO(0xae, 0)` in Linux's `include/uapi/linux/kvm.h`.
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;
/// `VFIO_GET_API_VERSION`, `_IO(';', 100)` in `include/uapi/linux/vfio.h`.
const VFIO_GET_API_VERSION: libc::Ioctl = 0x3b64;

pub(crate) fn has_kvm_and_vfio(_: &mut Ctx) -> Result<(), Failure> {
    let kvm = ioctl::without_argument(&File::open("/dev/kvm")?, KVM_GET_API_VERSION)?;
    expect!(kvm == 12, "KVM's API version is {kvm}, not 12");
    let vfio = ioctl::without_argument(&File::open("/dev/vfio/vfio")?, VFIO_GET_API_VERSION)?;
    expect!(vfio == 0, "VFIO's API version is {vfio}, not 0");
    let groups = fs::read_dir("/sys/kernel/iommu_groups")?.count();
    expect!(groups >= 8, "only {groups} IOMMU groups");
    Ok(())
}

pub(crate) fn has_the_devices(ctx: &mut Ctx) -> Result<(), Failure> {
    let expected = [
        (devices::E1000E, "0x8086:0x10d3"),
        (devices::IGB, "0x8086:0x10c9"),
        (devices::NVME, "0x1b36:0x0010"),
        (devices::BRIDGE, "0x1b36:0x000e"),
        (devices::RTL8139, "0x10ec:0x8139"),
        (devices::SHARED_DISK, "0x1af4:0x1001"),
        (devices::EDU, "0x1234:0x11e8"),
        (devices::LARGE_BAR, "0x1af4:0x1110"),
        (devices::DISPLAY, "0x1234:0x1111"),
        (devices::VIRTIO_NET, "0x1af4:0x1041"),
        (devices::SATA, "0x8086:0x2922"),
        (devices::CARD[0], "0x1234:0x11e8"),
        (devices::CARD[1], "0x1234:0x11e8"),
        (devices::ERASED_NVME, "0x8086:0x5845"),
        (devices::VIRTIO_GPU, "0x1af4:0x1050"),
    ];
    for (address, id) in expected {
        let read = |name: &str| fs::read_to_string(format!("/sys/bus/pci/devices/{address}/{name}"));
        let found = format!("{}:{}", read("vendor")?.trim(), read("device")?.trim());
        expect!(found == id, "{address} is {found}, not {id}");
    }
    let group = |address: &str| fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group"));
    expect!(group(devices::RTL8139)? == group(devices::SHARED_DISK)?, "the RTL8139 and the disk are apart");
    let mounts = fs::read_to_string("/proc/mounts")?;
    expect!(mounts.contains(devices::SHARED_DISK_MOUNT), "the disk beside the RTL8139 is not mounted");
    expect!(
        ctx.driver_of(devices::NVME).is_none(),
        "a driver has taken the NVMe drive before a test wanted it"
    );
    Ok(())
}

pub(crate) fn guest_image_boots_in_qemu(ctx: &mut Ctx) -> Result<(), Failure> {
    let initrd = ctx.directory().join("guest.cpio");
    GuestImage::new("echo value: $((6 * 7))").write(ctx.layout(), &initrd)?;
    let kernel = ctx.layout().guest_kernel();
    let text = |path: &Path| path.display().to_string();
    let (kernel, initrd) = (text(&kernel), text(&initrd));
    let fixed = "qemu-system-x86_64 -enable-kvm -M q35 -cpu host -m 256 -display none -nodefaults -serial stdio -no-reboot";
    let images = ["-kernel", &kernel, "-initrd", &initrd, "-append", "console=ttyS0 quiet"];
    let running = ctx.start(fixed.split(' ').chain(images))?;
    let run = running.wait(Duration::from_secs(90))?;
    let value = run.success()?.printed("CASEMATE-INIT")?.printed("CASEMATE-TEST-ENDED 0")?.value("value:")?;
    expect!(value == "42", "the guest printed {value}");
    Ok(())
}

#[allow(unsafe_code)]
mod ioctl {
    //! The version queries have no wrapper that both interfaces share; one call of libc's serves them.
    use std::{fs::File, io, os::fd::AsRawFd};

    /// An ioctl that takes no argument and touches no memory of the caller's.
    pub(super) fn without_argument(file: &File, request: libc::Ioctl) -> io::Result<i32> {
        // SAFETY: `file` is open for the call's length, and the requests this module's users pass (`_IO`, without
        // data) make the kernel neither read nor write memory of this process.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, 0) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
    }
}
