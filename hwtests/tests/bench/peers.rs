//! The VMMs that are measured, and how each is started.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::harness::{Ctx, Failure, GuestFile, Running};
use serde_json::Value;

/// A guest for all of them: one processor, a serial console.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) memory_mib: u64,
    /// Raw images, and whether each is only read.
    pub(crate) disks: Vec<(PathBuf, bool)>,
    pub(crate) net: Option<Net>,
    /// A physical function, by its address.
    pub(crate) device: Option<&'static str>,
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
}

impl Peer {
    /// Casemate, and the others that are on this machine.
    pub(crate) fn found(ctx: &Ctx) -> Result<Vec<Self>, Failure> {
        let told = ctx.run(["qemu-system-x86_64", "--version"])?;
        let version = told.success()?.stdout.split_whitespace().nth(3).unwrap_or("?").to_owned();
        Ok(vec![Self::Casemate, Self::Qemu { version, closed: false }])
    }

    /// As closed as libvirt has it: a user of its own, and all that its `-sandbox` denies. Casemate is closed always.
    pub(crate) fn close(&mut self) {
        if let Self::Qemu { closed, .. } = self {
            *closed = true;
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Casemate => "casemate",
            Self::Qemu { .. } => "qemu",
        }
    }

    pub(crate) fn version(&self) -> &str {
        match self {
            Self::Casemate => "",
            Self::Qemu { version, .. } => version,
        }
    }

    pub(crate) fn start(&self, ctx: &Ctx, guest: &Guest) -> Result<Running, Failure> {
        match self {
            Self::Casemate => {
                let mut file = GuestFile::new("bench", &guest.kernel, &guest.initrd)
                    .vcpus(1)
                    .memory(&format!("{} MiB", guest.memory_mib));
                for (path, read_only) in &guest.disks {
                    file = file.disk(path, *read_only);
                }
                if let Some(net) = guest.net {
                    file = file.net(net.tap, net.host_address).vhost(net.vhost);
                }
                if let Some(address) = guest.device {
                    file = file.device(address);
                }
                ctx.start_guest(&file)
            }
            Self::Qemu { closed, .. } => ctx.start(qemu(guest, *closed)),
        }
    }

    /// Whether it gives the host's end of a card its address.
    pub(crate) fn makes_taps(&self) -> bool {
        matches!(self, Self::Casemate)
    }

    /// The process that has the guest's memory.
    pub(crate) fn vmm_of(&self, running: &Running) -> Result<u32, Failure> {
        match self {
            Self::Casemate => {
                let step = running.wait_for_step("cell-closed", Duration::from_secs(60))?;
                let pid = step.get("pid").and_then(Value::as_u64).and_then(|pid| u32::try_from(pid).ok());
                pid.ok_or_else(|| Failure::new(format_args!("the step names no process: {step}")))
            }
            Self::Qemu { .. } => Ok(running.pid()),
        }
    }
}

fn qemu(guest: &Guest, closed: bool) -> Vec<OsString> {
    let fixed = "qemu-system-x86_64 -enable-kvm -M q35 -cpu host -smp 1 -display none -nodefaults -serial stdio -no-reboot";
    // It can't give up root's rights itself where it denies calls for rights.
    let before = if closed { "setpriv --reuid=65534 --regid=65534 --clear-groups " } else { "" };
    let mut words: Vec<OsString> =
        before.split_whitespace().chain(fixed.split(' ')).map(OsString::from).collect();
    let mut add = |option: &str, value: OsString| words.extend([OsString::from(option), value]);
    add("-m", guest.memory_mib.to_string().into());
    add("-kernel", guest.kernel.clone().into());
    add("-initrd", guest.initrd.clone().into());
    add("-append", "console=ttyS0 quiet".into());
    if closed {
        let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
        add("-sandbox", sandbox.into());
    }
    for (number, (path, read_only)) in guest.disks.iter().enumerate() {
        let read_only = if *read_only { "on" } else { "off" };
        let image = path.display();
        add("-drive", format!("file={image},if=none,id=d{number},format=raw,aio=io_uring,cache=writeback,readonly={read_only}").into());
        add("-device", format!("virtio-blk-pci,drive=d{number}").into());
    }
    if let Some(Net { tap, vhost, .. }) = guest.net {
        let vhost = if vhost { "on" } else { "off" };
        add("-netdev", format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost={vhost}").into());
        add("-device", "virtio-net-pci,netdev=n0,romfile=".into());
    }
    if let Some(address) = guest.device {
        add("-device", format!("vfio-pci,host={address}").into());
    }
    words
}

/// Pss of a process without its one large mapping, which is the guest's memory.
pub(crate) fn pss_beyond_kib(pid: u32, memory_mib: u64) -> Result<f64, Failure> {
    let smaps = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let kib = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    let (mut sum, mut is_guests) = (0, false);
    for line in smaps.lines() {
        if let Some(size) = kib(line, "Size:") {
            is_guests = size >= memory_mib << 10;
        }
        if let Some(pss) = kib(line, "Pss:").filter(|_| !is_guests) {
            sum += pss;
        }
    }
    Ok(sum as f64)
}
