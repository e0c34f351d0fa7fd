//! A virtio disk: how long requests take, and how often a processor leaves the guest for them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::harness::{Ctx, Failure, Running};

use crate::{
    NOW, SOON, guest, in_turn,
    peers::{Guest, Peer},
    seconds_between,
};

/// One after the other, past the guest's cache.
const REQUESTS: u32 = 2_000;
/// The image, and so many long requests.
const IMAGE_MIB: u32 = 64;
/// As often, by a process each: how long theirs take differs by one in fifteen, since the pages that one is given lie as they lie.
const LONG_TIMES: u32 = 4;
/// For all of a part, where KVM is emulated.
const PART_MAX: Duration = Duration::from_secs(120);

/// What is done in the guest: its name, and the command.
const PARTS: [(&str, &str); 5] = [
    // What is told on the console before and after a part, which is no request's.
    ("nothing", "true"),
    ("reads", "dd if=/dev/vda of=/dev/null bs=4k count=2000 iflag=direct"),
    ("writes", "dd if=/dev/zero of=/dev/vda bs=4k count=2000 oflag=direct"),
    ("long-reads", "for i in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct; done"),
    ("long-writes", "for i in 1 2 3 4; do dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct; done"),
];

/// What was measured of one part.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    /// Between the two times that the guest told.
    pub(crate) seconds: f64,
    pub(crate) exits: u64,
    pub(crate) to_user_space: u64,
}

impl Part {
    /// What was counted beyond what another part caused by itself.
    fn beyond(self, other: Self) -> Self {
        Self {
            seconds: self.seconds,
            exits: self.exits.saturating_sub(other.exits),
            to_user_space: self.to_user_space.saturating_sub(other.to_user_space),
        }
    }
}

pub(crate) fn disk(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")?;
    let image = image(ctx, IMAGE_MIB as usize)?;
    // The pauses are for the host to look at its counters.
    let mut script = format!("{NOW}\n");
    for (name, command) in PARTS {
        let line = format!(
            "echo {name}-begin; sleep 1; begin=$(now); {command} 2>/dev/null; end=$(now); echo {name}: $begin $end; echo {name}-end\nsleep 1\n"
        );
        script.push_str(&line);
    }
    let guest: Guest = guest(ctx, &script, vec![(image, false)])?;
    let peers = Peer::found(ctx)?;
    let measured = in_turn(&peers, 3, |peer| {
        let running = peer.start(ctx, &guest)?;
        let parts = parts_of(peer, &running, &PARTS.map(|(name, _)| name))?;
        peer.end(running, SOON)?;
        let nothing = parts.first().copied().ok_or_else(|| Failure::new("no part was measured"))?;
        Ok(parts.into_iter().map(|part| part.beyond(nothing)).collect())
    })?;
    let of = |index: usize, value: &dyn Fn(Part) -> f64| -> Vec<Vec<f64>> {
        let runs = |runs: &Vec<Vec<Part>>| {
            runs.iter().map(|parts| parts.get(index).map_or(f64::NAN, |part| value(*part))).collect()
        };
        measured.iter().map(runs).collect()
    };
    let requests = f64::from(REQUESTS);
    for (index, name) in [(1, "4 KiB reads"), (2, "4 KiB writes")] {
        crate::tell(
            &format!("{name}, one after the other"),
            "µs each",
            &peers,
            &of(index, &|part| part.seconds * 1e6 / requests),
        );
        crate::tell(
            &format!("{name}: exits"),
            "per 1,000",
            &peers,
            &of(index, &|part| part.exits as f64 * 1e3 / requests),
        );
        let to_user_space = of(index, &|part| part.to_user_space as f64 * 1e3 / requests);
        crate::tell(&format!("{name}: exits to user space"), "per 1,000", &peers, &to_user_space);
    }
    for (index, name) in [(3, "reads of 1 MiB"), (4, "writes of 1 MiB")] {
        let requests = f64::from(LONG_TIMES * IMAGE_MIB);
        crate::tell(name, "ms each", &peers, &of(index, &|part| part.seconds * 1e3 / requests));
    }
    Ok(())
}

/// An image of so many MiB in the host's cache, on ext4, as most hosts have theirs. What is written back goes to memory: how fast a disk of the
/// host's is would be measured in all alike.
pub(crate) fn image(ctx: &Ctx, mib: usize) -> Result<PathBuf, Failure> {
    let directory = ctx.directory().join("images");
    fs::create_dir_all(&directory)?;
    let (directory_name, room_kib) = (directory.display(), (mib + 64) << 10);
    ctx.shell(&format!(
        "! grep -q '^/dev/ram0 ' /proc/mounts || umount /dev/ram0; modprobe -r brd; modprobe brd rd_nr=1 rd_size={room_kib}
        mkfs.ext4 -q -F /dev/ram0; mount /dev/ram0 {directory_name}"
    ))?;
    let image = directory.join("disk.img");
    fs::write(&image, vec![1; mib << 20])?;
    fs::File::open(&image)?.sync_all()?;
    Ok(image)
}

/// What a guest does in parts: each tells NAME-begin, `NAME: TIME TIME` as by [`NOW`], and NAME-end.
pub(crate) fn parts_of(peer: &Peer, running: &Running, names: &[&str]) -> Result<Vec<Part>, Failure> {
    let mut parts = Vec::new();
    for name in names {
        running.wait_for_text(&format!("{name}-begin"), PART_MAX)?;
        let pid = peer.vmm_of(running)?;
        let before = counters(pid)?;
        running.wait_for_text(&format!("{name}-end"), PART_MAX)?;
        let after = counters(pid)?;
        let printed = running.printed_so_far();
        let line = printed
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{name}: ")).map(str::to_owned));
        let seconds = line.as_deref().and_then(seconds_between);
        let seconds = seconds.ok_or_else(|| Failure::new(format_args!("no times of {name}: {line:?}")))?;
        let Counters { exits, to_user_space } = after.since(before);
        parts.push(Part { seconds, exits, to_user_space });
    }
    Ok(parts)
}

/// KVM's counters of a machine.
#[derive(Clone, Copy)]
pub(crate) struct Counters {
    pub(crate) exits: u64,
    /// For registers and ports.
    pub(crate) to_user_space: u64,
}

impl Counters {
    /// What was counted since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            exits: self.exits.saturating_sub(before.exits),
            to_user_space: self.to_user_space.saturating_sub(before.to_user_space),
        }
    }
}

/// Those of a process's machine.
pub(crate) fn counters(pid: u32) -> Result<Counters, Failure> {
    // Named after the thread that made the machine, which need not be the first.
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task"))?
        .flatten()
        .map(|thread| format!("{}-", thread.file_name().to_string_lossy()))
        .collect();
    let mut entries = fs::read_dir("/sys/kernel/debug/kvm")?.flatten();
    let own = entries.find(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        threads.iter().any(|thread| name.starts_with(thread))
    });
    let own: PathBuf =
        own.map(|entry| entry.path()).ok_or_else(|| Failure::new("KVM has no counters of it"))?;
    let read = |path: &Path, name: &str| -> Result<u64, Failure> {
        let text = fs::read_to_string(path.join(name))?;
        text.trim().parse().map_err(|_| Failure::new(format_args!("{name} is {text:?}")))
    };
    let to_user_space = read(&own, "mmio_exits")?.saturating_add(read(&own, "io_exits")?);
    Ok(Counters { exits: read(&own, "exits")?, to_user_space })
}
