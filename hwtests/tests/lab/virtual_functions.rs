//! Virtual functions: made for guests, set through the physical function, removed after the last guest.

use std::{fs, path::PathBuf, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Running, send_signal, wait_until},
};
use rustix::process::Signal;

use crate::{
    endings::{SOON, broker_of, is_gone},
    host_state::HostState,
    notices::OBEYS,
    passthrough::{WORDS, came_back_somewhere, have_drive},
};

const CARDS: &str = "[[pool]]\nname = 'cards'\nid = '8086:10c9'\nvfs = 2\nvf_vlan = 100\n";
const DRIVES: &str = "[[pool]]\nname = 'drives'\nid = '1b36:0010'\nvfs = 1\nvf_namespaces = [2]\n";

/// Starts a guest with one device of a pool.
fn start(ctx: &Ctx, name: &str, pool: &str, host_file: &str, script: &str) -> Result<Running, Failure> {
    let text = ctx.guest(script)?.named(name).device(devices::IGB).to_toml()?;
    let named = format!("address = \"{}\"", devices::IGB);
    expect!(text.contains(&named), "the guest's file is another: {text}");
    let file = |ending: &str| -> PathBuf { ctx.directory().join(format!("{name}.{ending}")) };
    fs::write(file("toml"), text.replacen(&named, &format!("pool = \"{pool}\""), 1))?;
    fs::write(file("host"), host_file)?;
    let (guest, host) = (file("toml"), file("host"));
    let words =
        ["casemate", "--host-config", &host.to_string_lossy(), "run", "--json", &guest.to_string_lossy()]
            .map(str::to_owned);
    ctx.start(words)
}

fn attribute(address: &str, name: &str) -> String {
    fs::read_to_string(format!("/sys/bus/pci/devices/{address}/{name}")).unwrap_or_default().trim().to_owned()
}

fn interface(address: &str) -> Result<String, Failure> {
    let mut entries = fs::read_dir(format!("/sys/bus/pci/devices/{address}/net"))?.flatten();
    let first = entries.next().ok_or_else(|| Failure::new("the card has no interface"))?;
    Ok(first.file_name().to_string_lossy().into_owned())
}

/// Two guests have one each. Casemate's settings are read back from the physical function, which is given to nobody.
pub(crate) fn of_a_card_in_two_guests(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("igb")?;
    let card = interface(devices::IGB)?;
    ctx.shell(&format!("ip link set {card} up"))?;
    let before = HostState::now();
    let script = format!(
        r#"{WORDS}
        for f in /sys/bus/pci/devices/*; do
          [ "$(cat $f/vendor):$(cat $f/device)" = 0x8086:0x10ca ] && echo "driver: $(basename $(readlink $f/driver))"
        done
        card=$(interface igbvf); echo "interface: $card"; echo "mac: $(cat /sys/class/net/$card/address)"
        ip link set "$card" up && sleep 1; echo "carrier: $(cat /sys/class/net/$card/carrier)"
        dmesg | grep -i igbvf; echo vf-is-there; sleep 12"#
    );
    let first = start(ctx, "vf-a", "cards", CARDS, &script)?;
    let second = start(ctx, "vf-b", "cards", CARDS, &script)?;
    first.wait_for_text("vf-is-there", SOON)?;
    second.wait_for_text("vf-is-there", SOON)?;
    expect!(attribute(devices::IGB, "sriov_numvfs") == "2", "there are not two virtual functions");
    let told = ctx.shell(&format!("ip link show {card}"))?;
    let of: Vec<&str> = told.lines().map(str::trim).filter(|line| line.starts_with("vf ")).collect();
    expect!(of.len() == 2, "the card tells of {} virtual functions: {told}", of.len());
    for line in &of {
        for setting in ["link/ether 02:", "vlan 100", "spoof checking on", "trust off"] {
            expect!(line.contains(setting), "{setting:?} is not told: {line}");
        }
    }
    let guest = ctx.guest("true")?.named("vf-c").device(devices::IGB);
    let refused = ctx.run_guest(&guest)?;
    expect!(
        refused.stderr.contains("virtual functions"),
        "the physical function is given: {}",
        refused.stderr
    );
    for running in [first, second] {
        let run = running.wait(SOON)?;
        expect!(
            run.success()?.value("driver:")? == "igbvf",
            "the guest's driver is {}",
            run.value("driver:")?
        );
        expect!(!run.value("interface:")?.is_empty(), "the driver made no interface");
        println!("mac {}, carrier {:?}", run.value("mac:")?, run.value("carrier:"));
        came_back_somewhere(&run)?;
    }
    expect_none(devices::IGB)?;
    before.expect_unchanged()
}

fn expect_none(address: &str) -> Result<(), Failure> {
    let are_gone = || attribute(address, "sriov_numvfs") == "0";
    wait_until("the virtual functions are gone", Duration::from_secs(10), are_gone)?;
    let probes = attribute(address, "sriov_drivers_autoprobe");
    expect!(probes == "1", "drivers are probed for virtual functions: {probes}");
    Ok(())
}

/// The driver of the physical function goes, and its virtual functions with it: the guest that has one ends, and is told why.
pub(crate) fn of_a_card_whose_driver_goes(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("igb")?;
    let running = start(ctx, "vf-g", "cards", CARDS, "echo vf-is-there; sleep 1000")?;
    running.wait_for_text("vf-is-there", SOON)?;
    ctx.shell(&format!(
        "timeout 100 sh -c 'echo {} >/sys/bus/pci/drivers/igb/unbind' >/dev/null 2>&1 &",
        devices::IGB
    ))?;
    let step = running.wait_for_step("device-wanted", SOON)?;
    let run = running.wait(SOON)?;
    println!("the guest was told by {step}, and came to {}", run.report()?);
    wait_until("the card has no driver", SOON, || ctx.driver_of(devices::IGB).is_none())?;
    ctx.shell(&format!("echo {} >/sys/bus/pci/drivers/igb/bind", devices::IGB))?;
    expect_none(devices::IGB)?;
    expect!(run.status.code() == Some(4), "the run ended with {:?}, not 4", run.status.code());
    let report = run.report()?;
    let error = report.pointer("/devices/0/error").and_then(|error| error.as_str()).unwrap_or_default();
    expect!(!error.is_empty(), "nobody is told that the device is gone: {report}");
    let list = ctx.run(["casemate", "devices"])?;
    expect!(!list.success()?.stdout.contains("vf-g"), "the guest still has something");
    Ok(())
}

/// The physical function is reset, and stays: the guest that has a virtual one ends in order, and is told why.
pub(crate) fn of_a_card_that_is_reset(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("igb")?;
    let before = HostState::now();
    let running = start(ctx, "vf-r", "cards", CARDS, OBEYS)?;
    running.wait_for_text("guest-has-it", SOON)?;
    ctx.shell(&format!("echo 1 >/sys/bus/pci/devices/{}/reset", devices::IGB))?;
    running.wait_for_step("parent-reset", SOON)?;
    let run = running.wait(SOON)?;
    run.success()?.printed("button-was-pressed")?;
    came_back_somewhere(&run)?;
    let told = ctx.run(["casemate", "events", "vf-r", "--json"])?;
    expect!(told.success()?.stdout.contains("parent-reset"), "it is in no log: {}", told.stdout);
    expect_none(devices::IGB)?;
    before.expect_unchanged()
}

/// The keep dies, and the next command removes what it made.
pub(crate) fn of_a_killed_keep_go(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.load_driver("igb")?;
    let before = HostState::now();
    let running = start(ctx, "vf-k", "cards", CARDS, "echo vf-is-there; sleep 1000")?;
    running.wait_for_text("vf-is-there", SOON)?;
    expect!(attribute(devices::IGB, "sriov_numvfs") == "2", "there are not two virtual functions");
    let broker = broker_of(&running)?;
    send_signal(running.pid(), Signal::KILL)?;
    let _ = running.wait(SOON)?;
    wait_until("the broker has undone it", Duration::from_secs(60), || is_gone(broker))?;
    expect_none(devices::IGB)?;
    before.expect_unchanged()
}

/// A virtual function of a drive, with queues and a namespace that it got through the physical one.
pub(crate) fn of_a_drive_has_its_namespace(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let digest = ctx.shell("head -c 16777216 /dev/nvme0n1 | sha256sum | cut -d' ' -f1")?;
    let before = HostState::now();
    // The lab's drive gives namespace 1 to each controller that is enabled, whatever was taken from it before; its own is
    // told by its size.
    let script = format!(
        r#"{WORDS}
        own() {{ for disk in /sys/block/nvme0n*; do [ "$(cat $disk/size)" = 32768 ] && echo /dev/${{disk##*/}}; done; }}
        n=0; until [ -b "$(own)" ] || [ $n = 100 ]; do sleep 0.1; n=$((n + 1)); done
        echo "digest: $(sha256sum <$(own) | cut -d' ' -f1)"
        echo "interrupts: $(interrupts nvme0q)""#
    );
    for name in ["vd-a", "vd-b"] {
        let run = start(ctx, name, "drives", DRIVES, &script)?.wait(SOON)?;
        let seen = run.success()?.value("digest:")?;
        expect!(seen == digest, "the guest saw {seen:?} of its namespace, not {digest}");
        let interrupts: u64 = run.value("interrupts:")?.parse()?;
        expect!(interrupts > 0, "the virtual function does not interrupt");
        came_back_somewhere(&run)?;
        expect_none(devices::NVME)?;
        let again = ctx.shell("head -c 16777216 /dev/nvme0n1 | sha256sum | cut -d' ' -f1")?;
        expect!(again == digest, "the host's own namespace has changed");
    }
    before.expect_unchanged()
}
