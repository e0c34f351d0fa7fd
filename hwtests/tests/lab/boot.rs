//! A guest starts, and ends when it wants to.

use std::{fs, path::Path, thread, time::Duration};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, Finished, tiny_kernel},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{admission::Bundle, endings::ending};

pub(crate) fn boots_and_powers_off(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("uname -r")?;
    let run = ctx.run_guest(&guest)?;
    run.success()?.printed("CASEMATE-INIT")?.printed("CASEMATE-TEST-ENDED 0")?;
    expect!(ending(&run)? == "power-off", "the guest ended by {}", ending(&run)?);
    Ok(())
}

pub(crate) fn sees_what_its_file_says(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo vcpus: $(nproc)
        echo online: $(cat /sys/devices/system/cpu/online)
        echo memory: $(awk '/MemTotal/ { print $2 }' /proc/meminfo)
        echo words: $(cat /proc/cmdline)";
    let words = "console=ttyS0 quiet casemate.word=\"two words\" last=1";
    let guest = ctx.guest(script)?.vcpus(3).memory("200 MiB").command_line(words);
    let run = ctx.run_guest(&guest)?;
    run.success()?;
    expect!(run.value("vcpus:")? == "3", "the guest has 3 vCPUs and sees {}", run.value("vcpus:")?);
    expect!(run.value("online:")? == "0-2", "online: {}", run.value("online:")?);
    // Without what the kernel keeps to itself.
    let kib: u64 = run.value("memory:")?.parse()?;
    expect!((140 << 10..=200 << 10).contains(&kib), "the guest has 200 MiB and sees {kib} KiB");
    expect!(
        run.value("words:")? == words,
        "the command line is {words}, the guest sees {}",
        run.value("words:")?
    );
    Ok(())
}

pub(crate) fn reboot_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let run = ctx.run_guest(&ctx.guest("reboot -f; sleep 30")?)?;
    ended_otherwise(&run, "reset")
}

pub(crate) fn panic_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    // Without panic= a kernel stands still afterwards; with it, it resets the machine. Both are told as a panic.
    for words in ["console=ttyS0", "console=ttyS0 panic=-1"] {
        let guest = ctx.guest("echo c >/proc/sysrq-trigger; sleep 30")?.command_line(words);
        let run = ctx.run_guest(&guest)?;
        run.printed("Kernel panic - not syncing: sysrq triggered crash")?;
        ended_otherwise(&run, "panic")?;
    }
    Ok(())
}

/// A kernel without the driver that tells of a panic.
pub(crate) fn panic_untold_is_a_reset(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "rmmod pvpanic_mmio; echo c >/proc/sysrq-trigger; sleep 30";
    let run = ctx.run_guest(&ctx.guest(script)?.command_line("console=ttyS0 panic=-1"))?;
    run.printed("Kernel panic - not syncing")?;
    ended_otherwise(&run, "reset")
}

pub(crate) fn bzimage_boots(ctx: &mut Ctx) -> Result<(), Failure> {
    let kernel = ctx.layout().guest_bzimage()?;
    let script = "echo words: $(cat /proc/cmdline)
        echo memory: $(awk '/MemTotal/ { print $2 }' /proc/meminfo)
        echo button: $(ls /sys/bus/acpi/devices | grep -c PNP0C0C)";
    let run = ctx.run_guest(&ctx.guest(script)?.kernel(&kernel))?;
    run.success()?.printed("CASEMATE-TEST-ENDED 0")?;
    let words = run.value("words:")?;
    expect!(words == "console=ttyS0 quiet", "the guest sees the command line {words:?}");
    let kib: u64 = run.value("memory:")?.parse()?;
    expect!((196 << 10..=256 << 10).contains(&kib), "the guest has 256 MiB and sees {kib} KiB");
    expect!(run.value("button:")? == "1", "it found no ACPI tables");
    Ok(())
}

/// Debian 12's own kernel, and the cloud flavours of both: with two processors each finds its devices and uses them.
pub(crate) fn debians_kernels_boot(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, b"casemate".repeat(128 << 10))?;
    let script = "echo release: $(uname -r); echo vcpus: $(nproc)
        echo first: $(head -c 8 /dev/vda); echo seen: $(sha256sum /dev/vda | cut -c1-16)
        ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 5 192.0.2.1 && echo host-answered
        head -c 64 /dev/hwrng >/dev/null && echo entropy-came
        modprobe wdat_wdt; echo dog: $(cat /sys/class/watchdog/watchdog0/identity)";
    for (kernel, release, flavour) in [
        ("6.1", "6.1.0-", "-amd64"),
        ("6.1-cloud", "6.1.0-", "-cloud-amd64"),
        ("6.12-cloud", "6.12.", "-cloud-amd64"),
    ] {
        let guest = ctx.guest_of(kernel, script)?.vcpus(2).disk(&disk, true).net("cmtest0", "192.0.2.1/24");
        let run = ctx.run_guest(&guest)?;
        run.success()?.printed("host-answered")?.printed("entropy-came")?;
        let seen = run.value("release:")?;
        let flavoured = seen.contains("cloud") == flavour.contains("cloud");
        expect!(seen.starts_with(release) && seen.ends_with(flavour) && flavoured, "{kernel} is {seen}");
        for (what, wanted) in [("vcpus:", "2"), ("first:", "casemate"), ("dog:", "wdat_wdt")] {
            let value = run.value(what)?;
            expect!(value == wanted, "{kernel}: {what} {value}, not {wanted}");
        }
        let seen = run.value("seen:")?.to_owned();
        let digest = ctx.shell(&format!("sha256sum {} | cut -c1-16", disk.display()))?;
        expect!(seen == digest, "{kernel} read {seen} from its disk, which holds {digest}");
    }
    Ok(())
}

pub(crate) fn eight_vcpus_come_up(ctx: &mut Ctx) -> Result<(), Failure> {
    vcpus_come_up(ctx, 8, Duration::from_secs(90))
}

pub(crate) fn sixty_four_vcpus_come_up(ctx: &mut Ctx) -> Result<(), Failure> {
    vcpus_come_up(ctx, 64, Duration::from_secs(800))
}

fn vcpus_come_up(ctx: &mut Ctx, count: u32, within: Duration) -> Result<(), Failure> {
    let script = "echo vcpus: $(nproc)
        echo packages: $(cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u | wc -l)
        echo cores: $(cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l)
        echo threads: $(cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list | sort -u | wc -l)";
    // More than the shipped policy allows.
    let bundle = Bundle::write(ctx, "many", "limits.wasm", "max_vcpus = 64")?;
    let file = ctx.guest(script)?.vcpus(count).write_into(ctx.directory())?;
    let words = ["casemate", "run", "--json", "--policy"].map(Path::new);
    let run = ctx.start(words.into_iter().chain([bundle.path.as_path(), &file]))?.wait(within)?;
    let count = count.to_string();
    for (what, seen) in
        [("vcpus:", count.as_str()), ("packages:", "1"), ("cores:", &count), ("threads:", &count)]
    {
        let value = run.success()?.value(what)?;
        expect!(value == seen, "of {what} there should be {seen}, the guest sees {value}");
    }
    Ok(())
}

/// What the VMM may take beside the guest's memory, in bytes of Pss.
const VMM_MOST: u64 = 4 << 20;
/// The same without a disk, a network card and a Linux that uses them.
const VMM_ALONE_MOST: u64 = (23 << 20) / 10;
/// The program's file, all of which is loaded or can be.
const VMM_FILE_MOST: u64 = 3_000_000;

/// With a disk, a network card, entropy and a console in use, the VMM takes little beside the guest's memory.
pub(crate) fn vmm_is_small(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![1; 8 << 20])?;
    let script = "dd if=/dev/vda of=/dev/null bs=64k
        head -c 4096 /dev/hwrng >/dev/null
        ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; ping -c 2 192.0.2.1 && echo used-all
        sleep 12";
    let guest =
        ctx.guest(script)?.vcpus(1).memory("128 MiB").disk(&disk, false).net("cmtest0", "192.0.2.1/24");
    let run = ctx.run_guest(&guest)?;
    run.success()?.printed("used-all")?;
    let bytes = memory_of(&run)?;
    println!("# the VMM takes {} KiB", bytes >> 10);
    expect!((1..=VMM_MOST).contains(&bytes), "the VMM takes {bytes} bytes beside the guest's memory");

    let kernel = ctx.directory().join("tiny");
    fs::write(&kernel, tiny_kernel())?;
    let file = ctx.guest("")?.named("tiny").kernel(&kernel).vcpus(1).memory("128 MiB");
    let path = file.write_into(ctx.directory())?;
    let running = ctx.start([
        "casemate".as_ref(),
        "run".as_ref(),
        "--json".as_ref(),
        "--grace=0".as_ref(),
        path.as_os_str(),
    ])?;
    running.wait_for_text("tiny-guest-runs", SOON)?;
    // For its memory to be looked at once more, which takes a while here, and is done the less often for that.
    thread::sleep(Duration::from_secs(12));
    let of_kernel = fs::read_to_string("/sys/fs/cgroup/casemate/tiny/memory.stat")?;
    running.signal(Signal::TERM)?;
    let run = running.wait(Duration::from_secs(30))?;
    let bytes = memory_of(&run)?;
    let of_kernel = of_kernel.lines().find_map(|line| line.strip_prefix("kernel ")?.parse::<u64>().ok());
    println!("# alone {} KiB; the kernel {:?} KiB for both", bytes >> 10, of_kernel.map(|bytes| bytes >> 10));
    expect!((1..=VMM_ALONE_MOST).contains(&bytes), "the VMM takes {bytes} bytes beside a guest of nothing");

    let bytes = fs::metadata(ctx.program("casemate-vmm")?)?.len();
    println!("# its file has {bytes} bytes");
    expect!(bytes <= VMM_FILE_MOST, "the program has {bytes} bytes");
    Ok(())
}

/// What the VMM took beside the guest's memory, when last seen.
fn memory_of(run: &Finished) -> Result<u64, Failure> {
    let report = run.report()?;
    let bytes = report.pointer("/cell/memory_bytes").and_then(Value::as_u64);
    bytes.ok_or_else(|| Failure::new(format_args!("the report tells no memory: {report}")))
}

/// For a guest to come to its script.
const SOON: Duration = Duration::from_secs(60);

pub(crate) fn power_button_is_obeyed(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "modprobe evdev; grep . /sys/class/input/event0/device/name
        exec 3</dev/input/event0; echo waits-for-its-button
        head -c 24 <&3 >/dev/null && echo button-was-pressed";
    for signal in [Signal::TERM, Signal::INT] {
        let running = ctx.start_guest(&ctx.guest(script)?.vcpus(1))?;
        running.wait_for_text("waits-for-its-button", SOON)?;
        running.signal(signal)?;
        let run = running.wait(Duration::from_secs(30))?;
        run.success()?.printed("Power Button")?.printed("button-was-pressed")?;
        expect!(run.stderr.contains("asked-to-power-off"), "nothing was told of it: {}", run.stderr);
        expect!(ending(&run)? == "power-off", "the guest ended by {}", ending(&run)?);
    }
    Ok(())
}

pub(crate) fn power_button_ignored_stops(ctx: &mut Ctx) -> Result<(), Failure> {
    let path = ctx.guest("echo ignores-all; sleep 1000")?.vcpus(1).write_into(ctx.directory())?;
    let file = path.as_os_str();
    let running =
        ctx.start(["casemate".as_ref(), "run".as_ref(), "--json".as_ref(), "--grace=1".as_ref(), file])?;
    running.wait_for_text("ignores-all", SOON)?;
    running.signal(Signal::TERM)?;
    let run = running.wait(Duration::from_secs(15))?;
    run.success()?;
    expect!(ending(&run)? == "stopped", "the guest ended by {}", ending(&run)?);
    Ok(())
}

pub(crate) fn triple_fault_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("reboot -f; sleep 30")?.command_line("console=ttyS0 quiet reboot=triple");
    ended_otherwise(&ctx.run_guest(&guest)?, "triple-fault")
}

/// By the tables of before ACPI it finds its processors and its serial port, and nothing else.
pub(crate) fn boots_without_acpi(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest =
        ctx.guest("echo processors: $(nproc); grep -c ttyS0 /proc/interrupts; reboot -f; sleep 30")?;
    let run = ctx.run_guest(&guest.vcpus(2).command_line("console=ttyS0 quiet acpi=off reboot=triple"))?;
    expect!(run.value("processors:")? == "2", "the guest has {} processors", run.value("processors:")?);
    ended_otherwise(&run, "triple-fault")
}

/// The run says how the guest ended, in its report and by exit code 3.
fn ended_otherwise(run: &Finished, how: &str) -> Result<(), Failure> {
    expect!(ending(run)? == how, "the guest ended by {}, not {how}", ending(run)?);
    expect!(run.status.code() == Some(3), "the exit code is {:?}, not 3", run.status.code());
    Ok(())
}
