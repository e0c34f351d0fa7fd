//! An assigned NVMe drive: what its requests cost, how soon a guest has it, and how soon it's free again.

use std::{
    fs,
    time::{Duration, Instant},
};

use casemate_hwtests::{
    devices,
    harness::{Ctx, Failure, Running},
};

use crate::{
    SOON,
    disk::{Counters, counters},
    guest,
    peers::{Guest, Peer},
};

/// One after the other, past the guest's cache.
const READS: u32 = 2_000;
const PART_MAX: Duration = Duration::from_secs(120);

/// What one run told.
#[derive(Clone, Copy)]
struct Run {
    /// From the command to the first line of the guest's own program.
    start_ms: f64,
    read_us: f64,
    exits: f64,
    to_user_space: f64,
    /// From the guest's last line to the end of all that had the drive.
    free_ms: f64,
}

/// A row: its name, its unit, and which figure of a run it's of.
type Row = (&'static str, &'static str, fn(&Run) -> f64);

pub(crate) fn assigned(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("nvme")?;
    ctx.shell("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")?;
    // It stays with vfio-pci, as QEMU wants it; so no driver of the host's is waited for in either.
    ctx.run(["casemate", "devices", "claim", devices::NVME])?.success()?;
    let script = format!(
        "modprobe nvme; n=0; until [ -b /dev/nvme0n1 ] || [ $n = 200 ]; do sleep 0.1; n=$((n + 1)); done
        now() {{ cut -d' ' -f1 /proc/uptime; }}
        echo reads-begin; sleep 1; begin=$(now)
        dd if=/dev/nvme0n1 of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null
        end=$(now); echo reads: $begin $end; echo reads-end; sleep 1; echo last-line"
    );
    let mut guest: Guest = guest(ctx, &script, Vec::new())?;
    guest.device = Some(devices::NVME);
    let mut peers = Peer::found(ctx)?;
    peers.retain(|peer| peer.can(&guest));
    let mut measured = vec![Vec::new(); peers.len()];
    for _ in 0..3 {
        for (peer, runs) in peers.iter().zip(&mut measured) {
            runs.push(run(ctx, peer, &guest)?);
        }
    }
    let rows: [Row; 5] = [
        ("start with an assigned drive, to init", "ms", |run| run.start_ms),
        ("assigned drive: 4 KiB reads", "µs each", |run| run.read_us),
        ("assigned drive: exits", "per 1,000 reads", |run| run.exits),
        ("assigned drive: exits to user space", "per 1,000 reads", |run| run.to_user_space),
        ("assigned drive: from the guest's last line to free", "ms", |run| run.free_ms),
    ];
    for (name, unit, of) in rows {
        let values: Vec<Vec<f64>> = measured.iter().map(|runs| runs.iter().map(of).collect()).collect();
        crate::tell(name, unit, &peers, &values);
    }
    ctx.run(["casemate", "devices", "release", devices::NVME])?.success()?;
    Ok(())
}

fn run(ctx: &Ctx, peer: &Peer, guest: &Guest) -> Result<Run, Failure> {
    let begun = Instant::now();
    let running = peer.start(ctx, guest)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    let start_ms = begun.elapsed().as_secs_f64() * 1e3;
    running.wait_for_text("reads-begin", PART_MAX)?;
    let pid = peer.vmm_of(&running)?;
    let before = counters(pid)?;
    running.wait_for_text("reads-end", PART_MAX)?;
    let after = counters(pid)?;
    let seconds = seconds(&running)?;
    running.wait_for_text("last-line", PART_MAX)?;
    let ended = Instant::now();
    peer.end(running, SOON)?;
    let free_ms = ended.elapsed().as_secs_f64() * 1e3;
    // Whoever comes next can have it.
    let group = fs::read_link(format!("/sys/bus/pci/devices/{}/iommu_group", devices::NVME))?;
    let group = group.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    fs::File::options().read(true).write(true).open(format!("/dev/vfio/{group}"))?;
    let each = |count: u64| count as f64 * 1e3 / f64::from(READS);
    let Counters { exits, to_user_space } = after.since(before);
    let read_us = seconds * 1e6 / f64::from(READS);
    Ok(Run { start_ms, read_us, exits: each(exits), to_user_space: each(to_user_space), free_ms })
}

fn seconds(running: &Running) -> Result<f64, Failure> {
    let printed = running.printed_so_far();
    let line = printed.lines().find_map(|line| line.trim().strip_prefix("reads: "));
    let words: Vec<f64> =
        line.into_iter().flat_map(str::split_whitespace).filter_map(|word| word.parse().ok()).collect();
    match words[..] {
        [begin, end] => Ok(end - begin),
        _ => Err(Failure::new(format_args!("no times of the reads: {line:?}"))),
    }
}
