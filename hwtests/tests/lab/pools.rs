//! The operator's word: pools, pinned devices, quarantine, and who may have what after whom.

use std::{fs, path::Path};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, Finished},
};
use serde_json::Value;

use crate::{
    host_state::HostState,
    passthrough::{came_back, have_drive},
};

const HOST_FILE: &str = "[[pool]]\nname = 'drives'\nclass = '0108'\nid = '1b36:0010'\n";

/// Runs the guest with the drive that `device` names, for `tenant`, with a report.
fn run(ctx: &Ctx, device: &str, tenant: &str) -> Result<Finished, Failure> {
    run_with(ctx, device, tenant, &["--json"])
}

/// The same, to be refused; tells the line.
fn refused(ctx: &Ctx, device: &str, tenant: &str, code: &str) -> Result<String, Failure> {
    Ok(run_with(ctx, device, tenant, &[])?.refusal(code)?.to_owned())
}

fn run_with(ctx: &Ctx, device: &str, tenant: &str, options: &[&str]) -> Result<Finished, Failure> {
    let named = format!("address = \"{}\"", devices::NVME);
    let guest = ctx.guest("echo drive: $(cat /sys/bus/pci/devices/*/class | grep -c 0x010802)")?;
    let text = guest.device(devices::NVME).to_toml()?;
    expect!(text.contains(&named) && text.contains("tenant = "), "the guest's file is another: {text}");
    let line = |line: &str| {
        if line.starts_with("tenant = ") { format!("tenant = \"{tenant}\"\n") } else { format!("{line}\n") }
    };
    let text: String = text.replacen(&named, device, 1).lines().map(line).collect();
    let (file, host_file) = (ctx.directory().join("guest.toml"), ctx.directory().join("host.toml"));
    fs::write(&file, text)?;
    fs::write(&host_file, HOST_FILE)?;
    let words = ["casemate", "--host-config", text_of(&host_file)?, "run", text_of(&file)?];
    ctx.run(words.iter().chain(options))
}

fn text_of(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| Failure::new("the test's folder has a name that is no text"))
}

/// What `casemate devices --json` says of the drive.
fn drive(ctx: &Ctx) -> Result<Value, Failure> {
    let host_file = ctx.directory().join("host.toml");
    fs::write(&host_file, HOST_FILE)?;
    let words = ["casemate", "--json", "--host-config", text_of(&host_file)?, "devices"];
    let list = ctx.run(words)?;
    let lines = list.success()?.stdout.lines();
    let mut values = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let is_drive = |value: &Value| value.get("address").and_then(Value::as_str) == Some(devices::NVME);
    values.find(is_drive).ok_or_else(|| Failure::new("casemate devices does not list the drive"))
}

fn expect_told(ctx: &Ctx, key: &str, value: impl Into<Value>) -> Result<(), Failure> {
    let (told, value) = (drive(ctx)?, value.into());
    expect!(told.get(key) == Some(&value), "{key} is not {value} in {told}");
    Ok(())
}

/// The drive, with no tenant known who had it: other tests' guests did, and its pool would keep it to theirs.
fn have_unknown_drive(ctx: &Ctx) -> Result<(), Failure> {
    ctx.shell("rm -f /var/lib/casemate/ledger.json")?;
    have_drive(ctx)
}

pub(crate) fn pool_gives_a_drive_to_one_tenant(ctx: &mut Ctx) -> Result<(), Failure> {
    const POOL: &str = "pool = \"drives\"";
    have_unknown_drive(ctx)?;
    let before = HostState::now();
    expect_told(ctx, "pool", "drives")?;
    expect_told(ctx, "state", "free")?;
    let told = drive(ctx)?;
    let kind = |step: &str| told.pointer(&format!("/details/path/{step}/kind")).and_then(Value::as_str);
    expect!(kind("0") == Some("root port") && kind("1") == Some("endpoint"), "the path is not told: {told}");
    expect!(
        told.pointer("/details/msix_vectors").and_then(Value::as_u64) > Some(1),
        "no vectors are told: {told}"
    );
    let first = run(ctx, POOL, "acme")?;
    expect!(first.success()?.value("drive:")? == "1", "the guest has no drive");
    came_back(&first, devices::NVME, Some("nvme"))?;
    before.expect_unchanged()?;
    expect_told(ctx, "state", "free")?;
    expect_told(ctx, "last_tenant", "acme")?;

    let refusal = refused(ctx, POOL, "other", "pool-empty")?;
    expect!(refusal.contains("0000:03:00.0 device-of-another-tenant"), "not the reason: {refusal}");
    let refusal = refused(ctx, "address = \"0000:03:00.0\"", "other", "device-of-another-tenant")?;
    expect!(refusal.contains("acme") && refusal.contains("device[0].address"), "not the reason: {refusal}");
    expect!(refused(ctx, "pool = \"gpus\"", "acme", "pool-unknown")?.contains("drives"), "no pool is told");
    before.expect_unchanged()?;

    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    expect_told(ctx, "last_tenant", Value::Null)?;
    let second = run(ctx, POOL, "other")?;
    expect!(second.success()?.value("drive:")? == "1", "the guest has no drive");
    came_back(&second, devices::NVME, Some("nvme"))?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    before.expect_unchanged()
}

pub(crate) fn another_card_is_refused(ctx: &mut Ctx) -> Result<(), Failure> {
    have_unknown_drive(ctx)?;
    let before = HostState::now();
    let told = drive(ctx)?;
    let serial = told.pointer("/serials/0").and_then(Value::as_str);
    let serial = serial.ok_or_else(|| Failure::new(format_args!("no serial number in {told}")))?;
    let pinned = |id: &str, serial: &str| {
        format!("address = \"{}\"\nid = \"{id}\"\nserial = \"{serial}\"", devices::NVME)
    };
    let refusal = refused(ctx, &pinned("1b36:0010", "another"), "acme", "device-changed")?;
    expect!(refusal.contains(serial) && refusal.contains("serial another was meant"), "not both: {refusal}");
    refused(ctx, &pinned("1b36:0011", serial), "acme", "device-changed")?;
    before.expect_unchanged()?;
    let right = run(ctx, &pinned("1b36:0010", serial), "acme")?;
    right.success()?;
    came_back(&right, devices::NVME, Some("nvme"))?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    before.expect_unchanged()
}

pub(crate) fn operator_keeps_a_drive_back(ctx: &mut Ctx) -> Result<(), Failure> {
    have_unknown_drive(ctx)?;
    let before = HostState::now();
    let quarantine = ["casemate", "devices", "quarantine", devices::NVME, "--why", "it smells of smoke"];
    ctx.run(quarantine)?.success()?;
    ctx.run(quarantine)?.refusal("device-state")?;
    expect_told(ctx, "state", "quarantined")?;
    expect_told(ctx, "why", "it smells of smoke")?;
    let refusal = refused(ctx, &format!("address = \"{}\"", devices::NVME), "acme", "device-quarantined")?;
    expect!(refusal.contains("it smells of smoke"), "the reason is not told: {refusal}");
    ctx.run(["casemate", "devices", "free", devices::NVME])?.success()?;
    expect_told(ctx, "state", "free")?;
    ctx.run(["casemate", "devices", "free", devices::NVME])?.refusal("device-state")?;
    before.expect_unchanged()
}

/// A drive that an operator keeps for guests goes from one to the next without the host's driver in between.
pub(crate) fn operator_claims_and_releases(ctx: &mut Ctx) -> Result<(), Failure> {
    have_drive(ctx)?;
    let before = HostState::now();
    let driver = || ctx.driver_of(devices::NVME);
    ctx.run(["casemate", "devices", "release", devices::NVME])?.refusal("device-state")?;
    ctx.run(["casemate", "devices", "claim", devices::NVME])?.success()?.printed("is kept for guests")?;
    expect!(driver().as_deref() == Some("vfio-pci"), "{:?} has it", driver());
    for _ in ["first", "second"] {
        let run = ctx.run_guest(&ctx.guest("true")?.device(devices::NVME))?;
        came_back(run.success()?, devices::NVME, Some("vfio-pci"))?;
    }
    let told = ctx.run(["casemate", "--json", "devices", "release", devices::NVME])?;
    told.success()?.printed("\"driver\":\"nvme\"")?;
    have_drive(ctx)?;
    before.expect_unchanged()
}
