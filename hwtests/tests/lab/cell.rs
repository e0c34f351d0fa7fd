//! The cell holds: as /proc shows it around a running guest, and as a captured program meets it.

use std::{
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished, Running, wait_until},
};
use casemate_jail::{Answer, Call, CellView, Descriptor, filters, inspect};
use rustix::{
    net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with},
    process::Signal,
    thread::set_thread_uid,
};
use serde_json::Value;

use crate::{
    endings::{cell_of, ending},
    passthrough::have_drive,
};

pub(crate) fn is_closed_around_a_running_guest(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    ctx.load_driver("e1000e")?;
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let guest = ctx.guest("sleep 1000")?.vcpus(2).disk(&disk, false).net("cmtest0", "192.0.2.1/24");
    let running = ctx.start_guest(&guest.device(devices::NVME).device(devices::E1000E))?;
    let (pid, uid) = cell_of(&running)?;
    running.wait_for_text("CASEMATE-INIT", Duration::from_secs(60))?;
    expect!(uid != 0, "the cell runs as root");
    let view = inspect(pid)?;
    let mut faults = view.faults(uid, uid);
    for thread in &view.threads {
        println!("{thread:?}");
        // One while the machine was built, and the one that narrowed it.
        if thread.seccomp_filters.is_some_and(|count| count < 2) {
            faults.push(format!("thread {} has {:?} filters", thread.name, thread.seccomp_filters));
        }
    }
    let has_thread = |name: &str| view.threads.iter().any(|thread| thread.name == name);
    expect!(has_thread("vcpu0") && has_thread("vcpu1"), "threads are missing: {:?}", view.threads);
    let network = fs::read_to_string(format!("/proc/{pid}/net/dev"))?;
    let interfaces: Vec<&str> = network.lines().skip(2).filter_map(|line| line.split(':').next()).collect();
    expect!(
        interfaces.len() == 1 && interfaces.iter().all(|name| name.trim() == "lo"),
        "interfaces: {interfaces:?}"
    );
    for descriptor in &view.descriptors {
        println!("{descriptor:?}");
        if !is_expected(descriptor, &disk) {
            faults.push(format!("descriptor {} is {}", descriptor.number, descriptor.target));
        }
    }
    expect!(faults.is_empty(), "the cell is not closed: {}", faults.join("; "));
    running.signal(Signal::TERM)?;
    running.wait(Duration::from_secs(20))?.success()?;
    Ok(())
}

/// What a VMM works with. No directory, no file but the images.
fn is_expected(descriptor: &Descriptor, disk: &Path) -> bool {
    const KINDS: [&str; 6] = ["socket:[", "pipe:[", "anon_inode:", "/memfd:", "/dev/vfio/", "/dev/kvm"];
    let target = descriptor.target.as_str();
    KINDS.iter().any(|kind| target.starts_with(kind))
        || ["/dev/null", "/dev/net/tun"].contains(&target)
        || Path::new(target) == disk
}

pub(crate) fn hears_its_keep_alone(ctx: &mut Ctx) -> Result<(), Failure> {
    let running = ctx.start_guest(&ctx.guest("sleep 1000")?.vcpus(1))?;
    running.wait_for_step("running", Duration::from_secs(60))?;
    let path = format!("/run/casemate/{}.socket", ctx.name());
    // However far a stranger gets, nothing that it says may reach the guest.
    let stranger = thread::spawn({
        let path = path.clone();
        move || {
            set_thread_uid(rustix::thread::Uid::from_raw(65534))?;
            say(&path, &every_short_message())
        }
    });
    let said = stranger.join().map_err(|_| Failure::new("the stranger panicked"))?;
    println!("the stranger: {said:?}");
    running.wait_for_text("CASEMATE-INIT", Duration::from_secs(60))?;
    // From root, whose word counts, what is no message ends nothing either.
    println!("nonsense: {:?}", say(&path, &[vec![0xff; 64], Vec::new(), vec![0; 100_000]]));
    thread::sleep(Duration::from_millis(500));
    expect!(cell_of(&running).is_ok_and(|(pid, _)| inspect(pid).is_ok()), "the cell has ended");
    running.signal(Signal::TERM)?;
    let run = running.wait(Duration::from_secs(20))?;
    run.success()?;
    expect!(ending(&run)? == "stopped", "the guest ended by {}", ending(&run)?);
    Ok(())
}

/// Every message of one and two bytes: whatever the encoding, "stop" is among them.
fn every_short_message() -> Vec<Vec<u8>> {
    let one = (0..=u8::MAX).map(|byte| vec![byte]);
    one.chain((0..=u8::MAX).flat_map(|first| [vec![first, 0], vec![first, 1]])).collect()
}

/// Connects and sends; ends at the first error.
fn say(path: &str, messages: &[Vec<u8>]) -> io::Result<usize> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    for message in messages {
        send(&socket, message, SendFlags::NOSIGNAL)?;
    }
    Ok(messages.len())
}

pub(crate) fn is_closed_around_the_policy_compiler(ctx: &mut Ctx) -> Result<(), Failure> {
    let plugin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/built/limits.wasm");
    // With an empty cache it has to compile, which takes seconds here.
    let option = format!("--cache={}", ctx.directory().join("empty-cache").display());
    let words = ["casemate", &option, "policy", "install"].map(OsStr::new);
    let running = ctx.start(words.into_iter().chain([plugin.as_os_str()]))?;
    let mut found = None;
    wait_until("the compiler has its filter on", Duration::from_secs(60), || {
        found = compiler_under_its_filter();
        found.is_some()
    })?;
    let (pid, view) = found.ok_or_else(|| Failure::new("no compiler was seen"))?;
    let uid = view.threads.first().map_or(0, |thread| thread.uids[0]);
    expect!(uid >= 0x4361_0000, "its uid is {uid}");
    let mut faults = view.faults(uid, uid);
    let targets: Vec<&str> = view.descriptors.iter().map(|descriptor| descriptor.target.as_str()).collect();
    if targets.len() != 3 || !targets.iter().all(|target| target.starts_with("/memfd:casemate-policy")) {
        faults.push(format!("descriptors {targets:?}"));
    }
    let filters = filters(&[pid])?;
    expect!(filters.iter().map(|thread| thread.filters.len()).eq([1]), "its filters: {filters:?}");
    for filter in filters.iter().flat_map(|thread| &thread.filters) {
        // open, openat, socket, clone, execve, and memory that can be executed.
        let never = [2, 257, 41, 56, 59].map(Call::any);
        for call in never.into_iter().chain([Call::any(9).with(2, 4), Call::any(9).with(2, 7)]) {
            if filter.answers(&call) != [Answer::Kills].into() {
                faults.push(format!("{call:?}: {:?}", filter.answers(&call)));
            }
        }
    }
    expect!(faults.is_empty(), "the compiler's cell is not closed: {}", faults.join("; "));
    // It was stopped for a moment, and does its work all the same.
    running.wait(Duration::from_secs(60))?.success()?.printed("limits")?;
    expect!(compilers().next().is_none(), "its cgroup stays");
    Ok(())
}

/// The cgroups of compilers.
fn compilers() -> impl Iterator<Item = PathBuf> {
    let cgroups = fs::read_dir("/sys/fs/cgroup/casemate").into_iter().flatten().flatten();
    cgroups
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("-compiler"))
        .map(|entry| entry.path())
}

/// A compiler that is about to read its component, or has.
fn compiler_under_its_filter() -> Option<(u32, CellView)> {
    let pid = fs::read_to_string(compilers().next()?.join("cgroup.procs")).ok()?.trim().parse().ok()?;
    let view = inspect(pid).ok()?;
    let is_on = !view.threads.is_empty() && view.threads.iter().all(|thread| thread.seccomp_mode == 2);
    is_on.then_some((pid, view))
}

pub(crate) fn stops_its_victims(ctx: &mut Ctx) -> Result<(), Failure> {
    let victim = ctx.program("casemate-victim")?;
    let cgroup = Path::new("/sys/fs/cgroup/casemate-probe");
    let probe = ctx.start(["casemate-jail-probe".as_ref(), victim.as_os_str(), cgroup.as_os_str()])?;
    let table = probe.wait(Duration::from_secs(400))?;
    let rows: Vec<Value> = table.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let text = |row: &Value, key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    for row in &rows {
        let name = if row.get("attempt").is_some() { "attempt" } else { "check" };
        println!(
            "{:24} {:6} {:44} {}",
            text(row, name),
            text(row, "role"),
            text(row, "stopped_by"),
            text(row, "expected")
        );
    }
    let through: Vec<String> =
        rows.iter().filter(|row| row.get("ok") != Some(&Value::Bool(true))).map(Value::to_string).collect();
    expect!(through.is_empty(), "not stopped as they should be: {}", through.join(" "));
    table.success()?;
    for attempt in ["open-passwd", "connect-loopback", "mmap-exec", "kvm-create-vm"] {
        let stopped = rows.iter().filter(|row| text(row, "attempt") == attempt).collect::<Vec<_>>();
        let by_seccomp = |role: &str| {
            stopped
                .iter()
                .any(|row| text(row, "role") == role && text(row, "stopped_by").starts_with("seccomp"))
        };
        for role in ["vcpu", "control", "blk", "net", "device", "console", "intx"] {
            expect!(by_seccomp(role), "{attempt} was not stopped in {role}: {stopped:?}");
        }
    }
    Ok(())
}

/// A guest whose disk can't be limited is refused, and with the host file's leave is shown as weakened; one whose disk can
/// be is limited.
pub(crate) fn is_weaker_by_leave_alone(ctx: &mut Ctx) -> Result<(), Failure> {
    let host_file = ctx.directory().join("host.toml");
    let on_disk = Path::new(devices::SHARED_DISK_MOUNT).join("limited.img");
    let in_memory = Path::new("/run").join("unlimited.img");
    for image in [&on_disk, &in_memory] {
        fs::write(image, vec![0; 8 << 20])?;
    }
    // What is written back counts for whoever wrote to the file first since the kernel forgot it: not for this test.
    ctx.shell("sync; echo 3 >/proc/sys/vm/drop_caches")?;
    let script = "sleep 2; begin=$(cut -d. -f1 /proc/uptime)
        dd if=/dev/zero of=/dev/vda bs=1M count=8 conv=notrunc,fsync 2>/dev/null && echo has-written
        echo seconds: $(($(cut -d. -f1 /proc/uptime) - begin)); sleep 1000";
    let start = |image: &Path, cell: &str| -> Result<Running, Failure> {
        fs::write(&host_file, format!("{cell}[cell.io]\nwrite_bytes_per_second = \"2 MiB\"\n"))?;
        let guest = ctx.guest(script)?.vcpus(1).disk(image, false).write_into(ctx.directory())?;
        let words = ["casemate", "--json", "--host-config"].map(OsStr::new);
        ctx.start(words.into_iter().chain([host_file.as_os_str(), OsStr::new("run"), guest.as_os_str()]))
    };
    let soon = Duration::from_secs(60);
    let report = |passed: bool| -> Result<String, Failure> {
        let audit = ctx.run(["casemate", "audit", ctx.name()])?;
        expect!(audit.status.success() == passed, "the audit: {}", audit.stdout);
        Ok(audit.stdout)
    };

    let refused = start(&in_memory, "")?.wait(soon)?;
    expect!(
        refused.stderr.contains("cell-io") && refused.stderr.contains("unlimited.img"),
        "{}",
        refused.stderr
    );

    let limited = start(&on_disk, "[cell]\nfirst_uid = 200000\n")?;
    let (_, uid) = cell_of(&limited)?;
    expect!((200_000..208_192).contains(&uid), "its uid is {uid}");
    limited.wait_for_text("has-written", soon)?;
    limited.wait_for_text("seconds:", soon)?;
    let told = report(true)?;
    expect!(told.contains("wbps=2097152"), "its disk is not limited: {told}");
    ctx.run(["casemate", "ps"])?.success()?.printed("whole")?;
    let run = stop(limited)?;
    let seconds: u64 = run.value("seconds:")?.parse().map_err(|_| Failure::new("no seconds"))?;
    expect!(seconds >= 3, "8 MiB at 2 MiB a second were written in {seconds} s");

    let weaker = start(&in_memory, "[cell]\nallow_weaker = [\"io-limits\"]\n")?;
    let closed = weaker.wait_for_step("cell-closed", soon)?;
    expect!(closed.pointer("/weakened/0").is_some_and(|part| part == "io-limits"), "{closed}");
    weaker.wait_for_text("has-written", soon)?;
    let told = report(false)?;
    expect!(told.contains("without io-limits") && told.matches("FAIL").count() == 2, "{told}");
    ctx.run(["casemate", "ps"])?.success()?.printed("weakened: io-limits")?;
    stop(weaker)?;
    fs::remove_file(&on_disk)?;
    fs::remove_file(&in_memory)?;
    Ok(())
}

/// Stops a guest that does not power off by itself.
fn stop(running: Running) -> Result<Finished, Failure> {
    running.signal(Signal::TERM)?;
    let run = running.wait(Duration::from_secs(20))?;
    run.success()?;
    Ok(run)
}

/// What a captured VMM can do to its keep: whatever it says, the run ends, in order and by name.
pub(crate) fn keep_bears_a_captured_vmm(ctx: &mut Ctx) -> Result<(), Failure> {
    let programs = ctx.directory().join("captured");
    fs::create_dir_all(&programs)?;
    for (from, to) in [
        ("casemate", "casemate"),
        ("casemate-broker", "casemate-broker"),
        ("casemate-liar", "casemate-vmm"),
        ("casemate-policy-compiler", "casemate-policy-compiler"),
        ("casemate-policy-engine", "casemate-policy-engine"),
    ] {
        fs::copy(ctx.program(from)?, programs.join(to))?;
    }
    let casemate = programs.join("casemate");
    for lie in ["gone", "flood", "nonsense", "long", "short", "gifts", "paint", "log", "silence"] {
        let guest =
            ctx.guest("true")?.vcpus(1).command_line(&format!("liar={lie} ")).write_into(ctx.directory())?;
        let running =
            ctx.start([casemate.as_os_str(), "run".as_ref(), "--json".as_ref(), guest.as_os_str()])?;
        // Some do nothing that the keep would end: there the user does.
        if ["gifts", "log", "silence"].contains(&lie) {
            cell_of(&running)?;
            thread::sleep(Duration::from_secs(2));
            running.signal(Signal::TERM)?;
        }
        let run = running.wait(Duration::from_secs(60))?;
        println!(
            "{lie}: {:?}, {} bytes: {}",
            run.status.code(),
            run.stderr.len(),
            run.stderr.lines().last().unwrap_or_default()
        );
        expect!(
            run.status.code().is_some_and(|code| (0..10).contains(&code)),
            "{lie}: the keep ended by {}",
            run.status
        );
        expect!(run.stderr.len() < 256 << 10, "{lie}: the keep told {} bytes", run.stderr.len());
        let is_plain = |text: &str| !text.chars().any(|c| c.is_control() && c != '\n');
        expect!(
            is_plain(&run.stderr) && is_plain(&run.stdout),
            "{lie}: the terminal is painted: {:?}",
            run.stderr
        );
        let cgroup = Path::new("/sys/fs/cgroup/casemate").join(ctx.name());
        expect!(!cgroup.exists(), "{lie}: its cgroup stays");
    }
    Ok(())
}
