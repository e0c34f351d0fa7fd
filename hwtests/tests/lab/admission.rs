//! Nothing starts that the policy has not allowed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished},
};

use serde_json::Value;

use crate::{
    host_state::HostState,
    passthrough::{came_back, have_drive},
};

fn workspace(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// A bundle of one plugin: a copy of one that was built, in the test's folder, with its digest.
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    plugin: PathBuf,
}

impl Bundle {
    pub(crate) fn write(ctx: &Ctx, name: &str, plugin: &str, settings: &str) -> Result<Self, Failure> {
        Self::write_with(ctx, name, plugin, settings, "")
    }

    /// The same with more keys, each a line.
    fn write_with(ctx: &Ctx, name: &str, plugin: &str, settings: &str, more: &str) -> Result<Self, Failure> {
        let copy = ctx.directory().join(format!("{name}.wasm"));
        fs::copy(workspace("plugins/built").join(plugin), &copy)?;
        let digest = ctx.shell(&format!("sha256sum {name}.wasm | cut -d' ' -f1"))?;
        let path = ctx.directory().join(format!("{name}.bundle.toml"));
        let limits = "limits = { fuel = 20_000_000, deadline_ms = 10_000 }";
        let text = format!(
            "[[plugin]]\nname = \"{name}\"\npath = \"{name}.wasm\"\nsha256 = \"{digest}\"\nsettings = {{ {settings} }}\n{limits}\n{more}\n"
        );
        fs::write(&path, text)?;
        Ok(Self { path, plugin: copy })
    }

    /// And another plugin, asked after those that are there.
    fn and(self, ctx: &Ctx, name: &str, plugin: &str, settings: &str) -> Result<Self, Failure> {
        let other = Self::write(ctx, name, plugin, settings)?;
        let both = fs::read_to_string(&self.path)? + "\n" + &fs::read_to_string(&other.path)?;
        fs::write(&self.path, both)?;
        Ok(self)
    }
}

/// Runs a guest's file under a bundle.
fn run_under(ctx: &Ctx, bundle: &Path, guest: &Path) -> Result<Finished, Failure> {
    ctx.run([Path::new("casemate"), Path::new("run"), Path::new("--policy"), bundle, guest])
}

/// It was refused with this code, in one line, and no guest was started.
fn refused(run: &Finished, code: &str) -> Result<String, Failure> {
    let line = run.refusal(code)?;
    expect!(run.status.code() == Some(1), "the exit code is {:?}, not 1", run.status.code());
    expect!(run.stderr.lines().count() == 1, "not one line: {}", run.stderr);
    expect!(run.stdout.is_empty(), "a guest ran: {}", run.stdout);
    Ok(line.to_owned())
}

pub(crate) fn too_big_is_refused(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    ctx.load_driver("e1000e")?;
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let guest = ctx.guest("true")?.memory("64 GiB").disk(&disk, true).net("cmtest0", "192.0.2.1/24");
    let file = guest.device(devices::NVME).device(devices::E1000E).write_into(ctx.directory())?;
    let before = HostState::now();
    let run = ctx.run([Path::new("casemate"), Path::new("run"), &file])?;
    let line = refused(&run, "policy-denied")?;
    let said = format!("{}:4: memory: limits/memory: memory: 64 GiB is more than the 32 GiB", file.display());
    expect!(line.contains(&said), "it should say {said:?}: {line}");
    before.expect_unchanged()
}

pub(crate) fn swapped_plugin_flips_the_verdict(ctx: &mut Ctx) -> Result<(), Failure> {
    let file = ctx.guest("true")?.vcpus(1).write_into(ctx.directory())?;
    let before = HostState::now();
    let small = Bundle::write(ctx, "small", "limits.wasm", "max_memory = \"128 MiB\"")?;
    let line = refused(&run_under(ctx, &small.path, &file)?, "policy-denied")?;
    expect!(line.contains("256 MiB is more than the 128 MiB"), "{line}");
    let closed = Bundle::write(ctx, "closed", "tests/deny-all.wasm", "")?;
    let line = refused(&run_under(ctx, &closed.path, &file)?, "policy-denied")?;
    expect!(line.contains("nothing may start"), "{line}");
    before.expect_unchanged()?;
    // The same name, the same guest, another plugin and other settings.
    let large = Bundle::write(ctx, "small", "limits.wasm", "max_memory = \"256 MiB\"")?;
    run_under(ctx, &large.path, &file)?.success()?.printed("CASEMATE-TEST-ENDED 0")?;
    let allows = Bundle::write(ctx, "closed", "tests/misbehave.wasm", "how = \"well\"")?;
    run_under(ctx, &allows.path, &file)?.success()?.printed("CASEMATE-TEST-ENDED 0")?;
    before.expect_unchanged()
}

pub(crate) fn whatever_is_wrong_with_a_policy_refuses(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let file = ctx.guest("true")?.vcpus(1).device(devices::NVME).write_into(ctx.directory())?;
    let before = HostState::now();
    for (how, code) in [
        ("trap", "policy-trap"),
        ("spin", "policy-timeout"),
        ("hog", "policy-memory"),
        ("no-reason", "policy-answer"),
        ("in-no-way-that-it-knows", "policy-settings"),
    ] {
        let bundle = Bundle::write(ctx, "bad", "tests/misbehave.wasm", &format!("how = \"{how}\""))?;
        refused(&run_under(ctx, &bundle.path, &file)?, code)?;
    }
    let bundle = Bundle::write(ctx, "forbidden", "tests/forbidden.wasm", "")?;
    refused(&run_under(ctx, &bundle.path, &file)?, "policy-import")?;
    let bundle = Bundle::write(ctx, "limits", "limits.wasm", "")?;
    let mut bytes = fs::read(&bundle.plugin)?;
    bytes.push(0);
    fs::write(&bundle.plugin, bytes)?;
    refused(&run_under(ctx, &bundle.path, &file)?, "policy-digest")?;
    fs::remove_file(&bundle.plugin)?;
    refused(&run_under(ctx, &bundle.path, &file)?, "policy-missing")?;
    fs::write(&bundle.path, "# nothing\n")?;
    refused(&run_under(ctx, &bundle.path, &file)?, "policy-none")?;
    fs::remove_file(&bundle.path)?;
    refused(&run_under(ctx, &bundle.path, &file)?, "policy-bundle-missing")?;
    let without = ctx.run([
        Path::new("casemate"),
        Path::new("--policy-compiler=/nowhere/compiler"),
        Path::new("--cache=/run/lab-tests/empty-cache"),
        Path::new("run"),
        &file,
    ])?;
    refused(&without, "policy-compiler")?;
    before.expect_unchanged()
}

pub(crate) fn decisions_are_kept_and_asked_again(ctx: &mut Ctx) -> Result<(), Failure> {
    let file = ctx.guest("true")?.vcpus(1).write_into(ctx.directory())?;
    let small =
        Bundle::write_with(ctx, "small", "limits.wasm", "max_memory = \"128 MiB\"", "level = \"soft\"")?;
    let line = refused(&run_under(ctx, &small.path, &file)?, "policy-denied")?;
    expect!(line.ends_with(", or override it: --override REASON"), "{line}");
    let words = |words: &[&str]| -> Vec<PathBuf> { words.iter().map(PathBuf::from).collect() };
    let explained = ctx.run(words(&["casemate", "policy", "explain", "last"]))?;
    explained.success()?.printed("answered  denied by small/memory")?;
    explained.printed("256 MiB is more than the 128 MiB")?;

    // Tried, nothing is recorded; overridden, the guest runs and the reason is kept.
    let mut again = words(&["casemate", "policy", "try", "--policy"]);
    again.extend([small.path.clone(), file.clone()]);
    refused(&ctx.run(again)?, "policy-denied")?;
    let mut run = words(&["casemate", "run", "--override", "the lab wants it", "--policy"]);
    run.extend([small.path.clone(), file.clone()]);
    let ran = ctx.run(run)?;
    ran.success()?.printed("CASEMATE-TEST-ENDED 0")?;
    expect!(ran.stderr.contains("overridden: small/memory"), "{}", ran.stderr);
    ctx.run(words(&["casemate", "policy", "explain"]))?
        .success()?
        .printed("override  \"the lab wants it\"")?;

    let large = Bundle::write(ctx, "small", "limits.wasm", "max_memory = \"1 GiB\"")?;
    let mut replay = words(&["casemate", "policy", "replay", "--since", "1h", "--with"]);
    replay.push(large.path);
    let replayed = ctx.run(replay)?;
    replayed.success()?.printed("was denied by small/memory; would be allowed")?;
    // Folder and files are root's alone.
    let modes =
        ctx.shell("stat -c %a /var/lib/casemate/decisions /var/lib/casemate/decisions/decisions.jsonl")?;
    expect!(modes == "700\n600", "modes are {modes}");
    Ok(())
}

pub(crate) fn a_policy_changes_the_guest_and_knows_its_kernel(ctx: &mut Ctx) -> Result<(), Failure> {
    let file = ctx.guest("echo line: $(cat /proc/cmdline)")?.vcpus(1).write_into(ctx.directory())?;
    let kernel = ctx.layout().guest_kernel();
    let digest = ctx.shell(&format!("sha256sum {} | cut -d' ' -f1", kernel.display()))?;
    let settings = |digest: &str| {
        format!("kernels = [\"{digest}\"], required_words = [\"casemate.test=1\"], add_words = true")
    };
    let more = "may_change = [\"boot.command_line\"]";
    let images = Bundle::write_with(ctx, "images", "images.wasm", &settings(&digest), more)?;
    // It boots from the sealed copy, with the word that the policy added.
    let run = run_under(ctx, &images.path, &file)?;
    let line = run.success()?.value("line:")?.to_owned();
    expect!(line.ends_with(" casemate.test=1"), "the command line is {line}");
    expect!(run.stderr.contains("changed: boot.command_line: "), "{}", run.stderr);
    let other = Bundle::write_with(ctx, "images", "images.wasm", &settings(&"0".repeat(64)), more)?;
    let line = refused(&run_under(ctx, &other.path, &file)?, "policy-denied")?;
    expect!(line.contains(&format!("(sha256 {digest}) is none of the 1")), "{line}");
    Ok(())
}

pub(crate) fn only_what_the_hosts_key_signed_decides(ctx: &mut Ctx) -> Result<(), Failure> {
    let file = ctx.guest("true")?.vcpus(1).write_into(ctx.directory())?;
    for from in [
        "hwtests/tests/data/signed/bundle.toml",
        "hwtests/tests/data/signed/bundle.toml.minisig",
        "hwtests/tests/data/signed/policy.pub",
        "src/policy-engine/tests/data/limits-for-1.0.wasm",
    ] {
        let from = workspace(from);
        fs::copy(&from, ctx.directory().join(from.file_name().unwrap_or_default()))?;
    }
    let bundle = ctx.directory().join("bundle.toml");
    let run = |ctx: &Ctx, bundle: &Path| {
        let key = format!("--policy-key={}", ctx.directory().join("policy.pub").display());
        ctx.run(["casemate".as_ref(), key.as_ref(), "run".as_ref(), "--policy".as_ref(), bundle, &file])
    };
    let before = HostState::now();
    // The shipped bundle is not signed by this host's key.
    refused(&run(ctx, &workspace("policies/default.toml"))?, "policy-signature")?;
    let text = fs::read_to_string(&bundle)?;
    fs::write(&bundle, text.replace("1 GiB", "9 GiB"))?;
    refused(&run(ctx, &bundle)?, "policy-signature")?;
    fs::write(&bundle, text)?;
    before.expect_unchanged()?;
    run(ctx, &bundle)?.success()?.printed("CASEMATE-TEST-ENDED 0")?;
    Ok(())
}

/// A policy sees what the host found of a drive that comes back, and keeps it from everybody until an operator frees it.
pub(crate) fn a_policy_judges_a_drive(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let file = ctx.guest("true")?.device(devices::NVME).write_into(ctx.directory())?;
    let before = HostState::now();
    let judged = |wants: &str| -> Result<Finished, Failure> {
        let bundle = Bundle::write(ctx, "limits", "limits.wasm", "")?;
        let wants = format!("wants = [{wants}]");
        let bundle = bundle.and(ctx, "warden", "tests/warden.wasm", &wants)?;
        let words = ["casemate", "run", "--json", "--policy"].map(Path::new);
        ctx.run(words.into_iter().chain([bundle.path.as_path(), &file]))
    };
    came_back(&judged("'reset', 'config', 'bus-master'")?, devices::NVME, Some("nvme"))?;
    have_drive(ctx)?;
    before.expect_unchanged()?;
    let run = judged("'reset', 'scrub'")?;
    let why = run.report()?;
    let why = why.pointer("/devices/0/quarantined").and_then(Value::as_str).unwrap_or_default();
    expect!(why.contains("[warden/not-passed] scrub was not passed"), "it is not kept back: {}", run.stdout);
    let events = ctx.run(["casemate", "events"])?;
    events.printed("put into quarantine: [warden/not-passed]")?;
    let again = ctx.run_guest(&ctx.guest("true")?.device(devices::NVME))?;
    again.refusal("device-quarantined")?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    ctx.run(["casemate", "devices", "release", devices::NVME])?.success()?.printed("nvme has it")?;
    have_drive(ctx)?;
    before.expect_unchanged()
}
