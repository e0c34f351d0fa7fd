//! A guest of a few instructions: what processor time its VMM takes from its making to its end.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::harness::{Ctx, Failure, tiny_kernel_that_ends};
use serde_json::Value;

use crate::{
    SOON, guest,
    peers::{Guest, Peer},
};

const RUNS: usize = 7;
const GROUPS: &str = "/sys/fs/cgroup";

pub(crate) fn exec(ctx: &mut Ctx) -> Result<(), Failure> {
    let kernel = ctx.directory().join("tiny");
    fs::write(&kernel, tiny_kernel_that_ends())?;
    let guest = Guest { kernel, initrd: None, memory_mib: 128, ..guest(ctx, "true", Vec::new())? };
    let peers = Peer::found(ctx)?;
    let mut vmm = vec![Vec::new(); peers.len()];
    let mut all = vmm.clone();
    for _ in 0..RUNS {
        for (number, peer) in peers.iter().enumerate() {
            let [of_vmm, of_all] = times_ms(ctx, peer, &guest)?;
            for (measured, value) in [(&mut vmm, of_vmm), (&mut all, of_all)] {
                measured.get_mut(number).ok_or_else(|| Failure::new("no such peer"))?.push(value);
            }
        }
    }
    crate::tell("a guest of a few instructions: processor time of the VMM", "ms", &peers, &vmm);
    crate::tell("a guest of a few instructions: processor time of all", "ms", &peers, &all);
    Ok(())
}

/// Of the process that has the guest, and of all processes of the command.
fn times_ms(ctx: &Ctx, peer: &Peer, guest: &Guest) -> Result<[f64; 2], Failure> {
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
    Ok([vmm, all].map(|time| time.as_secs_f64() * 1e3))
}

/// Processor time of a cgroup.
fn used(cgroup: &Path) -> Result<Duration, Failure> {
    let text = fs::read_to_string(cgroup.join("cpu.stat"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let microseconds = line.ok_or_else(|| Failure::new("cpu.stat has no usage_usec"))?.parse()?;
    Ok(Duration::from_micros(microseconds))
}
