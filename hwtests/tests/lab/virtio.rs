//! Emulated devices do their work.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::MetadataExt,
    sync::mpsc,
    thread,
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, wait_until},
};

use crate::endings::cell_of;

pub(crate) fn disk_is_read_and_written(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    let contents: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(&disk, &contents)?;
    let digest = ctx.shell("sha256sum disk.img | cut -d' ' -f1")?;
    let script = "echo digest: $(sha256sum /dev/vda | cut -d' ' -f1)
        echo serial: $(cat /sys/block/vda/serial)
        echo written by the guest | dd of=/dev/vda conv=notrunc,fsync";
    let run = ctx.run_guest(&ctx.guest(script)?.disk(&disk, false))?;
    let seen = run.success()?.value("digest:")?;
    expect!(seen == digest, "the disk's digest is {digest}, the guest saw {seen}");
    expect!(run.value("serial:")? == "disk0", "its serial number is {}", run.value("serial:")?);
    let after = fs::read(&disk)?;
    expect!(after.starts_with(b"written by the guest\n"), "what the guest wrote is not in the disk");
    expect!(after.get(21..) == contents.get(21..), "the guest's write changed more than it wrote");
    Ok(())
}

/// What the guest discards reads as zeros, and takes no room on the host any more.
pub(crate) fn disk_discards(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0xA5; 8 << 20])?;
    let room = || -> Result<u64, Failure> { Ok(fs::metadata(&disk)?.blocks() * 512) };
    let before = room()?;
    let script = "blkdiscard -o 1048576 -l 4194304 /dev/vda && echo it discarded
        echo most: $(cat /sys/block/vda/queue/discard_max_bytes) $(cat /sys/block/vda/queue/write_zeroes_max_bytes)";
    let run = ctx.run_guest(&ctx.guest(script)?.disk(&disk, false))?;
    run.success()?.printed("it discarded")?;
    let most = run.value("most:")?;
    expect!(most == "2147483648 2147483648", "the guest may discard and zero {most} bytes at once");
    let after = fs::read(&disk)?;
    let expected = |at: usize| if (1 << 20..5 << 20).contains(&at) { 0 } else { 0xA5 };
    let wrong = after.iter().enumerate().position(|(at, byte)| *byte != expected(at));
    expect!(wrong.is_none() && after.len() == 8 << 20, "byte {wrong:?} of {} is wrong", after.len());
    let given_back = before.saturating_sub(room()?);
    expect!(given_back >= 4 << 20, "only {given_back} bytes were given back to the host");
    Ok(())
}

pub(crate) fn read_only_disk_stays(ctx: &mut Ctx) -> Result<(), Failure> {
    let disks = ["first.img", "second.img"].map(|name| ctx.directory().join(name));
    for (disk, fill) in disks.iter().zip([b'a', b'b']) {
        fs::write(disk, vec![fill; 1 << 20])?;
    }
    let script = "echo read-only: $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)
        blockdev --setrw /dev/vda 2>/dev/null
        echo x | dd of=/dev/vda conv=notrunc,fsync 2>&1 && echo it was written
        echo first bytes: $(head -c 1 /dev/vda) $(head -c 1 /dev/vdb)";
    let [first, second] = &disks;
    let run = ctx.run_guest(&ctx.guest(script)?.disk(first, true).disk(second, false))?;
    let told = run.success()?.value("read-only:")?;
    expect!(told == "1 0", "the disks should be read-only 1 0, and are {told}");
    expect!(!run.stdout.contains("it was written"), "a write to a read-only disk succeeded in the guest");
    expect!(
        run.value("first bytes:")? == "a b",
        "the disks are not in order: {}",
        run.value("first bytes:")?
    );
    expect!(fs::read(first)?.iter().all(|byte| *byte == b'a'), "the read-only disk was changed");
    Ok(())
}

/// What the process has in memory, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

pub(crate) fn free_memory_goes_back(ctx: &mut Ctx) -> Result<(), Failure> {
    const SOON: Duration = Duration::from_secs(60);
    let script = "mount -t tmpfs -o size=100% tmpfs /tmp
        dd if=/dev/zero of=/tmp/fill bs=1M count=120; echo has-filled
        rm /tmp/fill; echo has-freed
        sleep 10; yes | head -c 62914560 >/tmp/again; echo digest: $(sha256sum </tmp/again | cut -d' ' -f1)";
    let digest = ctx.shell("yes | head -c 62914560 | sha256sum | cut -d' ' -f1")?;
    let running = ctx.start_guest(&ctx.guest(script)?.vcpus(1))?;
    let (vmm, _) = cell_of(&running)?;
    running.wait_for_text("has-filled", SOON)?;
    let full = resident_bytes(vmm).unwrap_or_default();
    wait_until("100 MiB of the guest's go back", Duration::from_secs(30), || {
        resident_bytes(vmm).is_some_and(|now| now + (100 << 20) <= full)
    })?;
    // And what went back can be used again.
    let run = running.wait(SOON)?;
    let seen = run.success()?.value("digest:")?;
    expect!(seen == digest, "the guest wrote {digest} to memory it had back, and read {seen}");
    Ok(())
}

pub(crate) fn entropy_is_there(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = r#"echo "source: $(cat /sys/class/misc/hw_random/rng_current)"
        for n in 1 2; do echo "bytes$n: $(head -c 4096 /dev/hwrng | sha256sum | cut -d' ' -f1)"; done"#;
    let run = ctx.run_guest(&ctx.guest(script)?)?;
    let source = run.success()?.value("source:")?;
    expect!(source.starts_with("virtio_rng"), "the guest's entropy comes from {source:?}");
    let zeros = "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7";
    let (first, second) = (run.value("bytes1:")?, run.value("bytes2:")?);
    expect!(first != zeros && first != second, "this is not random: {first}, {second}");
    Ok(())
}

/// Bytes of one transfer.
const TRANSFER: usize = 4 << 20;

pub(crate) fn network_carries_both_ways(ctx: &mut Ctx) -> Result<(), Failure> {
    let sent: Vec<u8> =
        (0..TRANSFER as u32 / 4).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    let from_host = TcpListener::bind("0.0.0.0:7001")?;
    let to_host = TcpListener::bind("0.0.0.0:7002")?;
    let bytes = sent.clone();
    thread::spawn(move || from_host.accept().and_then(|(mut guest, _)| guest.write_all(&bytes)));
    let (sender, received) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = to_host.accept().and_then(|(mut guest, _)| guest.read_to_end(&mut bytes));
        sender.send(read.map(|_| bytes))
    });
    let script = "ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
        ping -c 2 -W 5 192.0.2.1 && echo host-answered
        nc 192.0.2.1 7001 </dev/null >/run/bytes
        nc 192.0.2.1 7002 </run/bytes
        echo guest-waits
        nc -l -p 7003 </dev/null >/dev/null";
    let running = ctx.start_guest(&ctx.guest(script)?.net("cmtest0", "192.0.2.1/24"))?;
    running.wait_for_text("guest-waits", Duration::from_secs(80))?;
    ctx.shell("busybox ping -c 2 -W 5 192.0.2.2")?;
    drop(TcpStream::connect("192.0.2.2:7003")?);
    let run = running.wait(Duration::from_secs(30))?;
    run.success()?.printed("host-answered")?;
    let back = received.recv_timeout(Duration::from_secs(5))??;
    expect!(back == sent, "the host sent {TRANSFER} bytes, and got others back: {}", back.len());
    expect!(!fs::exists("/sys/class/net/cmtest0")?, "the tap is still there");
    Ok(())
}
