//! Guests that don't end by themselves, and keeps and cells that die: the devices come back in every case.

use std::{fs, path::Path, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, GuestFile, Running, send_signal, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    host_state::{HostState, claims},
    passthrough::{came_back, have_drive},
};

/// For a guest to come to its first instruction, its first process, or its end.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// How the guest ended, as the report names it.
pub(crate) fn ending(run: &Finished) -> Result<String, Failure> {
    let report = run.report()?;
    let ending = report.pointer("/ending/ending").and_then(Value::as_str);
    ending
        .map(str::to_owned)
        .ok_or_else(|| Failure::new(format_args!("the report tells no ending: {report}")))
}

/// The process and the uid of a running guest's cell.
pub(crate) fn cell_of(running: &Running) -> Result<(u32, u32), Failure> {
    let step = running.wait_for_step("cell-closed", SOON)?;
    let number = |key: &str| step.get(key).and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
    let both = number("pid").zip(number("uid"));
    both.ok_or_else(|| Failure::new(format_args!("the step names no process: {step}")))
}

/// A guest that does not end by itself, with the drive and a tap.
fn lasting_guest(ctx: &Ctx) -> Result<GuestFile, Failure> {
    have_drive(ctx)?;
    Ok(ctx.guest("sleep 1000")?.vcpus(1).net("cmtest0", "192.0.2.1/24").device(devices::NVME))
}

/// Whether a process has ended.
pub(crate) fn is_gone(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

pub(crate) fn killed_vmm_is_told_and_undone(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    let running = ctx.start_guest(&guest)?;
    let (cell, _) = cell_of(&running)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    send_signal(cell, Signal::KILL)?;
    let run = running.wait(SOON)?;
    expect!(ending(&run)? == "cell-died", "the guest ended by {}", ending(&run)?);
    expect!(
        run.report()?.to_string().contains("killed by signal 9"),
        "how it died is not told: {}",
        run.report()?
    );
    expect!(run.status.code() == Some(3), "the exit code is {:?}, not 3", run.status.code());
    came_back(&run, devices::NVME, Some("nvme"))?;
    before.expect_unchanged()
}

pub(crate) fn recover_undoes_a_killed_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    kill_run(ctx, &guest, true)?;
    expect!(claims().len() == 1, "the ledger should tell what is left to undo: {:?}", claims());
    expect!(ctx.driver_of(devices::NVME).as_deref() == Some("vfio-pci"), "nobody had the drive");
    let recovered = ctx.run(["casemate", "recover"])?;
    let said = recovered.success()?.stderr.clone();
    expect!(said.contains(devices::NVME) && said.contains("given back to nvme"), "recover said {said:?}");
    before.expect_unchanged()?;
    let again = ctx.run(["casemate", "recover"])?;
    again.success()?.printed("Nothing was left behind")?;
    Ok(())
}

pub(crate) fn next_run_undoes_a_killed_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    // A keep whose broker was killed tells that its guest has died, and can give nothing back.
    let run = kill_run(ctx, &guest, false)?;
    expect!(run.status.code() == Some(3), "the exit code is {:?}, not 3", run.status.code());
    let next = ctx.guest("cat /sys/block/nvme0n1/size")?.vcpus(1).device(devices::NVME);
    let run = ctx.run_guest(&next)?;
    run.success()?.printed("131072")?;
    expect!(run.stderr.contains("\"step\":\"recovered\""), "the run told of no recovery: {}", run.stderr);
    came_back(&run, devices::NVME, Some("nvme"))?;
    before.expect_unchanged()
}

/// Starts the guest and kills its broker, or that and `casemate run`; returns when its cell has died with it.
fn kill_run(ctx: &Ctx, guest: &GuestFile, keep_too: bool) -> Result<Finished, Failure> {
    let running = ctx.start_guest(guest)?;
    let (cell, _) = cell_of(&running)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    send_signal(broker_of(&running)?, Signal::KILL)?;
    if keep_too {
        running.signal(Signal::KILL)?;
    }
    let run = running.wait(SOON)?;
    wait_until("the cell dies with its broker", Duration::from_secs(10), || is_gone(cell))?;
    Ok(run)
}

/// The process that is root for a run.
pub(crate) fn broker_of(running: &Running) -> Result<u32, Failure> {
    let pid = running.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let is_broker = |child: &u32| {
        fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.trim() == "casemate-broker")
    };
    let broker = children.split_whitespace().filter_map(|child| child.parse().ok()).find(is_broker);
    broker.ok_or_else(|| Failure::new(format_args!("process {pid} has no broker: {children:?}")))
}

/// A keep that dies alone: its broker ends the guest and gives back what it had, before anybody else comes.
pub(crate) fn broker_undoes_a_killed_keep(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    let running = ctx.start_guest(&guest)?;
    let (cell, _) = cell_of(&running)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    let broker = broker_of(&running)?;
    running.signal(Signal::KILL)?;
    running.wait(SOON)?;
    wait_until("the broker ends", SOON, || is_gone(broker))?;
    expect!(is_gone(cell), "the cell has outlived its broker");
    expect!(claims().is_empty(), "the ledger tells of {:?}", claims());
    expect!(ctx.driver_of(devices::NVME).as_deref() == Some("nvme"), "nvme does not have its drive");
    before.expect_unchanged()
}

pub(crate) fn run_killed_while_claiming_is_undone(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    let running = ctx.start_guest(&guest)?;
    running.wait_for_step("claiming", SOON)?;
    let has_left = || ctx.driver_of(devices::NVME).as_deref() != Some("nvme");
    wait_until("the drive leaves its driver", SOON, has_left)?;
    let broker = broker_of(&running)?;
    running.signal(Signal::KILL)?;
    running.wait(SOON)?;
    wait_until("the broker gives back what it had begun to take", SOON, || is_gone(broker))?;
    before.expect_unchanged()
}

pub(crate) fn signals_stop_in_order(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    for signal in [Signal::TERM, Signal::INT] {
        let running = ctx.start_guest(&guest)?;
        running.wait_for_step("running", SOON)?;
        // The first is the guest's power button, which this one does not heed.
        running.signal(signal)?;
        running.wait_for_step("asked-to-power-off", SOON)?;
        running.signal(signal)?;
        let run = running.wait(Duration::from_secs(8))?;
        run.success()?;
        expect!(ending(&run)? == "stopped", "the guest ended by {}", ending(&run)?);
        came_back(&run, devices::NVME, Some("nvme"))?;
        before.expect_unchanged()?;
    }
    Ok(())
}

pub(crate) fn signal_while_claiming_stops_in_order(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let before = HostState::now();
    let running = ctx.start_guest(&guest)?;
    running.wait_for_step("claiming", SOON)?;
    let has_left = || ctx.driver_of(devices::NVME).as_deref() != Some("nvme");
    wait_until("the drive leaves its driver", SOON, has_left)?;
    running.signal(Signal::TERM)?;
    let run = running.wait(SOON)?;
    run.success()?;
    expect!(ending(&run)? == "stopped", "the guest ended by {}", ending(&run)?);
    before.expect_unchanged()
}

pub(crate) fn vmm_that_is_missing_takes_nothing(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = lasting_guest(ctx)?;
    let path = guest.write_into(ctx.directory())?;
    let nothing = ctx.directory().join("no-program");
    fs::write(&nothing, "not a program")?;
    let before = HostState::now();
    for (vmm, code) in [(Path::new("/nowhere/casemate-vmm"), "vmm-missing"), (&nothing, "cell-program")] {
        let vmm = format!("--vmm={}", vmm.display());
        let run = ctx.run(["casemate".as_ref(), vmm.as_ref(), "run".as_ref(), path.as_os_str()])?;
        run.refusal(code)?;
        expect!(run.status.code() == Some(1), "the exit code is {:?}, not 1", run.status.code());
        before.expect_unchanged()?;
    }
    Ok(())
}
