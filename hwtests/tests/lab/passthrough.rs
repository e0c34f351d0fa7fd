//! Physical devices work in a guest, twice in a row, and come back as they were.

use std::time::Duration;

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, wait_until},
};
use serde_json::Value;

use crate::{
    endings::ending,
    host_state::{HostState, claims},
};

/// What the scripts of these tests' guests begin with.
pub(crate) const WORDS: &str = r#"
interface() { # the network interface of driver $1
  for i in /sys/class/net/*; do
    [ "$(basename "$(readlink "$i/device/driver")")" = "$1" ] && basename "$i" && return
  done
}
interrupts() { # all MSI-X interrupts so far whose line matches $1
  grep MSI /proc/interrupts | grep "$1" | awk '{ for (n = 2; n <= NF && $n ~ /^[0-9]+$/; n++) sum += $n } END { print sum + 0 }'
}
wait_for() { # until $2 is in file $1, 10 s at most
  n=0; until grep -q "$2" "$1" 2>/dev/null || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
}
"#;

/// Reads of 4 KiB, past the guest's page cache.
const READS: u64 = 10_000;
/// Exits that may differ between two runs for other reasons than reads.
const EXITS_APART: u64 = 200;

pub(crate) fn drive_works_and_comes_back(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let digest = ctx.shell("head -c 16777216 /dev/nvme0n1 | sha256sum | cut -d' ' -f1")?;
    let before = HostState::now();
    let mut runs = Vec::new();
    for reads in [0, READS] {
        let script = format!(
            r#"{WORDS}
            wait_for /sys/block/nvme0n1/size 131072
            n=0; until [ -b /dev/nvme0n1 ] || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
            echo "digest: $(head -c 16777216 /dev/nvme0n1 | sha256sum | cut -d' ' -f1)"
            echo "interrupts-before: $(interrupts nvme0q)"
            dd if=/dev/nvme0n1 of=/dev/null bs=4096 count={reads} iflag=direct 2>&1
            echo "interrupts-after: $(interrupts nvme0q)""#
        );
        let run = ctx.run_guest(&ctx.guest(&script)?.device(devices::NVME))?;
        let seen = run.success()?.value("digest:")?;
        expect!(seen == digest, "the drive's digest is {digest}, the guest saw {seen}");
        came_back(&run, devices::NVME, Some("nvme"))?;
        before.expect_unchanged()?;
        runs.push(run);
    }
    let [quiet, busy] = runs.as_slice() else { return Err(Failure::new("two runs")) };
    let interrupts = number(busy, "interrupts-after:")? - number(busy, "interrupts-before:")?;
    expect!(interrupts >= READS, "{READS} reads came with {interrupts} MSI-X interrupts");
    let (quiet, busy) = (register_exits(quiet)?, register_exits(busy)?);
    println!("register exits: {quiet} without reads, {busy} with {READS}");
    expect!(busy < quiet + EXITS_APART, "{READS} reads cost {} exits to the VMM", busy.saturating_sub(quiet));
    Ok(())
}

pub(crate) fn e1000e_works_and_comes_back(ctx: &mut Ctx) -> Result<(), Failure> {
    card_works_and_comes_back(ctx, devices::E1000E, "e1000e")
}

pub(crate) fn igb_works_and_comes_back(ctx: &mut Ctx) -> Result<(), Failure> {
    card_works_and_comes_back(ctx, devices::IGB, "igb")
}

/// Two guests in a row ping through the card.
fn card_works_and_comes_back(ctx: &mut Ctx, address: &str, driver: &str) -> Result<(), Failure> {
    ctx.load_driver(driver)?;
    let before = HostState::now();
    let script = format!(
        r#"{WORDS}
        card=$(interface {driver})
        ip addr add 10.0.2.15/24 dev "$card"; ip link set "$card" up
        wait_for /sys/class/net/$card/carrier 1
        echo "interrupts-before: $(interrupts "$card")"
        ping -c 3 -W 5 -I "$card" 10.0.2.2 && echo gateway-answered
        echo "interrupts-after: $(interrupts "$card")""#
    );
    for _ in ["first", "second"] {
        let run = ctx.run_guest(&ctx.guest(&script)?.device(address))?;
        run.success()?.printed("gateway-answered")?;
        let (first, last) = (number(&run, "interrupts-before:")?, number(&run, "interrupts-after:")?);
        expect!(last >= first + 3, "3 pings, and MSI-X interrupts from {first} to {last}");
        came_back(&run, address, Some(driver))?;
        before.expect_unchanged()?;
    }
    Ok(())
}

pub(crate) fn two_devices_in_one_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    ctx.load_driver("igb")?;
    let before = HostState::now();
    let script =
        "for f in /sys/bus/pci/devices/*; do echo \"function: $(cat $f/vendor) $(cat $f/device)\"; done
        echo drive: $(cat /sys/block/nvme0n1/size)";
    let guest = ctx.guest(script)?.vcpus(1).device(devices::NVME).device(devices::IGB);
    let run = ctx.run_guest(&guest)?;
    run.success()?.printed("function: 0x1b36 0x0010")?.printed("function: 0x8086 0x10c9")?;
    expect!(run.value("drive:")? == "131072", "the drive has {} sectors", run.value("drive:")?);
    came_back(&run, devices::NVME, Some("nvme"))?;
    came_back(&run, devices::IGB, Some("igb"))?;
    before.expect_unchanged()
}

/// Ten times a guest reboots while it reads its drive: each run ends by that, and the drive comes back clean for the next.
pub(crate) fn ten_reboots_in_a_row(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let script = format!(
        r#"{WORDS}
        wait_for /sys/block/nvme0n1/size 131072
        n=0; until [ -b /dev/nvme0n1 ] || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
        dd if=/dev/nvme0n1 of=/dev/null bs=4096 iflag=direct & sleep 1; echo drive-is-read; reboot -f; sleep 30"#
    );
    let guest = ctx.guest(&script)?.device(devices::NVME);
    for _ in 0..10 {
        let run = ctx.run_guest(&guest)?;
        expect!(ending(&run)? == "reset", "the run ended by {}", ending(&run)?);
        run.printed("drive-is-read")?;
        came_back(&run, devices::NVME, Some("nvme"))?;
        before.expect_unchanged()?;
    }
    Ok(())
}

/// A card whose only interrupt is INTx. Its group's mate is in use at first, and its reset is its bus's, so the mate has
/// to go.
pub(crate) fn rtl8139_works_by_intx(ctx: &mut Ctx) -> Result<(), Failure> {
    with_rtl8139(ctx, card_without_msi)
}

/// Does something with that card while its group's mate is away.
pub(crate) fn with_rtl8139(ctx: &Ctx, act: impl Fn(&Ctx) -> Result<(), Failure>) -> Result<(), Failure> {
    ctx.shell(&format!(
        "umount {}; echo 1 >/sys/bus/pci/devices/{}/remove",
        devices::SHARED_DISK_MOUNT,
        devices::SHARED_DISK
    ))?;
    let result = act(ctx);
    ctx.shell(&format!(
        "echo 1 >/sys/bus/pci/rescan
        n=0; until mount -t ext4 /dev/vd? {} 2>/dev/null || [ $n = 50 ]; do sleep 0.1; n=$((n + 1)); done",
        devices::SHARED_DISK_MOUNT
    ))?;
    result
}

fn card_without_msi(ctx: &Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let driver = ctx.driver_of(devices::RTL8139);
    let script = format!(
        r#"{WORDS}
        lines() {{ grep IO-APIC /proc/interrupts | grep "$1" | awk '{{ print $2 + $3 }}'; }}
        card=$(interface 8139cp)
        ip addr add 10.0.2.15/24 dev "$card"; ip link set "$card" up
        wait_for /sys/class/net/$card/carrier 1
        echo "interrupts-before: $(lines "$card")"
        ping -c 20 -i 0.2 -W 5 -I "$card" 10.0.2.2 && echo gateway-answered
        echo "interrupts-after: $(lines "$card")"
        grep "$card" /proc/interrupts
        # Its ports begin with its address.
        ports=$(sed -n 1p /sys/class/net/$card/device/resource | cut -d' ' -f1)
        by_ports() {{ dd if=/dev/port bs=1 skip=$((ports + $1)) count=$2 2>/dev/null | od -An -tx1 | tr -d ' \n'; }}
        echo "address-by-ports: $(by_ports 0 6)"
        echo "address-of-the-card: $(tr -d : </sys/class/net/$card/address)"
        printf '\245' | dd of=/dev/port bs=1 seek=$((ports + 9)) conv=notrunc 2>/dev/null; echo "written-by-ports: $(by_ports 9 1)"
        grep -i "$card\|8139" /proc/ioports"#
    );
    for _ in ["first", "second"] {
        let guest = ctx.guest(&script)?.vcpus(2).device(devices::RTL8139);
        let run = ctx.run_guest(&guest)?;
        run.success()?.printed("gateway-answered")?.printed("fasteoi")?;
        let (first, last) = (number(&run, "interrupts-before:")?, number(&run, "interrupts-after:")?);
        expect!(last >= first + 20, "20 pings, and INTx interrupts from {first} to {last}");
        let (by_ports, address) = (run.value("address-by-ports:")?, run.value("address-of-the-card:")?);
        expect!(by_ports == address, "by its ports the card is {by_ports}, and it is {address}");
        expect!(run.value("written-by-ports:")? == "a5", "writes to ports are lost");
        came_back(&run, devices::RTL8139, driver.as_deref())?;
        before.expect_unchanged()?;
    }
    Ok(())
}

/// The host's own driver has the NVMe drive, and its block device is there.
pub(crate) fn have_drive(ctx: &Ctx) -> Result<(), Failure> {
    ctx.load_driver("nvme")?;
    // Of an earlier test that failed.
    if !claims().is_empty() {
        ctx.run(["casemate", "recover"])?;
    }
    let is_there = || std::fs::exists("/dev/nvme0n1").unwrap_or(false);
    wait_until("the host's nvme driver has the drive", Duration::from_secs(10), is_there)
}

/// The report tells of a reset with result 0, bus master off, config space as first seen, and the driver.
pub(crate) fn came_back(run: &Finished, address: &str, driver: Option<&str>) -> Result<(), Failure> {
    let report = run.report()?;
    let devices = report.get("devices").and_then(Value::as_array).into_iter().flatten();
    let mut devices = devices.filter(|device| device.get("address").and_then(Value::as_str) == Some(address));
    let device =
        devices.next().ok_or_else(|| Failure::new(format_args!("no word of {address} in {report}")))?;
    let is = |key: &str| device.get(key) == Some(&Value::Bool(true));
    let returned_to = device.get("returned_to").and_then(Value::as_str);
    let is_clean = is("clean") && is("bus_master_off") && is("config_as_first_seen");
    expect!(
        is_clean && returned_to == driver,
        "{address} did not come back to {driver:?} as it was: {device}"
    );
    Ok(())
}

/// The one device of a run came back clean, to no driver.
pub(crate) fn came_back_somewhere(run: &Finished) -> Result<(), Failure> {
    let report = run.report()?;
    let address = report.pointer("/devices/0/address").and_then(Value::as_str);
    let address =
        address.ok_or_else(|| Failure::new(format_args!("the report tells no device: {report}")))?;
    came_back(run, address, None)
}

fn number(run: &Finished, label: &str) -> Result<u64, Failure> {
    Ok(run.value(label)?.parse()?)
}

/// Exits to the VMM for memory-mapped registers, as the report counts them.
pub(crate) fn register_exits(run: &Finished) -> Result<u64, Failure> {
    let report = run.report()?;
    let exits = report.pointer("/machine/mmio_exits").and_then(Value::as_u64);
    exits.ok_or_else(|| Failure::new(format_args!("the report counts no exits: {report}")))
}
