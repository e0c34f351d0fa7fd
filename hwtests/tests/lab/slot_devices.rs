//! The host's devices in the slots of guests that run.

use std::{fs, os::fd::OwnedFd, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Running, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    control::operate,
    devices::{give_back, start},
    endings::ending,
    host_state::{HostState, claims},
    notices::descriptor_of,
    passthrough::{WORDS, came_back, have_drive, with_rtl8139},
};

/// For a guest to boot, or to notice a card; the lab's processor is emulated.
const SOON: Duration = Duration::from_secs(120);

/// Words for guests into which something comes.
const COMES: &str = "modprobe -a nvme igb
    comes() { until [ -e $1 ]; do sleep 0.1; done; }
    goes() { while [ -e $1 ]; do sleep 0.1; done; }";

/// A drive comes, is read, and goes back to the host's driver, in a guest whose memory was the balloon's to give back before.
/// Then a card comes into the same slot, and the guest ends with it.
pub(crate) fn come_and_go(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    ctx.load_driver("igb")?;
    let before = HostState::now();
    let running = start(ctx, &ctx.guest(&drive_script(2, CARD))?.slots(2))?;
    running.wait_for_text("guest is ready", SOON)?;
    let before_limits = limits(ctx)?;
    plug_drive(ctx, &running, 2)?;
    expect!(limits(ctx)? == before_limits, "the cell's limits are not as they were");
    let done = operate(ctx, &["attach", ctx.name(), "--device", devices::IGB])?;
    expect!(done.pointer("/devices/0/former_driver") == Some(&Value::from("igb")), "it tells of {done}");
    running.wait_for_text("gateway-answered", SOON)?;
    ctx.run(["casemate", "audit", ctx.name()])?.success()?;
    ctx.run(["casemate", "power-off", ctx.name()])?.success()?;
    let run = running.wait(SOON)?;
    run.success()?;
    expect!(ending(&run)? == "power-off", "the guest ended by {}", ending(&run)?);
    came_back(&run, devices::IGB, Some("igb"))?;
    let events = ctx.run(["casemate", "events", ctx.name()])?;
    events.success()?.printed(&format!("{} came into slot 1", devices::NVME))?;
    events.printed(&format!("{} came out of slot 1", devices::NVME))?;
    before.expect_unchanged()
}

pub(crate) fn ten_in_a_row(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let running = start(ctx, &ctx.guest(&drive_script(10, ""))?.slots(2))?;
    running.wait_for_text("guest is ready", SOON)?;
    plug_drive(ctx, &running, 10)?;
    running.wait(SOON)?.success()?;
    before.expect_unchanged()
}

/// Uses the network card, and waits for the power button.
const CARD: &str = r#"
    comes /sys/class/net/eth0
    ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; wait_for /sys/class/net/eth0/carrier 1
    ping -c 3 -W 5 -I eth0 10.0.2.2 && echo gateway-answered
    modprobe evdev; head -c 24 </dev/input/event0 >/dev/null; echo button-was-pressed"#;

fn drive_script(rounds: usize, then: &str) -> String {
    format!(
        "{WORDS} {COMES}
        echo guest is ready
        for round in $(seq {rounds}); do
            comes /dev/nvme0n1
            echo digest $round: $(head -c 4194304 /dev/nvme0n1 | sha256sum | cut -d' ' -f1).
            goes /dev/nvme0n1
            echo drive gone $round.
        done
        {then}"
    )
}

fn plug_drive(ctx: &Ctx, running: &Running, rounds: usize) -> Result<(), Failure> {
    let digest = ctx.shell("head -c 4194304 /dev/nvme0n1 | sha256sum | cut -d' ' -f1")?;
    for round in 1..=rounds {
        let done = operate(ctx, &["attach", ctx.name(), "--device", devices::NVME])?;
        expect!(done.get("slot") == Some(&Value::from(1)), "it came into {done}");
        running.wait_for_text(&format!("digest {round}: {digest}."), SOON)?;
        if round == 1 {
            while_it_is_there(ctx)?;
        }
        let done = operate(ctx, &["detach", ctx.name(), "1", "--within", "50"])?;
        expect!(done.get("forced") == Some(&Value::Bool(false)), "the guest did not let it go: {done}");
        let is_clean = done.pointer("/devices/0/clean") == Some(&Value::Bool(true));
        let returned_to = done.pointer("/devices/0/returned_to").and_then(Value::as_str);
        expect!(is_clean && returned_to == Some("nvme"), "it did not come back: {done}");
        running.wait_for_text(&format!("drive gone {round}."), SOON)?;
        have_drive(ctx)?;
    }
    Ok(())
}

/// What holds while the guest has the drive: nobody else gets it, nothing of its memory is given back, and an auditor finds
/// what was given and no more.
fn while_it_is_there(ctx: &Ctx) -> Result<(), Failure> {
    let again = ctx.run(["casemate", "attach", ctx.name(), "--device", devices::NVME])?;
    again.refusal("device-claimed")?;
    let balloon = ctx.run(["casemate", "balloon", ctx.name(), "32MiB"])?;
    expect!(balloon.refusal("guest-refused")?.contains("ask-no-balloon"), "{}", balloon.stderr);
    let audit = ctx.run(["casemate", "audit", ctx.name()])?;
    audit.success()?.printed("1 vfio-container")?.printed(devices::NVME)?;
    let [claim] = &claims()[..] else { return Err(Failure::new("there is not one claim")) };
    expect!(claim.contains("\"slot\":1") && claim.contains("attached"), "the claim is {claim}");
    Ok(())
}

/// The limits of the guest's cell, as the kernel has them.
fn limits(ctx: &Ctx) -> Result<String, Failure> {
    Ok(fs::read_to_string(format!("/proc/{}/limits", cell_of(ctx)?))?)
}

/// What can't come is refused and is the host's as before; what the guest does not let go of is taken.
pub(crate) fn refuse_and_force(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let script = format!(
        "{COMES}
        echo guest is ready
        comes /dev/nvme0n1; exec 3</dev/nvme0n1; echo drive is up; goes /dev/nvme0n1; exec 3<&-; echo drive is gone
        comes /dev/nvme0n1; echo drive is back; goes /dev/nvme0n1; echo drive went home; sleep 1000"
    );
    let running = start(ctx, &ctx.guest(&script)?.slots(1))?;
    running.wait_for_text("guest is ready", SOON)?;
    let guest = ctx.name();
    let attach = |address: &str| ctx.run(["casemate", "attach", guest, "--device", address]);
    // Its BAR has 8 GiB, and a slot's window 256 MiB.
    let window = attach(devices::LARGE_BAR)?;
    expect!(window.refusal("hotplug-window")?.contains("prefetchable_memory = \"8"), "{}", window.stderr);
    attach("0000:3f:00.0")?.refusal("device-missing")?;
    attach(devices::BRIDGE)?.refusal("device-is-bridge")?;
    with_rtl8139(ctx, |_| {
        expect!(
            attach(devices::RTL8139)?.refusal("guest-refused")?.contains("hotplug-intx"),
            "by another code"
        );
        Ok(())
    })?;
    expect!(claims().is_empty(), "there are claims: {:?}", claims());

    attach(devices::NVME)?.success()?;
    running.wait_for_text("drive is up", SOON)?;
    let done = operate(ctx, &["detach", guest, "1", "--within", "1", "--force"])?;
    expect!(done.get("forced") == Some(&Value::Bool(true)), "it was not taken: {done}");
    expect!(done.pointer("/devices/0/clean") == Some(&Value::Bool(true)), "it is not clean: {done}");
    running.wait_for_text("drive is gone", SOON)?;
    have_drive(ctx)?;

    // The host wants it back: the guest lets it go, and runs on.
    attach(devices::NVME)?.success()?;
    running.wait_for_text("drive is back", SOON)?;
    let unbind = format!("echo {} >/sys/bus/pci/drivers/vfio-pci/unbind", devices::NVME);
    ctx.shell(&format!("timeout 100 sh -c '{unbind}' >/dev/null 2>&1 &"))?;
    let step = running.wait_for_step("device-wanted", SOON)?;
    expect!(step.get("slot") == Some(&Value::from(1)), "it tells of {step}");
    running.wait_for_text("drive went home", SOON)?;
    let step = running.wait_for_step("returned", SOON)?;
    have_drive(ctx)?;
    expect!(step.get("devices").is_some(), "it tells of {step}");
    operate(ctx, &["stop", guest])?;
    running.wait(SOON)?;
    before.expect_unchanged()
}

/// A keep is killed while its guest has a drive in a slot: the next command ends the guest and gives the drive back.
pub(crate) fn recovered_after_a_crash(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let running = start(ctx, &ctx.guest(&drive_script(1, ""))?.slots(1))?;
    running.wait_for_text("guest is ready", SOON)?;
    operate(ctx, &["attach", ctx.name(), "--device", devices::NVME])?;
    running.wait_for_text("digest 1:", SOON)?;
    running.signal(Signal::KILL)?;
    running.wait(SOON)?;
    wait_until("the drive is back", SOON, || claims().is_empty())?;
    have_drive(ctx)?;
    before.expect_unchanged()
}

/// A VMM that goes on holding a device that it was told to let go of: nobody else gets it, not even the host.
pub(crate) fn kept_by_its_vmm(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let running = start(ctx, &ctx.guest(&drive_script(1, "sleep 1000"))?.slots(1))?;
    running.wait_for_text("guest is ready", SOON)?;
    operate(ctx, &["attach", ctx.name(), "--device", devices::NVME])?;
    running.wait_for_text("digest 1:", SOON)?;
    // The same open device, as a second descriptor of the VMM's would be.
    let kept = device_of(ctx)?;
    let done = operate(ctx, &["detach", ctx.name(), "1", "--within", "50"])?;
    let why = done.pointer("/devices/0/quarantined").and_then(Value::as_str).unwrap_or_default();
    expect!(why.contains("has not let it go"), "it is not in quarantine for that: {done}");
    expect!(ctx.driver_of(devices::NVME).as_deref() == Some("vfio-pci"), "the host's driver has it");
    let again = ctx.run(["casemate", "attach", ctx.name(), "--device", devices::NVME])?;
    again.refusal("device-quarantined")?;
    let events = ctx.run(["casemate", "events", ctx.name()])?;
    events.success()?.printed("in quarantine")?;
    drop(kept);
    operate(ctx, &["stop", ctx.name()])?;
    running.wait(SOON)?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    give_back(devices::NVME)?;
    ctx.shell(&format!("echo {} >/sys/bus/pci/drivers_probe", devices::NVME))?;
    have_drive(ctx)?;
    before.expect_unchanged()
}

/// The device of the guest's VMM, opened no second time.
fn device_of(ctx: &Ctx) -> Result<OwnedFd, Failure> {
    let pid = cell_of(ctx)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().contains("[vfio-device]"))
        {
            return descriptor_of(pid, entry.file_name().to_string_lossy().parse()?);
        }
    }
    Err(Failure::new("the VMM has no device"))
}

/// The process of the guest's cell.
fn cell_of(ctx: &Ctx) -> Result<u32, Failure> {
    let record = fs::read_to_string(format!("/run/casemate/{}.json", ctx.name()))?;
    let record: Value = serde_json::from_str(&record)?;
    let pid = record.pointer("/cell/pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
    pid.ok_or_else(|| Failure::new("the record names no process"))
}
