//! What a guest's processors and its memory are made of.

use std::{
    fs,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, GuestFile},
};

use crate::endings::cell_of;

/// For a guest to come to its script and through it.
const SOON: Duration = Duration::from_secs(90);

pub(crate) fn are_as_asked(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo model: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | sort -u)
        echo flags: $(sed -n 's/^flags.*: //p' /proc/cpuinfo | sort -u)
        echo widths: $(sed -n 's/^address sizes.*: //p' /proc/cpuinfo | sort -u)
        cd /sys/devices/system/cpu
        echo packages: $(cat cpu*/topology/physical_package_id | sort -u | wc -l)
        echo cores: $(cat cpu*/topology/thread_siblings_list | sort -u | tr '\\n' ' ')
        echo caches: $(cat cpu0/cache/index*/size cpu0/cache/index3/shared_cpu_list | tr '\\n' ' ')
        echo clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
        echo counters: $(ls /sys/bus/event_source/devices | grep -cx cpu)
        echo date: $(date +%s)
        echo questions-answered; sleep 1";
    // The same processor on every host; two packages of two cores of two threads.
    let guest = ctx
        .guest(script)?
        .vcpus(8)
        .table("cpu", "model = \"baseline-v2\"\nsockets = 2\nthreads_per_core = 2")?;
    let run = ctx.start_guest(&guest)?.wait(SOON)?;
    run.success()?;
    let is = |key: &str, wanted: &str| {
        let seen = run.value(key)?;
        expect!(seen == wanted, "{key} the guest sees {seen}, not {wanted}");
        Ok::<(), Failure>(())
    };
    is("model:", "Casemate baseline-v2")?;
    is("widths:", "40 bits physical, 48 bits virtual")?;
    is("packages:", "2")?;
    is("cores:", "0-1 2-3 4-5 6-7")?;
    is("caches:", "32K 32K 512K 16384K 0-3")?;
    is("clock:", "kvm-clock")?;
    is("counters:", "0")?;
    let flags: Vec<&str> = run.value("flags:")?.split(' ').collect();
    for wanted in ["sse4_2", "popcnt", "cx16", "aes", "nx", "x2apic", "tsc_deadline_timer", "hypervisor"] {
        expect!(flags.contains(&wanted), "the baseline lacks {wanted}: {flags:?}");
    }
    for foreign in ["avx", "xsave", "svm", "smap", "fsgsbase", "rdrand", "perfctr_core", "constant_tsc"] {
        expect!(!flags.contains(&foreign), "the baseline has {foreign}: {flags:?}");
    }
    // Without a clock of the machine's own: kvmclock tells the time of day too.
    let seconds: u64 = run.value("date:")?.parse()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    expect!(now.abs_diff(seconds) < 90, "the guest's date is {seconds}, and it is {now}");

    // The host's processor, with its virtualisation, on one processor of the host's.
    let guest = ctx.guest(script)?.vcpus(2).table("cpu", "nested = true\npin = [\"0\", \"0\"]")?;
    let running = ctx.start_guest(&guest)?;
    let (pid, _) = cell_of(&running)?;
    running.wait_for_text("questions-answered", SOON)?;
    for (thread, allowed) in allowed_processors(pid)? {
        let pinned = thread.starts_with("vcpu");
        expect!(!pinned || allowed == "0", "{thread} may run on {allowed}");
    }
    let run = running.wait(SOON)?;
    let flags: Vec<&str> = run.success()?.value("flags:")?.split(' ').collect();
    expect!(flags.contains(&"svm"), "the guest was to have virtualisation: {flags:?}");
    expect!(run.value("counters:")? == "0", "the guest has performance counters");

    let absent = ctx.guest("true")?.vcpus(1).table("cpu", "pin = [\"1000\"]")?;
    refused(ctx, &absent, "processor-missing")?;
    Ok(())
}

fn refused(ctx: &Ctx, guest: &GuestFile, code: &str) -> Result<(), Failure> {
    let path = guest.write_into(ctx.directory())?;
    ctx.run(["casemate".as_ref(), "run".as_ref(), path.as_os_str()])?.refusal(code).map(drop)
}

/// The threads of a process, by name, and on which processors each may run.
fn allowed_processors(pid: u32) -> Result<Vec<(String, String)>, Failure> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?.trim().to_owned();
        let status = fs::read_to_string(task.join("status"))?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        threads.push((name, list.unwrap_or_default().trim().to_owned()));
    }
    Ok(threads)
}

/// What was seen of a guest's memory from outside.
#[derive(Debug)]
struct Seen {
    /// Page faults of the VMM's process, those on the guest's behalf too.
    faults: u64,
    /// In pages of 2 MiB that the kernel made.
    transparent_kib: u64,
    /// In pages that were set aside.
    set_aside_kib: u64,
}

pub(crate) fn memory_is_as_asked(ctx: &mut Ctx) -> Result<(), Failure> {
    let small = memory(ctx, "huge_pages = \"none\"")?;
    let large = memory(ctx, "huge_pages = \"transparent\"\nnuma_node = 0")?;
    println!("# 4 KiB pages: {small:?}\n# transparent: {large:?}");
    expect!(small.transparent_kib == 0 && small.set_aside_kib == 0, "small pages were asked for: {small:?}");
    expect!(large.transparent_kib >= 64 << 10, "large pages were asked for: {large:?}");
    expect!(large.faults * 4 < small.faults, "large pages saved few faults: {small:?} {large:?}");
    let huge = "huge_pages = \"2 MiB\"\nprefault = true\nnuma_node = 0";
    refused(ctx, &guest(ctx, huge)?, "huge-pages-missing")?;
    ctx.shell("echo 128 >/proc/sys/vm/nr_hugepages; grep -x 128 /proc/sys/vm/nr_hugepages")?;
    let set_aside = memory(ctx, huge)?;
    println!("# set aside: {set_aside:?}");
    expect!(set_aside.set_aside_kib == 256 << 10, "all of it was asked for: {set_aside:?}");
    ctx.shell("echo 0 >/proc/sys/vm/nr_hugepages; grep -x 0 /proc/sys/vm/nr_hugepages")?;
    refused(ctx, &guest(ctx, "numa_node = 9")?, "node-missing")?;
    Ok(())
}

fn guest(ctx: &Ctx, ram: &str) -> Result<GuestFile, Failure> {
    let script = "dd if=/dev/zero of=/run/fill bs=1M count=90; echo memory-is-filled; sleep 2";
    ctx.guest(script)?.vcpus(1).table("ram", ram)
}

/// Runs a guest that fills 90 of its 256 MiB, and looks at it then.
fn memory(ctx: &Ctx, ram: &str) -> Result<Seen, Failure> {
    let running = ctx.start_guest(&guest(ctx, ram)?)?;
    let (pid, _) = cell_of(&running)?;
    running.wait_for_text("memory-is-filled", SOON)?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = |name: &str| {
        let value = rollup.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    };
    // Behind the name in parentheses: state, and seven more, then minor faults (proc_pid_stat(5)).
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let faults = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(7)?.parse().ok());
    let seen = Seen {
        faults: faults.ok_or_else(|| Failure::new(format_args!("no faults in {stat}")))?,
        transparent_kib: kib("AnonHugePages:"),
        set_aside_kib: kib("Private_Hugetlb:"),
    };
    running.wait(SOON)?.success()?;
    Ok(seen)
}
