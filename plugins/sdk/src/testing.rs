//! For a plugin's own tests: a request to start from.

use crate::{Amounts, Device, Disk, File, GuestSpec, HostState, Net, Operation, Request, Tenant};

/// A modest guest `web` of tenant `acme`: 2 vCPUs, 8 GiB, an Intel network card of the host's, a disk and a tap, on a
/// host of 4 processors with 12 of 16 GiB free, alone.
pub fn request() -> Request {
    Request {
        operation: Operation::Create,
        guest: GuestSpec {
            name: "web".into(),
            vcpus: 2,
            memory_bytes: 8 << 30,
            kernel: file("/boot/vmlinux"),
            initrd: None,
            command_line: "console=ttyS0".into(),
            devices: vec![nic()],
            disks: vec![Disk {
                path: "/srv/acme/web.img".into(),
                size_bytes: 1 << 30,
                read_only: false,
                sha256: None,
                attrs: vec![],
            }],
            nets: vec![Net { tap: "web0".into(), mac: None, attrs: vec![] }],
            attrs: vec![],
        },
        old: None,
        tenant: Tenant {
            name: "acme".into(),
            quota: None,
            usage: Some(Amounts { guests: 0, vcpus: 0, memory_bytes: 0, devices: 0, attrs: vec![] }),
            attrs: vec![],
        },
        host: HostState {
            name: "host".into(),
            cpus: 4,
            memory_bytes: 16 << 30,
            memory_free_bytes: 12 << 30,
            attrs: vec![],
        },
        beside: vec![],
        now_seconds: 0,
        attrs: vec![],
    }
}

/// An Intel 82540EM at 0000:03:00.0.
pub fn nic() -> Device {
    Device {
        address: "0000:03:00.0".into(),
        vendor: 0x8086,
        device: 0x100e,
        subsystem_vendor: 0x1af4,
        subsystem_device: 0x1100,
        class: 0x02_00_00,
        group: Some(3),
        driver: Some("e1000".into()),
        attrs: vec![],
    }
}

/// A file of 1 MiB without a digest.
pub fn file(path: &str) -> File {
    File { path: path.into(), size_bytes: 1 << 20, sha256: None, attrs: vec![] }
}
