//! The VMMs that are measured, and how each is started.

mod lines;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::harness::{Ctx, Failure, Finished, GuestFile, Running};
use rustix::process::Signal;
use serde_json::Value;

/// What each guest prints last.
pub(crate) const LAST_LINE: &str = "bench-guest-ends";

/// The lab has it; a host may be without.
const QEMU: &str = "qemu-system-x86_64";

/// A guest for all of them: one processor, a serial console.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    /// None for a kernel of a few instructions.
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) memory_mib: u64,
    /// Raw images, and whether each is only read.
    pub(crate) disks: Vec<(PathBuf, bool)>,
    pub(crate) net: Option<Net>,
    /// A physical function, by its address.
    pub(crate) device: Option<&'static str>,
}

impl Guest {
    /// Whether the others get a source of entropy, as a guest of Casemate's always has. A kernel of a few instructions gets along without.
    fn has_entropy(&self) -> bool {
        self.initrd.is_some()
    }

    /// The same for a balloon with free page reporting, which there is not beside an assigned device.
    fn has_balloon(&self) -> bool {
        self.initrd.is_some() && self.device.is_none()
    }
}

/// A network card.
#[derive(Clone, Copy)]
pub(crate) struct Net {
    pub(crate) tap: &'static str,
    /// Of the host's end, with the length of its prefix.
    pub(crate) host_address: &'static str,
    /// Whether the kernel carries its frames.
    pub(crate) vhost: bool,
}

/// A VMM.
pub(crate) enum Peer {
    /// `casemate run`: admitted by the shipped policy, in a cell.
    Casemate,
    /// QEMU as q35 with virtio over PCI: without a jail, or with what it can close itself.
    Qemu { version: String, closed: bool },
    /// Cloud Hypervisor under its own filters: with Landlock when closed.
    CloudHypervisor { program: PathBuf, version: String, closed: bool },
    /// Firecracker under its own filters, with virtio over PCI: under its jailer when closed.
    Firecracker { program: PathBuf, version: String, jailer: Option<PathBuf> },
}

impl Peer {
    /// Casemate, and the others that are on this machine.
    pub(crate) fn found(ctx: &Ctx) -> Result<Vec<Self>, Failure> {
        let version = |program: &Path, word: usize| -> Result<String, Failure> {
            let told = ctx.run([program.as_os_str(), "--version".as_ref()])?;
            let printed = &told.success()?.stdout;
            let version = printed.split_whitespace().nth(word).unwrap_or("?");
            Ok(version.trim_start_matches('v').to_owned())
        };
        let mut peers = vec![Self::Casemate];
        let folders = std::env::var_os("PATH").unwrap_or_default();
        if std::env::split_paths(&folders).any(|folder| folder.join(QEMU).is_file()) {
            peers.push(Self::Qemu { version: version(Path::new(QEMU), 3)?, closed: false });
        } else {
            println!("# {QEMU} was not found on PATH: it's not measured");
        }
        let program = ctx.layout().peer("cloud-hypervisor");
        if program.exists() {
            let version = version(&program, 1)?;
            peers.push(Self::CloudHypervisor { program, version, closed: false });
        }
        let program = ctx.layout().peer("firecracker");
        if program.exists() {
            let version = version(&program, 1)?;
            peers.push(Self::Firecracker { program, version, jailer: None });
        }
        for absent in ["cloud-hypervisor", "firecracker"] {
            if !ctx.layout().peer(absent).exists() {
                println!("# {absent} was not found on PATH: it's not measured");
            }
        }
        Ok(peers)
    }

    /// As closed as it can be by what comes with it: QEMU as libvirt has it, with a user of its own and all that its
    /// `-sandbox` denies; Cloud Hypervisor with such a user and Landlock; Firecracker under its jailer, if that is there.
    /// Casemate is closed always.
    pub(crate) fn close(&mut self, ctx: &Ctx) {
        match self {
            Self::Casemate => {}
            Self::Qemu { closed, .. } | Self::CloudHypervisor { closed, .. } => *closed = true,
            Self::Firecracker { jailer, .. } => {
                *jailer = Some(ctx.layout().peer("jailer")).filter(|jailer| jailer.exists());
            }
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Casemate => "casemate",
            Self::Qemu { .. } => "qemu",
            Self::CloudHypervisor { .. } => "cloud-hypervisor",
            Self::Firecracker { .. } => "firecracker",
        }
    }

    pub(crate) fn version(&self) -> &str {
        match self {
            Self::Casemate => "",
            Self::Qemu { version, .. }
            | Self::CloudHypervisor { version, .. }
            | Self::Firecracker { version, .. } => version,
        }
    }

    /// Whether it has such a machine: the kernel's network back end and assigned devices are not everywhere.
    pub(crate) fn can(&self, guest: &Guest) -> bool {
        let vhost = guest.net.is_some_and(|net| net.vhost);
        match self {
            Self::Casemate | Self::Qemu { .. } => true,
            Self::CloudHypervisor { .. } => !vhost,
            Self::Firecracker { .. } => !vhost && guest.device.is_none(),
        }
    }

    /// Starts it: the others in a cgroup like that of Casemate's cell, or the host's scheduler would count each of their threads beside
    /// what they talk to, and all of a cell's as one.
    pub(crate) fn start(&self, ctx: &Ctx, guest: &Guest) -> Result<Running, Failure> {
        let words = self.words(ctx, guest)?;
        if matches!(self, Self::Casemate) {
            return ctx.start(words);
        }
        // What starts it is in there as well, for so long.
        fs::write(limited_cgroup(guest.memory_mib)?.join("cgroup.procs"), "0")?;
        let running = ctx.start(words);
        fs::write("/sys/fs/cgroup/cgroup.procs", "0")?;
        running
    }

    /// The words of the command that starts it; what it needs for that is made.
    fn words(&self, ctx: &Ctx, guest: &Guest) -> Result<Vec<OsString>, Failure> {
        if let Some(net) = guest.net {
            // Of the peer before, where it makes none itself.
            ctx.shell(&format!("ip link del {} 2>/dev/null || true", net.tap))?;
        }
        match self {
            Self::Casemate => {
                let path = casemate(guest).write_into(ctx.directory())?;
                let program = ctx.program("casemate")?;
                Ok(vec![program.into(), "run".into(), "--json".into(), path.into()])
            }
            Self::Qemu { closed, .. } => Ok(lines::qemu(guest, *closed)),
            Self::CloudHypervisor { program, closed, .. } => {
                Ok(lines::cloud_hypervisor(program, guest, *closed))
            }
            Self::Firecracker { program, jailer, .. } => {
                if let Some(net) = guest.net {
                    let Net { tap, host_address, .. } = net;
                    ctx.shell(&format!(
                        "ip tuntap add {tap} mode tap vnet_hdr
                        ip addr add {host_address} dev {tap}; ip link set {tap} up"
                    ))?;
                }
                match jailer {
                    None => lines::firecracker(ctx, program, guest),
                    Some(jailer) => lines::jailed_firecracker(ctx, jailer, program, guest),
                }
            }
        }
    }

    /// Starts it in a cgroup of its own, below which all that it makes there stays.
    pub(crate) fn start_in(&self, ctx: &Ctx, guest: &Guest, cgroup: &Path) -> Result<Running, Failure> {
        let script = r#"echo 0 >"$0/cgroup.procs"; exec "$@""#;
        let mut words = ["sh", "-euc", script].map(OsString::from).to_vec();
        words.push(cgroup.into());
        words.extend(self.words(ctx, guest)?);
        ctx.start(words)
    }

    /// Waits until the guest has ended, which Firecracker's can't by itself: it has no ACPI to power off by.
    pub(crate) fn end(&self, running: Running, timeout: Duration) -> Result<Finished, Failure> {
        if matches!(self, Self::Firecracker { .. }) {
            running.wait_for_text(LAST_LINE, timeout)?;
            running.signal(Signal::TERM)?;
            return running.wait(timeout);
        }
        let finished = running.wait(timeout)?;
        finished.success()?;
        Ok(finished)
    }

    /// Whether the host's end of a card has its address by now.
    pub(crate) fn makes_taps(&self) -> bool {
        !matches!(self, Self::Qemu { .. })
    }

    /// The process that has the guest's memory.
    pub(crate) fn vmm_of(&self, running: &Running) -> Result<u32, Failure> {
        match self {
            Self::Casemate => {
                let step = running.wait_for_step("cell-closed", Duration::from_secs(60))?;
                let pid = step.get("pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
                pid.ok_or_else(|| Failure::new(format_args!("the step names no process: {step}")))
            }
            // The jailer, too, becomes what it starts.
            _ => Ok(running.pid()),
        }
    }
}

/// A cgroup as deep as a cell's, with the same controllers and as much memory, by which the kernel also decides how much may wait to be
/// written back; and two processors.
fn limited_cgroup(memory_mib: u64) -> Result<PathBuf, Failure> {
    let root = Path::new("/sys/fs/cgroup");
    let parent = root.join("peers");
    let own = parent.join("bench");
    fs::create_dir_all(&own)?;
    for directory in [root, &parent] {
        fs::write(directory.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
    }
    fs::write(own.join("memory.max"), ((memory_mib + memory_mib / 128 + 64) << 20).to_string())?;
    fs::write(own.join("pids.max"), "256")?;
    fs::write(own.join("cpu.max"), "200000 100000")?;
    Ok(own)
}

fn casemate(guest: &Guest) -> GuestFile {
    let initrd = guest.initrd.as_deref();
    let mut file = GuestFile::new("bench", &guest.kernel, initrd.unwrap_or(Path::new("")))
        .vcpus(1)
        .memory(&format!("{} MiB", guest.memory_mib));
    if initrd.is_none() {
        file = file.without_initrd();
    }
    for (path, read_only) in &guest.disks {
        file = file.disk(path, *read_only);
    }
    if let Some(net) = guest.net {
        file = file.net(net.tap, net.host_address).vhost(net.vhost);
    }
    if let Some(address) = guest.device {
        file = file.device(address);
    }
    file
}

/// Pss of a process without the guest's memory: a mapping that is as large or larger, or some that lie one behind the other and are exactly
/// as large together.
pub(crate) fn pss_beyond_kib(pid: u32, memory_mib: u64) -> Result<f64, Failure> {
    let smaps = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let number = |text| u64::from_str_radix(text, 16).ok();
        if let Some((start, end)) = range.and_then(|(start, end)| Some((number(start)?, number(end)?))) {
            mappings.push(Mapping { start, end, pss_kib: 0 });
        } else if let (Some(pss), Some(last)) = (line.strip_prefix("Pss:"), mappings.last_mut()) {
            last.pss_kib = pss.trim().trim_end_matches(" kB").parse()?;
        }
    }
    let all: u64 = mappings.iter().map(|mapping| mapping.pss_kib).sum();
    let guests = guests(&mappings, memory_mib << 20);
    let guests =
        guests.ok_or_else(|| Failure::new(format_args!("no memory of {memory_mib} MiB in {smaps}")))?;
    Ok(all.saturating_sub(guests) as f64)
}

/// A mapping of a process.
struct Mapping {
    start: u64,
    end: u64,
    pss_kib: u64,
}

fn guests(mappings: &[Mapping], bytes: u64) -> Option<u64> {
    let large: Vec<&Mapping> =
        mappings.iter().filter(|mapping| mapping.end - mapping.start >= bytes).collect();
    if !large.is_empty() {
        return Some(large.iter().map(|mapping| mapping.pss_kib).sum());
    }
    let together = |from: &[Mapping]| {
        let (mut end, mut size, mut pss_kib) = (from.first()?.start, 0, 0);
        for mapping in from {
            if size >= bytes {
                break;
            }
            if mapping.start != end {
                return None;
            }
            end = mapping.end;
            size += mapping.end - mapping.start;
            pss_kib += mapping.pss_kib;
        }
        (size == bytes).then_some(pss_kib)
    };
    (0..mappings.len()).find_map(|first| together(mappings.get(first..)?))
}
