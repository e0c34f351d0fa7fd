//! What a guest stores is kept, whatever the disk's backend, format and number of queues.

use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Disk, Failure, GuestFile, WITH_TOOLS},
};

use crate::endings::cell_of;

/// For fio in an emulated processor.
const LONG: Duration = Duration::from_secs(150);
const DISK_BYTES: u64 = 32 << 20;

/// A guest whose last disk has Debian's programs.
pub(crate) fn with_tools(ctx: &Ctx, guest: GuestFile) -> GuestFile {
    guest.disk(&ctx.layout().guest_tools(), true)
}

fn blank(path: &Path) -> Result<(), Failure> {
    Ok(fs::File::create(path)?.set_len(DISK_BYTES)?)
}

/// Descriptors of the VMM that are rings.
pub(crate) fn rings(pid: u32) -> Result<usize, Failure> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let is_ring = |path: &Path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("io_uring"));
    Ok(descriptors.filter(|entry| is_ring(&entry.path())).count())
}

pub(crate) fn raw_disks_keep_what_is_written(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    blank(&disk)?;
    let script = format!(
        "{WITH_TOOLS}
        echo queues: $(ls /sys/block/vda/mq | wc -l)
        verify /dev/vda 1
        echo begins: $(dd if=/dev/vda bs=1M count=24 | sha256sum | cut -d' ' -f1)"
    );
    let guest = |queues| -> Result<GuestFile, Failure> {
        let disk = Disk { path: disk.clone(), queues, ..Disk::default() };
        Ok(with_tools(ctx, ctx.guest(&script)?.vcpus(2).disk_of(disk)))
    };
    for (forbidden, queues, expected) in [("0", None, "2"), ("2", Some(1), "1")] {
        fs::write("/proc/sys/kernel/io_uring_disabled", forbidden)?;
        let running = ctx.start_guest(&guest(queues)?)?;
        running.wait_for_text("CASEMATE-INIT", LONG)?;
        let (pid, _) = cell_of(&running)?;
        let found = rings(pid)?;
        let run = running.wait(LONG)?;
        fs::write("/proc/sys/kernel/io_uring_disabled", "0")?;
        run.success()?.printed("verified /dev/vda")?;
        expect!(run.value("queues:")? == expected, "the disk has {} queues", run.value("queues:")?);
        expect!((found == 2) == (forbidden == "0"), "{found} rings with io_uring_disabled {forbidden}");
        let told = run.stderr.contains("disk0 does one request at a time");
        expect!(told == (forbidden == "2"), "the log tells of io_uring: {told}");
        let digest = ctx.shell("head -c 25165824 disk.img | sha256sum | cut -d' ' -f1")?;
        expect!(run.value("begins:")? == digest, "the host has other bytes than the guest");
        let mut last = [0; 512];
        fs::File::open(&disk)?.read_exact_at(&mut last, DISK_BYTES - 512)?;
        expect!(last == [0; 512], "something was written behind what the guest wrote");
    }
    Ok(())
}

/// A qcow2 image over a raw one: made, checked and read by QEMU's tools.
pub(crate) fn qcow2_disks_keep_what_is_written(ctx: &mut Ctx) -> Result<(), Failure> {
    let (base, disk) = (ctx.directory().join("base.img"), ctx.directory().join("disk.qcow2"));
    let contents: Vec<u8> = (0..DISK_BYTES as u32 / 4).flat_map(u32::to_le_bytes).collect();
    fs::write(&base, &contents)?;
    ctx.shell("qemu-img create -q -f qcow2 -b base.img -F raw disk.qcow2 48M")?;
    let script = format!(
        "{WITH_TOOLS}
        echo size: $(blockdev --getsize64 /dev/vda)
        echo base: $(dd if=/dev/vda bs=1M count=32 | sha256sum | cut -d' ' -f1)
        verify /dev/vda 3
        blkdiscard -o 1048576 -l 1048576 /dev/vda && echo it discarded
        verify /dev/vda 4
        # What is not flushed is written when the guest has ended.
        echo the last words | dd of=/dev/vda bs=512 seek=90000 conv=notrunc
        sync; echo begins: $(dd if=/dev/vda bs=1M count=48 | sha256sum | cut -d' ' -f1)"
    );
    let qcow2 = |backing| Disk { path: disk.clone(), format: Some("qcow2"), backing, ..Disk::default() };
    ctx.run_guest(&ctx.guest("true")?.disk_of(qcow2(None)))?.refusal("cell-refused")?;
    let guest = with_tools(ctx, ctx.guest(&script)?.disk_of(qcow2(Some(base.clone()))));
    let run = ctx.start_guest(&guest)?.wait(LONG)?;
    run.success()?.printed("verified /dev/vda")?.printed("it discarded")?;
    expect!(run.stdout.matches("verified /dev/vda").count() == 2, "fio verified once");
    expect!(run.value("size:")? == "50331648", "the disk has {} bytes", run.value("size:")?);
    let of_base = ctx.shell("sha256sum base.img | cut -d' ' -f1")?;
    expect!(run.value("base:")? == of_base, "the guest did not see the image below");
    expect!(fs::read(&base)? == contents, "the image below was written to");
    // Nothing is wrong, and nothing was lost.
    let check = ctx.shell("qemu-img check disk.qcow2")?;
    expect!(check.contains("No errors were found"), "qemu-img check says: {check}");
    ctx.shell("qemu-img convert -O raw disk.qcow2 all.img")?;
    let digest = ctx.shell("sha256sum all.img | cut -d' ' -f1")?;
    expect!(run.value("begins:")? == digest, "QEMU reads other bytes than the guest");
    let words = ctx.shell("dd if=all.img bs=512 skip=90000 count=1 2>/dev/null | head -c 14")?;
    expect!(words == "the last words", "what the guest wrote last is {words:?}");
    Ok(())
}
