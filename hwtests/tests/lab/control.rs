//! What an operator does with a guest that runs.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, Running, wait_until},
};
use rustix::net::{RecvFlags, recv};
use serde_json::Value;

use crate::{
    admission::Bundle,
    endings::{cell_of, ending},
    virtio::resident_bytes,
};

/// For a guest to come to its script, or from there to its end.
const SOON: Duration = Duration::from_secs(60);

/// Runs `casemate --json VERB GUEST…`, which must succeed; returns what it printed.
pub(crate) fn operate(ctx: &Ctx, words: &[&str]) -> Result<Value, Failure> {
    let run = ctx.run(["casemate", "--json"].iter().chain(words))?;
    let line = run.success()?.stdout.trim();
    serde_json::from_str(line).map_err(|error| Failure::new(format_args!("{words:?} said {line:?}: {error}")))
}

/// What stands under a key; null where nothing does.
fn at<'a>(value: &'a Value, key: &str) -> &'a Value {
    value.get(key).unwrap_or(&Value::Null)
}

/// How many lines of the guest's say `tick`.
fn ticks(running: &Running) -> usize {
    running.printed_so_far().matches("tick-").count()
}

/// Processor time that the vCPU threads of a cell have used, in clock ticks.
fn vcpu_time(pid: u32) -> Result<u64, Failure> {
    let mut sum = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let stat = fs::read_to_string(thread.path().join("stat"))?;
        if let Some((name, rest)) = stat.rsplit_once(") ")
            && name.contains("(vcpu")
        {
            let fields: Vec<u64> = rest.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
            // utime and stime, the 14th and 15th field (proc_pid_stat(5)).
            sum += fields.get(11).copied().unwrap_or(0) + fields.get(12).copied().unwrap_or(0);
        }
    }
    Ok(sum)
}

/// One line to the operator's socket, and what comes back.
fn said(guest: &str, line: &[u8]) -> Result<String, Failure> {
    let mut socket = UnixStream::connect(format!("/run/casemate/{guest}.operator"))?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    let _ = socket.write_all(line);
    let mut answer = String::new();
    BufReader::new(socket).read_line(&mut answer)?;
    Ok(answer)
}

/// A guest stands still while it is paused, and goes on as if nothing had been; meanwhile it can be asked, but not in vain.
pub(crate) fn pauses_and_goes_on(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let script = "cat /dev/vda >/dev/null; (while true; do :; done) &
        i=0; while true; do i=$((i+1)); echo tick-$i.; sleep 0.2; dmesg | grep -i 'lockup\\|stall' && echo complains; done";
    let running = ctx.start_guest(&ctx.guest(script)?.vcpus(2).disk(&disk, false))?;
    let guest = ctx.name();
    let (pid, _) = cell_of(&running)?;
    running.wait_for_text("tick-3.", SOON)?;
    for _ in 0..3 {
        expect!(at(&operate(ctx, &["pause", guest])?, "state") == "paused", "it is not paused");
        running.wait_for_step("paused", SOON)?;
        thread::sleep(Duration::from_millis(700));
        let (before, time) = (ticks(&running), vcpu_time(pid)?);
        thread::sleep(Duration::from_secs(2));
        expect!(ticks(&running) == before, "a paused guest printed {} lines", ticks(&running) - before);
        expect!(vcpu_time(pid)? == time, "the processors of a paused guest ran");
        let listed = operate(ctx, &["ps"])?;
        expect!(at(&listed, "state") == "paused" && at(&listed, "guest") == guest, "ps says {listed}");
        // Pausing what is paused is no mistake.
        operate(ctx, &["pause", guest])?;
        ctx.run(["casemate", "power-off", guest])?.refusal("guest-paused")?;
        expect!(at(&operate(ctx, &["resume", guest])?, "state") == "running", "it does not run");
        let next = format!("tick-{}.", before + 3);
        running.wait_for_text(&next, Duration::from_secs(20))?;
    }
    counts(&operate(ctx, &["stats", guest])?)?;
    hostile_words(ctx, guest)?;
    let now = ticks(&running);
    running.wait_for_text(&format!("tick-{}.", now + 2), Duration::from_secs(20))?;
    operate(ctx, &["stop", guest])?;
    let run = running.wait(SOON)?;
    expect!(ending(&run)? == "stopped", "the guest ended by {}", ending(&run)?);
    expect!(!run.stdout.contains("complains"), "the guest's watchdogs complain");
    ctx.run(["casemate", "pause", guest])?.refusal("guest-not-running")?;
    expect!(!fs::exists(format!("/run/casemate/{guest}.operator"))?, "the operator's socket is still there");
    Ok(())
}

fn counts(statistics: &Value) -> Result<(), Failure> {
    let vcpus = at(statistics, "vcpus").as_array().map_or(0, Vec::len);
    expect!(vcpus == 2, "the statistics tell of {vcpus} processors: {statistics}");
    let exits = |vcpu: &Value| {
        at(vcpu, "pio_exits").as_u64().unwrap_or(0) + at(vcpu, "mmio_exits").as_u64().unwrap_or(0)
    };
    let all: u64 = at(statistics, "vcpus").as_array().into_iter().flatten().map(exits).sum();
    expect!(all > 100, "a guest that printed and read has {all} exits: {statistics}");
    let devices = at(statistics, "devices").as_array().cloned().unwrap_or_default();
    let disk = devices.iter().find(|device| at(device, "kind") == "disk").cloned().unwrap_or_default();
    let read = at(&disk, "bytes_to_guest").as_u64().unwrap_or(0);
    expect!((1 << 20..2 << 20).contains(&read), "the guest read 1 MiB, and the statistics say: {disk}");
    expect!(
        at(statistics, "vmm_memory_bytes").as_u64().is_some_and(|bytes| bytes > 0),
        "no memory: {statistics}"
    );
    Ok(())
}

/// Reading the configuration space of all that sits on the root bus takes the guest to the VMM for what's behind no page: a few
/// accesses, of thousands.
pub(crate) fn configuration_is_read_without_exits(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "
        read_all() { cat /sys/bus/pci/devices/*/config >/dev/null; }
        read_all; echo functions: $(ls /sys/bus/pci/devices | wc -l)
        echo reads; sleep 2; i=0; while [ $i -lt 20 ]; do i=$((i+1)); read_all; done; echo has-read; sleep 60";
    let running = ctx.start_guest(&ctx.guest(script)?.slots(1))?;
    let exits = || -> Result<u64, Failure> {
        let statistics = operate(ctx, &["stats", ctx.name()])?;
        let exits = statistics.pointer("/vcpus/0/mmio_exits").and_then(Value::as_u64);
        exits.ok_or_else(|| Failure::new(format_args!("no exits are counted: {statistics}")))
    };
    running.wait_for_text("reads", SOON)?;
    let before = exits()?;
    running.wait_for_text("has-read", SOON)?;
    let after = exits()?;
    operate(ctx, &["stop", ctx.name()])?;
    let run = running.wait(SOON)?;
    let functions: u64 = run.value("functions:")?.parse()?;
    expect!(functions >= 4, "the guest sees {functions} functions");
    expect!(after - before < 20, "reading {functions} functions 20 times took {} exits", after - before);
    Ok(())
}

/// Nonsense and floods at the operator's socket are refused, and change nothing.
fn hostile_words(ctx: &Ctx, guest: &str) -> Result<(), Failure> {
    let lines: [&[u8]; 4] = [b"\n", b"{\"do\":\"dance\"}\n", &[b'x'; 100_000], b"\0\xff\n"];
    for line in lines {
        let answer = said(guest, line)?;
        expect!(answer.contains("operator-request"), "{line:?} was answered with {answer:?}");
    }
    let path = format!("/run/casemate/{guest}.operator");
    let flood: Vec<_> = (0..100).filter_map(|_| UnixStream::connect(&path).ok()).collect();
    let is_refused = |socket: &&UnixStream| {
        let mut bytes = [0; 64];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let word = recv(*socket, &mut bytes[..], flags).map(|(count, _)| count).unwrap_or(0);
        bytes.get(..word).unwrap_or_default().starts_with(b"{\"refused\":\"guest-busy\"")
    };
    let are_refused = || flood.iter().filter(is_refused).count() >= 80;
    wait_until("80 of 100 connections are refused", Duration::from_secs(10), are_refused)?;
    drop(flood);
    thread::sleep(Duration::from_millis(200));
    expect!(at(&operate(ctx, &["stats", guest])?, "state") == "running", "the flood had consequences");
    Ok(())
}

/// The power button is pressed by name; the console is kept.
pub(crate) fn presses_the_button_by_name(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "modprobe evdev; exec 3</dev/input/event0; yes a-long-log | head -n 900
        echo waits-for-its-button; head -c 24 <&3 >/dev/null; echo button-was-pressed";
    let file = ctx.guest(script)?.vcpus(1).write_into(ctx.directory())?.to_string_lossy().into_owned();
    let log = ctx.directory().join("console.log");
    let log_option = format!("--console-log={}", log.display());
    let running = ctx.start(["casemate", "run", "--json", "--console-log-size=4KiB", &log_option, &file])?;
    running.wait_for_text("waits-for-its-button", SOON)?;
    operate(ctx, &["power-off", ctx.name()])?;
    let run = running.wait(Duration::from_secs(30))?;
    run.success()?.printed("button-was-pressed")?;
    let kept = fs::read(&log)?;
    expect!(run.stdout.as_bytes().ends_with(&kept) && !kept.is_empty(), "the log is not the console's end");
    expect!(kept.len() <= 4096, "the log has {} bytes", kept.len());
    expect!(ending(&run)? == "power-off", "the guest ended by {}", ending(&run)?);
    Ok(())
}

/// How the balloon stands: so many bytes given up, and what the guest says is free.
fn balloon(ctx: &Ctx) -> Result<(u64, Option<u64>), Failure> {
    let balloon = at(&operate(ctx, &["stats", ctx.name()])?, "balloon").clone();
    let given = at(&balloon, "actual_bytes").as_u64();
    let given =
        given.ok_or_else(|| Failure::new(format_args!("the statistics tell of no balloon: {balloon}")))?;
    Ok((given, at(&balloon, "free_bytes").as_u64()))
}

/// Memory that the guest uses as a cache goes to the host when the balloon is inflated; under pressure the guest takes some
/// back before it kills; and it has all again when the balloon is empty.
pub(crate) fn balloon_takes_and_gives(ctx: &mut Ctx) -> Result<(), Failure> {
    const MIB: u64 = 1 << 20;
    let disk = ctx.directory().join("disk.img");
    fs::File::create(&disk)?.set_len(160 * MIB)?;
    let script = r"pages() { awk '/^balloon_inflate/ {print $2}' /proc/vmstat; }
        cat /dev/vda >/dev/null; echo has-read
        while [ $(pages) -lt 53000 ]; do sleep 0.2; done
        mount -t tmpfs -o size=100% tmpfs /tmp
        dd if=/dev/zero of=/tmp/fill bs=1M count=150; echo bytes: $(wc -c </tmp/fill).
        dmesg | grep -i 'killed process'; echo has-filled; sleep 600";
    let running = ctx.start_guest(&ctx.guest(script)?.vcpus(1).memory("384 MiB").disk(&disk, false))?;
    let (vmm, _) = cell_of(&running)?;
    running.wait_for_text("has-read", SOON)?;
    let full = resident_bytes(vmm).unwrap_or_default();
    expect!(full > 160 * MIB, "the guest's cache takes no room: {full}");
    ctx.run(["casemate", "balloon", ctx.name(), "321MiB"])?.refusal("guest-refused")?;
    operate(ctx, &["balloon", ctx.name(), "200MiB"])?;
    let given = |least: u64, most: u64| balloon(ctx).is_ok_and(|(given, _)| (least..=most).contains(&given));
    wait_until("the guest gives 200 MiB up", SOON, || given(200 * MIB, 200 * MIB))?;
    let left = resident_bytes(vmm).unwrap_or_default();
    expect!(left + 100 * MIB < full, "{full} bytes were in use on the host, and {left} are");
    let (_, free) = balloon(ctx)?;
    expect!(free.is_some_and(|free| free < 184 * MIB), "the guest says that {free:?} are free");
    // Some more, and the guest knows that it is its turn.
    operate(ctx, &["balloon", ctx.name(), "208MiB"])?;
    running.wait_for_text("has-filled", SOON)?;
    let printed = running.printed_so_far();
    expect!(printed.contains("bytes: 157286400."), "the guest did not fill its memory: {printed}");
    expect!(!printed.to_lowercase().contains("killed process"), "the guest killed a process: {printed}");
    expect!(given(0, 190 * MIB), "the guest took nothing back under pressure: {:?}", balloon(ctx)?);
    operate(ctx, &["balloon", ctx.name(), "0"])?;
    wait_until("the guest has all again", SOON, || given(0, 0))?;
    operate(ctx, &["stop", ctx.name()])?;
    running.wait(SOON)?.success()?;
    Ok(())
}

/// Asked for it, the guest names what it has free; what it has written stays, and it has all its memory to use.
pub(crate) fn free_memory_is_reclaimed(ctx: &mut Ctx) -> Result<(), Failure> {
    const MIB: u64 = 1 << 20;
    let script = r"mount -t tmpfs -o size=100% tmpfs /tmp
        sum() { sha256sum </tmp/kept | cut -c1-64; }
        dd if=/dev/urandom of=/tmp/kept bs=1M count=16 2>/dev/null; before=$(sum); n=0
        while dd if=/dev/zero of=/tmp/fill bs=1M count=64 2>/dev/null && [ x$before = x$(sum) ]; do
            rm /tmp/fill; n=$((n + 1)); echo round $n.; sleep 1
        done; echo something is wrong";
    let running = ctx.start_guest(&ctx.guest(script)?.memory("256 MiB"))?;
    running.wait_for_text("round 1.", SOON)?;
    for _ in 0..2 {
        let told = operate(ctx, &["reclaim", ctx.name()])?;
        let bytes = at(&told, "reclaimed_bytes").as_u64().unwrap_or_default();
        expect!(
            (16 * MIB..240 * MIB).contains(&bytes),
            "the guest of 256 MiB has named {bytes} bytes as free"
        );
        // The next whole round begins after that.
        let rounds = running.printed_so_far().matches("round ").count();
        running.wait_for_text(&format!("round {}.", rounds + 2), SOON)?;
    }
    operate(ctx, &["pause", ctx.name()])?;
    ctx.run(["casemate", "reclaim", ctx.name()])?.refusal("guest-refused")?;
    operate(ctx, &["stop", ctx.name()])?;
    running.wait(SOON)?.success()?;
    Ok(())
}

/// A disk and a card do no more than they may, and as much as they can once they may.
pub(crate) fn limits_hold(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    // Reads what was not read before, and tells how long it took.
    let script = r"now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
        read_all() { t=$(now); dd if=/dev/vda of=/dev/null bs=$2 count=$3 skip=$4 2>/dev/null
            echo $1: $(( ($(now) - t) * 10 )); }
        echo wants-bytes; read x; read_all bytes 64k 96 100
        echo 0 >/sys/block/vda/queue/read_ahead_kb
        echo wants-operations; read x; read_all operations 4k 60 8000
        echo 128 >/sys/block/vda/queue/read_ahead_kb
        echo wants-freedom; read x; read_all again 64k 64 800";
    let file = ctx.guest(script)?.vcpus(1).disk(&disk, false).write_into(ctx.directory())?;
    // Limited by its file at first.
    let limited = "[[disk]]\nlimit = { bytes_per_second = \"2 MiB\", burst_bytes = \"512 KiB\" }";
    fs::write(&file, fs::read_to_string(&file)?.replacen("[[disk]]", limited, 1))?;
    let fifo = ctx.directory().join("typed");
    ctx.shell("mkfifo typed")?;
    let casemate = ctx.program("casemate")?;
    let command = format!("exec {} run --json --stdin {} <typed", casemate.display(), file.display());
    let running = ctx.start(["sh", "-c", &command])?;
    let mut typed = fs::File::options().write(true).open(&fifo)?;
    let mut go = |asked: &str, limits: Option<&[&str]>| {
        running.wait_for_text(asked, SOON)?;
        if let Some(limits) = limits {
            operate(ctx, &[&["limit", ctx.name(), "disk", "0"][..], limits].concat())?;
        }
        Ok::<(), Failure>(typed.write_all(b"go\n")?)
    };
    // 6 MiB at 2 MiB a second with half a MiB at once take 2.75 s at least; 60 requests at 20 with 10 at once take 2.5 s.
    go("wants-bytes", None)?;
    go("wants-operations", Some(&["--operations-per-second=20", "--burst-operations=10"]))?;
    go("wants-freedom", Some(&[]))?;
    let run = running.wait(SOON)?;
    let took = |label: &str| -> Result<u64, Failure> {
        let text = run.success()?.value(&format!("{label}:"))?;
        text.parse().map_err(|_| Failure::new(format_args!("{label} took {text:?}")))
    };
    let (bytes, operations, again) = (took("bytes")?, took("operations")?, took("again")?);
    expect!((2300..12_000).contains(&bytes), "6 MiB at 2 MiB a second took {bytes} ms");
    expect!((2000..12_000).contains(&operations), "60 requests at 20 a second took {operations} ms");
    expect!(again < 1900, "4 MiB without a limit took {again} ms");
    ctx.run(["casemate", "limit", ctx.name(), "disk", "0"])?.refusal("guest-not-running")?;
    Ok(())
}

/// A disk is as large as the operator makes it: the guest sees so, and writes to its new end.
pub(crate) fn disk_grows_and_shrinks(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let script = r"wait_for() { while [ $(cat /sys/block/vda/size) != $1 ]; do sleep 0.1; done; echo sees-$1.; }
        wait_for 2048; wait_for 4096
        echo written at the new end | dd of=/dev/vda bs=512 seek=4095 conv=notrunc,sync,fsync && echo has-written
        wait_for 1024; dd if=/dev/vda of=/dev/null bs=512 skip=1023 && echo reads-the-last
        wait_for 3072; sleep 600";
    let bundle = Bundle::write(ctx, "limits", "limits.wasm", "max_disk = \"2 MiB\"")?;
    let file = ctx.guest(script)?.vcpus(1).disk(&disk, false).write_into(ctx.directory())?;
    let run = [Path::new("casemate"), Path::new("run"), Path::new("--policy"), &bundle.path, &file];
    let running = ctx.start(run)?;
    running.wait_for_text("sees-2048.", SOON)?;
    let refused = |words: &[&str]| ctx.run([&["casemate", "resize", ctx.name()][..], words].concat());
    for words in [&["1"][..], &["0", "1000"], &["0", "0"], &["0", "512KiB"]] {
        refused(words)?.refusal("disk-resize")?;
    }
    let denied = refused(&["0", "3MiB"])?;
    let denied = denied.refusal("policy-denied")?;
    expect!(denied.contains("3 MiB is more than the 2 MiB that a disk may have"), "{denied}");
    expect!(fs::metadata(&disk)?.len() == 1 << 20, "a disk that was denied has grown");
    operate(ctx, &["resize", ctx.name(), "0", "2MiB"])?;
    running.wait_for_text("sees-4096.", SOON)?;
    running.wait_for_text("has-written", SOON)?;
    let bytes = fs::read(&disk)?;
    let end = bytes.get((2 << 20) - 512..).unwrap_or_default();
    expect!(end.starts_with(b"written at the new end"), "the end of the disk holds {end:?}");
    ctx.run(["casemate", "audit", ctx.name()])?.success()?;
    operate(ctx, &["resize", ctx.name(), "0", "512KiB", "--shrink"])?;
    running.wait_for_text("reads-the-last", SOON)?;
    expect!(fs::metadata(&disk)?.len() == 512 << 10, "the file was not made smaller");
    // Grown by somebody else, and then told.
    fs::File::options().write(true).open(&disk)?.set_len(3072 * 512)?;
    operate(ctx, &["resize", ctx.name(), "0"])?;
    running.wait_for_text("sees-3072.", SOON)?;
    fs::File::options().write(true).open(&disk)?.set_len(3 << 20)?;
    refused(&["0"])?.refusal("policy-denied")?;
    operate(ctx, &["stop", ctx.name()])?;
    running.wait(SOON)?.success()?;
    Ok(())
}
