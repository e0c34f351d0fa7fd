//! Which processors and which memory of the host's a guest may be placed on.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use casemate_spec::{ByteSize, CpuList, Guest, Refusal};

use crate::{Host, host::attribute};

/// Numbers in a list of the kernel's at most: no host has as many processors.
const NUMBERS_MOST: usize = 65_536;

/// Whether a guest finds on this host the processors it is pinned to, the node that its memory is to come from, and the
/// huge pages that it is to be made of. `cgroup` is where its cell's cgroup will be.
///
/// # Errors
/// `processor-missing`, `node-missing`, `placement-outside`, `huge-pages-missing`, each with what there is.
pub fn placeable(host: &Host, cgroup: &Path, guest: &Guest) -> Result<(), Refusal> {
    let pins = guest.cpu.pins.iter().take(guest.vcpus.into());
    pins.enumerate().try_for_each(|(vcpu, pin)| pinnable(host, cgroup, vcpu, pin))?;
    if let Some(node) = guest.ram.numa_node {
        has_node(host, cgroup, node)?;
    }
    match guest.ram.pages.set_aside_bytes() {
        Some(page_bytes) => {
            has_huge_pages(host, page_bytes, guest.memory.bytes() / page_bytes, guest.ram.numa_node)
        }
        None => Ok(()),
    }
}

fn pinnable(host: &Host, cgroup: &Path, vcpu: usize, pin: &CpuList) -> Result<(), Refusal> {
    let subject = format!("vCPU {vcpu}");
    let online = attribute(host.path("sys/devices/system/cpu/online")).unwrap_or_default();
    let (there, wanted) = (numbers(&online), BTreeSet::from_iter(pin.cpus().map(u32::from)));
    if let Some(cpu) = wanted.difference(&there).next() {
        let cause = format!("the host has no processor {cpu}, or it is offline; it has {online}");
        return Err(Refusal::new("processor-missing", subject, cause, "pin it to some of those"));
    }
    inside(host, cgroup, "cpuset.cpus.effective", &wanted)
        .map_err(|(file, allowed)| outside(subject, pin.to_string(), &file, &allowed))
}

fn has_node(host: &Host, cgroup: &Path, node: u16) -> Result<(), Refusal> {
    let nodes = attribute(host.path("sys/devices/system/node/has_memory")).unwrap_or_default();
    let subject = format!("node {node}");
    if !numbers(&nodes).contains(&node.into()) {
        let cause = format!("the host has no such node, or it has no memory; there are {nodes}");
        return Err(Refusal::new("node-missing", subject, cause, "name one of those, or none"));
    }
    inside(host, cgroup, "cpuset.mems.effective", &[node.into()].into())
        .map_err(|(file, allowed)| outside(subject, node.to_string(), &file, &allowed))
}

fn outside(subject: String, wanted: String, file: &Path, allowed: &str) -> Refusal {
    let cause = format!("{wanted} lies outside of what {} allows: {allowed}", file.display());
    let remedy = "choose from those, or widen the cgroup";
    Refusal::new("placement-outside", subject, cause, remedy)
}

/// Whether the nearest cgroup that has a say allows `wanted`. One without the file says nothing.
fn inside(host: &Host, cgroup: &Path, file: &str, wanted: &BTreeSet<u32>) -> Result<(), (PathBuf, String)> {
    let relative = cgroup.strip_prefix("/").unwrap_or(cgroup);
    let files = relative.ancestors().map(|directory| host.path(directory).join(file));
    let found =
        files.filter_map(|path| Some((attribute(&path).filter(|text| !text.is_empty())?, path))).next();
    match found {
        Some((allowed, path)) if !wanted.is_subset(&numbers(&allowed)) => Err((path, allowed)),
        _ => Ok(()),
    }
}

/// The pages that are free and not promised to another.
fn has_huge_pages(host: &Host, page_bytes: u64, wanted: u64, node: Option<u16>) -> Result<(), Refusal> {
    let name = format!("hugepages-{}kB", page_bytes >> 10);
    let everywhere = host.path("sys/kernel/mm/hugepages").join(&name);
    let directory = match node {
        Some(node) => host.path(format!("sys/devices/system/node/node{node}/hugepages/{name}")),
        None => everywhere.clone(),
    };
    let number = |directory: &Path, file: &str| {
        attribute(directory.join(file)).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
    };
    let free = number(&directory, "free_hugepages");
    // Promises are not kept by node.
    let promised = number(&everywhere, "resv_hugepages");
    let available = free.saturating_sub(promised);
    if available >= wanted {
        return Ok(());
    }
    let size = ByteSize::from_bytes(page_bytes);
    let all = number(&directory, "nr_hugepages");
    let cause = format!("{wanted} pages of {size} are wanted; of {all} set aside, {available} are to be had");
    let remedy = format!(
        "set more aside: echo {} >{}/nr_hugepages (1 GiB: best at boot, hugepagesz=1G hugepages=N)",
        all.saturating_add(wanted - available),
        directory.display()
    );
    Err(Refusal::new("huge-pages-missing", "the guest's memory", cause, remedy))
}

/// A list of the kernel's: `0-3,7`. What is no list is empty.
fn numbers(list: &str) -> BTreeSet<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().take(NUMBERS_MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;
    use casemate_spec::parse_guest;

    const CGROUP: &str = "/sys/fs/cgroup/casemate";

    fn judged(machine: &Fixture, table: &str) -> Result<(), String> {
        let text = format!(
            "name = \"g\"\ntenant = \"t\"\nvcpus = 2\nmemory = \"64 MiB\"\n[boot]\nkernel = \"k\"\n{table}\n"
        );
        let guest = parse_guest(Path::new("g.toml"), &text).unwrap().guest;
        placeable(&machine.host(), Path::new(CGROUP), &guest).map_err(|refusal| refusal.to_string())
    }

    fn machine() -> Fixture {
        let machine = Fixture::typical();
        machine.write("sys/devices/system/cpu/online", "0-3,6\n");
        machine.write("sys/devices/system/node/has_memory", "0-1\n");
        machine
    }

    #[test]
    fn pins_are_to_processors_that_are_there_and_allowed() {
        let machine = machine();
        assert_eq!(judged(&machine, "[cpu]\npin = [\"0-1\", \"6\"]"), Ok(()));
        let refused = judged(&machine, "[cpu]\npin = [\"0\", \"3-4\"]").unwrap_err();
        assert!(refused.starts_with("[processor-missing] vCPU 1: the host has no processor 4"), "{refused}");
        machine.write("sys/fs/cgroup/cpuset.cpus.effective", "0-1\n");
        let refused = judged(&machine, "[cpu]\npin = [\"0\", \"6\"]").unwrap_err();
        assert!(refused.starts_with("[placement-outside] vCPU 1: 6 lies outside"), "{refused}");
        // The nearest one counts.
        machine.write("sys/fs/cgroup/casemate/cpuset.cpus.effective", "0-7\n");
        assert_eq!(judged(&machine, "[cpu]\npin = [\"0\", \"6\"]"), Ok(()));
    }

    #[test]
    fn memory_comes_from_nodes_that_are_there_and_allowed() {
        let machine = machine();
        assert_eq!(judged(&machine, "[ram]\nnuma_node = 1"), Ok(()));
        assert!(judged(&machine, "[ram]\nnuma_node = 2").unwrap_err().contains("[node-missing] node 2"));
        machine.write("sys/fs/cgroup/cpuset.mems.effective", "0\n");
        assert!(judged(&machine, "[ram]\nnuma_node = 1").unwrap_err().contains("[placement-outside]"));
    }

    #[test]
    fn huge_pages_are_counted() {
        let machine = machine();
        let pages = |directory: &str, [all, free, promised]: [u32; 3]| {
            for (file, number) in
                [("nr_hugepages", all), ("free_hugepages", free), ("resv_hugepages", promised)]
            {
                machine.write(&format!("{directory}/hugepages-2048kB/{file}"), &format!("{number}\n"));
            }
        };
        let table = "[ram]\nhuge_pages = \"2 MiB\"";
        let refused = judged(&machine, table).unwrap_err();
        assert!(
            refused.contains("32 pages of 2 MiB are wanted; of 0 set aside, 0 are to be had"),
            "{refused}"
        );
        pages("sys/kernel/mm/hugepages", [50, 40, 9]);
        assert!(judged(&machine, table).unwrap_err().contains("echo 51 >"));
        pages("sys/kernel/mm/hugepages", [50, 40, 8]);
        assert_eq!(judged(&machine, table), Ok(()));
        pages("sys/devices/system/node/node1/hugepages", [50, 8, 0]);
        assert!(judged(&machine, &format!("{table}\nnuma_node = 1")).is_err());
    }

    #[test]
    fn lists_of_the_kernels() {
        assert_eq!(numbers("0-2,5\n"), BTreeSet::from([0, 1, 2, 5]));
        assert!(
            numbers("").is_empty()
                && numbers("a-b,").is_empty()
                && numbers("0-4294967295").len() == NUMBERS_MOST
        );
    }
}
