//! The limits of a running process, as the kernel has them.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// The files of a cgroup whose values are its limits, and what it uses of them.
const CGROUP_FILES: [&str; 10] = [
    "memory.max",
    "memory.oom.group",
    "memory.current",
    "pids.max",
    "pids.current",
    "cpu.max",
    "cpu.weight",
    "io.max",
    "io.weight",
    "io.bfq.weight",
];

/// Limits of a process and of its cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsView {
    /// Resource limits by the kernel's name ("Max open files"): soft and hard; `None` is unlimited.
    pub rlimits: BTreeMap<String, (Option<u64>, Option<u64>)>,
    /// The cgroup's path below the root of the hierarchy, as the caller sees it.
    pub cgroup: PathBuf,
    /// The content of those of its files that are there ("memory.max").
    pub cgroup_files: BTreeMap<&'static str, String>,
}

/// Reads the limits of a process; `hierarchy` is where cgroup v2 is mounted.
///
/// # Errors
/// Those of reading /proc: NotFound when the process has ended.
pub fn limits(pid: u32, hierarchy: &Path) -> io::Result<LimitsView> {
    let process = Path::new("/proc").join(pid.to_string());
    let rlimits = rlimits(&fs::read_to_string(process.join("limits"))?);
    let membership = fs::read_to_string(process.join("cgroup"))?;
    // The line of cgroup v2 (cgroups(7)); those of v1 have a number and controllers.
    let cgroup = membership.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let cgroup = PathBuf::from(cgroup.trim_start_matches('/'));
    let directory = hierarchy.join(&cgroup);
    let cgroup_files = CGROUP_FILES
        .into_iter()
        .filter_map(|file| Some((file, fs::read_to_string(directory.join(file)).ok()?.trim().to_owned())))
        .collect();
    Ok(LimitsView { rlimits, cgroup, cgroup_files })
}

/// Reads /proc/PID/limits: a name, then soft limit, hard limit and unit in columns.
fn rlimits(text: &str) -> BTreeMap<String, (Option<u64>, Option<u64>)> {
    let line = |line: &str| {
        let (name, rest) = line.split_at_checked(26)?;
        let mut values = rest.split_whitespace().map(|value| value.parse().ok());
        Some((name.trim().to_owned(), (values.next()?, values.next()?)))
    };
    text.lines().skip(1).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_limits_of_this_process() {
        let view = limits(std::process::id(), Path::new("/sys/fs/cgroup")).unwrap();
        assert_eq!(view.rlimits.len(), 16, "{view:?}");
        let (soft, hard) = view.rlimits["Max open files"];
        assert!(soft.is_some() && hard >= soft);
    }

    proptest! {
        #[test]
        fn never_panics(text in "(Limit\n)?(.{0,40}\n?){0,4}") {
            let _ = rlimits(&text);
        }
    }
}
