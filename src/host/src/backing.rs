//! The disk that a file lies on.

use std::{fs, os::fd::AsFd};

use rustix::fs::{FileType, fstat, major, minor};

use crate::{Host, host::attribute};

impl Host {
    /// The whole disk that an open file or block device lies on, by major and minor number; a partition's is its disk's.
    /// `None` where no single one is behind it: a filesystem of several devices, or in memory, or of another machine.
    pub fn disk_under(&self, file: &impl AsFd) -> Option<(u32, u32)> {
        let stat = fstat(file).ok()?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let device = if is_device { stat.st_rdev } else { stat.st_dev };
        self.whole_disk(major(device), minor(device))
    }

    fn whole_disk(&self, major: u32, minor: u32) -> Option<(u32, u32)> {
        // Filesystems without a device have numbers of major 0.
        let path = self.path(format!("sys/dev/block/{major}:{minor}"));
        let path = fs::canonicalize(path).ok().filter(|_| major != 0)?;
        if !path.join("partition").exists() {
            return Some((major, minor));
        }
        let numbers = attribute(path.parent()?.join("dev"))?;
        let (major, minor) = numbers.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_its_disks_and_memory_is_on_none() {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        let disk = sys.join("devices/pci/block/vda");
        fs::create_dir_all(disk.join("vda1")).unwrap();
        fs::create_dir_all(sys.join("dev/block")).unwrap();
        fs::write(disk.join("dev"), "254:0\n").unwrap();
        fs::write(disk.join("vda1/partition"), "1\n").unwrap();
        for (number, directory) in [("254:0", disk.clone()), ("254:1", disk.join("vda1"))] {
            std::os::unix::fs::symlink(directory, sys.join("dev/block").join(number)).unwrap();
        }
        let host = Host::with_root(root.path());
        assert_eq!(host.whole_disk(254, 0), Some((254, 0)));
        assert_eq!(host.whole_disk(254, 1), Some((254, 0)));
        assert_eq!(host.whole_disk(8, 0), None);
        assert_eq!(host.whole_disk(0, 41), None);
    }
}
