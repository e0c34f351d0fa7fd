//! User, capabilities, namespaces, root, network, and limits.

use std::{fs, io, path::Path};

use casemate_jail::{Capabilities, ThreadView};

use super::{AuditLine, Measured, measured};

pub(super) fn lines(at: &Measured<'_>) -> io::Result<Vec<AuditLine>> {
    let view = &at.view;
    let uid = at.record.uid;
    let every = |holds: &dyn Fn(&ThreadView) -> bool| view.threads.iter().all(holds);
    let odd = |holds: &dyn Fn(&ThreadView) -> bool, tell: &dyn Fn(&ThreadView) -> String, good: String| {
        let odd: Vec<String> = view
            .threads
            .iter()
            .filter(|thread| !holds(thread))
            .map(|thread| format!("thread {} ({}): {}", thread.tid, printable(&thread.name), tell(thread)))
            .collect();
        if odd.is_empty() { good } else { odd.join("; ") }
    };
    let is_own = |thread: &ThreadView| {
        uid != 0 && thread.uids == [uid; 4] && thread.gids == [uid; 4] && thread.groups.is_empty()
    };
    let has_none = |thread: &ThreadView| thread.capabilities == Capabilities::default();
    let shared: Vec<&str> =
        view.namespaces.iter().filter(|namespace| namespace.is_shared).map(|one| one.kind).collect();
    let kinds: Vec<&str> = view.namespaces.iter().map(|namespace| namespace.kind).collect();
    let options = view.mounts.first().map(|(_, options)| options.as_str()).unwrap_or_default();
    let has = |option: &str| options.split(',').any(|given| given == option);
    let is_bare = view.root_entries.is_empty()
        && view.mounts.len() == 1
        && ["ro", "nosuid", "nodev", "noexec"].into_iter().all(has);
    let interfaces = interfaces(at.record.cell.pid)?;
    Ok(vec![
        measured(
            "user",
            format!("uid and gid {uid} in every thread, no groups"),
            odd(
                &is_own,
                &|thread| {
                    format!("uids {:?}, gids {:?}, groups {:?}", thread.uids, thread.gids, thread.groups)
                },
                format!("so in {} threads", view.threads.len()),
            ),
            every(&is_own),
        ),
        measured(
            "capabilities",
            "none in any of the five sets of any thread",
            odd(&has_none, &|thread| format!("{:x?}", thread.capabilities), "none".into()),
            every(&has_none),
        ),
        measured(
            "privileges",
            "no_new_privs in every thread",
            odd(&|thread| thread.no_new_privs, &|_| "not set".into(), "set".into()),
            every(&|thread| thread.no_new_privs),
        ),
        measured(
            "namespaces",
            "cgroup, ipc, mnt, net, pid and uts are its own",
            if shared.is_empty() {
                format!("{} are its own", kinds.join(", "))
            } else {
                format!("shared: {}", shared.join(", "))
            },
            shared.is_empty() && kinds.len() == 6,
        ),
        measured(
            "root",
            "one mount: empty, read-only, nosuid, nodev, noexec",
            format!("{} mounts ({options}), {} entries", view.mounts.len(), view.root_entries.len()),
            is_bare,
        ),
        measured(
            "network",
            "no interface but lo",
            interfaces.join(", "),
            interfaces.iter().all(|interface| interface == "lo"),
        ),
        measured(
            "dumping",
            "not dumpable",
            if view.is_dumpable { "dumpable" } else { "not dumpable" },
            !view.is_dumpable,
        ),
        measured(
            "environment",
            "0 bytes, beside what all cells have",
            format!("{} bytes", view.environment_bytes),
            view.environment_bytes == 0,
        ),
        program(at.record.cell.pid)?,
        cores(at),
    ])
}

/// The program is a sealed copy in memory, and no file.
fn program(pid: u32) -> io::Result<AuditLine> {
    let path = format!("/proc/{pid}/exe");
    let name = fs::read_link(&path)?.to_string_lossy().into_owned();
    let digest = crate::record::sha256(&fs::read(&path)?);
    let is_copy = name.starts_with("/memfd:casemate-vmm");
    Ok(measured("program", "a copy in memory", format!("{name}, sha256 {digest}"), is_copy))
}

/// Whether its threads may share a core with other processes' at the same moment (core scheduling).
fn cores(at: &Measured<'_>) -> AuditLine {
    let smt = fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default();
    let mut cookies: Vec<u64> = at.cookies.clone();
    cookies.sort_unstable();
    cookies.dedup();
    let wanted = "one core-scheduling cookie of its own for all its threads, where processors have SMT";
    match (smt.trim(), cookies.as_slice()) {
        ("0", _) => {
            measured("cores", wanted, "no core runs two threads at once (SMT is off or absent)", true)
        }
        (_, [cookie]) if *cookie != 0 => measured("cores", wanted, "so in all its threads", true),
        (_, []) => measured("cores", wanted, "the kernel tells of no cookies (CONFIG_SCHED_CORE)", false),
        (_, cookies) => measured("cores", wanted, format!("{} different, or none", cookies.len()), false),
    }
}

fn interfaces(pid: u32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let names = text.lines().skip(2).filter_map(|line| line.split(':').next());
    Ok(names.map(|name| name.trim().to_owned()).collect())
}

/// The cgroup's limits, and the process's.
pub(super) fn limits(at: &Measured<'_>) -> Vec<AuditLine> {
    let (given, found) = (&at.record.limits, &at.limits);
    let is_inside = Path::new("/sys/fs/cgroup").join(&found.cgroup) == given.cgroup;
    let mut lines = vec![measured(
        "cgroup",
        given.cgroup.display().to_string(),
        format!("/sys/fs/cgroup/{}", found.cgroup.display()),
        is_inside,
    )];
    let wanted = [
        // The kernel counts in pages, and rounds down.
        ("memory.max", (given.memory_bytes_max / 4096 * 4096).to_string()),
        ("memory.oom.group", "1".into()),
        ("pids.max", given.pids_max.to_string()),
        ("cpu.max", format!("{} 100000", u64::from(given.cpus_max) * 100_000)),
    ];
    let file = |name: &str| found.cgroup_files.get(name).map_or("absent", String::as_str);
    lines.extend(wanted.into_iter().map(|(name, value)| {
        let is = file(name);
        measured("cgroup", format!("{name} {value}"), format!("{name} {is}"), is == value)
    }));
    // As the kernel shows it: "default" is the weight where no disk has one of its own.
    let weigher =
        ["io.weight", "io.bfq.weight"].into_iter().find(|name| found.cgroup_files.contains_key(name));
    let weight = given.io_weight.map(|weight| (weigher.unwrap_or("io.weight"), format!("default {weight}")));
    let maxima = given.io_max.iter().map(|line| ("io.max", line.clone()));
    lines.extend(weight.into_iter().chain(maxima).map(|(name, value)| {
        let is = file(name);
        measured(
            "cgroup",
            format!("{name} {value}"),
            format!("{name} {is}"),
            is.lines().any(|line| line == value),
        )
    }));
    let wanted = [
        ("Max core file size", 0),
        ("Max locked memory", given.memlock_bytes),
        ("Max open files", given.descriptors_max),
        ("Max processes", given.threads_max),
        ("Max file size", given.file_size_bytes_max),
        ("Max msgqueue size", 0),
        ("Max realtime priority", 0),
    ];
    lines.extend(wanted.into_iter().map(|(name, value)| {
        let is = found.rlimits.get(name).copied();
        let tell = |limit: Option<u64>| limit.map_or("unlimited".into(), |limit| limit.to_string());
        let told = is.map_or("absent".into(), |(soft, hard)| format!("{}, hard {}", tell(soft), tell(hard)));
        let wanted = format!("{name} {value}");
        measured("limits", wanted, format!("{name} {told}"), is == Some((Some(value), Some(value))))
    }));
    lines
}

/// A name that a thread may have given itself.
pub(super) fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(16).collect()
}
