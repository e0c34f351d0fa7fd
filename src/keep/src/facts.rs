//! What is told to policies besides: the attrs of a request, by the names that docs/policies.md lists.

use std::{fs, path::Path};

use casemate_host::PciFunction;
use casemate_policy::Attrs;
use casemate_spec::{ConsoleDevice, CpuList, Guest};

/// Logical processors of a host that are told of at most: 4,096 take some 60 KB of a request.
const PROCESSORS_MOST: usize = 4096;

/// What is told of the host.
pub(crate) fn host() -> Attrs {
    host_below(Path::new("/"))
}

fn host_below(root: &Path) -> Attrs {
    let mut attrs = Attrs::new();
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            attrs.insert(name.to_owned(), value);
        }
    };
    add("cpu-topology", Some(topology(&root.join("sys/devices/system/cpu"))));
    add("numa-memory", Some(numa_memory(&root.join("sys/devices/system/node"))));
    add("kernel", line(&root.join("proc/sys/kernel/osrelease")));
    let nested = ["kvm_amd", "kvm_intel"]
        .iter()
        .find_map(|module| line(&root.join(format!("sys/module/{module}/parameters/nested"))));
    add("nested", nested.map(|value| matches!(value.as_str(), "1" | "Y").to_string()));
    add("smt", line(&root.join("sys/devices/system/cpu/smt/active")).map(|value| (value == "1").to_string()));
    attrs
}

/// What is told of a guest.
pub(crate) fn guest(guest: &Guest) -> Attrs {
    let mut pins: Vec<u16> = guest.cpu.pins.iter().flat_map(CpuList::cpus).collect();
    pins.sort_unstable();
    pins.dedup();
    let pins: Vec<_> = pins.iter().map(ToString::to_string).collect();
    let yes = |is: bool| is.then(|| "true".to_owned());
    [
        ("cpu-pins", Some(pins.join(" "))),
        ("cpu-model", Some(guest.cpu.model.name().to_owned())),
        ("nested", yes(guest.cpu.nested)),
        ("pages", Some(guest.ram.pages.name().to_owned())),
        ("prefault", yes(guest.ram.prefault)),
        ("numa-node", guest.ram.numa_node.map(|node| node.to_string())),
        ("vsock", yes(guest.vsock.is_some())),
        ("console", (guest.console == ConsoleDevice::Virtio).then(|| guest.console.name().to_owned())),
        ("ports", (!guest.ports.is_empty()).then(|| guest.ports.len().to_string())),
        ("peer-to-peer", yes(guest.dma.peer_to_peer)),
        ("slots", (guest.hotplug.slots > 0).then(|| guest.hotplug.slots.to_string())),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value.filter(|value| !value.is_empty())?)))
    .collect()
}

/// What is told of a device.
pub(crate) fn device(function: &PciFunction) -> Attrs {
    let role = match (function.physical_function, function.details.virtual_functions_most) {
        (Some(parent), _) => Some(format!("vf {parent}")),
        (None, Some(_)) => Some("pf".to_owned()),
        (None, None) => None,
    };
    let mates: Vec<_> = function.group_mates.iter().map(ToString::to_string).collect();
    [
        ("numa-node", function.numa_node.map(|node| node.to_string())),
        ("sriov", role),
        ("serial", function.serials.first().cloned()),
        ("group-mates", (!mates.is_empty()).then(|| mates.join(" "))),
        ("reset-methods", Some(function.reset_methods.join(" "))),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value.filter(|value| !value.is_empty())?)))
    .collect()
}

/// `0@0.0.0 1@0.0.1`: number, NUMA node, package, core.
fn topology(cpus: &Path) -> String {
    let mut processors: Vec<(u32, String)> = entries(cpus)
        .into_iter()
        .filter_map(|name| {
            let number: u32 = name.strip_prefix("cpu")?.parse().ok()?;
            let cpu = cpus.join(&name);
            let id = |file: &str| line(&cpu.join("topology").join(file))?.parse::<i64>().ok();
            let node = entries(&cpu).iter().find_map(|entry| entry.strip_prefix("node")?.parse::<u32>().ok());
            let (package, core) = (id("physical_package_id")?.max(0), id("core_id")?.max(0));
            Some((number, format!("{number}@{}.{package}.{core}", node.unwrap_or(0))))
        })
        .take(PROCESSORS_MOST)
        .collect();
    processors.sort_unstable();
    processors.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

/// `0=34359738368/17179869184`: node, all its memory, what of it is free.
fn numa_memory(nodes: &Path) -> String {
    let mut found: Vec<(u32, String)> = entries(nodes)
        .into_iter()
        .filter_map(|name| {
            let number: u32 = name.strip_prefix("node")?.parse().ok()?;
            let text = fs::read_to_string(nodes.join(&name).join("meminfo")).ok()?;
            // `Node 0 MemTotal:       16384 kB`
            let bytes = |key: &str| {
                let line = text.lines().find(|line| line.contains(key))?;
                line.split_whitespace().nth(3)?.parse::<u64>().ok()?.checked_mul(1024)
            };
            Some((number, format!("{number}={}/{}", bytes("MemTotal:")?, bytes("MemFree:")?)))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(" ")
}

fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn a_host_is_told_of() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (cpu, node, package, core) in [(0, 0, 0, 0), (10, 1, 1, 3), (2, 0, 0, 0)] {
            let cpu = format!("sys/devices/system/cpu/cpu{cpu}");
            write(&format!("{cpu}/topology/physical_package_id"), &format!("{package}\n"));
            write(&format!("{cpu}/topology/core_id"), &format!("{core}\n"));
            fs::create_dir_all(root.path().join(format!("{cpu}/node{node}"))).unwrap();
        }
        write("sys/devices/system/cpu/smt/active", "1\n");
        write(
            "sys/devices/system/node/node1/meminfo",
            "Node 1 MemTotal:       16 kB\nNode 1 MemFree:        4 kB\n",
        );
        write("sys/module/kvm_amd/parameters/nested", "0\n");
        let attrs = host_below(root.path());
        assert_eq!(attrs["cpu-topology"], "0@0.0.0 2@0.0.0 10@1.1.3");
        assert_eq!(attrs["numa-memory"], "1=16384/4096");
        assert_eq!((attrs["nested"].as_str(), attrs["smt"].as_str()), ("false", "true"));
        assert!(!attrs.contains_key("kernel"), "what can't be read isn't told");
    }
}
