//! A machine made of files, for tests.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use casemate_spec::PciAddress;

use crate::{Host, Ledger, Use, config};

/// The address that is written so.
pub(crate) fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

/// A tree with `sys`, `proc` and `state`, which goes with this value.
pub(crate) struct Fixture(tempfile::TempDir);

impl Fixture {
    /// Like the lab: root ports, an e1000e and an igb without drivers (groups 8 and 9), an NVMe drive with its driver
    /// (group 10) and a partition, edu without a reset (group 5), a SATA controller that shares group 7 with others.
    pub(crate) fn typical() -> Self {
        let machine = Self(tempfile::tempdir().unwrap());
        for driver in ["nvme", "e1000e", "igb", "ahci", "vfio-pci", "pcieport", "virtio-pci"] {
            machine.write(&format!("sys/bus/pci/drivers/{driver}/bind"), "");
            machine.write(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        machine.write("sys/bus/pci/drivers_probe", "");
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "f00f4e\n");
        machine.write("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n");
        machine.write("proc/cmdline", "console=ttyS0 intel_iommu=on\n");
        machine.write("proc/net/route", "Iface\tDestination\tGateway\n");
        machine.write("proc/net/ipv6_route", "");
        machine.write("proc/swaps", "Filename Type Size Used Priority\n");
        machine.mounts(&[]);
        machine.pci(
            "0000:00:01.0",
            &[("class", "0x060400"), ("vendor", "0x1b36"), ("device", "0x000c")],
            Some("pcieport"),
            Some(1),
        );
        machine.pci(
            "0000:00:05.0",
            &[("class", "0x00ff00"), ("vendor", "0x1234"), ("device", "0x11e8")],
            None,
            Some(5),
        );
        machine.pci("0000:00:1f.0", &[("class", "0x060100")], None, Some(7));
        machine.pci("0000:00:1f.2", &[("class", "0x010601"), ("reset_method", "pm")], Some("ahci"), Some(7));
        machine.pci("0000:00:1f.3", &[("class", "0x0c0500")], None, Some(7));
        let e1000e =
            [("class", "0x020000"), ("vendor", "0x8086"), ("device", "0x10d3"), ("reset_method", "pm bus")];
        machine.pci("0000:01:00.0", &e1000e, None, Some(8));
        let igb = [
            ("class", "0x020000"),
            ("vendor", "0x8086"),
            ("device", "0x10c9"),
            ("reset_method", "flr pm bus"),
        ];
        machine.pci("0000:02:00.0", &igb, None, Some(9));
        let nvme =
            [("class", "0x010802"), ("vendor", "0x1b36"), ("device", "0x0010"), ("reset_method", "flr bus")];
        machine.pci("0000:03:00.0", &nvme, Some("nvme"), Some(10));
        machine.nvme_namespace();
        machine
    }

    pub(crate) fn host(&self) -> Host {
        Host::with_root(self.0.path())
    }

    pub(crate) fn ledger(&self) -> Ledger {
        Ledger::open(&self.path("state")).unwrap()
    }

    pub(crate) fn uses(&self, address: &str) -> Vec<Use> {
        let functions = self.host().functions().unwrap();
        functions.into_iter().find(|function| function.address == at(address)).unwrap().uses
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap()
    }

    /// A link at `path` to another path of the tree; replaces what is there.
    pub(crate) fn link(&self, path: &str, target: &str) {
        let ups = "../".repeat(Path::new(path).components().count() - 1);
        self.absolute_link(path, &format!("{ups}{target}"));
    }

    pub(crate) fn absolute_link(&self, path: &str, target: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    /// A function with these attributes, in sysfs' own layout: a directory under devices, links to it.
    pub(crate) fn pci(
        &self,
        address: &str,
        attributes: &[(&str, &str)],
        driver: Option<&str>,
        group: Option<u32>,
    ) {
        let directory = format!("sys/devices/pci0000:00/{address}");
        let defaults =
            [("vendor", "0x8086"), ("device", "0x0001"), ("numa_node", "-1"), ("driver_override", "(null)")];
        for (name, value) in defaults.iter().chain(attributes) {
            self.write(&format!("{directory}/{name}"), &format!("{value}\n"));
        }
        let mut config = config::tests::some();
        for (name, offset) in [("vendor", 0), ("device", 2)] {
            let value = self.read(&format!("{directory}/{name}"));
            let id = u16::from_str_radix(value.trim().trim_start_matches("0x"), 16).unwrap();
            config[offset..offset + 2].copy_from_slice(&id.to_le_bytes());
        }
        fs::write(self.path(&format!("{directory}/config")), config).unwrap();
        self.link(&format!("sys/bus/pci/devices/{address}"), &directory);
        if let Some(driver) = driver {
            self.bind(address, driver);
        }
        if let Some(group) = group {
            self.link(&format!("{directory}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"));
            self.link(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), &directory);
        }
    }

    /// Takes a function away.
    pub(crate) fn remove(&self, address: &str) {
        fs::remove_file(self.path(&format!("sys/bus/pci/devices/{address}"))).unwrap();
        fs::remove_dir_all(self.path(&format!("sys/devices/pci0000:00/{address}"))).unwrap();
    }

    pub(crate) fn bind(&self, address: &str, driver: &str) {
        self.link(
            &format!("sys/devices/pci0000:00/{address}/driver"),
            &format!("sys/bus/pci/drivers/{driver}"),
        );
    }

    pub(crate) fn remove_driver(&self, driver: &str) {
        fs::remove_dir_all(self.path(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
    }

    /// A block device, in a directory below /sys/devices.
    fn block(&self, directory: &str, name: &str, number: &str) {
        self.write(&format!("sys/devices/{directory}/dev"), &format!("{number}\n"));
        self.link(&format!("sys/class/block/{name}"), &format!("sys/devices/{directory}"));
        self.link(&format!("sys/dev/block/{number}"), &format!("sys/devices/{directory}"));
    }

    /// As the kernel shows it with native multipath: the namespace hangs from a subsystem, not from the PCI function.
    fn nvme_namespace(&self) {
        let subsystem = "virtual/nvme-subsystem/nvme-subsys0";
        self.block(&format!("{subsystem}/nvme0n1"), "nvme0n1", "259:0");
        self.block(&format!("{subsystem}/nvme0n1/nvme0n1p1"), "nvme0n1p1", "259:1");
        let controller = "sys/devices/pci0000:00/0000:03:00.0/nvme/nvme0";
        self.write(&format!("{controller}/model"), "a drive\n");
        self.link(&format!("sys/devices/{subsystem}/nvme0"), controller);
    }

    /// A disk behind the SATA controller.
    pub(crate) fn sata_disk(&self) {
        self.block("pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda", "sda", "8:0");
    }

    /// A volume over another block device.
    pub(crate) fn volume(&self, name: &str, number: &str, over: &str) {
        self.block(&format!("virtual/block/{name}"), name, number);
        self.link(
            &format!("sys/devices/virtual/block/{name}/slaves/{over}"),
            &format!("sys/class/block/{over}"),
        );
        if self.path(&format!("sys/class/block/{over}")).exists() {
            self.link(&format!("sys/class/block/{over}/holders/{name}"), &format!("sys/class/block/{name}"));
        }
    }

    /// Mounts, from the third field on: `MAJOR:MINOR ROOT POINT OPTIONS - TYPE SOURCE OPTIONS`.
    pub(crate) fn mounts(&self, mounts: &[&str]) {
        let lines = mounts.iter().map(|mount| format!("30 1 {mount}\n"));
        self.write("proc/self/mountinfo", &lines.collect::<String>());
    }

    /// A network interface of a PCI function.
    pub(crate) fn netdev(&self, name: &str, address: &str, up: bool) {
        let directory = format!("sys/devices/pci0000:00/{address}/net/{name}");
        self.write(&format!("{directory}/flags"), if up { "0x1003\n" } else { "0x1002\n" });
        self.link(&format!("{directory}/device"), &format!("sys/devices/pci0000:00/{address}"));
        self.link(&format!("sys/class/net/{name}"), &directory);
    }

    /// An IPv4 default route.
    pub(crate) fn default_route(&self, interface: &str) {
        let line = format!(
            "Iface\tDestination\n{interface}\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        );
        self.write("proc/net/route", &line);
    }
}
