//! A guest of a few instructions: how long it takes from the command to the command's end, and what processor time. It needs no lab:
//! `cargo xtask bench native` measures it on the host itself.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::harness::{Ctx, Failure, tiny_kernel_that_ends};
use serde_json::Value;

use crate::{
    SOON, in_turn,
    peers::{Guest, Peer},
};

const RUNS: usize = 11;
const GROUPS: &str = "/sys/fs/cgroup";

pub(crate) fn exec(ctx: &mut Ctx) -> Result<(), Failure> {
    let kernel = ctx.directory().join("tiny");
    fs::write(&kernel, tiny_kernel_that_ends())?;
    let guest = Guest { kernel, initrd: None, memory_mib: 128, disks: Vec::new(), net: None, device: None };
    let peers = Peer::found(ctx)?;
    let resting = crate::resting(ctx)?;
    // The first run compiles policies, and reads all programs.
    for peer in &peers {
        times_ms(ctx, peer, &guest)?;
    }
    let measured = in_turn(&peers, crate::rounds(RUNS), |peer| times_ms(ctx, peer, &guest))?;
    crate::end_resting(resting)?;
    for (index, what) in ["from the command to its end", "processor time of the VMM", "processor time of all"]
        .iter()
        .enumerate()
    {
        let of = |runs: &Vec<[f64; 3]>| runs.iter().filter_map(|run| run.get(index).copied()).collect();
        let values: Vec<Vec<f64>> = measured.iter().map(of).collect();
        crate::tell(&format!("a guest of a few instructions: {what}"), "ms", &peers, &values);
    }
    Ok(())
}

/// On the clock; processor time of the process that has the guest, and of all processes of the command.
fn times_ms(ctx: &Ctx, peer: &Peer, guest: &Guest) -> Result<[f64; 3], Failure> {
    // Cells are beside the command's own cgroup; what theirs took stays with their parent when they are gone.
    let (own, cells) = (PathBuf::from(GROUPS).join("bench-exec"), Path::new(GROUPS).join("casemate"));
    fs::create_dir_all(&own)?;
    fs::create_dir_all(&cells)?;
    let before = (used(&own)?, used(&cells)?);
    let running = peer.start_in(ctx, guest, &own)?;
    let finished = running.wait(SOON)?;
    finished.success()?.printed("guest-runs")?;
    let own = used(&own)?.saturating_sub(before.0);
    let all = own + used(&cells)?.saturating_sub(before.1);
    let vmm = match peer {
        Peer::Casemate => {
            let report = finished.report()?;
            let cpu = report.pointer("/cell/cpu_us").and_then(Value::as_u64);
            cpu.map(Duration::from_micros).ok_or_else(|| Failure::new("the report has no processor time"))?
        }
        _ => own,
    };
    Ok([finished.elapsed, vmm, all].map(|time| time.as_secs_f64() * 1e3))
}

/// Processor time of a cgroup.
fn used(cgroup: &Path) -> Result<Duration, Failure> {
    let text = fs::read_to_string(cgroup.join("cpu.stat"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let microseconds = line.ok_or_else(|| Failure::new("cpu.stat has no usage_usec"))?.parse()?;
    Ok(Duration::from_micros(microseconds))
}
