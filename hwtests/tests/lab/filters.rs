//! The filters are neither too wide nor too narrow: each rule is used, and nothing is tried that no rule allows.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use casemate_filters::{Role, rules};
use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Disk, Failure, GuestFile, Running, WITH_TOOLS, wait_until},
};
use serde_json::Value;

use crate::{
    console,
    control::operate,
    disks::with_tools,
    passthrough::{WORDS, have_drive, with_rtl8139},
};

/// For a guest that is followed call by call.
const SOON: Duration = Duration::from_secs(120);

/// A rule, as the tracer tells of its use: role, file, call, and comparisons.
type Use = (String, String, String, String);

/// Guests that between them have every device and do what an operator can ask are followed by the kernel's own means; what
/// their threads called is held beside the rules.
pub(crate) fn rules_are_used(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    ctx.load_driver("igb")?;
    let out = ctx.directory().join("calls");
    everything_emulated(ctx, Means::Followed(&out))?;
    everything_assigned(ctx, Means::Followed(&out))?;
    let mut used: BTreeSet<Use> = BTreeSet::new();
    for line in fs::read_to_string(&out)?.lines() {
        let line: Value = serde_json::from_str(line)?;
        let text = |key: &str| line.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        expect!(line.get("rule") != Some(&Value::Null), "a call that no rule allows: {line}");
        let when = line.get("when").map(Value::to_string).unwrap_or_default();
        used.insert((text("role"), text("file"), text("call"), when));
    }
    let mut faults = Vec::new();
    println!("not followed: the policy compiler, which runs when a plugin is first seen");
    for role in Role::ALL.into_iter().filter(|role| *role != Role::Compiler) {
        for rule in rules(role) {
            let name = |role: Role| {
                (role.name().to_owned(), rule.file.to_owned(), rule.call.to_owned(), when(rule.when))
            };
            // The filter of building repeats the others' rules, for filters stack; it has a use where one of them has. What
            // the language's run time needs is one file for all threads.
            let is_used = match (role, rule.file) {
                (Role::Build | Role::PolicyLoad, _) | (_, "runtime") => {
                    Role::ALL.into_iter().any(|role| used.contains(&name(role)))
                }
                _ => used.contains(&name(role)),
            };
            match (is_used, rule.unseen) {
                (false, None) => {
                    faults.push(format!("nothing uses {role}: {} {:?} ({})", rule.call, rule.when, rule.file))
                }
                (true, Some(_)) => {
                    println!("seen though marked: {role}: {} {:?} ({})", rule.call, rule.when, rule.file)
                }
                _ => {}
            }
        }
    }
    println!("{} uses of rules seen", used.len());
    expect!(
        faults.is_empty(),
        "rules without a use, to be taken out or marked as `unseen`:\n{}",
        faults.join("\n")
    );
    Ok(())
}

fn when(words: &[&str]) -> String {
    Value::from(words.to_vec()).to_string()
}

/// The filters hold the VMM as it is built with assertions, too.
pub(crate) fn a_debug_build_is_not_stopped(ctx: &mut Ctx) -> Result<(), Failure> {
    not_stopped(ctx, "../debug/casemate-vmm")
}

/// And with another C library.
pub(crate) fn a_build_with_musl_is_not_stopped(ctx: &mut Ctx) -> Result<(), Failure> {
    not_stopped(ctx, "../../x86_64-unknown-linux-musl/release/casemate-vmm")
}

fn not_stopped(ctx: &mut Ctx, vmm: &str) -> Result<(), Failure> {
    let usual = ctx.program("casemate-vmm")?;
    let vmm = usual.parent().unwrap_or(Path::new("/")).join(vmm);
    if !vmm.exists() {
        return Err(Failure::skip(format_args!("{} was not built", vmm.display())));
    }
    have_drive(ctx)?;
    ctx.load_driver("igb")?;
    everything_emulated(ctx, Means::Built(&vmm))?;
    everything_assigned(ctx, Means::Built(&vmm))
}

/// How a guest is run.
#[derive(Clone, Copy)]
enum Means<'a> {
    /// As users run it, and followed: where its calls are told.
    Followed(&'a Path),
    /// With this VMM.
    Built(&'a Path),
}

/// Starts a guest; returns what types at its console.
fn start(ctx: &Ctx, means: Means<'_>, guest: &GuestFile) -> Result<(Running, File), Failure> {
    let command = match means {
        Means::Followed(out) => {
            let trace = ctx.program("casemate-jail-trace")?;
            format!("{} {} $CASEMATE run --json --stdin $FILE", trace.display(), out.display())
        }
        Means::Built(vmm) => format!("$CASEMATE --vmm {} run --json --stdin $FILE", vmm.display()),
    };
    console::start(ctx, guest, &command)
}

/// Two processors, disks by ring and by call, cards of both kinds, sockets, a port, slots; paused, resized, limited, plugged.
fn everything_emulated(ctx: &Ctx, means: Means<'_>) -> Result<(), Failure> {
    let (raw, image) = (ctx.directory().join("raw.img"), ctx.directory().join("disk.qcow2"));
    for path in [&raw, &ctx.directory().join("hot.img")] {
        fs::write(path, vec![1; 1 << 20])?;
    }
    ctx.shell("qemu-img create -q -f qcow2 disk.qcow2 8M")?;
    let socket = ctx.directory().join("web.vsock");
    let listener = UnixListener::bind(ctx.directory().join("web.vsock_7001"))?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let (mut guest, _) = listener.accept()?;
        let mut bytes = Vec::new();
        guest.read_to_end(&mut bytes)?;
        guest.write_all(&bytes)
    });
    let script = format!(
        "{WITH_TOOLS}
        use_disk() {{ dd if=$1 of=/dev/null bs=64k; dd if=/dev/zero of=$1 bs=64k count=4 conv=notrunc,fsync; blkdiscard -l 65536 $1
            blkdiscard -z -l 65536 $1; }} 2>/dev/null
        use_disk /dev/vda; use_disk /dev/vdb
        for card in 0 1; do ip address add 192.0.$card.2/24 dev eth$card; ip link set eth$card up
            ping -c 3 -W 20 192.0.$card.1; done
        head -c 65536 /dev/hwrng >/dev/null
        head -c 65536 /dev/urandom | tools socat -t 20 - VSOCK-CONNECT:2:7001 >/dev/null
        tools socat -t 20 VSOCK-LISTEN:7000 PIPE &
        modprobe -a virtio_blk virtio_net
        echo guest is ready; read line; echo it read $line
        until port=$(grep -l agent /sys/class/virtio-ports/*/name); do sleep 0.1; done
        exec 5<>/dev/$(basename $(dirname $port)); echo port is open; read line <&5; echo reply >&5; echo port used
        until [ -e /dev/vdd ]; do sleep 0.1; done; use_disk /dev/vdd; echo disk used
        while [ -e /dev/vdd ]; do sleep 0.1; done
        until [ -e /sys/class/net/eth2 ]; do sleep 0.1; done
        ip address add 192.0.9.2/24 dev eth2; ip link set eth2 up; ping -c 3 -W 20 192.0.9.1; echo card used
        while [ -e /sys/class/net/eth2 ]; do sleep 0.1; done; echo all done; sleep 2"
    );
    let port = ctx.directory().join("agent.sock");
    let guest = ctx.guest(&script)?.vcpus(2).slots(1).vsock(&socket).port("agent", &port);
    let guest =
        guest.disk(&raw, false).disk_of(Disk { path: image, format: Some("qcow2"), ..Disk::default() });
    let guest = guest.net("cmtest0", "192.0.0.1/24").vhost(true).net("cmtest1", "192.0.1.1/24").net_queues(2);
    let (running, mut typed) = start(ctx, means, &with_tools(ctx, guest))?;
    running.wait_for_text("guest is ready", SOON * 2)?;
    typed.write_all(b"good day\n")?;
    running.wait_for_text("it read good day", SOON)?;
    // The end of its input, which the thread that types does not outlive.
    drop(typed);
    running.wait_for_text("port is open", SOON)?;
    let mut agent = UnixStream::connect(&port)?;
    agent.write_all(b"hello\n")?;
    running.wait_for_text("port used", SOON)?;
    drop(agent);
    let name = ctx.name();
    talk(&socket)?;
    operate(ctx, &["pause", name])?;
    operate(ctx, &["resume", name])?;
    operate(ctx, &["stats", name])?;
    operate(ctx, &["balloon", name, "32MiB"])?;
    operate(ctx, &["resize", name, "0", "2MiB"])?;
    operate(ctx, &["limit", name, "disk", "0", "--operations-per-second", "1000"])?;
    let hot = ctx.directory().join("hot.img");
    for (what, used) in [
        (&["--disk", &hot.to_string_lossy()][..], "disk used"),
        (&["--net", "cmhot0", "--host-address", "192.0.9.1/24"], "card used"),
    ] {
        operate(ctx, &[&["attach", name], what].concat())?;
        running.wait_for_text(used, SOON)?;
        operate(ctx, &["detach", name, "1", "--within", "50"])?;
    }
    running.wait_for_text("all done", SOON)?;
    operate(ctx, &["power-off", name])?;
    running.wait(SOON)?.success()?;
    echo.join().map_err(|_| Failure::new("the echo panicked"))??;
    Ok(())
}

/// Sends the guest something that it sends back, as soon as somebody listens there.
fn talk(socket: &Path) -> Result<(), Failure> {
    wait_until("the guest listens", SOON, || speak(socket).is_ok_and(|answer| answer.starts_with("OK")))
}

fn speak(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"CONNECT 7000\nhello")?;
    let mut answer = [0; 16];
    let length = stream.read(&mut answer)?;
    Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned())
}

/// A drive by MSI-X, whose registers are there for its peers until it's turned off, and a card by INTx, in memory as the guest's file
/// wants it; and a card that comes and goes.
fn everything_assigned(ctx: &Ctx, means: Means<'_>) -> Result<(), Failure> {
    let script = format!(
        "{WORDS}
        wait_for /sys/block/nvme0n1/size 131072
        dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 2>/dev/null; echo drive used
        card=$(interface 8139cp); ip addr add 10.0.2.15/24 dev $card; ip link set $card up
        wait_for /sys/class/net/$card/carrier 1; ping -c 3 -W 20 10.0.2.2 && echo card used
        drive=$(ls -d /sys/bus/pci/drivers/nvme/0000:*); drive=${{drive##*/}}; echo $drive >/sys/bus/pci/drivers/nvme/unbind
        printf '\\000\\000' | dd of=/sys/bus/pci/devices/$drive/config bs=1 seek=4 conv=notrunc 2>/dev/null
        ip link set $card down; modprobe igb; until [ -n \"$(interface igb)\" ]; do sleep 0.1; done; echo another came
        while [ -n \"$(interface igb)\" ]; do sleep 0.1; done; echo it went"
    );
    let guest = ctx.guest(&script)?.device(devices::NVME).device(devices::RTL8139).slots(1);
    let guest = guest.table("ram", "huge_pages = \"none\"\nprefault = true\nnuma_node = 0")?;
    let guest = guest.table("dma", "peer_to_peer = true")?;
    with_rtl8139(ctx, |ctx| {
        let (running, _typed) = start(ctx, means, &guest)?;
        running.wait_for_text("card used", SOON * 2)?;
        operate(ctx, &["attach", ctx.name(), "--device", devices::IGB])?;
        running.wait_for_text("another came", SOON)?;
        operate(ctx, &["detach", ctx.name(), "1", "--within", "50"])?;
        running.wait(SOON * 2)?.success()?.printed("drive used")?.printed("it went")?;
        Ok(())
    })
}
