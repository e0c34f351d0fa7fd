//! What the kernel tells of a device that a guest has: the host wants it back, or it has failed.

use std::{fs, os::fd::OwnedFd};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Running},
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::Value;

use crate::{
    devices::{give_back, start},
    endings::{SOON, broker_of, ending},
    host_state::HostState,
    passthrough::{came_back, have_drive},
};

/// What obeys its power button.
pub(crate) const OBEYS: &str = "modprobe evdev; grep . /sys/class/input/event0/device/name
    exec 3</dev/input/event0; echo guest-has-it; head -c 24 <&3 >/dev/null && echo button-was-pressed";

/// An operator unbinds it as if nobody had it: the guest powers off, and the drive is proven and back with its driver.
pub(crate) fn wanted_back_ends_its_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    for paused in [false, true] {
        let running = ctx.start_guest(&ctx.guest(OBEYS)?.named("wanted").device(devices::NVME))?;
        running.wait_for_text("guest-has-it", SOON)?;
        if paused {
            ctx.run(["casemate", "pause", "wanted"])?.success()?;
        }
        // Whoever unbinds it waits until nobody has it.
        ctx.shell(&format!(
            "timeout 100 sh -c 'echo {} >/sys/bus/pci/drivers/vfio-pci/unbind' >/dev/null 2>&1 &",
            devices::NVME
        ))?;
        let step = running.wait_for_step("device-wanted", SOON)?;
        expect!(step.get("device").and_then(Value::as_str) == Some(devices::NVME), "it tells of {step}");
        if !paused {
            running.wait_for_step("asked-to-power-off", SOON)?;
        }
        let run = running.wait(SOON)?;
        run.success()?;
        let wanted = if paused { "stopped" } else { "power-off" };
        expect!(ending(&run)? == wanted, "the guest ended by {}", ending(&run)?);
        came_back(&run, devices::NVME, Some("nvme"))?;
        let events = ctx.run(["casemate", "events", "wanted"])?;
        let told = format!("the host wants {} back", devices::NVME);
        events.success()?.printed(&told)?;
        before.expect_unchanged()?;
    }
    Ok(())
}

/// The kernel says that a device has failed: its guest is stopped, others go on, and nobody gets the device. No real error
/// can be made here; the test writes to the keep's trigger as the kernel does.
pub(crate) fn failed_device_stops_its_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let other = ctx.start_guest(&ctx.guest(OBEYS)?.named("other"))?;
    let running = start(ctx, &ctx.guest(OBEYS)?.named("failed").device(devices::EDU))?;
    running.wait_for_text("guest-has-it", SOON)?;
    other.wait_for_text("guest-has-it", SOON)?;
    rustix::io::write(error_trigger(&running)?, &1u64.to_ne_bytes())?;
    running.wait_for_step("device-failed", SOON)?;
    let run = running.wait(SOON)?;
    expect!(run.status.code() == Some(4), "the run ended with {:?}, not 4", run.status.code());
    expect!(ending(&run)? == "device-failed", "the guest ended by {}", ending(&run)?);
    let report = run.report()?;
    let why = report.pointer("/devices/0/quarantined").and_then(Value::as_str).unwrap_or_default();
    expect!(why.contains("AER"), "it is not in quarantine for its error: {report}");

    ctx.run(["casemate", "stop", "other"])?.success()?;
    let other = other.wait(SOON)?;
    other.success()?;
    ctx.run(["casemate", "devices", "free", devices::EDU])?.success()?;
    give_back(devices::EDU)?;
    before.expect_unchanged()
}

/// The broker's eventfd for the errors of its one device: of its epoll set with three members (its requests, its errors, and the
/// kernel's log), that with the number 1.
fn error_trigger(keep: &Running) -> Result<OwnedFd, Failure> {
    let missing = || Failure::new("nobody listens to the device's errors");
    let broker = broker_of(keep)?;
    for entry in fs::read_dir(format!("/proc/{broker}/fdinfo"))?.flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let members: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("tfd:"))
            .map(|line| line.split_whitespace().collect())
            .collect();
        let number = |member: &&Vec<&str>, number: &str| member.get(5) == Some(&number);
        let Some(trigger) = members.iter().find(|member| number(member, "1")) else { continue };
        if members.len() == 3 {
            return descriptor_of(broker, trigger.get(1).ok_or_else(missing)?.parse()?);
        }
    }
    Err(missing())
}

/// The same open file as another process's descriptor.
pub(crate) fn descriptor_of(pid: u32, number: i32) -> Result<OwnedFd, Failure> {
    let no_pid = || Failure::new(format_args!("{pid} is no process"));
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(no_pid)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}
