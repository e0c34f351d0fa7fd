//! Casemate beside other VMMs in one lab: the same kernel, the same image, in turn. `cargo xtask bench` runs it and shows the
//! table; docs/performance.md says how each row is measured and what it does not tell.
//!
//! What is measured is told in lines of the log that begin with `# row `, each with JSON behind it.

mod assigned;
mod disk;
mod exec;
mod jail;
mod net;
mod peers;
mod queue;

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use casemate_hwtests::harness::{self, Ctx, Failure, GuestFile, GuestImage, LabTest, Running, tiny_kernel};
use casemate_hwtests::is_counted;
use peers::{Guest, LAST_LINE, Peer, pss_beyond_kib};
use rustix::process::Signal;
use serde_json::json;

const BENCHES: &[LabTest] = &[
    LabTest::new("bench-start", start).deadline_seconds(1200),
    LabTest::new("bench-memory", memory).deadline_seconds(600),
    LabTest::new("bench-disk", disk::disk).deadline_seconds(900),
    LabTest::new("bench-queue", queue::queue).deadline_seconds(1800),
    LabTest::new("bench-exec", exec::exec).deadline_seconds(600),
    LabTest::new("bench-net", net::net).deadline_seconds(1200),
    LabTest::new("bench-assigned", assigned::assigned).deadline_seconds(900),
    LabTest::new("bench-attach", assigned::attach).deadline_seconds(900),
    LabTest::new("bench-attach-4gib", assigned::attach_to_a_larger_one)
        .long("a guest of 4 GiB, in a lab of 7")
        .deadline_seconds(1800),
    LabTest::new("bench-card", assigned::card).deadline_seconds(900),
    LabTest::new("bench-jail", jail::jail).deadline_seconds(600),
];

/// In a guest's script: its clock, in nanoseconds.
const NOW: &str = "now() { sed -n 's|^now at \\([0-9]*\\) nsecs$|\\1|p' /proc/timer_list; }";
/// The seconds between two times that it told, if a line has them and no more.
fn seconds_between(times: &str) -> Option<f64> {
    let times: Vec<f64> = times.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match times[..] {
        [begin, end] => Some((end - begin) / 1e9),
        _ => None,
    }
}

/// For a guest to come so far.
const SOON: Duration = Duration::from_secs(60);
const MEMORY_MIB: u64 = 256;

fn main() -> ExitCode {
    harness::main(BENCHES)
}

/// How often each is measured: where instructions are counted, runs of the same differ little.
fn rounds(timed: usize) -> usize {
    if is_counted() { 3 } else { timed }
}

/// Has each of the peers measured so many times; each round begins with another of them, so that none always runs in what the same
/// one has left behind. What came of it is told by peer, in their order.
fn in_turn<T>(
    peers: &[Peer],
    rounds: usize,
    mut measure: impl FnMut(&Peer) -> Result<T, Failure>,
) -> Result<Vec<Vec<T>>, Failure> {
    let mut measured: Vec<Vec<T>> = peers.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        let all = peers.iter().zip(0..).cycle().skip(round % peers.len().max(1)).take(peers.len());
        for (peer, number) in all {
            let value = measure(peer)?;
            if let Some(runs) = measured.get_mut::<usize>(number) {
                runs.push(value);
            }
        }
    }
    Ok(measured)
}

/// Tells a row of which less is better: medians of what was measured, ours first, and how many times better ours is.
fn tell(name: &str, unit: &str, peers: &[Peer], measured: &[Vec<f64>]) {
    let median = |values: &Vec<f64>| {
        let mut values = values.clone();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    for (peer, values) in peers.iter().zip(measured) {
        let all: Vec<String> = values.iter().map(|value| format!("{value:.4}")).collect();
        println!("# {name}: {} had {} {unit}", peer.name(), all.join(", "));
    }
    let Some((ours, others)) = measured.split_first() else { return };
    for (peer, theirs) in peers.iter().skip(1).zip(others) {
        let (own, other) = (median(ours), median(theirs));
        // Of what there is none at all, nobody has a part.
        let ratio = (own > 0.0).then(|| other / own);
        let row = json!({
            "name": name, "unit": unit, "ours": own, "peer": peer.name(), "theirs": other,
            "peer_version": peer.version(), "ratio": ratio, "runs": ours.len(),
        });
        println!("# row {row}");
    }
}

/// Tells a row of a count, which is exact; less is better.
fn tell_counts(name: &str, peers: &[Peer], counts: &[f64]) {
    let Some((ours, others)) = counts.split_first() else { return };
    for (peer, theirs) in peers.iter().skip(1).zip(others) {
        let ratio = (*ours > 0.0).then(|| theirs / ours);
        let row = json!({
            "name": name, "unit": "count", "ours": ours, "peer": peer.name(), "theirs": theirs,
            "peer_version": peer.version(), "ratio": ratio, "runs": 1,
        });
        println!("# row {row}");
    }
}

/// A guest that runs `script`, with an image of it in the bench's folder. Its kernel is there as well, in memory: what the lab's share
/// takes to read is nobody's.
fn guest(ctx: &Ctx, script: &str, disks: Vec<(PathBuf, bool)>) -> Result<Guest, Failure> {
    let kernel = ctx.directory().join("vmlinux");
    fs::copy(ctx.layout().guest_kernel(), &kernel)?;
    let initrd = ctx.directory().join("guest.cpio");
    GuestImage::new(&format!("{script}\necho {LAST_LINE}")).write(ctx.layout(), &initrd)?;
    Ok(Guest { kernel, initrd: Some(initrd), memory_mib: MEMORY_MIB, disks, net: None, device: None })
}

/// A guest of Casemate's in which nothing happens, beside whatever is measured: where guests start, others run, and a host has one copy of
/// Casemate's programs as long as somebody executes it.
fn resting(ctx: &Ctx) -> Result<Running, Failure> {
    let kernel = ctx.directory().join("resting");
    fs::write(&kernel, tiny_kernel())?;
    let guest = GuestFile::new("resting", &kernel, Path::new("")).without_initrd().vcpus(1).memory("64 MiB");
    let path = guest.write_into(ctx.directory())?;
    let words = ["run", "--json", "--grace=0"].map(OsStr::new);
    let running =
        ctx.start([ctx.program("casemate")?.as_os_str()].into_iter().chain(words).chain([path.as_os_str()]))?;
    running.wait_for_text("tiny-guest-runs", SOON)?;
    Ok(running)
}

/// Ends it.
fn end_resting(running: Running) -> Result<(), Failure> {
    running.signal(Signal::TERM)?;
    running.wait(SOON)?.success()?;
    Ok(())
}

/// From the command to the first line of the guest's own program, and how much of that its kernel says that it took.
fn start(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = r"echo clock: $(dmesg | sed -n 's|^\[ *\([0-9.]*\)\] Run /init .*|\1|p')";
    let (peers, guest) = (Peer::found(ctx)?, guest(ctx, script, Vec::new())?);
    let resting = resting(ctx)?;
    let started = |peer: &Peer| {
        let begun = Instant::now();
        let running = peer.start(ctx, &guest)?;
        if matches!(peer, Peer::Casemate) {
            for step in ["admitted", "cell-closed", "running"] {
                running.wait_for_step(step, SOON)?;
                println!("# {step} after {} ms", begun.elapsed().as_millis());
            }
        }
        running.wait_for_text("CASEMATE-INIT", SOON)?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        println!("# {} after {took:.0} ms", peer.name());
        let own = peer.end(running, SOON)?.value("clock:")?.parse::<f64>()? * 1e3;
        Ok([took, own])
    };
    // What each reads from disks for the first time, and Casemate's plugins that are compiled once a host, are in none of the rounds.
    in_turn(&peers, 1, started)?;
    // What a kernel waits for at its start ends with a tick of its clock, so that runs of the same differ even where instructions are counted.
    let measured = in_turn(&peers, 9, started)?;
    end_resting(resting)?;
    for (index, what) in
        ["start, to init", "start, to init: by its kernel's own clock"].into_iter().enumerate()
    {
        let of = |runs: &Vec<[f64; 2]>| runs.iter().filter_map(|run| run.get(index).copied()).collect();
        tell(what, "ms", &peers, &measured.iter().map(of).collect::<Vec<_>>());
    }
    Ok(())
}

/// What the VMM's process has beside the guest's memory, with a Linux that has used a disk, and how often a processor left
/// the guest until then.
fn memory(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")?;
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![1; 8 << 20])?;
    let script = "dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; echo used-all; sleep 4";
    let (peers, guest) = (Peer::found(ctx)?, guest(ctx, script, vec![(disk, false)])?);
    let measured = in_turn(&peers, 3, |peer| {
        let running = peer.start(ctx, &guest)?;
        running.wait_for_text("used-all", SOON)?;
        let pid = peer.vmm_of(&running)?;
        let counted = disk::counters(pid)?;
        let values =
            [pss_beyond_kib(pid, guest.memory_mib)?, counted.exits as f64, counted.to_user_space as f64];
        peer.end(running, SOON)?;
        Ok(values)
    })?;
    let rows = [
        ("memory beside the guest's", "KiB"),
        ("start, and 8 MiB read from a disk: exits", "exits"),
        ("start, and 8 MiB read from a disk: exits to user space", "exits"),
    ];
    for (index, (name, unit)) in rows.into_iter().enumerate() {
        let of = |runs: &Vec<[f64; 3]>| runs.iter().filter_map(|run| run.get(index).copied()).collect();
        tell(name, unit, &peers, &measured.iter().map(of).collect::<Vec<_>>());
    }
    Ok(())
}
