//! The cell: namespaces, cgroup, rlimits, capabilities, Landlock, seccomp.
