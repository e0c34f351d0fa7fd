//! The cell's cgroup (v2): made with its limits before the process, which is born in it, and removed after it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use casemate_spec::Refusal;

use crate::{CgroupPlan, IoPlan};

/// The controllers whose limits a cell always has.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// Beside them the one of disks, where there is something to limit.
const IO: &str = "io";

/// The period over which processor time is counted, in microseconds: the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// How long killed processes may take to leave a cgroup. Unpinning a large guest's memory takes seconds.
const EMPTY_WITHIN: Duration = Duration::from_secs(30);

/// A cell's cgroup; it stays until [`Cgroup::remove`].
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: File,
}

impl Cgroup {
    /// Makes `plan.parent/guest` with its limits.
    pub(crate) fn create(plan: &CgroupPlan, guest: &str) -> Result<Self, Refusal> {
        let has_io = plan.io.rules.limits() && has_controller(&plan.parent, IO);
        let controllers: Vec<&str> = CONTROLLERS.into_iter().chain(has_io.then_some(IO)).collect();
        for directory in hierarchy(&plan.parent)? {
            if let Err(error) = fs::create_dir(&directory)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(refuse(
                    &directory,
                    format_args!("can't be made: {error}"),
                    "run the keep as root",
                ));
            }
            delegate(&directory, &controllers)?;
        }
        let path = plan.parent.join(guest);
        make(&path)?;
        let limited = limit(&path, plan);
        let limited = limited.and_then(|()| if has_io { limit_io(&path, &plan.io) } else { Ok(()) });
        let limited = limited.and_then(|()| {
            let directory =
                OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_PATH).open(&path);
            directory.map_err(|error| refuse(&path, error, "see that nothing else manages this cgroup"))
        });
        match limited {
            Ok(directory) => Ok(Self { path, directory }),
            Err(refusal) => {
                // It was made above and is empty; what is told is why it is of no use.
                let _ = fs::remove_dir(&path);
                Err(refusal)
            }
        }
    }

    /// For `CLONE_INTO_CGROUP`.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Processor time of all that was ever in it, by its `cpu.stat`, which needs no controller.
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        let text = fs::read_to_string(self.path.join("cpu.stat")).ok()?;
        let microseconds = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
        microseconds.parse().ok().map(Duration::from_micros)
    }

    /// Kills what is in the cgroup and removes it.
    pub(crate) fn remove(&self) -> Result<(), Refusal> {
        empty_and_remove(&self.path)
    }
}

fn refuse(path: &Path, cause: impl std::fmt::Display, remedy: &str) -> Refusal {
    Refusal::new("cell-cgroup", path.display(), cause, remedy)
}

/// The directories from the root of the cgroup v2 hierarchy, which exists, down to `parent`.
fn hierarchy(parent: &Path) -> Result<Vec<PathBuf>, Refusal> {
    const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
    let is_cgroup2 = |path: &Path| rustix::fs::statfs(path).is_ok_and(|at| at.f_type == CGROUP2_SUPER_MAGIC);
    let mut directories: Vec<PathBuf> = Vec::new();
    let mut has_root = false;
    for directory in parent.ancestors() {
        if is_cgroup2(directory) {
            has_root = true;
        } else if has_root || directory.exists() {
            break;
        }
        directories.push(directory.into());
    }
    if !has_root {
        let remedy = "name a directory below a mount of cgroup2, usually /sys/fs/cgroup; a host with cgroup v1 boots with \
                      systemd.unified_cgroup_hierarchy=1";
        return Err(refuse(parent, "is not in a cgroup v2 hierarchy", remedy));
    }
    directories.reverse();
    Ok(directories)
}

/// Whether cgroups below `parent` can have this controller: the hierarchy's root has it, and hands it down when it is asked to.
pub(crate) fn has_controller(parent: &Path, controller: &str) -> bool {
    let lists = parent.ancestors().map(|directory| directory.join("cgroup.controllers"));
    let list = lists.filter_map(|path| fs::read_to_string(path).ok()).last().unwrap_or_default();
    list.split_whitespace().any(|known| known == controller)
}

/// Gives the children of this cgroup the controllers.
fn delegate(directory: &Path, controllers: &[&str]) -> Result<(), Refusal> {
    let read = |file: &str| {
        let text = fs::read_to_string(directory.join(file));
        text.map_err(|error| refuse(&directory.join(file), error, "run the keep as root"))
    };
    let (has, gives) = (read("cgroup.controllers")?, read("cgroup.subtree_control")?);
    let names = |list: &str, name: &str| list.split_whitespace().any(|known| known == name);
    for controller in controllers.iter().filter(|controller| !names(&gives, controller)) {
        if !names(&has, controller) {
            let cause = format_args!("the {controller} controller is not to be had here");
            let remedy = "hand the controllers memory, pids and cpu to cgroup v2 (and not to v1), and delegate them down to this cgroup";
            return Err(refuse(directory, cause, remedy));
        }
        fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}")).map_err(|error| {
            let cause = format_args!("can't give the {controller} controller to its children: {error}");
            refuse(directory, cause, "move the processes that live in it to a cgroup of their own")
        })?;
    }
    Ok(())
}

/// Makes the directory; one that a dead cell left is removed first.
fn make(path: &Path) -> Result<(), Refusal> {
    let told =
        |error: io::Error| refuse(path, format_args!("can't be made: {error}"), "run the keep as root");
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if is_populated(path).map_err(told)? {
                let remedy = "the guest runs already; stop it, or give this one another name";
                return Err(refuse(path, "has processes in it", remedy));
            }
            empty_and_remove(path)?;
            fs::create_dir(path).map_err(told)
        }
        result => result.map_err(told),
    }
}

fn limit(path: &Path, plan: &CgroupPlan) -> Result<(), Refusal> {
    let limits = [
        ("memory.max", plan.memory_bytes_max.to_string()),
        // One process of a cell killed is the guest killed; half a guest is of no use.
        ("memory.oom.group", "1".into()),
        ("pids.max", plan.pids_max.to_string()),
        ("cpu.max", format!("{} {CPU_PERIOD_US}", u64::from(plan.cpus_max) * CPU_PERIOD_US)),
    ];
    limits.into_iter().try_for_each(|(file, value)| set(path, file, &value))
}

fn limit_io(path: &Path, plan: &IoPlan) -> Result<(), Refusal> {
    if let Some(weight) = plan.rules.weight {
        // By the scheduler that weighs (blk-iocost, or BFQ as a module).
        let file = if path.join("io.weight").exists() { "io.weight" } else { "io.bfq.weight" };
        set(path, file, &weight.to_string())?;
    }
    // The kernel takes one line a write.
    plan.lines().iter().try_for_each(|line| set(path, "io.max", line))
}

fn set(path: &Path, file: &str, value: &str) -> Result<(), Refusal> {
    fs::write(path.join(file), value).map_err(|error| {
        refuse(
            &path.join(file),
            format_args!("can't be set to {value}: {error}"),
            "see that nothing else manages this cgroup",
        )
    })
}

fn is_populated(path: &Path) -> io::Result<bool> {
    Ok(fs::read_to_string(path.join("cgroup.events"))?.lines().any(|line| line == "populated 1"))
}

fn empty_and_remove(path: &Path) -> Result<(), Refusal> {
    let deadline = Instant::now() + EMPTY_WITHIN;
    let mut pause = Duration::from_millis(1);
    loop {
        // Absent before Linux 5.14; the cell's process is killed and waited for in any case.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(refuse(
                    path,
                    format_args!("can't be removed: {error}"),
                    "see which processes are in it",
                ));
            }
            Err(_) => sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_elsewhere_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for parent in [directory.path().join("a/b"), directory.path().into(), "/nowhere/at/all".into()] {
            let plan = CgroupPlan {
                parent: parent.clone(),
                memory_bytes_max: 1 << 30,
                pids_max: 8,
                cpus_max: 1,
                io: IoPlan::default(),
            };
            let refusal = Cgroup::create(&plan, "g").unwrap_err();
            assert_eq!(refusal.code, "cell-cgroup");
            assert!(refusal.to_string().contains("not in a cgroup v2 hierarchy"), "{refusal}");
            assert!(!parent.join("g").exists());
        }
    }

    #[test]
    fn a_controller_that_was_not_handed_down_yet_can_be_had() {
        let directory = tempfile::tempdir().unwrap();
        let parent = directory.path().join("casemate");
        fs::create_dir(&parent).unwrap();
        fs::write(directory.path().join("cgroup.controllers"), "cpu io memory\n").unwrap();
        fs::write(parent.join("cgroup.controllers"), "cpu memory\n").unwrap();
        assert!(has_controller(&parent, IO) && !has_controller(&parent, "pids"));
    }

    #[test]
    fn a_controller_that_is_not_there_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        fs::write(directory.path().join("cgroup.subtree_control"), "memory cpu\n").unwrap();
        let refusal = delegate(directory.path(), &CONTROLLERS).unwrap_err();
        assert!(refusal.to_string().contains("the pids controller is not to be had"), "{refusal}");
        fs::write(directory.path().join("cgroup.controllers"), "pids memory cpu\n").unwrap();
        delegate(directory.path(), &CONTROLLERS).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("cgroup.subtree_control")).unwrap(), "+pids");
    }
}
