//! Open descriptors by kind.

use std::collections::BTreeMap;

use casemate_jail::Descriptor;

use super::{AuditLine, measured};
use crate::GuestRecord;

/// One line: what kinds there are, and how many of each.
pub(super) fn line(descriptors: &[Descriptor], record: &GuestRecord) -> AuditLine {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let mut faults = Vec::new();
    for descriptor in descriptors {
        match kind(&descriptor.target, record) {
            Some(kind) => *kinds.entry(kind).or_default() += 1,
            None => faults.push(format!("descriptor {} is {:?}", descriptor.number, descriptor.target)),
        }
    }
    let count = |kind: &str| kinds.get(kind).copied().unwrap_or(0);
    let groups = record.devices.iter().map(|device| device.group).collect::<std::collections::BTreeSet<_>>();
    // One for what it started with, and one for each slot.
    let containers =
        record.devices.iter().map(|device| device.slot).collect::<std::collections::BTreeSet<_>>();
    let vcpus = usize::try_from(record.vcpus).unwrap_or(usize::MAX);
    let nets = usize::try_from(record.nets).unwrap_or(usize::MAX);
    for (kind, most) in [
        ("kvm", 1),
        ("kvm-vm", 1),
        ("kvm-vcpu", vcpus),
        ("kvm-vfio", usize::from(!groups.is_empty() || record.slots > 0)),
        ("vfio-container", containers.len()),
        ("vfio-group", groups.len()),
        ("vfio-device", record.devices.len()),
        ("tap", nets),
        ("vhost", nets),
        ("image", record.files.len()),
        // Of disks, which are fewer than files.
        ("ring", record.files.len()),
    ] {
        if count(kind) > most {
            faults.push(format!("{} of kind {kind}, at most {most}", count(kind)));
        }
    }
    let mut found = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>();
    let passed = faults.is_empty();
    found.extend(faults);
    let wanted = "what a VMM works with, no more of each than the guest has, no file but its images";
    measured("descriptors", wanted, found.join(", "), passed)
}

/// The kind of what /proc names so; `None` for what has no place in a cell.
fn kind(target: &str, record: &GuestRecord) -> Option<&'static str> {
    let anonymous = target.strip_prefix("anon_inode:").map(|name| name.trim_matches(['[', ']']));
    match anonymous {
        Some("eventfd") => return Some("eventfd"),
        Some("eventpoll") => return Some("epoll"),
        Some("io_uring") => return Some("ring"),
        Some("kvm-vm") => return Some("kvm-vm"),
        Some("kvm-vfio") => return Some("kvm-vfio"),
        Some("vfio-device") => return Some("vfio-device"),
        Some(name) if name.starts_with("kvm-vcpu") => return Some("kvm-vcpu"),
        Some(_) => return None,
        None => {}
    }
    match target {
        "/dev/null" => Some("null"),
        "/dev/kvm" => Some("kvm"),
        "/dev/net/tun" => Some("tap"),
        "/dev/vhost-net" => Some("vhost"),
        "/dev/vfio/vfio" => Some("vfio-container"),
        _ if target.starts_with("/dev/vfio/") => Some("vfio-group"),
        _ if target.starts_with("pipe:[") => Some("pipe"),
        _ if target.starts_with("socket:[") => Some("socket"),
        _ if target.starts_with("/memfd:guest-ram") => Some("memory"),
        _ => {
            let path = target.strip_suffix(" (deleted)").unwrap_or(target);
            record.files.iter().any(|file| file.as_os_str() == path).then_some("image")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    fn of(targets: &[&str]) -> AuditLine {
        let descriptors = targets.iter().zip(0..);
        let descriptors: Vec<_> =
            descriptors.map(|(target, number)| Descriptor { number, target: (*target).into() }).collect();
        line(&descriptors, &record("g"))
    }

    #[test]
    fn what_a_guest_has_passes() {
        let line = of(&[
            "/dev/null",
            "pipe:[1]",
            "socket:[2]",
            "/dev/kvm",
            "anon_inode:kvm-vm",
            "anon_inode:kvm-vcpu:0",
            "anon_inode:[eventfd]",
            "anon_inode:[eventfd]",
            "anon_inode:[eventpoll]",
            "anon_inode:[io_uring]",
            "/images/disk (deleted)",
        ]);
        assert!(line.passed, "{line:?}");
        assert!(line.found.contains("2 eventfd") && line.found.contains("1 image"), "{line:?}");
    }

    #[test]
    fn what_it_does_not_have_fails() {
        for odd in [
            "/",
            "/etc/passwd",
            "/images/disk2",
            "anon_inode:bpf-map",
            "/memfd:x (deleted)",
            "/dev/vfio/7",
            "/dev/net/tun",
            "/dev/vhost-net",
            "anon_inode:[vfio-device]",
            "anon_inode:kvm-vfio",
            "anon_inode:[pidfd]",
        ] {
            assert!(!of(&[odd]).passed, "{odd}");
        }
        assert!(!of(&["anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1"]).passed);
    }
}
