//! A running cell as /proc shows it: measured, not remembered.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path};

use crate::sys::ENVIRONMENT;

/// The capability sets of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the sets' own, capabilities(7)")]
pub struct Capabilities {
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadView {
    /// Its id as the host sees it.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// 0 without seccomp, 1 strict, 2 with filters.
    pub seccomp_mode: u32,
    /// How many filters are stacked; `None` before Linux 5.9.
    pub seccomp_filters: Option<u32>,
    /// Whether exec can give it no rights.
    pub no_new_privs: bool,
    /// Real, effective, saved and file system uid.
    pub uids: [u32; 4],
    /// The same of the gid.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// All should be 0.
    pub capabilities: Capabilities,
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `mnt`, `net`, ...
    pub kind: &'static str,
    /// Whether the caller lives in it as well.
    pub is_shared: bool,
}

/// One open descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub number: u32,
    /// What /proc links it to: a path, or `socket:[…]` and the like.
    pub target: String,
}

/// What /proc tells of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CellView {
    /// Every thread.
    pub threads: Vec<ThreadView>,
    /// The namespaces that a cell has of its own.
    pub namespaces: Vec<Namespace>,
    /// Names in the root directory.
    pub root_entries: Vec<String>,
    /// Mounts of its mount namespace: mount point and options.
    pub mounts: Vec<(String, String)>,
    /// Open descriptors, in order.
    pub descriptors: Vec<Descriptor>,
    /// Whether processes of the same uid may trace it and read its /proc files.
    pub is_dumpable: bool,
    /// Bytes of environment, beside the one variable that all cells have.
    pub environment_bytes: usize,
}

/// The kinds of namespaces that a cell has of its own.
const NAMESPACES: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];

/// Reads what /proc tells of a process; needs to be root on the host.
///
/// # Errors
/// Those of reading /proc: NotFound when the process has ended.
pub fn inspect(pid: u32) -> io::Result<CellView> {
    let process = Path::new("/proc").join(pid.to_string());
    let mut threads = Vec::new();
    for tid in numbers(&process.join("task"))? {
        let Some(status) = present(fs::read_to_string(process.join(format!("task/{tid}/status"))))? else {
            continue;
        };
        threads.push(
            thread(tid, &status).ok_or_else(|| io::Error::other("an unknown form of /proc/PID/status"))?,
        );
    }
    let mut namespaces = Vec::new();
    for kind in NAMESPACES {
        let [theirs, ours] =
            [&process, Path::new("/proc/self")].map(|of| fs::read_link(of.join("ns").join(kind)));
        namespaces.push(Namespace { kind, is_shared: theirs? == ours? });
    }
    let mut descriptors = Vec::new();
    for number in numbers(&process.join("fd"))? {
        let Some(target) = present(fs::read_link(process.join(format!("fd/{number}"))))? else { continue };
        descriptors.push(Descriptor { number, target: target.to_string_lossy().into_owned() });
    }
    let root = fs::read_dir(process.join("root"))?;
    let root_entries = root.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    // Its files in /proc belong to root when it is not dumpable (proc_pid(5)).
    let owner = fs::metadata(process.join("fd"))?.uid();
    let is_dumpable = threads.iter().any(|thread| thread.uids[1] == owner);
    Ok(CellView {
        root_entries: root_entries.collect::<io::Result<_>>()?,
        mounts: mounts(&fs::read_to_string(process.join("mounts"))?),
        environment_bytes: {
            let all = fs::read(process.join("environ"))?;
            all.strip_prefix(ENVIRONMENT.to_bytes_with_nul()).unwrap_or(&all).len()
        },
        threads,
        namespaces,
        descriptors,
        is_dumpable,
    })
}

/// `None` for a thread or descriptor that went away after it was listed.
fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn numbers(directory: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(directory)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads /proc/PID/task/TID/status (proc_pid_status(5)).
fn thread(tid: u32, status: &str) -> Option<ThreadView> {
    let field =
        |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()));
    let number = |name: &str| field(name)?.parse::<u32>().ok();
    let set = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    let list = |name: &str| {
        field(name)?.split_whitespace().map(|id| id.parse::<u32>().ok()).collect::<Option<Vec<_>>>()
    };
    Some(ThreadView {
        tid,
        name: field("Name")?.into(),
        seccomp_mode: number("Seccomp")?,
        seccomp_filters: number("Seccomp_filters"),
        no_new_privs: number("NoNewPrivs")? == 1,
        uids: list("Uid")?.try_into().ok()?,
        gids: list("Gid")?.try_into().ok()?,
        groups: list("Groups")?,
        capabilities: Capabilities {
            inheritable: set("CapInh")?,
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
        },
    })
}

fn mounts(text: &str) -> Vec<(String, String)> {
    let parts = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    parts.filter_map(|parts| Some(((*parts.get(1)?).into(), (*parts.get(3)?).into()))).collect()
}

impl CellView {
    /// What is not as in a closed cell, in words; empty when it is closed. The uid and gid are those of its plan. Seccomp is
    /// the program's own part and is looked at on every thread.
    pub fn faults(&self, uid: u32, gid: u32) -> Vec<String> {
        let mut faults = Vec::new();
        let mut expect = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault)
            }
        };
        for thread in &self.threads {
            let ThreadView { tid, name, .. } = thread;
            let mut expect =
                |holds: bool, what: String| expect(holds, format!("thread {tid} ({name}): {what}"));
            expect(thread.seccomp_mode == 2, format!("seccomp mode {}", thread.seccomp_mode));
            expect(thread.no_new_privs, "no_new_privs is not set".into());
            expect(thread.capabilities == Capabilities::default(), format!("{:x?}", thread.capabilities));
            expect(
                thread.uids == [uid; 4] && thread.gids == [gid; 4],
                format!("uid {:?}, gid {:?}", thread.uids, thread.gids),
            );
            expect(thread.groups.is_empty(), format!("groups {:?}", thread.groups));
        }
        for namespace in &self.namespaces {
            expect(!namespace.is_shared, format!("the {} namespace is the host's", namespace.kind));
        }
        expect(self.root_entries.is_empty(), format!("the root holds {:?}", self.root_entries));
        let is_alone = matches!(self.mounts.as_slice(), [(at, options)] if at == "/"
            && ["ro", "nosuid", "nodev", "noexec"].iter().all(|option| options.split(',').any(|has| has == *option)));
        expect(is_alone, format!("mounts {:?}", self.mounts));
        expect(!self.is_dumpable, "it is dumpable".into());
        expect(self.environment_bytes == 0, format!("{} bytes of environment", self.environment_bytes));
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_outside_of_a_cell_has_every_fault() {
        let view = inspect(std::process::id()).unwrap();
        let faults = view.faults(70001, 70001).join("\n");
        for fault in [
            "seccomp mode 0",
            "no_new_privs",
            "uid [",
            "the net namespace",
            "the root holds",
            "mounts",
            "dumpable",
        ] {
            assert!(faults.contains(fault), "{fault}: {faults}");
        }
        assert!(view.descriptors.iter().any(|descriptor| descriptor.number == 2));
    }

    #[test]
    fn mounts_are_read() {
        assert_eq!(mounts("cell / tmpfs ro,nosuid 0 0\nx\n"), [("/".into(), "ro,nosuid".into())]);
    }
}
