//! What is measured: the cell's cgroup (v2), its vCPUs' time in the scheduler, what its VMM counts, and the host's pressure.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use casemate_policy::{
    CpuSample, DiskSample, GuestSample, HostSample, Knobs, MemorySample, NetSample, Pressure,
};
use casemate_wire::{Answer, Ask, BalloonStatistics, DeviceKind, Statistics};

use super::Charge;
use crate::operator::{GuestState, Operator};

/// What only grows, as it was at the last look.
#[derive(Clone, Copy, Default)]
struct Counters {
    used_us: u64,
    waited_ns: u64,
    throttled_us: u64,
    cpu: Pressure,
    memory: Pressure,
    io: Pressure,
    read_bytes: u64,
    written_bytes: u64,
    disk_requests: u64,
    received_bytes: u64,
    sent_bytes: u64,
    packets: u64,
    exits: u64,
    interrupts: u64,
    faults: u64,
}

pub(super) struct Sampler {
    root: PathBuf,
    operator: Operator,
    before: Option<Counters>,
    host_before: Option<[Pressure; 3]>,
}

impl Sampler {
    pub(super) fn new(_: &Charge, operator: Operator) -> Self {
        Self { root: "/".into(), operator, before: None, host_before: None }
    }

    /// The guest, of its knobs only what the kernel holds; and its balloon.
    pub(super) fn guest(
        &mut self,
        charge: &Charge,
        interval_ms: u32,
    ) -> (GuestSample, Option<BalloonStatistics>) {
        let statistics = match self.operator.ask(Ask::Statistics, Vec::new()) {
            Ok(Answer::Statistics(statistics)) => Some(*statistics),
            _ => None,
        };
        let now = self.counters(charge, statistics.as_ref());
        // At the first look there is no interval.
        let before = self.before.replace(now).filter(|_| interval_ms > 0).unwrap_or(now);
        let faulted = statistics.as_ref().is_some_and(|statistics| faults(statistics).is_some());
        let balloon = statistics.and_then(|statistics| statistics.balloon);
        let cgroup = |file: &str| number(&charge.cgroup.join(file));
        let grown = |of: &dyn Fn(&Counters) -> u64| of(&now).saturating_sub(of(&before));
        let sample = GuestSample {
            name: charge.guest.clone(),
            tenant: charge.tenant.clone(),
            governed: true,
            paused: self.operator.state() == GuestState::Paused,
            pinned: !charge.devices.is_empty(),
            vcpus: charge.vcpus.into(),
            memory_bytes: charge.memory_bytes,
            cpu: CpuSample {
                used_us: grown(&|c| c.used_us),
                waited_us: grown(&|c| c.waited_ns) / 1_000,
                throttled_us: grown(&|c| c.throttled_us),
                pressure: grown_pressure(now.cpu, before.cpu),
            },
            memory: MemorySample {
                used_bytes: cgroup("memory.current").unwrap_or(0),
                given_bytes: charge
                    .memory_bytes
                    .saturating_sub(balloon.map_or(0, |balloon| balloon.actual_bytes)),
                free_bytes: balloon.and_then(|balloon| balloon.free_bytes),
                available_bytes: balloon.and_then(|balloon| balloon.available_bytes),
                faults: faulted.then(|| grown(&|c| c.faults)),
                pressure: grown_pressure(now.memory, before.memory),
            },
            disk: DiskSample {
                read_bytes: grown(&|c| c.read_bytes),
                written_bytes: grown(&|c| c.written_bytes),
                requests: grown(&|c| c.disk_requests),
                pressure: grown_pressure(now.io, before.io),
            },
            net: NetSample {
                received_bytes: grown(&|c| c.received_bytes),
                sent_bytes: grown(&|c| c.sent_bytes),
                packets: grown(&|c| c.packets),
            },
            exits: grown(&|c| c.exits),
            interrupts: grown(&|c| c.interrupts),
            knobs: Knobs { cpu_weight: cgroup_number(&charge.cgroup, "cpu.weight", 100), ..Knobs::default() },
            ..GuestSample::default()
        };
        (sample, balloon)
    }

    fn counters(&self, charge: &Charge, statistics: Option<&Statistics>) -> Counters {
        let text = |file: &str| fs::read_to_string(charge.cgroup.join(file)).unwrap_or_default();
        let stat = text("cpu.stat");
        let cpu = keyed(&stat);
        let mut counters = Counters {
            used_us: cpu.get("usage_usec").copied().unwrap_or(0),
            throttled_us: cpu.get("throttled_usec").copied().unwrap_or(0),
            waited_ns: self.waited_ns(charge.pid),
            cpu: pressure(&text("cpu.pressure")),
            memory: pressure(&text("memory.pressure")),
            io: pressure(&text("io.pressure")),
            interrupts: self.interrupts(&charge.devices),
            ..self.before.unwrap_or_default()
        };
        // A VMM that doesn't answer has counted nothing since.
        let Some(statistics) = statistics else { return counters };
        let sum = |kind: DeviceKind, of: &dyn Fn(&casemate_wire::DeviceStatistics) -> u64| {
            statistics
                .devices
                .iter()
                .filter(|device| device.kind == kind)
                .map(of)
                .fold(0, u64::saturating_add)
        };
        counters.read_bytes = sum(DeviceKind::Disk, &|device| device.bytes_to_guest);
        counters.written_bytes = sum(DeviceKind::Disk, &|device| device.bytes_from_guest);
        counters.disk_requests = sum(DeviceKind::Disk, &|device| device.requests);
        counters.received_bytes = sum(DeviceKind::Net, &|device| device.bytes_to_guest);
        counters.sent_bytes = sum(DeviceKind::Net, &|device| device.bytes_from_guest);
        counters.packets = sum(DeviceKind::Net, &|device| device.requests);
        let exits = |vcpu: &casemate_wire::Counters| {
            vcpu.pio_exits.saturating_add(vcpu.mmio_exits).saturating_add(vcpu.other_exits)
        };
        counters.faults = faults(statistics).unwrap_or(counters.faults);
        counters.exits = statistics.vcpus.iter().map(exits).fold(0, u64::saturating_add);
        counters
    }

    /// How long the VMM's vCPU threads were ready to run and did not (`/proc/PID/task/TID/schedstat`, its second number).
    fn waited_ns(&self, pid: u32) -> u64 {
        let tasks = self.root.join(format!("proc/{pid}/task"));
        let Ok(entries) = fs::read_dir(&tasks) else { return 0 };
        let vcpus = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("vcpu")));
        let waited = |task: PathBuf| {
            let text = fs::read_to_string(task.join("schedstat")).ok()?;
            text.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        vcpus.filter_map(waited).fold(0, u64::saturating_add)
    }

    /// Interrupts of physical devices: `/proc/interrupts` names VFIO's by the function's address.
    fn interrupts(&self, devices: &[String]) -> u64 {
        if devices.is_empty() {
            return 0;
        }
        let text = fs::read_to_string(self.root.join("proc/interrupts")).unwrap_or_default();
        let of_guest =
            |line: &&str| line.contains("vfio") && devices.iter().any(|device| line.contains(device));
        text.lines()
            .filter(of_guest)
            .flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()))
            .fold(0, u64::saturating_add)
    }

    /// The host.
    pub(super) fn host(&mut self, interval_ms: u32) -> HostSample {
        let now = ["cpu", "memory", "io"].map(|name| {
            let path = self.root.join("proc/pressure").join(name);
            pressure(&fs::read_to_string(path).unwrap_or_default())
        });
        let before = self.host_before.replace(now).filter(|_| interval_ms > 0).unwrap_or(now);
        let [cpu, memory, io] = [0, 1, 2].map(|index: usize| {
            let of = |all: &[Pressure; 3]| all.get(index).copied().unwrap_or_default();
            grown_pressure(of(&now), of(&before))
        });
        let state = crate::admission::host_state(BTreeMap::new());
        HostSample {
            name: state.name,
            cpus: state.cpus,
            memory_bytes: state.memory_bytes,
            memory_free_bytes: state.memory_free_bytes,
            cpu,
            memory,
            io,
            attrs: BTreeMap::new(),
        }
    }
}

/// Major faults and pages swapped in, by the guest's word.
fn faults(statistics: &Statistics) -> Option<u64> {
    let balloon = statistics.balloon?;
    let swapped = balloon.swapped_in_bytes.unwrap_or(0) / 4096;
    Some(balloon.major_faults?.saturating_add(swapped))
}

/// `usage_usec 123` and so on.
fn keyed(text: &str) -> BTreeMap<&str, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key, value.trim().parse().ok()?)))
        .collect()
}

/// The totals of a file of pressure (`some avg10=0.00 avg60=0.00 avg300=0.00 total=123`); nothing where the kernel has none.
fn pressure(text: &str) -> Pressure {
    let total = |kind: &str| {
        let line = text.lines().find(|line| line.starts_with(kind))?;
        line.rsplit_once("total=")?.1.trim().parse().ok()
    };
    Pressure { some_us: total("some").unwrap_or(0), full_us: total("full").unwrap_or(0) }
}

fn grown_pressure(now: Pressure, before: Pressure) -> Pressure {
    Pressure {
        some_us: now.some_us.saturating_sub(before.some_us),
        full_us: now.full_us.saturating_sub(before.full_us),
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn cgroup_number(cgroup: &Path, file: &str, default: u32) -> u32 {
    number(&cgroup.join(file)).and_then(|number| u32::try_from(number).ok()).unwrap_or(default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let text = "usage_usec 1234\nuser_usec 1000\nnr_throttled 3\nthrottled_usec 77\n";
        assert_eq!((keyed(text)["usage_usec"], keyed(text)["throttled_usec"]), (1234, 77));
        let text = "some avg10=1.00 avg60=0.50 avg300=0.10 total=900\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=8\n";
        assert_eq!(pressure(text), Pressure { some_us: 900, full_us: 8 });
        assert_eq!(pressure(""), Pressure::default(), "a kernel without PSI");
    }

    #[test]
    fn time_of_vcpus_and_interrupts_of_devices_are_summed() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (task, name, waited) in [(1, "casemate-vmm", 1_000), (2, "vcpu0", 20), (3, "vcpu1", 3)] {
            write(&format!("proc/7/task/{task}/comm"), &format!("{name}\n"));
            write(&format!("proc/7/task/{task}/schedstat"), &format!("900 {waited} 5\n"));
        }
        write(
            "proc/interrupts",
            "           CPU0       CPU1\n 24:        5          6   IR-PCI-MSIX-0000:03:00.0  0-edge  vfio-msix[0](0000:03:00.0)\n \
             25:        1          1   PCI-MSI  vfio-msix[0](0000:04:00.0)\n 26:  9  9  PCI-MSI  nvme0q0\n",
        );
        let (operator, _orders) = crate::operator::pair("web").unwrap();
        let sampler = Sampler { root: root.path().into(), operator, before: None, host_before: None };
        assert_eq!(sampler.waited_ns(7), 23);
        assert_eq!(sampler.interrupts(&["0000:03:00.0".into()]), 11);
        assert_eq!(sampler.interrupts(&[]), 0);
    }
}
