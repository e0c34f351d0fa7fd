//! Governors look after a running guest: what they want is done within its bounds, told, and changed with the bundle.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, WITH_TOOLS, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

use crate::disks::with_tools;

/// For a governor to look, act, and tell.
const SOON: Duration = Duration::from_secs(60);

fn built(plugin: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/built").join(plugin)
}

/// Writes a bundle: one that admits everything, and a governor that does as its settings say.
fn write_bundle(ctx: &Ctx, settings: &str, more: &str) -> Result<PathBuf, Failure> {
    let steward = format!("settings = {{ {settings} }}\n{more}\n");
    write_plugins(ctx, &[("limits", "limits.wasm", ""), ("steward", "tests/steward.wasm", &steward)])
}

/// Writes a bundle of these plugins: name, file, and what else stands there. The file is replaced as a whole.
fn write_plugins(ctx: &Ctx, plugins: &[(&str, &str, &str)]) -> Result<PathBuf, Failure> {
    let path = ctx.directory().join("governed.toml");
    let mut text = String::new();
    for (name, file, rest) in plugins {
        let plugin = built(file);
        let digest = ctx.shell(&format!("sha256sum {} | cut -d' ' -f1", plugin.display()))?;
        text.push_str(&format!(
            "[[plugin]]\nname = \"{name}\"\npath = \"{}\"\nsha256 = \"{digest}\"\nlimits = {{ deadline_ms = 10_000 }}\n{rest}",
            plugin.display()
        ));
    }
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, &path)?;
    Ok(path)
}

fn events(ctx: &Ctx) -> Result<Vec<Value>, Failure> {
    let run = ctx.run(["casemate", "--json", "events", ctx.name(), "--last", "1000"])?;
    run.success()?.stdout.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

fn is(event: &Value, key: &str, value: &str) -> bool {
    event.pointer(key).and_then(Value::as_str) == Some(value)
}

/// Waits for an event of this kind that `fits`.
fn wait_for(ctx: &Ctx, kind: &str, fits: impl Fn(&Value) -> bool) -> Result<Value, Failure> {
    let mut found = None;
    let mut failed = None;
    wait_until(&format!("an event {kind:?}"), SOON, || {
        match events(ctx) {
            Ok(events) => {
                found = events.into_iter().rev().find(|event| is(event, "/event", kind) && fits(event))
            }
            Err(failure) => failed = Some(failure),
        }
        found.is_some() || failed.is_some()
    })?;
    failed.map_or_else(|| found.ok_or_else(|| Failure::new("no event")), Err)
}

const MAY_DO: &str = "may_do = [\"cpu-weight\", \"cpu-limit\", \"pause\", \"resume\", \"stop\"]";

pub(crate) fn act_within_bounds_and_tell(ctx: &mut Ctx) -> Result<(), Failure> {
    let bundle = write_bundle(ctx, "how = \"cpu-weight\", to = 5000", MAY_DO)?;
    let script = "i=0; while true; do i=$((i+1)); echo tick-$i.; sleep 1; done";
    let file = ctx.guest(script)?.vcpus(1).write_into(ctx.directory())?;
    let mut text = fs::read_to_string(&file)?;
    text.push_str("\n[resources]\ncpu_weight_most = 300\npause = true\n");
    fs::write(&file, text)?;
    let words =
        ["casemate".as_ref(), "run".as_ref(), "--json".as_ref(), "--policy".as_ref(), bundle.as_os_str()];
    let running = ctx.start(words.into_iter().chain([file.as_os_str()]))?;
    running.wait_for_text("tick-1.", SOON)?;

    // More than the guest's file lets it have: held to that.
    let done = wait_for(ctx, "done", |event| is(event, "/action/deed", "cpu-weight"))?;
    expect!(is(&done, "/instead", "cpu-weight 300"), "it was not held to its bounds: {done}");
    let cgroup = Path::new("/sys/fs/cgroup/casemate").join(ctx.name());
    let weight = || fs::read_to_string(cgroup.join("cpu.weight")).unwrap_or_default();
    expect!(weight().trim() == "300", "cpu.weight is {}", weight());
    // Others are told of it.
    let sample: Value =
        serde_json::from_str(&fs::read_to_string(format!("/run/casemate/{}.sample", ctx.name()))?)?;
    expect!(sample.pointer("/sample/vcpus") == Some(&1.into()), "{sample}");
    wait_until("the guest's processor time is seen", SOON, || {
        let text = fs::read_to_string(format!("/run/casemate/{}.sample", ctx.name())).unwrap_or_default();
        let sample: Value = serde_json::from_str(&text).unwrap_or_default();
        sample.pointer("/sample/cpu/used_us").and_then(Value::as_u64).is_some_and(|used| used > 0)
    })?;

    // A bundle that is no good changes nothing and is told; then one that pauses the guest.
    fs::write(&bundle, "nonsense")?;
    let refused = wait_for(ctx, "bundle-refused", |_| true)?;
    expect!(is(&refused, "/code", "policy-bundle"), "{refused}");
    ctx.run(["casemate", "policy", "reload", ctx.name()])?.refusal("policy-bundle")?;
    write_bundle(ctx, "how = \"pause\"", MAY_DO)?;
    wait_for(ctx, "done", |event| is(event, "/action/deed", "pause"))?;
    running.wait_for_step("paused", SOON)?;
    expect!(weight().trim() == "300", "what was set last did not stay: {}", weight());
    write_bundle(ctx, "how = \"resume\"", MAY_DO)?;
    running.wait_for_step("resumed", SOON)?;

    // Its file does not let it be stopped; and what the bundle does not permit is not done.
    write_bundle(ctx, "how = \"stop\"", MAY_DO)?;
    let held = wait_for(ctx, "not-done", |event| is(event, "/action/deed", "stop"))?;
    expect!(held.to_string().contains("does not let it be stopped"), "{held}");
    write_bundle(ctx, "how = \"cpu-limit\", to = 100", "may_do = []")?;
    let held = wait_for(ctx, "not-done", |event| is(event, "/action/deed", "cpu-limit"))?;
    expect!(is(&held, "/because", "the bundle does not permit it"), "{held}");

    // One that fails too often is not asked any more, and the guest goes on.
    write_bundle(ctx, "how = \"trap\"", MAY_DO)?;
    wait_for(ctx, "plugin-failed", |event| is(event, "/code", "policy-trap"))?;
    wait_for(ctx, "plugin-failed", |event| is(event, "/code", "policy-suspended"))?;
    // Policies are asked before a paused guest goes on.
    ctx.run(["casemate", "pause", ctx.name()])?.success()?;
    ctx.run(["casemate", "resume", ctx.name()])?.success()?;
    ctx.run(["casemate", "policy", "explain", "last"])?.success()?.printed("go on on")?;
    ctx.run(["casemate", "policy", "reload", ctx.name()])?.success()?;
    ctx.run(["casemate", "events", ctx.name()])?
        .success()?
        .printed("done: cpu-weight 300, instead of cpu-weight 5000")?;
    running.signal(Signal::TERM)?;
    running.signal(Signal::TERM)?;
    running.wait(SOON)?.success()?;
    expect!(!Path::new(&format!("/run/casemate/{}.sample", ctx.name())).exists(), "its sample stayed");
    Ok(())
}

/// What a guest's cell has used of processors, in seconds.
fn used_seconds(guest: &str) -> Result<f64, Failure> {
    let stat = fs::read_to_string(format!("/sys/fs/cgroup/casemate/{guest}/cpu.stat"))?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let used = used.and_then(|used| used.trim().parse::<f64>().ok());
    Ok(used.ok_or_else(|| Failure::new(format_args!("no usage in {stat}")))? / 1e6)
}

/// Two guests of strangers on one processor, under stress-ng: who uses more than its share, which is a fifth, gives way to who has more; and memory
/// that one does not use goes to the host until it needs it.
pub(crate) fn fair_share_and_balloon(ctx: &mut Ctx) -> Result<(), Failure> {
    let bundle = write_plugins(
        ctx,
        &[
            ("limits", "limits.wasm", ""),
            (
                "fair-share",
                "fair-share.wasm",
                "settings = { burst_seconds = 10, shares = { quiet = 400 } }\nmay_do = [\"cpu-weight\", \"cpu-limit\"]\n",
            ),
            // More than the lab has, so that it is always short.
            (
                "balloon",
                "balloon.wasm",
                "settings = { keep_free = \"64 GiB\", spare_percent = 100, step_percent = 50 }\nmay_do = [\"balloon\"]\n",
            ),
        ],
    )?;
    let start = |name: &str, memory: &str, script: &str| {
        let script = format!("{WITH_TOOLS}{script}");
        let text = with_tools(ctx, ctx.guest(&script)?).named(name).memory(memory).to_toml()?;
        let file = ctx.directory().join(format!("{name}.toml"));
        fs::write(&file, text.replace("tenant = \"demo\"", &format!("tenant = \"{name}\"")))?;
        let words = ["casemate", "run", "--json", "--stdin", "--policy"].map(Path::new);
        ctx.start(words.into_iter().chain([bundle.as_path(), &file]))
    };
    let noisy = start("noisy", "128 MiB", "echo it works; tools stress-ng --quiet --temp-path /tmp --cpu 1")?;
    noisy.wait_for_text("it works", SOON)?;
    let quiet = start(
        "quiet",
        "512 MiB",
        "echo it waits; until [ -e /run/go ]; do sleep 1; [ $(awk '/MemFree/ { print $2 }' /proc/meminfo) -lt 300000 ] && touch /run/go; done
        echo it works; tools stress-ng --quiet --temp-path /tmp --vm 1 --vm-bytes 140M --vm-keep",
    )?;
    quiet.wait_for_text("it waits", SOON)?;
    let of = |event: &Value, guest: &str, deed: &str, code: &str| {
        is(event, "/guest", guest) && is(event, "/action/deed", deed) && is(event, "/action/why/code", code)
    };
    let seen = |guest: &'static str, deed: &'static str, code: &'static str| {
        wait_for_any(ctx, &format!("{deed} of {guest} for {code}"), move |event| of(event, guest, deed, code))
    };
    seen("noisy", "cpu-weight", "credit")?;
    seen("quiet", "balloon", "host-short")?;
    quiet.wait_for_text("it works", SOON * 2)?;
    seen("quiet", "balloon", "guest-short")?;
    seen("noisy", "cpu-limit", "noisy")?;
    let before = (used_seconds("noisy")?, used_seconds("quiet")?);
    thread::sleep(Duration::from_secs(10));
    let (noisy_used, quiet_used) = (used_seconds("noisy")? - before.0, used_seconds("quiet")? - before.1);
    println!("# in 10 s the one that had used its share got {noisy_used:.1} s, the other {quiet_used:.1} s");
    expect!(quiet_used > 2.0 * noisy_used, "{noisy_used:.1} s and {quiet_used:.1} s");
    for running in [noisy, quiet] {
        running.signal(Signal::TERM)?;
        running.signal(Signal::TERM)?;
        running.wait(SOON)?;
    }
    Ok(())
}

/// Waits for something that was done to any guest.
fn wait_for_any(ctx: &Ctx, what: &str, fits: impl Fn(&Value) -> bool) -> Result<(), Failure> {
    let mut failed = None;
    wait_until(what, SOON, || {
        let run = ctx.run(["casemate", "--json", "events", "--last", "1000"]);
        let lines = run.map(|run| run.stdout);
        let found = lines.as_ref().is_ok_and(|lines| {
            let mut events = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            events.any(|event| is(&event, "/event", "done") && fits(&event))
        });
        failed = lines.err();
        found || failed.is_some()
    })?;
    failed.map_or(Ok(()), Err)
}
