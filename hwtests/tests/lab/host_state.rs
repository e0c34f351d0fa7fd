//! What a guest must leave on its host as it was.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use casemate_hwtests::harness::{Failure, wait_until};
use serde_json::Value;

/// What Casemate could change, in lines: each function's driver, network interfaces, VFIO's groups, cells' cgroups and
/// sockets, claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostState(BTreeSet<String>);

impl HostState {
    /// As it is now.
    pub(crate) fn now() -> Self {
        let mut lines = BTreeSet::new();
        for function in names("/sys/bus/pci/devices") {
            let path = Path::new("/sys/bus/pci/devices").join(&function);
            let driver = fs::read_link(path.join("driver")).ok();
            let driver =
                driver.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
            let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default().trim().to_owned();
            let (forced, enabled) = (read("driver_override"), read("enable"));
            lines.insert(format!("{function}: driver {driver:?}, override {forced}, enabled {enabled}"));
        }
        for (what, directory) in [
            ("network interface", "/sys/class/net"),
            ("VFIO node", "/dev/vfio"),
            ("cgroup", "/sys/fs/cgroup/casemate"),
            ("in /run/casemate:", "/run/casemate"),
        ] {
            // A cgroup's control files are no cgroups; locks are files that stay, and hold nothing when nobody has them.
            let is_meant =
                |name: &String| !name.ends_with(".lock") && (what != "cgroup" || !name.contains('.'));
            lines.extend(names(directory).into_iter().filter(is_meant).map(|name| format!("{what} {name}")));
        }
        lines.extend(claims().into_iter().map(|claim| format!("claim {claim}")));
        Self(lines)
    }

    /// Fails, with each difference, when the host is not as it was then. Waits a moment for what the kernel does after
    /// a driver got its device back.
    pub(crate) fn expect_unchanged(&self) -> Result<(), Failure> {
        if wait_until("", Duration::from_secs(3), || Self::now() == *self).is_ok() {
            return Ok(());
        }
        let now = Self::now();
        let gone = self.0.difference(&now.0).map(|line| format!("no longer: {line}"));
        let come = now.0.difference(&self.0).map(|line| format!("new: {line}"));
        let all: Vec<String> = gone.chain(come).collect();
        Err(Failure::new(format_args!("the host is not as it was: {}", all.join("; "))))
    }
}

/// The claims in the ledger and what is in quarantine, each as a line.
pub(crate) fn claims() -> Vec<String> {
    let text = fs::read_to_string("/var/lib/casemate/ledger.json").unwrap_or_default();
    let ledger: Value = serde_json::from_str(&text).unwrap_or_default();
    let lists = ["entries", "quarantined"].into_iter().filter_map(|list| ledger.get(list)?.as_array());
    lists.flatten().map(ToString::to_string).collect()
}

fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
