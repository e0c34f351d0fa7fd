//! Devices of other kinds: large BARs, displays, MSI, a card that is reset as a whole, and what goes wrong with some.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, GuestFile, Running, WITH_TOOLS, send_signal, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    admission::Bundle,
    disks::with_tools,
    endings::{SOON, cell_of},
    host_state::HostState,
    passthrough::{WORDS, came_back, register_exits},
};

/// For a guest from its start to its end.
const GUEST: Duration = Duration::from_secs(90);

/// Words for scripts of guests that reach registers without a driver.
const REGISTERS: &str = r#"
device() { # the directory of the function with vendor:device $1, the $2th (1 when left out)
  for f in /sys/bus/pci/devices/*; do
    [ "$(cat $f/vendor):$(cat $f/device)" = "$1" ] && echo $f
  done | sed -n "${2:-1}p"
}
on() { echo 1 >$1/enable; printf '\006\000' | dd of=$1/config bs=1 seek=4 conv=notrunc 2>/dev/null; } # memory and bus master
bar() { sed -n "$(($2 + 1))p" $1/resource | cut -d' ' -f1; } # where BAR $2 is
size() { set -- $(sed -n "$(($2 + 1))p" $1/resource); echo $(($2 - $1 + 1)); }
put() { devmem $(printf '0x%x' $(($1))) $2 $3; }
get() { devmem $(printf '0x%x' $(($1))) $2; }
"#;

/// Words for DMA by the teaching device, whose buffer is at 0x40000 of its own.
const DMA: &str = r#"
edu=$(device 0x1234:0x11e8); on $edu; registers=$(bar $edu 0)
dma() { # from $1 to $2; command $3
  put $registers+0x80 64 $(($1)); put $registers+0x88 64 $(($2)); put $registers+0x90 64 4096; put $registers+0x98 64 $3
}
finish() { n=0; while [ $(($(get $registers+0x98 64) & 1)) = 1 ] && [ $n -lt 100 ]; do sleep 0.05; n=$((n + 1)); done; }
"#;

/// A command line by which the kernel leaves 1 MiB of memory alone, 128 MiB up: /dev/mem reaches it.
const HOLE: &str = "console=ttyS0 quiet memmap=1M$0x8000000";

/// Starts a guest under a policy that takes devices of every class, and more of them than the shipped one.
pub(crate) fn start(ctx: &Ctx, guest: &GuestFile) -> Result<Running, Failure> {
    let bundle = Bundle::write(ctx, "limits", "limits.wasm", "max_devices = 8")?;
    let file = guest.write_into(ctx.directory())?;
    let words = ["casemate", "run", "--json", "--policy"].map(Path::new);
    ctx.start(words.iter().copied().chain([bundle.path.as_path(), file.as_path()]))
}

fn run_guest(ctx: &Ctx, guest: &GuestFile) -> Result<Finished, Failure> {
    start(ctx, guest)?.wait(GUEST)
}

/// The modules of the kernel's driver for virtio graphics, in the order of their needs: in the image of every guest they would
/// cost each start.
const GPU_MODULES: [&str; 5] = [
    "virtio/virtio_dma_buf",
    "gpu/drm/drm",
    "gpu/drm/drm_kms_helper",
    "gpu/drm/drm_shmem_helper",
    "gpu/drm/virtio/virtio-gpu",
];

/// Those, as a disk that is an archive.
fn gpu_modules(ctx: &Ctx) -> Result<PathBuf, Failure> {
    let (lab, directory) = (ctx.layout().root().display(), ctx.directory().display());
    let archive = ctx.directory().join("modules.tar");
    ctx.shell(&format!(
        "cd {lab}/kernel/lib/modules/*/kernel/drivers && mkdir {directory}/modules &&
        for module in {}; do xz -dc $module.ko.xz >{directory}/modules/$(basename $module).ko || exit 1; done &&
        tar -C {directory}/modules -cf {} .",
        GPU_MODULES.join(" "),
        archive.display()
    ))?;
    Ok(archive)
}

/// A BAR of 8 GiB, a display, a teaching device, a SATA controller by MSI, and virtio behind the IOMMU, a network card and
/// graphics: all in one guest.
pub(crate) fn many_kinds_in_one_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let all = [
        devices::LARGE_BAR,
        devices::DISPLAY,
        devices::EDU,
        devices::SATA,
        devices::VIRTIO_NET,
        devices::VIRTIO_GPU,
    ];
    let drivers = all.map(|address| ctx.driver_of(address));
    let script = format!(
        r#"{WORDS}{REGISTERS}
        large=$(device 0x1af4:0x1110); on $large
        echo "large-size: $(size $large 2)"
        base=$(bar $large 2)
        for at in 0 0x100000000 0x1ffffff00; do put $base+$at 64 0xfeed00$((at >> 32))5; done
        for at in 0 0x100000000 0x1ffffff00; do echo "large-$at: $(get $base+$at 64)"; done

        display=$(device 0x1234:0x1111); on $display
        echo "display-id: $(get $(bar $display 2)+0x500 16)"
        put $(bar $display 0)+0xfffffc 32 0x5aa5c33c; echo "display-pixel: $(get $(bar $display 0)+0xfffffc 32)"
        [ -e $display/rom ] || echo rom-is-hidden

        edu=$(device 0x1234:0x11e8); on $edu; registers=$(bar $edu 0)
        echo "edu-id: $(get $registers 32)"
        put $registers+4 32 0x12345678; echo "edu-inverts: $(get $registers+4 32)"

        n=0; until [ -b /dev/sda ] || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
        echo "sata-digest: $(sha256sum </dev/sda | cut -d' ' -f1)"
        echo "sata-interrupts: $(interrupts ahci)"

        dmesg | grep -i virtio
        card=$(interface virtio_net)
        ip addr add 10.0.2.15/24 dev "$card"; ip link set "$card" up
        ping -c 3 -W 5 -I "$card" 10.0.2.2 && echo gateway-answered

        cd /tmp; tar xf /dev/vda
        for module in {modules}; do insmod $(basename $module).ko || echo "no $module"; done
        n=0; until [ -e /dev/dri/card0 ] || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
        echo "gpu-mode: $(head -n 1 /sys/class/drm/card0-Virtual-1/modes)"
        echo "gpu-interrupts: $(interrupts virtio)""#,
        modules = GPU_MODULES.join(" ")
    );
    let modules = gpu_modules(ctx)?;
    let guest =
        all.iter().fold(ctx.guest(&script)?.disk(&modules, true), |guest, address| guest.device(address));
    let run = run_guest(ctx, &guest)?;
    run.success()?.printed("gateway-answered")?.printed("rom-is-hidden")?;
    for (label, value) in [
        ("large-size:", "8589934592"),
        ("large-0:", "0x00000000FEED0005"),
        ("large-0x100000000:", "0x00000000FEED0015"),
        ("large-0x1ffffff00:", "0x00000000FEED0015"),
        ("display-id:", "0xB0C5"),
        ("display-pixel:", "0x5AA5C33C"),
        ("edu-id:", "0x010000ED"),
        ("edu-inverts:", "0xEDCBA987"),
        ("sata-digest:", devices::PATTERN_SHA256),
    ] {
        let seen = run.value(label)?;
        expect!(seen == value, "{label} {value} was to be seen, not {seen}");
    }
    let interrupts: u64 = run.value("sata-interrupts:")?.parse()?;
    expect!(interrupts >= 16, "16 MiB came from the SATA disk with {interrupts} MSI interrupts");
    // What the card says of its screen came by DMA, in answer to a request.
    expect!(run.value("gpu-mode:")?.contains('x'), "the graphics card has no screen");
    for (address, driver) in all.iter().zip(&drivers) {
        came_back(&run, address, driver.as_deref())?;
    }
    before.expect_unchanged()
}

/// A guest is killed while its device is about to write to its memory: the next one's memory, at the same place and with
/// the same device, stays as it is.
pub(crate) fn dma_ends_with_its_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    // Memory that the kernel leaves alone, 128 MiB up: /dev/mem reaches it.
    let words = format!("{WORDS}{REGISTERS}{DMA}");
    let first = format!(
        r#"{words}
        put 0x8000000 64 0xbadbadbadbad; dma 0x8000000 0x40000 1; finish
        dma 0x40000 0x8001000 3; finish
        echo "came-back: $(get 0x8001000 64)"
        echo dma-runs-on
        while :; do dma 0x40000 0x8002000 3; finish; done"#
    );
    let guest = ctx.guest(&first)?.command_line(HOLE).device(devices::EDU);
    let running = start(ctx, &guest)?;
    let (cell, _) = cell_of(&running)?;
    running.wait_for_text("dma-runs-on", SOON)?;
    thread::sleep(Duration::from_millis(300));
    send_signal(cell, Signal::KILL)?;
    let killed = running.wait(Duration::from_secs(60))?;
    expect!(killed.value("came-back:")? == "0x0000BADBADBADBAD", "the device does no DMA");
    came_back(&killed, devices::EDU, None)?;

    let second = format!(
        r#"{words}
        yes untouched | head -c 65536 >/tmp/pattern
        dd if=/tmp/pattern of=/dev/mem bs=4096 seek=32768 conv=notrunc 2>/dev/null
        sleep 2
        dd if=/dev/mem bs=4096 skip=32768 count=16 2>/dev/null | cmp - /tmp/pattern && echo memory-is-untouched"#
    );
    let run = run_guest(ctx, &ctx.guest(&second)?.command_line(HOLE).device(devices::EDU))?;
    run.success()?.printed("memory-is-untouched")?;
    came_back(&run, devices::EDU, None)
}

/// One device writes into another's registers and reads them back, where the guest asks for that alone: it follows the guest's
/// turning the other off and on, and without the spec's word the IOMMU lets nothing through.
pub(crate) fn peers_reach_each_other(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let script = format!(
        r#"{WORDS}{REGISTERS}{DMA}
        display=$(device 0x1234:0x1111); on $display; frame=$(bar $display 0)
        fill() {{ put 0x8000000 64 $1; dma 0x8000000 0x40000 1; finish; }}
        put $frame 64 0x1; fill 0x600d
        dma 0x40000 $frame 3; finish; echo "written: $(get $frame 64)"
        fill 0xbad; dma $frame 0x40000 1; finish; dma 0x40000 0x8001000 3; finish; echo "read-back: $(get 0x8001000 64)"
        echo 0 >$display/enable; printf '\000\000' | dd of=$display/config bs=1 seek=4 conv=notrunc 2>/dev/null
        fill 0xbad; dma 0x40000 $frame 3; finish
        on $display; echo "while-off: $(get $frame 64)"
        fill 0x900d; dma 0x40000 $frame 3; finish; echo "on-again: $(get $frame 64)""#
    );
    let guest = || {
        Ok::<_, Failure>(ctx.guest(&script)?.command_line(HOLE).device(devices::EDU).device(devices::DISPLAY))
    };
    let run = run_guest(ctx, &guest()?.table("dma", "peer_to_peer = true")?)?;
    run.success()?;
    for (label, value) in
        [("written:", "600D"), ("read-back:", "600D"), ("while-off:", "600D"), ("on-again:", "900D")]
    {
        let seen = run.value(label)?;
        expect!(seen == format!("0x000000000000{value}"), "{label} {value} was to be seen, not {seen}");
    }
    came_back(&run, devices::EDU, None)?;
    let alone = run_guest(ctx, &guest()?)?;
    alone.success()?;
    let report = alone.report()?;
    let faults = report.pointer("/devices/0/iommu_faults").and_then(Value::as_u64).unwrap_or_default();
    expect!(faults > 0, "DMA that was stopped isn't counted: {report}");
    let told = ctx.run(["casemate", "events", ctx.name(), "--json"])?;
    expect!(told.success()?.stdout.contains("dma-stopped"), "nobody is told of it: {}", told.stdout);
    expect!(alone.value("written:")? == "0x0000000000000001", "devices reached each other unasked");
    before.expect_unchanged()
}

/// A device whose reset fails goes to nobody, until an operator frees it.
pub(crate) fn failed_reset_is_quarantined(ctx: &mut Ctx) -> Result<(), Failure> {
    let method = format!("/sys/bus/pci/devices/{}/reset_method", devices::EDU);
    let before = HostState::now();
    let first = fs::read_to_string(&method)?;
    let guest = ctx.guest("echo guest-has-it; sleep 3")?.device(devices::EDU);
    let running = start(ctx, &guest)?;
    running.wait_for_text("guest-has-it", SOON)?;
    // From here on the kernel has no way to reset it.
    fs::write(&method, "\n")?;
    let run = running.wait(Duration::from_secs(60))?;
    let report = run.report()?;
    let told = |key: &str| report.pointer(&format!("/devices/0/{key}")).cloned().unwrap_or(Value::Null);
    expect!(run.status.code() == Some(4), "the run ended with {:?}, not 4", run.status.code());
    expect!(told("clean") == Value::Bool(false), "it is told to be clean: {report}");
    let why = told("quarantined").as_str().unwrap_or_default().to_owned();
    expect!(why.contains("its reset (bus) failed"), "it is not in quarantine for its reset: {report}");
    fs::write(&method, &first)?;

    let again = run_guest(ctx, &guest)?;
    expect!(
        again.refusal("device-quarantined")?.contains("its reset (bus) failed"),
        "the reason is not told"
    );
    let list = ctx.run(["casemate", "devices"])?;
    expect!(list.success()?.stdout.contains("quarantined"), "casemate devices does not show it");
    ctx.run(["casemate", "devices", "free", devices::EDU])?.success()?;
    give_back(devices::EDU)?;
    let sound = run_guest(ctx, &ctx.guest("echo guest-has-it")?.device(devices::EDU))?;
    sound.success()?.printed("guest-has-it")?;
    came_back(&sound, devices::EDU, None)?;
    before.expect_unchanged()
}

/// What an operator does with a device that came out of quarantine.
pub(crate) fn give_back(address: &str) -> Result<(), Failure> {
    let directory = format!("/sys/bus/pci/devices/{address}");
    fs::write(format!("{directory}/driver_override"), "\n")?;
    fs::write(format!("{directory}/driver/unbind"), address)?;
    let is_free = || !fs::exists(format!("{directory}/driver")).unwrap_or(true);
    wait_until("the device has no driver", Duration::from_secs(10), is_free)
}

/// A ROM of one image that Linux takes for one (PCI Firmware 3.0, 5.1): 40 blocks of 512 bytes, and so no power of two.
fn option_rom() -> Vec<u8> {
    let mut rom: Vec<u8> = (0..40 * 512u32).map(|byte| (byte % 251) as u8).collect();
    let structure =
        [&b"PCIR"[..], &[0x34, 0x12, 0xe8, 0x11, 0, 0, 0x18, 0, 3, 0, 0, 0xff, 40, 0, 1, 0, 0, 0x80]]
            .concat();
    for (at, bytes) in [(0, &[0x55, 0xaa, 40][..]), (0x18, &[0x1c, 0]), (0x1c, &structure)] {
        rom.iter_mut().skip(at).zip(bytes).for_each(|(byte, new)| *byte = *new);
    }
    rom
}

/// A guest sees of its device the option ROM that its file names, and none without; a file that isn't what was written down is
/// refused.
pub(crate) fn rom_is_the_files(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let rom = ctx.directory().join("vbios.rom");
    fs::write(&rom, option_rom())?;
    let digest = ctx.shell("sha256sum vbios.rom | cut -d' ' -f1")?;
    let script = "cd /sys/bus/pci/devices; for device in *; do
            [ $(cat $device/vendor) = 0x1234 ] || continue
            [ -e $device/rom ] || { echo it has no rom; continue; }
            echo 1 >$device/enable; echo 1 >$device/rom; echo size: $(cat $device/rom | wc -c)
            echo digest: $(sha256sum $device/rom | cut -d' ' -f1)
            echo 0 >$device/rom
        done";
    let with_rom = |digest: &str| Ok::<_, Failure>(ctx.guest(script)?.device(devices::EDU).rom(&rom, digest));
    let run = run_guest(ctx, &with_rom(&digest)?)?;
    run.success()?;
    expect!(run.value("digest:")? == digest, "the guest read {}", run.value("digest:")?);
    expect!(run.value("size:")? == "20480", "its size is {}", run.value("size:")?);
    run_guest(ctx, &ctx.guest(script)?.device(devices::EDU))?.success()?.printed("it has no rom")?;
    let wrong = digest.replace(|c: char| c.is_ascii_digit(), "0");
    run_guest(ctx, &with_rom(&wrong)?)?.refusal("rom-digest")?;
    fs::write(&rom, "a virus")?;
    run_guest(ctx, &with_rom(&digest)?)?.refusal("rom-format")?;
    before.expect_unchanged()
}

/// Neither function of the card can be reset alone: only a guest that has both gets them.
pub(crate) fn card_is_reset_as_a_whole(ctx: &mut Ctx) -> Result<(), Failure> {
    let before = HostState::now();
    let [first, second] = devices::CARD;
    let refused = run_guest(ctx, &ctx.guest("true")?.device(first))?;
    expect!(refused.refusal("device-no-reset")?.contains(second), "its mate is not told");
    let script = format!(
        r#"{REGISTERS}
        for n in 1 2; do
          edu=$(device 0x1234:0x11e8 $n); on $edu; registers=$(bar $edu 0)
          echo "found-$n: $(get $registers+4 32)"; put $registers+4 32 0x12345678; echo "left-$n: $(get $registers+4 32)"
          echo "place-$n: ${{edu##*:}}"
        done"#
    );
    for _ in ["first", "second"] {
        let run = run_guest(ctx, &ctx.guest(&script)?.device(first).device(second))?;
        for number in ["1", "2"] {
            expect!(
                run.success()?.value(&format!("left-{number}:"))? == "0xEDCBA987",
                "not the teaching device"
            );
        }
        let places = (run.value("place-1:")?, run.value("place-2:")?);
        let devices = (places.0.strip_suffix(".0"), places.1.strip_suffix(".1"));
        expect!(devices.0.is_some() && devices.0 == devices.1, "one card's functions sit at {places:?}");
        expect_method(&run, "card")?;
        came_back(&run, first, None)?;
        came_back(&run, second, None)?;
    }
    before.expect_unchanged()
}

fn expect_method(run: &Finished, method: &str) -> Result<(), Failure> {
    let report = run.report()?;
    let told = report.pointer("/devices/0/reset_method").and_then(Value::as_str);
    expect!(told == Some(method), "it was reset by {told:?}, not {method}");
    Ok(())
}

/// Packets of 1 KiB that a guest sends in the busy run.
const PACKETS: u64 = 10_000;
/// Exits that may differ between two runs for other reasons than packets.
const EXITS_APART: u64 = 200;

/// A network card's packets cost no exit to the VMM: two runs, one with [`PACKETS`] more.
pub(crate) fn packets_cost_no_exits(ctx: &mut Ctx) -> Result<(), Failure> {
    for (address, driver) in [(devices::E1000E, "e1000e"), (devices::IGB, "igb")] {
        let mut exits = Vec::new();
        for packets in [0, PACKETS] {
            let script = format!(
                r#"{WORDS}{WITH_TOOLS}
                card=$(interface {driver})
                ip addr add 10.0.2.15/24 dev "$card"; ip link set "$card" up
                wait_for /sys/class/net/$card/carrier 1
                head -c $(({packets} * 1024)) /dev/zero | tools socat -u -b 1024 - UDP-SENDTO:10.0.2.2:9
                echo "sent: $(cat /sys/class/net/$card/statistics/tx_packets)""#
            );
            let guest = with_tools(ctx, ctx.guest(&script)?.device(address));
            let run = start(ctx, &guest)?.wait(Duration::from_secs(400))?;
            let sent: u64 = run.success()?.value("sent:")?.parse()?;
            expect!(sent >= packets, "{sent} packets were sent of {packets}");
            exits.push(register_exits(&run)?);
        }
        let [quiet, busy] = exits.as_slice() else { return Err(Failure::new("two runs")) };
        println!("{driver}: register exits: {quiet} without packets, {busy} with {PACKETS}");
        expect!(*busy < quiet + EXITS_APART, "{PACKETS} packets cost {} exits", busy.saturating_sub(*quiet));
    }
    Ok(())
}
