//! The parts of a cell that the child makes, and how the lack of one is told.

use casemate_spec::Refusal;
use rustix::io::Errno;

/// What the child was doing. The number goes through the pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Moving descriptors to their places and closing all others.
    Descriptors = 1,
    /// A session of its own, fresh signals, the plain personality, a core-scheduling cookie of its own.
    Session,
    /// The cgroup namespace.
    CgroupNamespace,
    /// The host's name.
    Hostname,
    /// The empty root.
    Root,
    /// Resource limits.
    Rlimits,
    /// Bounding and ambient sets, securebits.
    Capabilities,
    /// uid, gid, groups, and the last capabilities.
    Identity,
    /// no_new_privs.
    NoNewPrivileges,
    /// The signal at the parent's death.
    Tie,
    /// Landlock.
    Landlock,
    /// execveat.
    Exec,
}

impl Step {
    const ALL: [Self; 12] = [
        Self::Descriptors,
        Self::Session,
        Self::CgroupNamespace,
        Self::Hostname,
        Self::Root,
        Self::Rlimits,
        Self::Capabilities,
        Self::Identity,
        Self::NoNewPrivileges,
        Self::Tie,
        Self::Landlock,
        Self::Exec,
    ];

    fn words(self) -> (&'static str, &'static str, &'static str) {
        const ROOT: &str =
            "run the keep as root with all capabilities, outside of a container that takes them away";
        match self {
            Self::Descriptors => (
                "cell-descriptors",
                "placing its descriptors",
                "raise the keep's RLIMIT_NOFILE to 128 or more",
            ),
            Self::Session => ("cell-session", "making its session", ROOT),
            Self::CgroupNamespace => ("cell-namespaces", "making its cgroup namespace", ROOT),
            Self::Hostname => ("cell-namespaces", "naming its host", ROOT),
            Self::Root => (
                "cell-root",
                "making its empty root",
                "start the keep where the root is a mount (not in a chroot) and /proc exists",
            ),
            Self::Rlimits => (
                "cell-rlimits",
                "setting its resource limits",
                "raise the keep's hard limits, or run it with CAP_SYS_RESOURCE",
            ),
            Self::Capabilities => ("cell-capabilities", "taking its capabilities away", ROOT),
            Self::Identity => ("cell-identity", "taking its uid and gid", ROOT),
            Self::NoNewPrivileges => ("cell-capabilities", "setting no_new_privs", ROOT),
            Self::Tie => {
                ("cell-tie", "tying it to its parent", "the parent was gone already; start the guest again")
            }
            Self::Landlock => (
                "cell-landlock",
                "enforcing its Landlock ruleset",
                "use a kernel with Landlock ABI 2 or newer (Linux 5.19)",
            ),
            Self::Exec => (
                "cell-exec",
                "executing the program",
                "the program must be a static one that fits the cell's memory limit",
            ),
        }
    }

    /// The refusal for a step that ended with this error.
    pub(crate) fn refusal(self, guest: &str, error: Errno) -> Refusal {
        let (code, doing, remedy) = self.words();
        Refusal::new(code, guest, format_args!("the cell could not be closed: {doing}: {error}"), remedy)
    }
}

/// A report of the child as it goes through the pipe: step, then the error.
pub(crate) type Report = [u8; 5];

/// Packs a report. No allocation: the child calls it.
pub(crate) fn pack(step: Step, error: Errno) -> Report {
    let [a, b, c, d] = error.raw_os_error().to_le_bytes();
    [step as u8, a, b, c, d]
}

/// Unpacks a report; `None` when it is none.
pub(crate) fn unpack(report: &[u8]) -> Option<(Step, Errno)> {
    let [step, a, b, c, d] = *report else { return None };
    let step = Step::ALL.into_iter().find(|known| *known as u8 == step)?;
    Some((step, Errno::from_raw_os_error(i32::from_le_bytes([a, b, c, d]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_come_through_and_name_the_part() {
        for step in Step::ALL {
            assert_eq!(unpack(&pack(step, Errno::PERM)), Some((step, Errno::PERM)));
            let refusal = step.refusal("g", Errno::PERM);
            assert!(refusal.code.starts_with("cell-") && !refusal.remedy.is_empty(), "{refusal}");
        }
        assert_eq!(unpack(&[0, 1, 0, 0, 0]), None);
        assert_eq!(unpack(&[1, 1, 0]), None);
    }
}
