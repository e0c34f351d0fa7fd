//! Which functions the host's storage stands on.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use casemate_spec::{PciAddress, Refusal};

use crate::{
    Use,
    function::unreadable,
    host::{Host, names, pci_parent},
    mountinfo::Mount,
    process,
};

/// Volumes stand on volumes, but not this deep.
const WALK_MAX: usize = 4096;
/// Where the host runs from.
const BOOT_MOUNTS: [&str; 5] = ["/", "/boot", "/boot/efi", "/efi", "/usr"];

/// Every use of every function's block devices.
pub(crate) fn uses(host: &Host, mounts: &[Mount]) -> Result<Vec<(PciAddress, Use)>, Refusal> {
    let parents = Parents::read(host);
    let mut found = Vec::new();
    let mut add = |block: &str, reason: Use| {
        found.extend(parents.of(block).iter().map(|address| (*address, reason.clone())));
    };
    for mount in mounts {
        for block in blocks_of(host, mount) {
            let mount_point = mount.mount_point.clone();
            let boot = BOOT_MOUNTS.contains(&mount_point.as_str());
            let name = block.clone();
            let reason =
                if boot { Use::BootDisk { block, mount_point } } else { Use::Mounted { block, mount_point } };
            add(&name, reason);
        }
    }
    for block in swaps(host)? {
        add(&block.clone(), Use::Swap { block });
    }
    for block in parents.blocks() {
        for of in names(host.path("sys/class/block").join(block).join("holders")) {
            add(block, Use::Member { block: block.to_owned(), of });
        }
    }
    for (node, by) in process::open_device_nodes(host) {
        if let Some(block) = node.strip_prefix("/dev/") {
            add(block, Use::HeldOpen { node: node.clone(), by });
        }
    }
    Ok(found)
}

/// The block devices behind a mount: by number, and by the source's name (btrfs shows no number), and for btrfs all
/// devices of the filesystem.
fn blocks_of(host: &Host, mount: &Mount) -> BTreeSet<String> {
    let mut blocks = BTreeSet::new();
    let numbered = host.path("sys/dev/block").join(&mount.device);
    if let Some(name) =
        fs::canonicalize(numbered).ok().and_then(|real| Some(real.file_name()?.to_str()?.to_owned()))
    {
        blocks.insert(name);
    }
    blocks.extend(block_name(host, &mount.source));
    if mount.fs_type == "btrfs" {
        // Which of the btrfs filesystems this mount shows is not told here: sysfs lists only mounted ones, so all of
        // that one's devices are in use.
        let btrfs = host.path("sys/fs/btrfs");
        let members = names(&btrfs).into_iter().map(|id| names(btrfs.join(id).join("devices")));
        for members in
            members.filter(|members| members.iter().any(|member| blocks.contains(member))).collect::<Vec<_>>()
        {
            blocks.extend(members);
        }
    }
    blocks
}

/// The kernel's name for a node under /dev, through links such as /dev/mapper/root.
fn block_name(host: &Host, source: &str) -> Option<String> {
    source.strip_prefix("/dev/")?;
    let real = if host.is_live() { fs::canonicalize(source).ok()? } else { PathBuf::from(source) };
    let name = real.strip_prefix("/dev").ok()?.to_str()?.replace('/', "!");
    host.path("sys/class/block").join(&name).exists().then_some(name)
}

fn swaps(host: &Host) -> Result<BTreeSet<String>, Refusal> {
    // A kernel without swap has no such file.
    let text = match host.table("proc/swaps") {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        read => read.map_err(|error| unreadable("proc/swaps", error))?,
    };
    let names = text.lines().skip(1).filter_map(|line| block_name(host, line.split_whitespace().next()?));
    Ok(names.collect())
}

/// Which functions each block device stands on.
struct Parents(BTreeMap<String, BTreeSet<PciAddress>>);

impl Parents {
    fn read(host: &Host) -> Self {
        let blocks = host.path("sys/class/block");
        let of = |name: String| {
            let parents = pci_parents(&blocks.join(&name));
            (name, parents)
        };
        Self(names(&blocks).into_iter().map(of).collect())
    }

    fn of(&self, block: &str) -> BTreeSet<PciAddress> {
        self.0.get(block).cloned().unwrap_or_default()
    }

    fn blocks(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Walks down from a block device: a partition's disk, a volume's members, the controllers of an NVMe namespace with
/// several paths (which hangs from no PCI function itself).
fn pci_parents(block: &Path) -> BTreeSet<PciAddress> {
    let mut parents = BTreeSet::new();
    let mut seen = HashSet::new();
    let mut todo = vec![block.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(real) = fs::canonicalize(path) else { continue };
        if seen.len() >= WALK_MAX || !seen.insert(real.clone()) {
            continue;
        }
        parents.extend(pci_parent(&real));
        for directory in real.ancestors().take(3) {
            todo.extend(
                names(directory.join("slaves")).iter().map(|name| directory.join("slaves").join(name)),
            );
            let subsystem = directory.file_name().and_then(|name| name.to_str());
            if subsystem.is_some_and(|name| name.starts_with("nvme-subsys")) {
                let controllers = names(directory).into_iter().filter(|name| is_nvme_controller(name));
                todo.extend(controllers.map(|name| directory.join(name)));
            }
        }
    }
    parents
}

/// `nvme0`, not `nvme0n1`.
fn is_nvme_controller(name: &str) -> bool {
    name.strip_prefix("nvme").is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}

/// A block device of the function that something holds exclusively: another mount namespace's mount, ZFS, a volume
/// manager. Asks the kernel by opening each, so it is done only for functions that are about to be taken.
pub(crate) fn held_exclusively(host: &Host, address: PciAddress) -> Option<Use> {
    if !host.is_live() {
        return None;
    }
    let parents = Parents::read(host);
    let blocks = parents.0.iter().filter(|(_, functions)| functions.contains(&address));
    for (block, _) in blocks {
        let node = format!("/dev/{}", block.replace('!', "/"));
        let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(&node);
        if opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            return Some(Use::HeldOpen { node, by: "the kernel or a process (exclusively)".into() });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    const NVME: &str = "0000:03:00.0";

    #[test]
    fn a_mounted_partition_and_the_boot_disk() {
        let machine = Fixture::typical();
        machine.mounts(&["259:1 / /mnt/data rw - ext4 /dev/nvme0n1p1 rw"]);
        let mounted = Use::Mounted { block: "nvme0n1p1".into(), mount_point: "/mnt/data".into() };
        assert_eq!(machine.uses(NVME), [mounted]);
        machine.mounts(&["259:1 / / rw - ext4 /dev/nvme0n1p1 rw"]);
        assert_eq!(
            machine.uses(NVME),
            [Use::BootDisk { block: "nvme0n1p1".into(), mount_point: "/".into() }]
        );
    }

    #[test]
    fn a_mount_that_only_process_1_sees() {
        let machine = Fixture::typical();
        machine.write("proc/1/mountinfo", "30 1 259:0 / /srv rw - ext4 /dev/nvme0n1 rw\n");
        assert_eq!(
            machine.uses(NVME),
            [Use::Mounted { block: "nvme0n1".into(), mount_point: "/srv".into() }]
        );
    }

    #[test]
    fn btrfs_is_known_by_its_source_and_members() {
        let machine = Fixture::typical();
        machine.sata_disk();
        machine.mounts(&["0:40 / /pool rw - btrfs /dev/sda rw"]);
        assert_eq!(machine.uses(NVME), []);
        machine.link("sys/fs/btrfs/1234/devices/sda", "sys/class/block/sda");
        machine.link("sys/fs/btrfs/1234/devices/nvme0n1", "sys/class/block/nvme0n1");
        assert_eq!(
            machine.uses(NVME),
            [Use::Mounted { block: "nvme0n1".into(), mount_point: "/pool".into() }]
        );
    }

    #[test]
    fn a_volume_over_a_raid_over_a_namespace() {
        let machine = Fixture::typical();
        machine.volume("md0", "9:0", "nvme0n1p1");
        let member = Use::Member { block: "nvme0n1p1".into(), of: "md0".into() };
        assert_eq!(machine.uses(NVME), std::slice::from_ref(&member));
        machine.volume("dm-0", "253:0", "md0");
        machine.mounts(&["253:0 / / rw - ext4 /dev/mapper/root rw"]);
        let uses = machine.uses(NVME);
        assert!(uses.contains(&Use::BootDisk { block: "dm-0".into(), mount_point: "/".into() }), "{uses:?}");
        assert!(uses.contains(&member), "{uses:?}");
        machine.mounts(&[]);
        machine.write("proc/swaps", "Filename Type Size Used Priority\n/dev/dm-0 partition 1 0 -2\n");
        assert!(machine.uses(NVME).contains(&Use::Swap { block: "dm-0".into() }));
    }

    #[test]
    fn a_process_with_the_disk_open() {
        let machine = Fixture::typical();
        machine.write("proc/77/comm", "dd\n");
        machine.absolute_link("proc/77/fd/3", "/dev/nvme0n1");
        let held = Use::HeldOpen { node: "/dev/nvme0n1".into(), by: "process 77 (dd)".into() };
        assert_eq!(machine.uses(NVME), [held]);
    }

    #[test]
    fn volumes_in_a_circle_end() {
        let machine = Fixture::typical();
        machine.volume("dm-0", "253:0", "dm-1");
        machine.volume("dm-1", "253:1", "dm-0");
        machine.mounts(&["253:0 / / rw - ext4 /dev/mapper/root rw"]);
        assert_eq!(machine.uses(NVME), []);
    }
}
