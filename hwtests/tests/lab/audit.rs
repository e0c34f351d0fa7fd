//! The isolation report: measured from a running guest, kept with its digest, and no harm to the guest.

use std::{fs, path::Path, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, Running},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{endings::cell_of, passthrough::have_drive};

/// For a guest to come to its first process.
const SOON: Duration = Duration::from_secs(60);

fn audit(ctx: &Ctx, guest: &str) -> Result<(Finished, Value), Failure> {
    let run = ctx.run(["casemate", "--json", "audit", guest])?;
    let report = serde_json::from_str(&run.stdout)
        .map_err(|error| Failure::new(format_args!("no report: {error}: {} {}", run.stdout, run.stderr)))?;
    Ok((run, report))
}

fn lines<'a>(report: &'a Value, part: &'a str) -> impl Iterator<Item = &'a Value> {
    let lines = report.get("lines").and_then(Value::as_array).into_iter().flatten();
    lines.filter(move |line| line.get("part").is_some_and(|of| of == part))
}

fn text<'a>(line: &'a Value, key: &str) -> &'a str {
    line.get(key).and_then(Value::as_str).unwrap_or_default()
}

pub(crate) fn tells_what_a_cell_is(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let script = "i=0; while true; do i=$((i+1)); echo tick-$i.; sleep 1; done";
    let guest = ctx.guest(script)?.vcpus(2).disk(&disk, false).net("cmtest0", "192.0.2.1/24");
    let running = ctx.start_guest(&guest.device(devices::NVME))?;
    let (pid, uid) = cell_of(&running)?;
    running.wait_for_text("tick-1.", SOON)?;

    let ps = ctx.run(["casemate", "--json", "ps"])?;
    let listed: Value = serde_json::from_str(ps.success()?.stdout.trim())?;
    expect!(listed.get("guest").is_some_and(|name| name == ctx.name()), "ps lists {listed}");
    expect!(listed.pointer("/cell/pid") == Some(&pid.into()), "ps tells another process: {listed}");
    expect!(listed.get("uid") == Some(&uid.into()), "ps tells another uid: {listed}");
    ctx.run(["casemate", "ps"])?.success()?.printed(ctx.name())?.printed(devices::NVME)?;

    let (run, report) = audit(ctx, ctx.name())?;
    println!("{report:#}");
    let odd: Vec<&Value> = report.get("lines").and_then(Value::as_array).into_iter().flatten().collect();
    let odd: Vec<_> = odd.into_iter().filter(|line| line.get("passed") != Some(&true.into())).collect();
    expect!(odd.is_empty(), "lines that do not pass: {odd:?}");
    run.success()?;
    let filters: Vec<&str> = lines(&report, "seccomp").map(|line| text(line, "found")).collect();
    for (thread, role) in [
        ("casemate-vmm", "control"),
        ("vcpu0", "vcpu"),
        ("vcpu1", "vcpu"),
        ("virtio-rng0", "device"),
        ("virtio-blk1", "blk"),
        ("virtio-net2", "net"),
    ] {
        let filters_of = format!("filters build and {role},");
        let is_so = |found: &&str| found.starts_with(thread) && found.contains(&filters_of);
        expect!(filters.iter().any(is_so), "{thread} is not under {role}: {filters:?}");
    }
    let descriptors = lines(&report, "descriptors").map(|line| text(line, "found")).collect::<String>();
    for kind in ["1 kvm-vm", "2 kvm-vcpu", "1 vfio-device", "1 vfio-group", "1 tap"] {
        expect!(descriptors.contains(kind), "{kind} is missing among {descriptors}");
    }
    expect!(
        lines(&report, "devices").any(|line| text(line, "found").contains(devices::NVME)),
        "the drive is not in the report"
    );
    digest_is_of_the_report(ctx, &run.stdout)?;

    // The guest goes on, and a cell that has become wider does not pass.
    goes_on(&running)?;
    let pids = Path::new("/sys/fs/cgroup/casemate").join(ctx.name()).join("pids.max");
    fs::write(&pids, "max")?;
    let (run, report) = audit(ctx, ctx.name())?;
    expect!(run.status.code() == Some(5), "the exit code is {:?}, not 5", run.status.code());
    let failed = |line: &&Value| line.get("passed") == Some(&false.into());
    expect!(
        lines(&report, "cgroup").filter(failed).any(|line| text(line, "found") == "pids.max max"),
        "the wider limit is not told: {report}"
    );
    goes_on(&running)?;
    running.signal(Signal::TERM)?;
    running.wait(Duration::from_secs(20))?.success()?;
    ctx.run(["casemate", "audit", ctx.name()])?.refusal("guest-not-running")?;
    expect!(!Path::new("/run/casemate").join(format!("{}.json", ctx.name())).exists(), "the record stays");
    Ok(())
}

/// By other tools than Casemate's.
fn digest_is_of_the_report(ctx: &Ctx, report: &str) -> Result<(), Failure> {
    fs::write(ctx.directory().join("report.json"), report)?;
    let digests = ctx.shell(
        "sed 's/.*,\"digest\":\"\\([0-9a-f]*\\)\"}$/\\1/' report.json
         sed 's/,\"digest\":\"[0-9a-f]*\"}$/}/' report.json | tr -d '\\n' | sha256sum | cut -d' ' -f1",
    )?;
    let mut digests = digests.lines();
    let (said, found) = (digests.next(), digests.next());
    expect!(said.is_some() && said == found, "the digest is {found:?}, the report says {said:?}");
    Ok(())
}

/// It counts further than it has counted now.
fn goes_on(running: &Running) -> Result<(), Failure> {
    let tick = |number: &u32| format!("tick-{number}.");
    let next = (1..u32::MAX).find(|number| running.wait_for_text(&tick(number), Duration::ZERO).is_err());
    running.wait_for_text(&tick(&(next.unwrap_or(0) + 2)), SOON)
}
