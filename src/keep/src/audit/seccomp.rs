//! Each thread's filters, taken out of the kernel and asked what they let through.

use casemate_filters::{Role, calls};
use casemate_jail::{Answer, Call, CellView, Filter, ThreadFilters, ThreadView};

use super::{AuditLine, measured, process::printable};

/// Calls that no thread of a cell may make, whatever their arguments: ways to paths, sockets, programs, other processes,
/// other rights, and the wide parts of the kernel.
const NEVER: &[&str] = &[
    "open",
    "openat",
    "openat2",
    "creat",
    "open_by_handle_at",
    "name_to_handle_at",
    "unlink",
    "unlinkat",
    "rename",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "mkdir",
    "mknod",
    "mknodat",
    "chmod",
    "fchmodat",
    "chown",
    "fchownat",
    "truncate",
    "chdir",
    "fchdir",
    "chroot",
    "socket",
    "socketpair",
    "connect",
    "bind",
    "listen",
    "execve",
    "execveat",
    "fork",
    "vfork",
    "clone3",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "kill",
    "tkill",
    "mount",
    "umount2",
    "pivot_root",
    "move_mount",
    "open_tree",
    "fsopen",
    "fsmount",
    "fsconfig",
    "mount_setattr",
    "unshare",
    "setns",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "keyctl",
    "add_key",
    "request_key",
    "memfd_create",
    "memfd_secret",
    "init_module",
    "finit_module",
    "delete_module",
    "kexec_load",
    "kexec_file_load",
    "reboot",
    "setuid",
    "setgid",
    "setresuid",
    "setresgid",
    "setgroups",
    "capset",
    "personality",
    "modify_ldt",
    "iopl",
    "ioperm",
    "swapon",
    "swapoff",
    "sethostname",
    "settimeofday",
    "clock_settime",
    "adjtimex",
    "quotactl",
    "acct",
    "syslog",
    "fanotify_init",
    "inotify_init1",
    "shmget",
    "msgget",
    "semget",
    "mq_open",
    "sched_setattr",
    "prlimit64",
    "setrlimit",
    "seccomp",
    "landlock_restrict_self",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "migrate_pages",
    "move_pages",
    "mbind",
    "process_mrelease",
    "lookup_dcookie",
    "vmsplice",
];
/// Other ways into the kernel: 32-bit x86 (`AUDIT_ARCH_I386`), and x32 by its bit in the call's number.
const ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;

/// A line for each thread.
pub(super) fn lines(view: &CellView, filters: &[ThreadFilters]) -> Vec<AuditLine> {
    let known = Role::ALL.map(|role| (role, Filter::of_role(role)));
    let none = Vec::new();
    let of = |thread: &ThreadView| {
        let own = filters.iter().find(|own| own.tid == thread.tid);
        line(thread, own.map_or(&none, |own| &own.filters), &known)
    };
    view.threads.iter().map(of).collect()
}

fn line(thread: &ThreadView, filters: &[Filter], known: &[(Role, Filter)]) -> AuditLine {
    let names: Vec<&str> = filters
        .iter()
        .map(|filter| {
            known.iter().find(|(_, known)| known == filter).map_or("unknown", |(role, _)| role.name())
        })
        .collect();
    let mut faults = Vec::new();
    if thread.seccomp_mode != 2 || filters.is_empty() {
        faults.push("it has no filters".to_owned());
    }
    if thread.seccomp_filters.is_some_and(|count| usize::try_from(count) != Ok(filters.len())) {
        faults.push(format!("{:?} filters by its status", thread.seccomp_filters));
    }
    let is_narrow = |name: &&str| Role::NARROW.iter().any(|role| role.name() == *name);
    if !names.contains(&"build") || !names.iter().any(is_narrow) || names.contains(&"unknown") {
        faults.push("not the filters of this casemate: build, and that of a role".into());
    }
    let may_run = |call: Call| filters.iter().all(|filter| filter.may_run(&call));
    let allowed: Vec<&str> =
        calls().iter().filter(|(number, _)| may_run(Call::any(*number))).map(|(_, name)| *name).collect();
    // A disk's thread uses the ring that was made for it; the one that fills slots names files to such rings, and does nothing
    // else by this call.
    let has_role = |roles: &[&str]| names.iter().any(|name| roles.contains(name));
    let is_its_own = |name: &str| match name {
        "io_uring_enter" => has_role(&["blk", "spare"]),
        "io_uring_register" => has_role(&["hotplug"]) && only_names_files(&may_run),
        _ => false,
    };
    let through: Vec<&str> =
        allowed.iter().copied().filter(|name| NEVER.contains(name) && !is_its_own(name)).collect();
    if !through.is_empty() {
        faults.push(format!("may call {}", through.join(", ")));
    }
    if executable(&may_run) {
        faults.push("may make memory executable".into());
    }
    let foreign = |call: Call| filters.iter().all(|filter| filter.answers(&call) != [Answer::Kills].into());
    if calls().iter().any(|(number, _)| {
        may_run(Call { architecture: ARCH_I386, ..Call::any(*number) })
            || foreign(Call::any(number | X32_BIT))
    }) {
        faults.push("may call as another architecture".into());
    }
    let mut bytes = Vec::new();
    filters.iter().for_each(|filter| bytes.extend(filter.bytes()));
    let name = printable(&thread.name);
    let digest = crate::record::sha256(&bytes);
    let mut found = format!(
        "{name} ({}): filters {}, {} of {} calls, sha256 {digest}",
        thread.tid,
        names.join(" and "),
        allowed.len(),
        calls().len()
    );
    if !faults.is_empty() {
        found.push_str(&format!("; {}", faults.join("; ")));
    }
    let wanted = "this casemate's filters; no path, socket, program, process or right can be had by a call";
    measured("seccomp", wanted, found, faults.is_empty())
}

/// Whether of io_uring_register(2) nothing but the naming of files gets through.
fn only_names_files(may_run: &dyn Fn(Call) -> bool) -> bool {
    const IO_URING_REGISTER: u32 = 427;
    const FILES_UPDATE: u64 = 6;
    // Linux 6.12 knows some 30 commands.
    (0..=255)
        .all(|command| command == FILES_UPDATE || !may_run(Call::any(IO_URING_REGISTER).with(1, command)))
}

/// Whether memory can be made executable.
fn executable(may_run: &dyn Fn(Call) -> bool) -> bool {
    const EXECUTE: u64 = 4;
    let number = |name: &str| calls().iter().find(|(_, known)| *known == name).map(|(number, _)| *number);
    ["mmap", "mprotect", "pkey_mprotect"].into_iter().filter_map(number).any(|number| {
        // With and without reading and writing, and with bits that mean nothing yet.
        [0, 1, 2, 3, 1 << 24].into_iter().any(|other| may_run(Call::any(number).with(2, EXECUTE | other)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_jail::Capabilities;

    fn thread() -> ThreadView {
        ThreadView {
            tid: 7,
            name: "vcpu0".into(),
            seccomp_mode: 2,
            seccomp_filters: None,
            no_new_privs: true,
            uids: [1; 4],
            gids: [1; 4],
            groups: Vec::new(),
            capabilities: Capabilities::default(),
        }
    }

    fn found(roles: &[Role]) -> AuditLine {
        let known = Role::ALL.map(|role| (role, Filter::of_role(role)));
        let filters: Vec<Filter> = roles.iter().map(|role| Filter::of_role(*role)).collect();
        line(&thread(), &filters, &known)
    }

    #[test]
    fn every_name_is_one_of_a_call() {
        for name in NEVER {
            assert!(calls().iter().any(|(_, known)| known == name), "{name}");
        }
    }

    #[test]
    fn the_filters_of_a_cell_pass() {
        for role in Role::NARROW {
            let line = found(&[Role::Build, role]);
            assert!(line.passed, "{line:?}");
        }
    }

    #[test]
    fn no_filter_and_the_wide_one_alone_do_not() {
        let none = found(&[]);
        assert!(!none.passed);
        for fault in ["no filters", "openat", "executable", "another architecture"] {
            assert!(none.found.contains(fault), "{fault}: {}", none.found);
        }
        let wide = found(&[Role::Build]);
        assert!(!wide.passed && wide.found.contains("not the filters"), "{wide:?}");
    }
}
