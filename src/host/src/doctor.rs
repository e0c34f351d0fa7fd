//! What this host can do for guests, and what is missing.

mod devices;
mod pages;
mod strangers;

use std::fs::{self, File};

use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::{
    Host, driver,
    host::{attribute, names},
    judge::{Remapping, interrupt_remapping},
    pools::acs_is_overridden,
    sys::{probe, vfio},
};

/// The stable API of KVM.
const KVM_API_VERSION: i32 = 12;
/// Floor of the jail: ABI 2 came with Linux 5.19.
const LANDLOCK_ABI_MIN: i32 = 2;
/// Debian 12's kernel, the oldest that Casemate is tried with.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// What the jail's filters answer with.
const SECCOMP_ACTIONS: [&str; 3] = ["kill_process", "errno", "allow"];
/// What a cell is limited by.
const CGROUP_CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckState {
    /// It is there.
    Ok,
    /// It is not there, and guests with devices, or all guests, cannot run.
    Missing,
    /// It works, with a limit that is told.
    Warn,
}

/// One thing that guests need of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it went.
    pub state: CheckState,
    /// What was found.
    pub found: String,
    /// What to do, when it is not all well.
    pub remedy: Option<String>,
}

/// Looks at all that guests need. Changes nothing; what a device node would tell is told of the live host only.
pub fn doctor(host: &Host) -> Vec<Check> {
    let needs = [
        kernel(host),
        kvm(host),
        kvm_backend(host),
        iommu_groups(host),
        remapping(host),
        device_isolation(host),
        vfio_pci(host),
        vfio_container(host),
        landlock(),
        seccomp(host),
        cgroup(host),
        memlock(),
        user_namespaces(host),
        memfd_exec(host),
        pages::large_pages(host),
    ];
    needs.into_iter().chain(devices::checks(host)).chain(strangers::checks(host)).collect()
}

fn check(name: &'static str, state: CheckState, found: impl Into<String>, remedy: &str) -> Check {
    let remedy = (state != CheckState::Ok).then(|| remedy.to_owned());
    Check { name, state, found: found.into(), remedy }
}

fn ok_or(holds: bool, otherwise: CheckState) -> CheckState {
    if holds { CheckState::Ok } else { otherwise }
}

fn kernel(host: &Host) -> Check {
    let release = attribute(host.path("proc/sys/kernel/osrelease")).unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    let state = ok_or(version.is_some_and(|version| version >= KERNEL_MIN), CheckState::Warn);
    check("kernel", state, format!("Linux {release}"), "use Linux 6.1 (Debian 12) or newer")
}

fn kvm(host: &Host) -> Check {
    let remedy = "turn virtualization on in the firmware (VT-x, AMD-V), load kvm_intel or kvm_amd, and run as a user who may open /dev/kvm";
    let opened = File::options().read(true).write(true).open(host.path("dev/kvm"));
    match opened.and_then(|kvm| probe::kvm_api_version(&kvm)) {
        Ok(version) => check(
            "kvm",
            ok_or(version == KVM_API_VERSION, CheckState::Missing),
            format!("/dev/kvm, API version {version}"),
            remedy,
        ),
        Err(error) => check("kvm", CheckState::Missing, format!("/dev/kvm: {error}"), remedy),
    }
}

/// A /dev/kvm alone does not tell that it runs Linux at a usable speed: some sandboxes put an emulation there.
fn kvm_backend(host: &Host) -> Check {
    let module =
        ["kvm_intel", "kvm_amd"].into_iter().find(|module| host.path("sys/module").join(module).exists());
    let nested =
        host.table("proc/cpuinfo").unwrap_or_default().lines().any(|line| {
            line.starts_with("flags") && line.split_whitespace().any(|flag| flag == "hypervisor")
        });
    let inside = if nested { ", on a host that is itself a guest (nested: slower)" } else { "" };
    let remedy = "use a host with kvm_intel or kvm_amd; whether this /dev/kvm runs Linux guests cannot be told without trying";
    match module {
        Some(module) => check("kvm-backend", CheckState::Ok, format!("{module}{inside}"), remedy),
        None => {
            check("kvm-backend", CheckState::Warn, format!("neither kvm_intel nor kvm_amd{inside}"), remedy)
        }
    }
}

fn iommu_groups(host: &Host) -> Check {
    let count = names(host.path("sys/kernel/iommu_groups")).len();
    if count > 0 {
        return check("iommu", CheckState::Ok, format!("{count} groups"), "");
    }
    let (why, remedy) = devices::why_no_groups(host);
    check("iommu", CheckState::Missing, format!("0 groups: {why}"), remedy)
}

fn remapping(host: &Host) -> Check {
    let remedy =
        "turn interrupt remapping on in the firmware, and remove intremap=off from the kernel's command line";
    let allowed = attribute(host.path("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"));
    match interrupt_remapping(host) {
        Remapping::On(_) if allowed.as_deref() == Some("Y") => {
            let remedy = "echo N > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
            check("interrupt-remapping", CheckState::Missing, "allow_unsafe_interrupts is set", remedy)
        }
        Remapping::On(units) => check("interrupt-remapping", CheckState::Ok, units, remedy),
        Remapping::Off(why) => check("interrupt-remapping", CheckState::Missing, why, remedy),
    }
}

/// What a host needs beside remapping when those who get devices aren't trusted.
fn device_isolation(host: &Host) -> Check {
    const NAME: &str = "isolation";
    let groups = host.path("sys/kernel/iommu_groups");
    let is_open = |group: &String| attribute(groups.join(group).join("type")).as_deref() == Some("identity");
    let open = names(&groups).iter().filter(|group| is_open(group)).count();
    if acs_is_overridden(host) {
        let remedy = "remove pcie_acs_override from the kernel's command line; until then only trusted pools' devices are given";
        return check(NAME, CheckState::Warn, "pcie_acs_override: groups are apart on paper only", remedy);
    }
    let found = format!("{open} IOMMU groups in passthrough mode");
    let remedy = "remove iommu=pt from the kernel's command line; until then only trusted pools' devices of these are given";
    check(NAME, ok_or(open == 0, CheckState::Warn), found, remedy)
}

fn vfio_pci(host: &Host) -> Check {
    if host.path("sys/bus/pci/drivers").join(driver::VFIO).exists() {
        return check("vfio-pci", CheckState::Ok, "loaded", "");
    }
    let release = attribute(host.path("proc/sys/kernel/osrelease")).unwrap_or_default();
    let modules = host.path("lib/modules").join(release);
    let listed = ["modules.dep", "modules.builtin"].iter().any(|list| {
        crate::host::read_text(&modules.join(list), 16 << 20).is_ok_and(|text| text.contains("/vfio-pci.ko"))
    });
    if listed {
        return check(
            "vfio-pci",
            CheckState::Ok,
            "not loaded, but there: it is loaded when a device is claimed",
            "",
        );
    }
    check(
        "vfio-pci",
        CheckState::Missing,
        "neither loaded nor among the modules",
        "install the distribution's full kernel; then: modprobe vfio-pci",
    )
}

fn vfio_container(host: &Host) -> Check {
    let remedy = "load the modules: modprobe -a vfio-pci vfio_iommu_type1";
    match vfio::open_container(&host.path("dev/vfio/vfio")) {
        Ok(_) => check("vfio-container", CheckState::Ok, "type1 v2", remedy),
        Err(error) => {
            check("vfio-container", CheckState::Missing, format!("/dev/vfio/vfio: {error}"), remedy)
        }
    }
}

fn landlock() -> Check {
    let remedy = "put lsm=landlock,... on the kernel's command line, or use Linux 5.19 or newer";
    match probe::landlock_abi() {
        Ok(abi) => check(
            "landlock",
            ok_or(abi >= LANDLOCK_ABI_MIN, CheckState::Missing),
            format!("ABI {abi}"),
            remedy,
        ),
        Err(error) => check("landlock", CheckState::Missing, error.to_string(), remedy),
    }
}

fn seccomp(host: &Host) -> Check {
    let actions = attribute(host.path("proc/sys/kernel/seccomp/actions_avail")).unwrap_or_default();
    let has = |action: &&str| actions.split_whitespace().any(|available| available == *action);
    let state = ok_or(SECCOMP_ACTIONS.iter().all(has), CheckState::Missing);
    let found = if actions.is_empty() { "not there".to_owned() } else { actions.clone() };
    check("seccomp", state, found, "use a kernel with CONFIG_SECCOMP_FILTER")
}

fn cgroup(host: &Host) -> Check {
    let root = host.path("sys/fs/cgroup");
    let Some(controllers) = attribute(root.join("cgroup.controllers")) else {
        let remedy = "mount it: mount -t cgroup2 none /sys/fs/cgroup (hybrid hosts: systemd.unified_cgroup_hierarchy=1)";
        return check("cgroup-v2", CheckState::Missing, "not mounted on /sys/fs/cgroup", remedy);
    };
    let has = |controller: &&str| controllers.split_whitespace().any(|available| available == *controller);
    let state = ok_or(CGROUP_CONTROLLERS.iter().all(has), CheckState::Missing);
    check(
        "cgroup-v2",
        state,
        controllers.clone(),
        "enable the controllers cpu, memory, pids and io for this cgroup",
    )
}

fn memlock() -> Check {
    let limit = getrlimit(Resource::Memlock);
    let found =
        limit.maximum.map_or_else(|| "unlimited".to_owned(), |bytes| format!("at most {} MiB", bytes >> 20));
    // Root raises it for each guest; others are held to it.
    let state = ok_or(limit.maximum.is_none() || rustix::process::geteuid().is_root(), CheckState::Warn);
    check(
        "memlock",
        state,
        found,
        "run as root, or raise it (ulimit -l, LimitMEMLOCK=): all memory of a guest with devices is locked",
    )
}

fn user_namespaces(host: &Host) -> Check {
    let remedy = "sysctl user.max_user_namespaces=1024 (and on Debian kernel.unprivileged_userns_clone=1)";
    let number = |path: &str| attribute(host.path(path)).and_then(|text| text.parse::<u64>().ok());
    match number("proc/sys/user/max_user_namespaces") {
        Some(most) if most > 0 && number("proc/sys/kernel/unprivileged_userns_clone") != Some(0) => {
            check("user-namespaces", CheckState::Ok, format!("at most {most}"), remedy)
        }
        // The jail starts from root, which needs none.
        Some(most) => check(
            "user-namespaces",
            CheckState::Warn,
            format!("at most {most}, or not for ordinary users"),
            remedy,
        ),
        None => check("user-namespaces", CheckState::Warn, "not there", remedy),
    }
}

/// The VMM is started from a sealed memfd; at level 2 the kernel makes none that can be executed.
fn memfd_exec(host: &Host) -> Check {
    let path = host.path("proc/sys/vm/memfd_noexec");
    let level = match fs::exists(&path) {
        Ok(false) => return check("memfd-exec", CheckState::Ok, "allowed (this kernel has no limit)", ""),
        _ => attribute(&path).unwrap_or_default(),
    };
    check(
        "memfd-exec",
        ok_or(level != "2", CheckState::Missing),
        format!("vm.memfd_noexec = {level}"),
        "sysctl vm.memfd_noexec=1",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    fn state(machine: &Fixture, name: &str) -> CheckState {
        let checks = doctor(&machine.host());
        checks.into_iter().find(|check| check.name == name).unwrap().state
    }

    #[test]
    fn each_check_reads_the_machine() {
        let machine = Fixture::typical();
        for (name, path, good, bad, bad_state) in [
            ("kernel", "proc/sys/kernel/osrelease", "6.12.95+deb12-amd64\n", "5.10.0-9\n", CheckState::Warn),
            (
                "seccomp",
                "proc/sys/kernel/seccomp/actions_avail",
                "kill_process errno allow\n",
                "allow\n",
                CheckState::Missing,
            ),
            (
                "cgroup-v2",
                "sys/fs/cgroup/cgroup.controllers",
                "cpu io memory pids\n",
                "cpu\n",
                CheckState::Missing,
            ),
            ("memfd-exec", "proc/sys/vm/memfd_noexec", "1\n", "2\n", CheckState::Missing),
            ("user-namespaces", "proc/sys/user/max_user_namespaces", "100\n", "0\n", CheckState::Warn),
            ("isolation", "sys/kernel/iommu_groups/10/type", "DMA\n", "identity\n", CheckState::Warn),
            ("interrupt-remapping", "proc/cmdline", "quiet\n", "intremap=off\n", CheckState::Missing),
        ] {
            machine.write(path, good);
            assert_eq!(state(&machine, name), CheckState::Ok, "{name}");
            machine.write(path, bad);
            assert_eq!(state(&machine, name), bad_state, "{name}");
        }
        machine.write("sys/kernel/iommu_groups/10/type", "DMA-FQ\n");
        machine.write("proc/cmdline", "pcie_acs_override=downstream\n");
        assert_eq!(state(&machine, "isolation"), CheckState::Warn);
        assert_eq!(state(&machine, "iommu"), CheckState::Ok);
        assert_eq!(state(&machine, "vfio-pci"), CheckState::Ok);
        machine.remove_driver("vfio-pci");
        assert_eq!(state(&machine, "vfio-pci"), CheckState::Missing);
        assert_eq!(state(&machine, "kvm"), CheckState::Missing);
        assert_eq!(state(&machine, "vfio-container"), CheckState::Missing);
        assert_eq!(state(&machine, "kvm-backend"), CheckState::Warn);
    }

    #[test]
    fn what_is_not_well_has_a_remedy() {
        for check in doctor(&Fixture::typical().host()) {
            assert_eq!(check.remedy.is_some(), check.state != CheckState::Ok, "{check:?}");
            assert_ne!(check.remedy.as_deref(), Some(""), "{check:?}");
        }
    }
}
