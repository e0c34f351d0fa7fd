//! What tenants who don't trust each other share on this host, beyond what a cell can hold apart.

use super::{Check, CheckState, check, ok_or};
use crate::{
    Host,
    host::{attribute, names},
};

/// The four checks. None of them keeps a guest from running.
pub(super) fn checks(host: &Host) -> [Check; 4] {
    [mitigations(host), smt(host), ksm(host), swap(host)]
}

/// What the kernel says of the processor's known flaws (`Documentation/ABI/testing/sysfs-devices-system-cpu`).
fn mitigations(host: &Host) -> Check {
    let directory = host.path("sys/devices/system/cpu/vulnerabilities");
    let flaws = names(&directory);
    let is_open = |flaw: &String| {
        let state = attribute(directory.join(flaw)).unwrap_or_default();
        // "Vulnerable", "Vulnerable: no microcode", and "Unknown: ..." inside of virtual machines.
        (!state.starts_with("Not affected")
            && !state.starts_with("Mitigation")
            && !state.starts_with("KVM: Mitigation"))
        .then(|| format!("{flaw} ({state})"))
    };
    let open: Vec<String> = flaws.iter().filter_map(is_open).collect();
    let remedy = "a guest may read memory of others through these: update microcode and kernel, and remove mitigations=off";
    match (flaws.len(), open.len()) {
        (0, _) => check("mitigations", CheckState::Warn, "the kernel does not tell", remedy),
        (_, 0) => check("mitigations", CheckState::Ok, format!("all {} known flaws", flaws.len()), remedy),
        _ => check("mitigations", CheckState::Warn, format!("open: {}", open.join(", ")), remedy),
    }
}

fn smt(host: &Host) -> Check {
    let remedy = "threads of one core leak to each other; each guest has a core-scheduling cookie, which needs CONFIG_SCHED_CORE \
                  (`casemate audit` tells) and does not hold the host's own programs off; for strangers boot with nosmt";
    match attribute(host.path("sys/devices/system/cpu/smt/active")).as_deref() {
        Some("0") => check("smt", CheckState::Ok, "no core runs two threads", remedy),
        Some("1") => check("smt", CheckState::Warn, "cores run two threads at once", remedy),
        _ => check("smt", CheckState::Warn, "the kernel does not tell", remedy),
    }
}

fn ksm(host: &Host) -> Check {
    let run = attribute(host.path("sys/kernel/mm/ksm/run"));
    let state = ok_or(run.as_deref() != Some("1"), CheckState::Warn);
    let found = match run.as_deref() {
        None => "this kernel has none",
        Some("1") => "equal pages are merged",
        Some(_) => "off",
    };
    let remedy =
        "by the time a write takes, a guest learns which pages others have: echo 2 >/sys/kernel/mm/ksm/run";
    check("ksm", state, found, remedy)
}

fn swap(host: &Host) -> Check {
    let swaps = host.table("proc/swaps").unwrap_or_default();
    let areas = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let areas: Vec<String> = areas.map(str::to_owned).collect();
    let remedy =
        "memory of guests without devices may come to lie there in the clear: swapoff, or encrypt it";
    match areas.as_slice() {
        [] => check("swap", CheckState::Ok, "none", remedy),
        areas => check("swap", CheckState::Warn, areas.join(", "), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::Fixture;

    #[test]
    fn each_is_told() {
        let machine = Fixture::typical();
        let flaw = "sys/devices/system/cpu/vulnerabilities/mds";
        for (name, path, good, bad) in [
            (
                "mitigations",
                flaw,
                "Mitigation: Clear CPU buffers; SMT disabled\n",
                "Vulnerable: no microcode\n",
            ),
            ("smt", "sys/devices/system/cpu/smt/active", "0\n", "1\n"),
            ("ksm", "sys/kernel/mm/ksm/run", "0\n", "1\n"),
            ("swap", "proc/swaps", "Filename Type\n", "Filename Type\n/dev/sda2 partition 1 0 -2\n"),
        ] {
            for (text, state) in [(good, CheckState::Ok), (bad, CheckState::Warn)] {
                machine.write(path, text);
                let check = checks(&machine.host()).into_iter().find(|check| check.name == name).unwrap();
                assert_eq!(check.state, state, "{check:?}");
            }
        }
        machine.write(flaw, "Vulnerable\n");
        assert_eq!(mitigations(&machine.host()).found, "open: mds (Vulnerable)");
    }
}
