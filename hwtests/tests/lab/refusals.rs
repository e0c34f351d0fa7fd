//! Bad input: one line that names file, line and key or device, cause and remedy; exit code 1; the host unchanged.

use std::{fs, path::Path};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, GuestFile, Running},
};
use rustix::process::Signal;

use crate::{endings::broker_of, host_state::HostState, passthrough::have_drive};

/// What a refused guest's line must say.
struct Refused<'a> {
    code: &'a str,
    /// The key that is named, and the text in the file that stands in its line.
    key: &'a str,
    written: &'a str,
    /// What else the line names: a device, the cause, the remedy.
    says: &'a [&'a str],
}

/// Runs a guest's file and judges the refusal.
fn expect_refused(ctx: &Ctx, text: &str, refused: &Refused<'_>) -> Result<(), Failure> {
    let Refused { code, key, written, says } = refused;
    let path = ctx.directory().join("refused.toml");
    fs::write(&path, text)?;
    let number = text.lines().position(|line| line.contains(written)).map(|at| at + 1);
    let number = number.ok_or_else(|| Failure::new(format_args!("{written:?} is not in:\n{text}")))?;
    let before = HostState::now();
    let run = ctx.run([Path::new("casemate"), Path::new("run"), &path])?;
    let line = run.refusal(code)?;
    let place = format!("[{code}] {}:{number}: {key}: ", path.display());
    expect!(line.contains(&place), "{place:?} is not in: {line}");
    for word in *says {
        expect!(line.contains(word), "{word:?} is not in: {line}");
    }
    let (_, remedy) = line.split_once("; ").unwrap_or_default();
    expect!(remedy.len() > 5, "there is no remedy in: {line}");
    expect!(run.status.code() == Some(1), "{code}: the exit code is {:?}, not 1", run.status.code());
    expect!(refusals_in(&run) == 1, "{code}: not one refusal: {}", run.stderr);
    expect!(run.stdout.is_empty(), "{code}: a guest ran: {}", run.stdout);
    before.expect_unchanged()
}

/// Lines that refuse; a line on a step that was taken may stand before them.
fn refusals_in(run: &Finished) -> usize {
    run.stderr.lines().filter(|line| line.contains("refused:")).count()
}

/// Refused for the device that it names.
fn expect_device_refused(ctx: &Ctx, address: &str, code: &str, says: &[&str]) -> Result<(), Failure> {
    let guest = ctx.guest("true")?.device(address).to_toml()?;
    let says = [says, &[address]].concat();
    expect_refused(ctx, &guest, &Refused { code, key: "device[0].address", written: address, says: &says })
}

pub(crate) fn wrong_values(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("true")?.device(devices::NVME).to_toml()?;
    for (good, bad, refused) in [
        ("tenant", "tenants", ("unknown-key", "tenants", "tenants")),
        ("vcpus = 1", "vcpus = 0", ("bad-vcpus", "vcpus", "vCPUs")),
        ("vcpus = 1", "vcpus = 65", ("bad-vcpus", "vcpus", "1 to 64")),
        ("256 MiB", "0 MiB", ("bad-memory", "memory", "0")),
        ("256 MiB", "3 MiB", ("bad-memory", "memory", "64 MiB")),
        ("vcpus = 1", "vcpus = \"two\"", ("bad-toml", "vcpus", "two")),
        (devices::NVME, "3:0", ("bad-pci-address", "device[0].address", "3:0")),
    ] {
        let (code, key, says) = refused;
        let text = guest.replacen(good, bad, 1);
        expect_refused(ctx, &text, &Refused { code, key, written: bad, says: &[says] })?;
    }
    Ok(())
}

pub(crate) fn wrong_images(ctx: &mut Ctx) -> Result<(), Failure> {
    let file = |name: &str, contents: &[u8]| {
        let path = ctx.directory().join(name);
        fs::write(&path, contents).map(|()| path)
    };
    let (text, archive) = (file("text", b"this is no kernel\n")?, file("initrd.cpio", b"070701")?);
    let (empty, odd, good) =
        (file("empty.img", b"")?, file("odd.img", b"odd")?, file("disk.img", &[0; 4096])?);
    let (missing, same) = (ctx.directory().join("missing"), ctx.directory().join("same.img"));
    std::os::unix::fs::symlink(&good, &same)?;
    let guest = || ctx.guest("true");
    let cases: Vec<(GuestFile, &str, &str, &Path, &[&str])> = vec![
        (guest()?.kernel(&text), "kernel-format", "boot.kernel", &text, &["text", "vmlinux"]),
        (guest()?.kernel(&archive), "kernel-format", "boot.kernel", &archive, &["cpio archive"]),
        (guest()?.kernel(&missing), "kernel-unreadable", "boot.kernel", &missing, &["No such file"]),
        (
            guest()?.kernel(ctx.directory()),
            "kernel-unreadable",
            "boot.kernel",
            Path::new("kernel ="),
            &["not a regular file"],
        ),
        (guest()?.disk(&missing, false), "disk-unreadable", "disk[0].path", &missing, &["No such file"]),
        (guest()?.disk(&empty, false), "disk-empty", "disk[0].path", &empty, &["no bytes"]),
        (guest()?.disk(&odd, false), "disk-size", "disk[0].path", &odd, &["multiple of 512"]),
        (guest()?.disk(&good, true).disk(&same, false), "disk-in-use", "disk[1].path", &same, &[]),
    ];
    for (guest, code, key, path, says) in cases {
        let written = path.to_string_lossy();
        expect_refused(ctx, &guest.to_toml()?, &Refused { code, key, written: &written, says })?;
    }
    Ok(())
}

pub(crate) fn files_that_are_none(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let missing = ctx.directory().join("missing.toml");
    for path in [&missing, ctx.directory()] {
        let run = ctx.run([Path::new("casemate"), Path::new("run"), path])?;
        let line = run.refusal("file-unreadable")?;
        expect!(line.contains(&path.display().to_string()), "the file is not named: {line}");
        expect!(run.status.code() == Some(1), "the exit code is {:?}, not 1", run.status.code());
        expect!(refusals_in(&run) == 1, "not one refusal: {}", run.stderr);
    }
    before.expect_unchanged()
}

pub(crate) fn devices_that_cannot_be_given(ctx: &mut Ctx) -> Result<(), Failure> {
    expect_device_refused(
        ctx,
        "0000:00:1e.7",
        "device-missing",
        &["no such PCI device", "casemate devices"],
    )?;
    expect_device_refused(ctx, devices::BRIDGE, "device-is-bridge", &["the device behind it"])?;
    let edu = function_with_id(devices::EDU_ID)?;
    expect_device_refused(ctx, &edu, "device-no-reset", &["no way to reset"])?;
    let mounted = ["0000:05:02.0", "vda is mounted on", "umount"];
    expect_device_refused(ctx, devices::RTL8139, "device-group-shared", &mounted)?;
    expect_device_refused(
        ctx,
        devices::SHARED_DISK,
        "device-in-use",
        &["is mounted on", devices::SHARED_DISK_MOUNT],
    )
}

pub(crate) fn drive_in_use(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let refused = |code: &str, says: &[&str]| expect_device_refused(ctx, devices::NVME, code, says);
    ctx.shell("mkfs.ext4 -q -F /dev/nvme0n1 16M; mkdir -p /mnt/drive; mount /dev/nvme0n1 /mnt/drive")?;
    let mounted = refused("device-in-use", &["nvme0n1 is mounted on /mnt/drive", "umount /mnt/drive"]);
    ctx.shell("umount /mnt/drive; mkdir -p /boot; mount /dev/nvme0n1 /boot")?;
    let boot = refused("device-boot-disk", &["the host runs from it", "/boot"]);
    ctx.shell("umount /boot; mkswap -q /dev/nvme0n1; busybox swapon /dev/nvme0n1")?;
    let swap = refused("device-in-use", &["swaps to nvme0n1", "swapoff"]);
    ctx.shell("busybox swapoff /dev/nvme0n1")?;
    let script = "exec 3</dev/nvme0n1; echo held; exec sleep 1000";
    let holder = ctx.start(["sh", "-c", script])?;
    holder.wait_for_text("held", std::time::Duration::from_secs(10))?;
    let held = refused("device-in-use", &["holds /dev/nvme0n1 open"]);
    holder.signal(Signal::KILL)?;
    mounted.and(boot).and(swap).and(held)
}

pub(crate) fn network_card_in_use(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("busybox rmmod igb 2>/dev/null || true")?;
    ctx.load_driver("e1000e")?;
    let refused = |code: &str, says: &[&str]| expect_device_refused(ctx, devices::E1000E, code, says);
    let card = interface_of(devices::E1000E)?;
    ctx.shell(&format!("ip addr add 10.0.2.15/24 dev {card}; ip link set {card} up"))?;
    let only = refused("device-only-network", &[&card, "only network card", "bring up another"]);
    ctx.load_driver("igb")?;
    let other = interface_of(devices::IGB)?;
    ctx.shell(&format!("ip link set {other} up; ip route add default via 10.0.2.2 dev {card}"))?;
    let route = refused("device-in-use", &[&card, "default route"]);
    ctx.shell(&format!(
        "ip route del default; ip addr flush dev {card}; ip link set {card} down; ip link set {other} down"
    ))?;
    only.and(route)
}

pub(crate) fn what_a_running_guest_has(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let guest = ctx.guest("sleep 1000")?.vcpus(1).named("first");
    let first = guest.clone().device(devices::NVME).disk(&disk, false).net("cmtest0", "192.0.2.1/24");
    let running = ctx.start_guest(&first)?;
    running.wait_for_step("running", std::time::Duration::from_secs(60))?;
    let judged = beside_a_running_guest(ctx, &guest, &running);
    running.signal(Signal::TERM)?;
    running.wait(std::time::Duration::from_secs(20))?.success()?;
    judged
}

fn beside_a_running_guest(ctx: &Ctx, guest: &GuestFile, running: &Running) -> Result<(), Failure> {
    let second = || guest.clone().named("second");
    expect_device_refused(
        ctx,
        devices::NVME,
        "device-claimed",
        &["guest first has it", &broker_of(running)?.to_string()],
    )?;
    let disk = ctx.directory().join("disk.img");
    let text = second().disk(&disk, true).to_toml()?;
    let refused = Refused { code: "disk-in-use", key: "disk[0].path", written: "disk.img", says: &[] };
    expect_refused(ctx, &text, &refused)?;
    let text = second().net("cmtest0", "192.0.2.9/24").to_toml()?;
    let refused =
        Refused { code: "tap-exists", key: "net[0].tap", written: "cmtest0", says: &["another name"] };
    expect_refused(ctx, &text, &refused)?;
    let refused = Refused { code: "guest-runs", key: "name", written: "name = ", says: &["first"] };
    expect_refused(ctx, &guest.to_toml()?, &refused)
}

/// The first function, by address, with this ID.
fn function_with_id(id: &str) -> Result<String, Failure> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if format!("{}:{}", read("vendor").trim(), read("device").trim()).replace("0x", "") == id {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    found.into_iter().min().ok_or_else(|| Failure::new(format_args!("the lab has no {id}")))
}

fn interface_of(address: &str) -> Result<String, Failure> {
    let directory = format!("/sys/bus/pci/devices/{address}/net");
    let first = fs::read_dir(&directory).ok().and_then(|mut entries| entries.next()?.ok());
    let first = first.ok_or_else(|| Failure::new(format_args!("{address} has no network interface")))?;
    Ok(first.file_name().to_string_lossy().into_owned())
}
