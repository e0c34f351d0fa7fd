//! The process in which a keep's plugins run.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, send_signal, wait_until},
};
use casemate_jail::{Answer, Call, filters, inspect};
use rustix::process::Signal;

use crate::endings::cell_of;

pub(crate) fn is_in_a_cell_of_its_own(ctx: &mut Ctx) -> Result<(), Failure> {
    let running = ctx.start_guest(&ctx.guest("sleep 1000")?.vcpus(1))?;
    running.wait_for_text("CASEMATE-INIT", Duration::from_secs(60))?;
    let pid = engine()?;
    let view = inspect(pid)?;
    let uid = view.threads.first().map_or(0, |thread| thread.uids[0]);
    expect!(uid >= 0x4361_0000, "its uid is {uid}");
    let mut faults = view.faults(uid, uid);
    expect!(view.threads.len() == 2, "{} threads", view.threads.len());
    let targets: Vec<&str> = view.descriptors.iter().map(|descriptor| descriptor.target.as_str()).collect();
    let expected = ["socket:", "/dev/null", "/memfd:casemate-policy"];
    let are_its = targets.iter().zip(expected).all(|(target, begin)| target.starts_with(begin));
    expect!(targets.len() == 3 && are_its, "descriptors {targets:?}");
    for thread in &filters(&[pid])? {
        expect!(thread.filters.len() == 2, "a thread has {} filters", thread.filters.len());
        // open, openat, socket, clone, execve, recvmsg, and memory that can be executed.
        let never = [2, 257, 41, 56, 59, 47].map(Call::any);
        for call in never.into_iter().chain([Call::any(9).with(2, 4), Call::any(10).with(2, 5)]) {
            if thread.filters.iter().all(|filter| filter.answers(&call) != [Answer::Kills].into()) {
                faults.push(format!("{call:?}"));
            }
        }
    }
    expect!(faults.is_empty(), "the engine's cell is not closed: {}", faults.join("; "));
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default();
    println!("the engine, with the plugins of this test: {resident}");

    // One that ends is replaced when the next question comes.
    send_signal(pid, Signal::KILL)?;
    let is_another = || engine().is_ok_and(|other| other != pid);
    wait_until("another engine is there", Duration::from_secs(20), is_another)?;
    ctx.run(["casemate", "policy", "reload", ctx.name()])?.success()?;
    expect!(engines().len() == 1, "{:?} are left", engines());
    running.signal(Signal::TERM)?;
    running.wait(Duration::from_secs(30))?.success()?;
    expect!(engines().is_empty(), "its cgroup stays: {:?}", engines());

    // What a killed keep leaves is ended by its broker.
    let running = ctx.start_guest(&ctx.guest("sleep 1000")?.vcpus(1))?;
    running.wait_for_text("CASEMATE-INIT", Duration::from_secs(60))?;
    let pid = engine()?;
    running.signal(Signal::KILL)?;
    running.wait(Duration::from_secs(30))?;
    let is_gone = || fs::metadata(format!("/proc/{pid}")).is_err();
    wait_until("the engine has ended with its keep", Duration::from_secs(10), is_gone)?;
    wait_until("its cgroup goes", Duration::from_secs(10), || engines().is_empty())?;
    Ok(())
}

/// A host has one copy of the VMM and of the engine, however many guests run.
pub(crate) fn programs_are_copied_once(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("sleep 1000")?.vcpus(1);
    let mut running = Vec::new();
    let mut copies = BTreeSet::new();
    for name in ["first", "second"] {
        let one = ctx.start_guest(&guest.clone().named(name))?;
        copies.insert(program(cell_of(&one)?.0)?);
        running.push(one);
    }
    expect!(copies.len() == 1, "two cells run {} copies: {copies:?}", copies.len());
    let engines =
        engines().iter().map(|cgroup| program(process_of(cgroup)?)).collect::<Result<Vec<_>, _>>()?;
    expect!(engines.len() == 2 && engines.first() == engines.last(), "engines run {engines:?}");
    for one in running {
        one.signal(Signal::TERM)?;
        one.wait(Duration::from_secs(30))?.success()?;
    }
    Ok(())
}

/// What a process executes: its name, and the inode.
fn program(pid: u32) -> Result<(PathBuf, u64), Failure> {
    let path = format!("/proc/{pid}/exe");
    Ok((fs::read_link(&path)?, fs::metadata(&path)?.ino()))
}

/// The cgroups of engines.
fn engines() -> Vec<PathBuf> {
    let cgroups = fs::read_dir("/sys/fs/cgroup/casemate").into_iter().flatten().flatten();
    cgroups
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("-engine"))
        .map(|entry| entry.path())
        .collect()
}

/// The one engine that runs.
fn engine() -> Result<u32, Failure> {
    let [cgroup] = &engines()[..] else {
        return Err(Failure::new(format!("not one engine: {:?}", engines())));
    };
    process_of(cgroup)
}

/// The one process of a cgroup.
fn process_of(cgroup: &Path) -> Result<u32, Failure> {
    let pid = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    pid.trim().parse().map_err(|_| Failure::new(format!("no engine in its cgroup: {pid:?}")))
}
