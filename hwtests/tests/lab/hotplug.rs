//! Slots for what comes while a guest runs.

use std::{fs, time::Duration};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure},
};
use serde_json::Value;

use crate::{control::operate, disks::rings, endings::cell_of};

/// For a guest to boot, or to notice a card; the lab's processor is emulated.
const SOON: Duration = Duration::from_secs(120);
const MIB: usize = 1 << 20;

/// Linux takes root ports, buses and windows as they were placed, and drives each slot natively.
pub(crate) fn slots_are_seen(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo slots: $(ls /sys/bus/pci/slots)
        echo empty: $(cat /sys/bus/pci/slots/*/adapter)
        echo drivers: $(cat /proc/interrupts | grep -c 'pciehp')
        for port in /sys/bus/pci/devices/*; do
            [ $(cat $port/class) = 0x060400 ] || continue
            echo port: ${port##*/} $(cat $port/secondary_bus_number) $(cat $port/subordinate_bus_number) \
                windows $(sed -n '14,16p' $port/resource | grep -c -v '^0x0* 0x0*')
        done
        echo complaints: $(dmesg | grep -c -e \"can't claim\" -e 'no space' -e 'failed to assign' -e 'BAR.*: assigned' \
            -e 'bridge window.*: assigned')
        dmesg | grep -e pciehp -e 'PCI bridge' -e 'bridge window' -e _OSC";
    let run = ctx.run_guest(&ctx.guest(script)?.slots(3))?;
    run.success()?;
    expect!(run.value("slots:")? == "1 2 3", "Linux sees the slots {}", run.value("slots:")?);
    expect!(run.value("empty:")? == "0 0 0", "in them is {}", run.value("empty:")?);
    expect!(run.value("drivers:")? == "3", "{} of them interrupt", run.value("drivers:")?);
    for (function, bus) in (0..3).zip(1..) {
        let line = format!("0000:00:03.{function} {bus} {bus} windows 2");
        run.printed(&line)?;
    }
    expect!(run.value("complaints:")? == "0", "Linux placed something itself");
    Ok(())
}

/// A disk and a network card are put into a running guest, used by it, and taken out when it has let them go.
pub(crate) fn disk_and_net_come_and_go(ctx: &mut Ctx) -> Result<(), Failure> {
    plug(ctx, 2)
}

pub(crate) fn ten_plugs_in_a_row(ctx: &mut Ctx) -> Result<(), Failure> {
    plug(ctx, 10)
}

fn plug(ctx: &Ctx, rounds: usize) -> Result<(), Failure> {
    let script = format!(
        "modprobe -a virtio_blk virtio_net
        comes() {{ until [ -e $1 ]; do sleep 0.1; done; }}
        goes() {{ while [ -e $1 ]; do sleep 0.1; done; }}
        echo guest is ready
        for round in $(seq {rounds}); do
            comes /dev/vda
            echo digest $round: $(sha256sum /dev/vda | cut -d' ' -f1)
            echo serial $round: $(cat /sys/block/vda/serial)
            echo written in round $round | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
            echo disk used $round.
            until [ $(cat /sys/block/vda/size) = 4096 ]; do sleep 0.1; done
            begun=$(cut -d' ' -f1 /proc/uptime | tr -d .)
            dd if=/dev/vda of=/dev/null bs=4k count=10 iflag=direct 2>/dev/null
            echo disk read $round: $((($(cut -d' ' -f1 /proc/uptime | tr -d .) - begun) * 10)) ms.
            goes /dev/vda
            echo disk gone $round.
        done
        comes /sys/class/net/eth0
        ip address add 192.0.2.2/24 dev eth0 && ip link set eth0 up
        ping -c 3 -W 20 192.0.2.1 && echo net used
        goes /sys/class/net/eth0
        echo net gone"
    );
    let guest = ctx.guest(&script)?.slots(2);
    let disk = ctx.directory().join("hot.img");
    let mut contents: Vec<u8> = (0..MIB / 4).flat_map(|word| (word as u32).to_le_bytes()).collect();
    fs::write(&disk, &contents)?;
    let running = ctx.start_guest(&guest)?;
    running.wait_for_text("guest is ready", SOON)?;
    let (pid, _) = cell_of(&running)?;
    expect!(rings(pid)? == 2, "{} rings wait for the disks of two slots", rings(pid)?);
    let path = disk.to_string_lossy();
    for round in 1..=rounds {
        let digest = ctx.shell("sha256sum hot.img | cut -d' ' -f1")?;
        let slot = attach(ctx, &["--disk", &path])?;
        running.wait_for_text(&format!("disk used {round}."), SOON)?;
        let used = ctx.run(["casemate", "attach", ctx.name(), "--disk", &path])?;
        used.refusal("disk-in-use")?;
        if round == 1 {
            limit_and_grow(ctx, slot)?;
            contents.resize(2 * MIB, 0);
        }
        running.wait_for_text(&format!("disk read {round}:"), SOON)?;
        detach(ctx, slot)?;
        running.wait_for_text(&format!("disk gone {round}."), SOON)?;
        expect!(
            running.printed_so_far().contains(&format!("digest {round}: {digest}")),
            "the guest read something else than {digest}"
        );
        expect!(
            running.printed_so_far().contains(&format!("serial {round}: slot{slot}")),
            "the serial number is wrong"
        );
        let line = format!("written in round {round}\n");
        if let Some(start) = contents.get_mut(..line.len()) {
            start.copy_from_slice(line.as_bytes());
        }
        expect!(fs::read(&disk)? == contents, "what the guest wrote is not in the disk");
    }
    let took = |round: usize| -> Result<u64, Failure> {
        let printed = running.printed_so_far();
        let (_, text) = printed.split_once(&format!("disk read {round}: ")).unwrap_or_default();
        Ok(text.split(' ').next().unwrap_or_default().parse()?)
    };
    // Ten reads, of which one may be done at once and five in a second.
    expect!(took(1)? >= 1500, "the limit of what is in the slot let 10 reads through in {} ms", took(1)?);
    expect!(took(2)? < 1500, "what came after it is limited as well: {} ms", took(2)?);
    let slot = attach(ctx, &["--net", "cmhot0", "--host-address", "192.0.2.1/24"])?;
    running.wait_for_text("net used", SOON)?;
    detach(ctx, slot)?;
    let links = ctx.shell("ip -o link")?;
    expect!(!links.contains("cmhot0"), "the tap is still there: {links}");
    let run = running.wait(SOON)?;
    run.success()?.printed("net gone")?;
    expect!(!run.stderr.contains("one request at a time"), "a disk had no ring: {}", run.stderr);
    Ok(())
}

/// What is in a slot is counted, limited and made larger like what the guest started with.
fn limit_and_grow(ctx: &Ctx, slot: u64) -> Result<(), Failure> {
    let name = format!("slot{slot}");
    let stats = operate(ctx, &["stats", ctx.name()])?;
    let devices = stats.get("devices").and_then(Value::as_array).into_iter().flatten();
    let mut disks = devices.filter(|device| device.get("slot").and_then(Value::as_u64) == Some(slot));
    let requests = disks.next().and_then(|disk| disk.get("requests")).and_then(Value::as_u64);
    expect!(requests.is_some_and(|requests| requests > 0), "the disk in the slot isn't counted: {stats}");
    let refused = ctx.run(["casemate", "limit", ctx.name(), "disk", "slot2"])?;
    refused.refusal("ask-no-device")?;
    let refused = ctx.run(["casemate", "resize", ctx.name(), "slot2", "2MiB"])?;
    refused.refusal("disk-resize")?;
    let limits = ["--operations-per-second=5", "--burst-operations=1"];
    operate(ctx, &[&["limit", ctx.name(), "disk", &name][..], &limits].concat())?;
    let done = operate(ctx, &["resize", ctx.name(), &name, "2MiB"])?;
    expect!(done.get("disk") == Some(&Value::from(name)), "another disk was made larger: {done}");
    ctx.run(["casemate", "audit", ctx.name()])?.success()?;
    Ok(())
}

/// What is not there, is taken or does not fit is refused; a disk that the guest does not let go in time stays, and is taken
/// when that was asked for.
pub(crate) fn refuse_and_force(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("hot.img");
    fs::write(&disk, vec![7; MIB])?;
    let path = disk.to_string_lossy();
    let script = "modprobe virtio_blk; echo guest is ready
        until [ -e /dev/vda ]; do sleep 0.1; done; echo disk is up
        while [ -e /dev/vda ]; do sleep 0.1; done; echo disk is gone; sleep 1000";
    let running = ctx.start_guest(&ctx.guest(script)?.slots(1))?;
    running.wait_for_text("guest is ready", SOON)?;
    let refused = |words: &[&str], code: &str| -> Result<(), Failure> {
        ctx.run(["casemate"].iter().chain(words))?.refusal(code).map(drop)
    };
    let guest = ctx.name();
    refused(&["attach", guest, "--disk", "/nowhere"], "disk-unreadable")?;
    refused(&["attach", guest, "--net", "lo"], "tap-exists")?;
    refused(&["detach", guest, "1"], "hotplug-empty-slot")?;
    refused(&["detach", guest, "9"], "hotplug-empty-slot")?;
    attach(ctx, &["--disk", &path])?;
    running.wait_for_text("disk is up", SOON)?;
    refused(&["attach", guest, "--net", "cmhot1"], "hotplug-no-slot")?;
    // Linux gives whoever presses the button five seconds to think it over.
    refused(&["detach", guest, "1", "--within", "1"], "hotplug-not-let-go")?;
    let done = operate(ctx, &["detach", guest, "1", "--within", "1", "--force"])?;
    expect!(
        done.get("forced") == Some(&Value::Bool(true)),
        "it was not told that the disk was taken: {done}"
    );
    running.wait_for_text("disk is gone", SOON)?;
    ctx.shell("flock -n hot.img true")?;
    operate(ctx, &["stop", guest])?;
    running.wait(SOON)?;
    Ok(())
}

/// Attaches something to the test's guest and returns its slot.
fn attach(ctx: &Ctx, what: &[&str]) -> Result<u64, Failure> {
    let done = operate(ctx, &[&["attach", ctx.name()], what].concat())?;
    let slot = done.get("slot").and_then(Value::as_u64);
    slot.ok_or_else(|| Failure::new(format_args!("no slot is told: {done}")))
}

/// Detaches what is in a slot, in order.
fn detach(ctx: &Ctx, slot: u64) -> Result<(), Failure> {
    let done = operate(ctx, &["detach", ctx.name(), &slot.to_string(), "--within", "50"])?;
    expect!(done.get("forced") == Some(&Value::Bool(false)), "the guest did not let it go: {done}");
    Ok(())
}
