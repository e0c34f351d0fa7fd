//! For a plugin's own tests: questions to start from.

use crate::{
    Amounts, Bounds, Check, CpuSample, Device, Disk, DiskSample, File, GuestSample, GuestSpec, HostSample,
    HostState, Knobs, MemorySample, Net, NetSample, Operation, Outcome, Pressure, Rate, ReleasedDevice,
    Request, Samples, Tenant,
};

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

/// A second on a host of 4 processors with 12 of 16 GiB free; these guests run there.
pub fn samples(guests: Vec<GuestSample>) -> Samples {
    Samples {
        now_seconds: 0,
        interval_ms: 1_000,
        host: HostSample {
            name: "host".into(),
            cpus: 4,
            memory_bytes: 16 << 30,
            memory_free_bytes: 12 << 30,
            cpu: calm(),
            memory: calm(),
            io: calm(),
            attrs: vec![],
        },
        guests,
        attrs: vec![],
    }
}

/// An idle guest of tenant `acme` with 2 vCPUs and 4 GiB, as its file has it, in wide bounds.
pub fn guest_sample(name: &str) -> GuestSample {
    let none = Rate { bytes_a_second: None, requests_a_second: None };
    GuestSample {
        name: name.into(),
        tenant: "acme".into(),
        governed: true,
        paused: false,
        pinned: false,
        vcpus: 2,
        memory_bytes: 4 << 30,
        cpu: CpuSample { used_us: 0, waited_us: 0, throttled_us: 0, pressure: calm() },
        memory: MemorySample {
            used_bytes: 4 << 30,
            given_bytes: 4 << 30,
            free_bytes: None,
            available_bytes: None,
            faults: None,
            pressure: calm(),
        },
        disk: DiskSample { read_bytes: 0, written_bytes: 0, requests: 0, pressure: calm() },
        net: NetSample { received_bytes: 0, sent_bytes: 0, packets: 0 },
        exits: 0,
        interrupts: 0,
        knobs: Knobs {
            cpu_weight: 100,
            cpu_limit: None,
            balloon_bytes: 4 << 30,
            disk_limit: none,
            net_limit: none,
            attrs: vec![],
        },
        bounds: Bounds {
            cpu_weight_least: 1,
            cpu_weight_most: 10_000,
            cpu_limit_least: 100,
            memory_least_bytes: 512 << 20,
            may_pause: true,
            may_stop: true,
            attrs: vec![],
        },
        attrs: vec![],
    }
}

fn calm() -> Pressure {
    Pressure { some_us: 0, full_us: 0 }
}

/// An Intel 82540EM that came back clean.
pub fn released() -> ReleasedDevice {
    let passed = |name: &str| Check { name: name.into(), outcome: Outcome::Passed, detail: String::new() };
    ReleasedDevice {
        address: "0000:03:00.0".into(),
        vendor: 0x8086,
        device: 0x100e,
        subsystem_vendor: 0x1af4,
        subsystem_device: 0x1100,
        class: 0x02_00_00,
        pool: None,
        guest: "web".into(),
        tenant: "acme".into(),
        checks: ["reset", "bus-master", "config"].map(passed).to_vec(),
        quarantined: None,
        now_seconds: 0,
        attrs: vec![],
    }
}
