//! What a drive stores is erased between its guests, and a drive that can't be erased goes to nobody.

use std::{fs, path::PathBuf, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, Running, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{host_state::claims, passthrough::have_drive};

const DONE: &str = "1 namespace formatted, 32 marks written before are gone";
/// Fills the drive with somebody's data.
const FILL: &str = "yes secret-of-somebody | dd of=/dev/nvme0n1 bs=1M count=16 iflag=fullblock conv=fsync 2>/dev/null; echo filled";
/// Tells how many bytes of it are not zero.
const LEFT: &str = "echo left: $(tr -d '\\0' </dev/nvme0n1 | wc -c)";

/// Starts a guest with a drive whose pool wants it formatted.
fn start(ctx: &Ctx, drive: &str, script: &str) -> Result<Running, Failure> {
    let host_file = ctx.directory().join("host.toml");
    let pool = |name: &str, address: &str| {
        let rest = "firmware = 'locked'\nscrub = ['nvme-format']";
        format!("[[pool]]\nname = '{name}'\naddresses = ['{address}']\n{rest}\n")
    };
    fs::write(&host_file, pool("erased", devices::ERASED_NVME) + &pool("shared", devices::NVME))?;
    let script = format!(
        "modprobe nvme; n=0; until [ -b /dev/nvme0n1 ] || [ $n = 200 ]; do sleep 0.1; n=$((n + 1)); done
        {script}"
    );
    let guest = ctx.guest(&script)?.vcpus(1).device(drive).write_into(ctx.directory())?;
    let words =
        [PathBuf::from("casemate"), "--json".into(), "--host-config".into(), host_file, "run".into(), guest];
    ctx.start(words)
}

fn run(ctx: &Ctx, drive: &str, script: &str) -> Result<Finished, Failure> {
    start(ctx, drive, script)?.wait(Duration::from_secs(120))
}

fn is_empty(run: &Finished) -> Result<(), Failure> {
    run.success()?;
    let left = run.value("left:")?;
    expect!(left == "0", "{left} bytes are left on the drive");
    Ok(())
}

pub(crate) fn drive_is_erased_between_guests(ctx: &mut Ctx) -> Result<(), Failure> {
    let filled = run(ctx, devices::ERASED_NVME, &format!("{FILL}; {LEFT}"))?;
    filled.success()?;
    expect!(filled.stderr.contains("\"step\":\"scrubbing\""), "nobody says that it takes its time");
    expect!(filled.value("left:")? == "16777216", "the guest has not filled it: {}", filled.stdout);
    let scrubbed = filled.report()?;
    let told = scrubbed.pointer("/devices/0/scrubbed/Ok").and_then(Value::as_str);
    expect!(told == Some(DONE), "the report tells of no scrub: {scrubbed}");
    is_empty(&run(ctx, devices::ERASED_NVME, LEFT)?)?;

    // An operator has it done without a guest, and has to say that it may be.
    let words = ["casemate", "devices", "scrub", devices::ERASED_NVME];
    expect!(!ctx.run(words)?.status.success(), "it was erased without --erase");
    ctx.run(words.into_iter().chain(["--erase"]))?.success()?.printed(DONE)?;

    // A keep that is killed leaves it to its broker.
    let running = start(ctx, devices::ERASED_NVME, &format!("{FILL}; sleep 1000"))?;
    running.wait_for_text("filled", Duration::from_secs(60))?;
    running.signal(Signal::KILL)?;
    running.wait(Duration::from_secs(30))?;
    wait_until("the drive is back", Duration::from_secs(60), || claims().is_empty())?;
    is_empty(&run(ctx, devices::ERASED_NVME, LEFT)?)?;
    Ok(())
}

pub(crate) fn drive_that_cannot_be_erased_goes_to_nobody(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let digest = || ctx.shell("head -c 16777216 /dev/nvme0n1 | sha256sum | cut -d' ' -f1");
    let before = digest()?;
    let kept = run(ctx, devices::NVME, "true")?;
    let why = kept.report()?;
    let why = why.pointer("/devices/0/quarantined").and_then(Value::as_str).unwrap_or_default();
    expect!(
        why.contains("it could not be scrubbed: its namespace 2 is attached to nobody"),
        "it came back: {}",
        kept.stdout
    );
    ctx.run_guest(&ctx.guest("true")?.device(devices::NVME))?.refusal("device-quarantined")?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    ctx.run(["casemate", "devices", "release", devices::NVME])?.success()?.printed("nvme has it")?;
    have_drive(ctx)?;
    expect!(digest()? == before, "it was written to all the same");
    Ok(())
}
