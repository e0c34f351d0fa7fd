//! What is looked at beside the attempts: the cell as /proc shows it, refusals, what is left behind, and what it costs.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread::{sleep, spawn},
    time::{Duration, Instant},
};

use casemate_filters::Role;
use casemate_jail::{End, Program, inspect};
use serde_json::{Value, json};

use crate::{
    merge,
    start::{ID, Probe},
};

pub(crate) fn all(probe: &Probe, print: &mut impl FnMut(Value)) -> Result<(), String> {
    print(view(probe)?);
    print(limits(probe)?);
    for refusal in refusals(probe)? {
        print(refusal);
    }
    print(tied(probe)?);
    print(nothing_left(probe)?);
    print(cost(probe)?);
    Ok(())
}

/// Every thread's filters and rights, the namespaces, the root, the descriptors.
fn view(probe: &Probe) -> Result<Value, String> {
    let mut victim = probe.start(&["stay", "-"]).map_err(|refusal| refusal.to_string())?;
    victim.wait_for_word()?;
    let view = inspect(victim.cell.pid()).map_err(|error| error.to_string())?;
    let mut faults = view.faults(ID, ID);
    let filters: Vec<_> = view.threads.iter().map(|thread| thread.seccomp_filters).collect();
    let narrow = Role::NARROW.map(|_| Some(2));
    if filters.split_first() != Some((&Some(1), narrow.as_slice())) {
        faults.push(format!("filters {filters:?}"));
    }
    let targets: Vec<_> = view.descriptors.iter().map(|descriptor| descriptor.target.as_str()).collect();
    let is_given = matches!(targets.as_slice(), ["/dev/null", "/dev/null", pipe, socket]
        if pipe.starts_with("pipe:") && socket.starts_with("socket:"));
    if !is_given {
        faults.push(format!("descriptors {targets:?}"));
    }
    let memory = victim.cell.memory(0).map_err(|error| error.to_string())?;
    Ok(
        json!({ "check": "view", "landlock": victim.cell.landlock().to_string(), "threads": view.threads.len(),
        "pss_bytes": memory.pss_bytes, "faults": faults, "ok": faults.is_empty() && memory.pss_bytes > 0 }),
    )
}

/// The limits as the kernel has them.
fn limits(probe: &Probe) -> Result<Value, String> {
    let mut victim = probe.start(&["stay", "-"]).map_err(|refusal| refusal.to_string())?;
    victim.wait_for_word()?;
    let read = |path: &Path| fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
    let process = Path::new("/proc").join(victim.cell.pid().to_string());
    let mut faults = Vec::new();
    let rlimits = read(&process.join("limits"))?;
    for (name, value) in [
        ("Max core file size", "0"),
        ("Max locked memory", "1048576"),
        ("Max open files", "64"),
        ("Max processes", "16"),
        ("Max file size", "1048576"),
    ] {
        let line = rlimits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        if !line.split_whitespace().take(2).eq([value, value]) {
            faults.push(format!("{name}: {line}"));
        }
    }
    let membership = read(&process.join("cgroup"))?;
    let path = membership.trim().rsplit(':').next().unwrap_or_default();
    let cgroup = probe.parent.join(Path::new(path).file_name().unwrap_or_default());
    let threads = (1 + Role::NARROW.len()).to_string();
    for (file, value) in [
        ("memory.max", "536870912"),
        ("memory.oom.group", "1"),
        ("pids.max", "16"),
        ("cpu.max", "200000 100000"),
        ("pids.current", threads.as_str()),
    ] {
        let found = read(&cgroup.join(file))?;
        if found.trim() != value {
            faults.push(format!("{file}: {found}"));
        }
    }
    Ok(json!({ "check": "limits", "faults": faults, "ok": faults.is_empty() }))
}

/// Cells that can't be had, each refused by the name of the part, and nothing left of them.
fn refusals(probe: &Probe) -> Result<Vec<Value>, String> {
    let mut rows = Vec::new();
    let mut expect =
        |what: &str, code: &str, result: Result<crate::start::Victim, casemate_spec::Refusal>| {
            let refusal = result.err().map(|refusal| (refusal.code, refusal.to_string()));
            let is_ok = refusal.as_ref().is_some_and(|(found, _)| *found == code);
            let words = refusal.map_or("started".into(), |(_, words)| words);
            rows.push(json!({ "check": "refusal", "what": what, "refusal": words, "ok": is_ok }));
        };
    let stay = &["stay", "-"];
    expect("uid 0", "cell-plan", probe.start_with(stay, |plan| plan.uid = 0));
    expect("a name with a slash", "cell-plan", probe.start_with(stay, |plan| plan.guest = "../x".into()));
    expect("no room for a process", "cell-cgroup", probe.start_with(stay, |plan| plan.cgroup.pids_max = 0));
    let outside = |plan: &mut casemate_jail::CellPlan| plan.cgroup.parent = "/tmp/casemate".into();
    expect("a cgroup elsewhere", "cell-cgroup", probe.start_with(stay, outside));
    let broken = broken_program()?;
    expect("a broken program", "cell-exec", probe.start_with(stay, |plan| plan.program = broken));
    let first =
        probe.start_with(stay, |plan| plan.guest = "twice".into()).map_err(|refusal| refusal.to_string())?;
    expect("a guest that runs", "cell-cgroup", probe.start_with(stay, |plan| plan.guest = "twice".into()));
    drop(first);
    Ok(rows)
}

/// An ELF header with nothing behind it: passes for a static program, and can't be executed.
fn broken_program() -> Result<Program, String> {
    let path = std::env::temp_dir().join(format!("casemate-broken-{}", std::process::id()));
    let mut image = [0u8; 64];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18] = 62;
    let file = fs::write(&path, image).and_then(|()| fs::File::open(&path));
    let _ = fs::remove_file(&path);
    Program::seal(file.map_err(|error| error.to_string())?).map_err(|refusal| refusal.to_string())
}

/// A tied cell goes with the thread that started it, and an untied one stays.
fn tied(probe: &Probe) -> Result<Value, String> {
    let ends = |tied: bool| -> Result<Option<End>, String> {
        let probe = Probe { program: probe.program.clone(), parent: probe.parent.clone() };
        let starter = spawn(move || {
            let mut victim = probe.start_with(&["stay", "-"], |plan| plan.tied_to_parent = tied)?;
            Ok::<_, casemate_spec::Refusal>(victim.wait_for_word().map(|()| victim))
        });
        let victim =
            starter.join().map_err(|_| "the starter panicked")?.map_err(|refusal| refusal.to_string())?;
        let mut victim = victim?;
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if let Some(end) = victim.cell.try_wait().map_err(|error| error.to_string())? {
                return Ok(Some(end));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(None)
    };
    let (tied, untied) = (ends(true)?, ends(false)?);
    let is_ok = tied == Some(End::Signalled(libc::SIGKILL)) && untied.is_none();
    Ok(json!({ "check": "tied", "tied": format!("{tied:?}"), "untied": format!("{untied:?}"), "ok": is_ok }))
}

/// After all those cells: no cgroup is left but the parent.
fn nothing_left(probe: &Probe) -> Result<Value, String> {
    let entries = fs::read_dir(&probe.parent).map_err(|error| error.to_string())?.flatten();
    let left: Vec<_> = entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name()).collect();
    Ok(json!({ "check": "nothing-left", "left": format!("{left:?}"), "ok": left.is_empty() }))
}

/// The time from `start` to the executed program, beside that of a bare fork and exec of a program as small.
fn cost(probe: &Probe) -> Result<Value, String> {
    const RUNS: usize = 21;
    let mut cells = Vec::new();
    let mut bare = Vec::new();
    for _ in 0..RUNS {
        let begin = Instant::now();
        let victim = probe.start(&["stay", "-"]).map_err(|refusal| refusal.to_string())?;
        cells.push(begin.elapsed());
        drop(victim);
        let mut command = Command::new("/proc/self/exe");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let begin = Instant::now();
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        bare.push(begin.elapsed());
        let _ = child.wait();
    }
    let median = |mut times: Vec<Duration>| {
        times.sort_unstable();
        times.get(RUNS / 2).map_or(0, Duration::as_micros)
    };
    let row = json!({ "check": "cost", "start_us_median": median(cells), "bare_spawn_us_median": median(bare),
        "ioctl_ns": call_ns(probe, "-")?, "ioctl_filtered_ns": call_ns(probe, Role::Vcpu.name())? });
    Ok(merge(row, json!({ "ok": true })))
}

/// What one call takes under the filters of this role, in nanoseconds.
fn call_ns(probe: &Probe, role: &str) -> Result<u64, String> {
    let told = probe.start(&["time", role]).map_err(|refusal| refusal.to_string())?.wait()?;
    told.said.trim().parse().map_err(|_| format!("no time: {}, {}", told.end, told.said))
}
