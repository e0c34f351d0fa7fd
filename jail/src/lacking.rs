//! What of a cell this host can't give. It refuses the cell, unless whoever plans it says that it may be without.

use std::{collections::BTreeSet, fs};

use casemate_spec::{CellPart, Refusal};

use crate::{CellPlan, CgroupPlan, cgroup, landlock, sys};

/// A part that can't be had here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Which.
    pub part: CellPart,
    /// Why.
    pub cause: String,
    pub(crate) remedy: &'static str,
}

impl Lack {
    /// The refusal of a cell that may not be without it.
    pub fn refusal(&self) -> Refusal {
        let code = match self.part {
            CellPart::Landlock => "cell-landlock",
            CellPart::CoreScheduling => "cell-core-scheduling",
            CellPart::IoLimits => "cell-io",
        };
        let remedy = format!(
            "{}; or let guests of this host start without it: allow_weaker = [\"{}\"] in [cell] of the host file",
            self.remedy, self.part
        );
        Refusal::new(code, self.part, &self.cause, remedy)
    }
}

/// The parts of a cell with this cgroup that this host can't give.
pub fn lacking(plan: &CgroupPlan) -> Vec<Lack> {
    let cores = core_scheduling(
        &fs::read_to_string("/sys/devices/system/cpu/smt/active").unwrap_or_default(),
        sys::has_core_scheduling(),
    );
    [landlock::lack(), cores, io(plan)].into_iter().flatten().collect()
}

/// What a cell of this plan will be without.
pub(crate) fn accepted(plan: &CellPlan) -> Result<BTreeSet<CellPart>, Refusal> {
    let lacks = lacking(&plan.cgroup);
    match lacks.iter().find(|lack| !plan.may_lack.contains(&lack.part)) {
        Some(lack) => Err(lack.refusal()),
        None => Ok(lacks.into_iter().map(|lack| lack.part).collect()),
    }
}

/// Where no core runs two threads at once there is nothing to schedule apart.
fn core_scheduling(smt_active: &str, has_it: bool) -> Option<Lack> {
    (!has_it && smt_active.trim() != "0").then(|| Lack {
        part: CellPart::CoreScheduling,
        cause: "processors have SMT, and the kernel has no core scheduling to keep a cell's core to itself"
            .into(),
        remedy: "use a kernel with CONFIG_SCHED_CORE, or turn SMT off (`nosmt`)",
    })
}

fn io(plan: &CgroupPlan) -> Option<Lack> {
    let wanted = &plan.io;
    if !wanted.rules.limits() {
        return None;
    }
    let lack = |cause: String, remedy| Lack { part: CellPart::IoLimits, cause, remedy };
    if !cgroup::has_controller(&plan.parent, "io") {
        let cause = "the io controller of cgroup v2 is not to be had".into();
        return Some(lack(cause, "use a kernel with CONFIG_BLK_CGROUP, and leave io to cgroup v2"));
    }
    wanted.without_device.first().map(|path| {
        let cause = format!("{path} lies on no block device of its own, so what it costs can't be limited");
        lack(cause, "put the image on a filesystem like ext4 or XFS, on a disk")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoPlan;
    use casemate_spec::IoRules;

    #[test]
    fn a_core_must_be_kept_apart_where_it_is_shared() {
        for (smt, has_it, is_lacking) in
            [("1\n", false, true), ("", false, true), ("0\n", false, false), ("1\n", true, false)]
        {
            assert_eq!(core_scheduling(smt, has_it).is_some(), is_lacking, "{smt:?} {has_it}");
        }
    }

    #[test]
    fn what_is_lacking_refuses_under_a_code_of_its_own_and_says_how_to_do_without() {
        for part in CellPart::ALL {
            let refusal = Lack { part, cause: "x".into(), remedy: "do something" }.refusal();
            assert!(refusal.code.starts_with("cell-"), "{refusal}");
            assert!(refusal.to_string().contains(&format!("allow_weaker = [\"{part}\"]")), "{refusal}");
        }
    }

    #[test]
    fn io_is_lacking_only_where_it_is_wanted() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cgroup.controllers"), "cpu io\n").unwrap();
        let mut plan = CgroupPlan {
            parent: directory.path().into(),
            memory_bytes_max: 1,
            pids_max: 1,
            cpus_max: 1,
            io: IoPlan { without_device: vec!["/tmp/x".into()], ..IoPlan::default() },
        };
        assert_eq!(io(&plan), None);
        plan.io.rules = IoRules { weight: Some(10), ..IoRules::default() };
        assert!(io(&plan).unwrap().cause.contains("/tmp/x"));
        plan.io.without_device.clear();
        assert_eq!(io(&plan), None);
        std::fs::write(directory.path().join("cgroup.controllers"), "cpu\n").unwrap();
        assert!(io(&plan).unwrap().cause.contains("the io controller"));
    }
}
