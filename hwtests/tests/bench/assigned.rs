//! Assigned devices: what a drive's requests and a card's packets cost, how soon a guest has its drive, and how soon it's free again.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use casemate_hwtests::{
    devices,
    harness::{Ctx, Failure},
};

use crate::{
    SOON,
    disk::{Counters, counters},
    guest, in_turn,
    peers::{Guest, Peer},
};

/// One after the other, past the guest's cache.
const READS: u32 = 8_000;
/// Answered before the next; each is a packet both ways.
const PINGS: u32 = 3_000;
const PART_MAX: Duration = Duration::from_secs(180);
/// Until then a guest has done what it puts off when it starts: a tenth of a second or three, which isn't the device's.
const QUIET_AFTER_S: u32 = 5;

/// What one run told.
#[derive(Clone, Copy)]
struct Run {
    /// From the command to the first line of the guest's own program.
    start_ms: f64,
    /// Of what was done one after the other, the processor's time that each took of guest and VMM. How long it took would tell of the
    /// device, which the lab emulates in a thread of its own.
    each_us: f64,
    exits: f64,
    to_user_space: f64,
    /// From the guest's last line to the end of all that had the drive.
    free_ms: f64,
}

/// A row: its name, its unit, and which figure of a run it's of.
type Row = (&'static str, &'static str, fn(&Run) -> f64);

/// With vfio-pci, where it stays between guests, as QEMU wants it; so no driver of the host's is waited for in either. And KVM doesn't spend
/// processor time on waiting for a device.
fn claimed(
    ctx: &Ctx,
    address: &'static str,
    act: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    ctx.shell("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")?;
    ctx.run(["casemate", "devices", "claim", address])?.success()?;
    let polls = Path::new("/sys/module/kvm/parameters/halt_poll_ns");
    let usual = fs::read_to_string(polls)?;
    fs::write(polls, "0")?;
    let done = act();
    fs::write(polls, usual)?;
    ctx.run(["casemate", "devices", "release", address])?.success()?;
    done
}

/// Those that can have this guest, and three runs of each, in turn.
fn measure(
    ctx: &Ctx,
    guest: &Guest,
    run: impl Fn(&Peer) -> Result<Run, Failure>,
) -> Result<(Vec<Peer>, Vec<Vec<Run>>), Failure> {
    let mut peers = Peer::found(ctx)?;
    peers.retain(|peer| peer.can(guest));
    let measured = in_turn(&peers, 3, run)?;
    Ok((peers, measured))
}

fn tell(rows: &[Row], peers: &[Peer], measured: &[Vec<Run>]) {
    for (name, unit, of) in rows {
        let values: Vec<Vec<f64>> = measured.iter().map(|runs| runs.iter().map(of).collect()).collect();
        crate::tell(name, unit, peers, &values);
    }
}

pub(crate) fn assigned(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("nvme")?;
    let script = format!(
        "modprobe nvme; n=0; until [ -b /dev/nvme0n1 ] || [ $n = 200 ]; do sleep 0.1; n=$((n + 1)); done
        sleep {QUIET_AFTER_S}; echo work-begins; sleep 1
        dd if=/dev/nvme0n1 of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null
        echo work-ends; sleep 1; echo last-line"
    );
    let mut guest: Guest = guest(ctx, &script, Vec::new())?;
    guest.device = Some(devices::NVME);
    claimed(ctx, devices::NVME, || {
        let (peers, measured) = measure(ctx, &guest, |peer| run(ctx, peer, &guest, READS))?;
        let rows: [Row; 5] = [
            ("start with an assigned drive, to init", "ms", |run| run.start_ms),
            ("assigned drive: processor time of a 4 KiB read", "µs", |run| run.each_us),
            ("assigned drive: exits", "per 1,000 reads", |run| run.exits),
            ("assigned drive: exits to user space", "per 1,000 reads", |run| run.to_user_space),
            ("assigned drive: from the guest's last line to free", "ms", |run| run.free_ms),
        ];
        tell(&rows, &peers, &measured);
        Ok(())
    })
}

/// A network card's packets.
pub(crate) fn card(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = format!(
        "modprobe e1000e; n=0; until [ -e /sys/class/net/eth0 ] || [ $n = 200 ]; do sleep 0.1; n=$((n + 1)); done
        ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
        n=0; until ping -c 1 -W 1 10.0.2.2 >/dev/null || [ $n = 60 ]; do n=$((n + 1)); done
        sleep {QUIET_AFTER_S}; echo work-begins; sleep 1
        ping -c {PINGS} -A -q 10.0.2.2 >/dev/null || echo no-answers
        echo work-ends; sleep 1; echo last-line"
    );
    let mut guest: Guest = guest(ctx, &script, Vec::new())?;
    guest.device = Some(devices::E1000E);
    claimed(ctx, devices::E1000E, || {
        let (peers, measured) = measure(ctx, &guest, |peer| run(ctx, peer, &guest, 2 * PINGS))?;
        let rows: [Row; 3] = [
            ("assigned card: processor time of a round trip", "µs", |run| 2.0 * run.each_us),
            ("assigned card: exits", "per 1,000 packets", |run| run.exits),
            ("assigned card: exits to user space", "per 1,000 packets", |run| run.to_user_space),
        ];
        tell(&rows, &peers, &measured);
        Ok(())
    })
}

/// How soon a guest of 1 GiB has its drive: all of its memory has to be mapped for that.
pub(crate) fn attach(ctx: &mut Ctx) -> Result<(), Failure> {
    attach_to(ctx, 1024, "start with an assigned drive and 1 GiB, to init")
}

/// The same with 4 GiB.
pub(crate) fn attach_to_a_larger_one(ctx: &mut Ctx) -> Result<(), Failure> {
    attach_to(ctx, 4096, "start with an assigned drive and 4 GiB, to init")
}

fn attach_to(ctx: &Ctx, memory_mib: u64, name: &'static str) -> Result<(), Failure> {
    ctx.load_driver("nvme")?;
    let mut guest: Guest = guest(ctx, "true", Vec::new())?;
    (guest.device, guest.memory_mib) = (Some(devices::NVME), memory_mib);
    claimed(ctx, devices::NVME, || {
        let (peers, measured) = measure(ctx, &guest, |peer| started(ctx, peer, &guest))?;
        tell(&[(name, "ms", |run| run.start_ms)], &peers, &measured);
        Ok(())
    })
}

fn started(ctx: &Ctx, peer: &Peer, guest: &Guest) -> Result<Run, Failure> {
    let begun = Instant::now();
    let running = peer.start(ctx, guest)?;
    running.wait_for_text("CASEMATE-INIT", PART_MAX)?;
    let start_ms = begun.elapsed().as_secs_f64() * 1e3;
    peer.end(running, SOON)?;
    Ok(Run { start_ms, each_us: 0.0, exits: 0.0, to_user_space: 0.0, free_ms: 0.0 })
}

/// A run in which so many things are done one after the other.
fn run(ctx: &Ctx, peer: &Peer, guest: &Guest, count: u32) -> Result<Run, Failure> {
    let begun = Instant::now();
    let running = peer.start(ctx, guest)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    let start_ms = begun.elapsed().as_secs_f64() * 1e3;
    running.wait_for_text("work-begins", PART_MAX)?;
    let pid = peer.vmm_of(&running)?;
    let (before, used_before) = (counters(pid)?, processor_time_ns(pid)?);
    running.wait_for_text("work-ends", PART_MAX)?;
    let (after, used) = (counters(pid)?, processor_time_ns(pid)?.saturating_sub(used_before));
    running.wait_for_text("last-line", PART_MAX)?;
    let ended = Instant::now();
    let finished = peer.end(running, SOON)?;
    let free_ms = ended.elapsed().as_secs_f64() * 1e3;
    if finished.stdout.contains("no-answers") {
        return Err(Failure::new("some pings had no answer"));
    }
    // Whoever comes next can have it.
    let device = guest.device.unwrap_or_default();
    let group = fs::read_link(format!("/sys/bus/pci/devices/{device}/iommu_group"))?;
    let group = group.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    fs::File::options().read(true).write(true).open(format!("/dev/vfio/{group}"))?;
    let per_thousand = |counted: u64| counted as f64 * 1e3 / f64::from(count);
    let Counters { exits, to_user_space } = after.since(before);
    let each_us = used as f64 / 1e3 / f64::from(count);
    let (exits, to_user_space) = (per_thousand(exits), per_thousand(to_user_space));
    Ok(Run { start_ms, each_us, exits, to_user_space, free_ms })
}

/// What a process's threads have had of processors, their guest included.
fn processor_time_ns(pid: u32) -> Result<u64, Failure> {
    let mut sum: u64 = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let told = fs::read_to_string(thread?.path().join("schedstat"))?;
        let own = told.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        sum += own.ok_or_else(|| Failure::new(format_args!("schedstat is {told:?}")))?;
    }
    Ok(sum)
}
