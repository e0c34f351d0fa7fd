//! Governors look after a running guest: what they want is done within its bounds, told, and changed with the bundle.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, wait_until},
};
use rustix::process::Signal;
use serde_json::Value;

/// For a governor to look, act, and tell.
const SOON: Duration = Duration::from_secs(60);

fn built(plugin: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/built").join(plugin)
}

/// Writes a bundle: one that admits everything, and a governor that does as its settings say. The file is replaced as a whole.
fn write_bundle(ctx: &Ctx, settings: &str, more: &str) -> Result<PathBuf, Failure> {
    let path = ctx.directory().join("governed.toml");
    let mut text = String::new();
    for (name, file, rest) in [
        ("limits", "limits.wasm", String::new()),
        ("steward", "tests/steward.wasm", format!("settings = {{ {settings} }}\n{more}\n")),
    ] {
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
