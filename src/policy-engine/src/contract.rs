//! The contract `policies/wit` as wasmtime sees it, and the way between its records and our types.

use casemate_spec::PciAddress;

use casemate_policy::{
    self as ours, Attrs, HOST_LIMITS, LogLevel, Reason, Severity, Value, Verdict, is_code, one_line,
};

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::restriction,
    clippy::pedantic,
    reason = "generated from policies/wit"
)]
mod bindings {
    wasmtime::component::bindgen!({
        path: "../../policies/wit",
        world: "plugin",
        imports: { default: trappable },
    });

    // One interface each: what a plugin exports beside `meta` makes its kind.
    pub mod admission {
        wasmtime::component::bindgen!({
            path: "../../policies/wit",
            inline: "package casemate:host; world gate-alone { export casemate:policy/gate@1.1.0; }",
            world: "casemate:host/gate-alone",
            with: { "casemate:policy/types@1.1.0": crate::contract::bindings::casemate::policy::types },
        });
    }
    pub mod resources {
        wasmtime::component::bindgen!({
            path: "../../policies/wit",
            inline: "package casemate:host; world governor-alone { export casemate:policy/governor@1.1.0; }",
            world: "casemate:host/governor-alone",
            with: { "casemate:policy/types@1.1.0": crate::contract::bindings::casemate::policy::types },
        });
    }
    pub mod device {
        wasmtime::component::bindgen!({
            path: "../../policies/wit",
            inline: "package casemate:host; world releases-alone { export casemate:policy/releases@1.1.0; }",
            world: "casemate:host/releases-alone",
            with: { "casemate:policy/types@1.1.0": crate::contract::bindings::casemate::policy::types },
        });
    }
}

pub(crate) mod governor;
pub(crate) mod releases;

pub(crate) use bindings::{
    Plugin as Meta, PluginPre as MetaPre,
    admission::GateAlonePre as GatePre,
    casemate::policy::{log, types},
    device::ReleasesAlonePre as ReleasesPre,
    exports::casemate::policy::meta::Description,
    resources::GovernorAlonePre as GovernorPre,
};

/// The interfaces that a component may import; of `types`, there are no functions.
pub(crate) const IMPORTS: [&str; 2] = ["casemate:policy/log@1.", "casemate:policy/types@1."];

pub(crate) fn request(request: &ours::Request) -> types::Request {
    types::Request {
        operation: match request.operation {
            ours::Operation::Create => types::Operation::Create,
            ours::Operation::Update => types::Operation::Update,
            ours::Operation::HotPlug => types::Operation::HotPlug,
            ours::Operation::Resume => types::Operation::Resume,
            ours::Operation::Migrate => types::Operation::Migrate,
        },
        guest: guest(&request.guest),
        old: request.old.as_ref().map(guest),
        tenant: types::Tenant {
            name: request.tenant.name.clone(),
            quota: request.tenant.quota.as_ref().map(amounts),
            usage: request.tenant.usage.as_ref().map(amounts),
            attrs: attrs(&request.tenant.attrs),
        },
        host: types::HostState {
            name: request.host.name.clone(),
            cpus: request.host.cpus,
            memory_bytes: request.host.memory_bytes,
            memory_free_bytes: request.host.memory_free_bytes,
            attrs: attrs(&request.host.attrs),
        },
        beside: request.beside.iter().map(neighbour).collect(),
        now_seconds: request.now_seconds,
        attrs: attrs(&request.attrs),
    }
}

fn attrs(attrs: &Attrs) -> types::Attrs {
    attrs.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn guest(guest: &ours::GuestSpec) -> types::GuestSpec {
    types::GuestSpec {
        name: guest.name.clone(),
        vcpus: guest.vcpus,
        memory_bytes: guest.memory_bytes,
        kernel: file(&guest.kernel),
        initrd: guest.initrd.as_ref().map(file),
        command_line: guest.command_line.clone(),
        devices: guest.devices.iter().map(device).collect(),
        disks: guest.disks.iter().map(disk).collect(),
        nets: guest.nets.iter().map(net).collect(),
        attrs: attrs(&guest.attrs),
    }
}

fn file(file: &ours::File) -> types::File {
    types::File {
        path: file.path.clone(),
        size_bytes: file.size_bytes,
        sha256: file.sha256.clone(),
        attrs: attrs(&file.attrs),
    }
}

fn device(device: &ours::Device) -> types::Device {
    types::Device {
        address: device.address.to_string(),
        vendor: device.vendor,
        device: device.device,
        subsystem_vendor: device.subsystem_vendor,
        subsystem_device: device.subsystem_device,
        class: device.class,
        group: device.group,
        driver: device.driver.clone(),
        attrs: attrs(&device.attrs),
    }
}

fn disk(disk: &ours::Disk) -> types::Disk {
    types::Disk {
        path: disk.path.clone(),
        size_bytes: disk.size_bytes,
        read_only: disk.read_only,
        sha256: disk.sha256.clone(),
        attrs: attrs(&disk.attrs),
    }
}

fn net(net: &ours::Net) -> types::Net {
    types::Net { tap: net.tap.clone(), mac: net.mac.clone(), attrs: attrs(&net.attrs) }
}

fn amounts(amounts: &ours::Amounts) -> types::Amounts {
    types::Amounts {
        guests: amounts.guests,
        vcpus: amounts.vcpus,
        memory_bytes: amounts.memory_bytes,
        devices: amounts.devices,
        attrs: attrs(&amounts.attrs),
    }
}

fn neighbour(neighbour: &ours::Neighbour) -> types::Neighbour {
    types::Neighbour {
        name: neighbour.name.clone(),
        tenant: neighbour.tenant.clone(),
        vcpus: neighbour.vcpus,
        memory_bytes: neighbour.memory_bytes,
        devices: neighbour.devices.iter().map(PciAddress::to_string).collect(),
        attrs: attrs(&neighbour.attrs),
    }
}

/// A plugin's answer, checked. The error says which rule it breaks.
pub(crate) fn answer(plugin: &str, verdict: types::Verdict) -> Result<PluginAnswer, String> {
    match verdict {
        types::Verdict::Allow(allowed) => {
            let changes = changes(allowed.changes)?;
            Ok(PluginAnswer {
                verdict: Verdict::Allow { warnings: reasons(plugin, allowed.warnings)? },
                changes,
            })
        }
        types::Verdict::Deny(denied) if denied.reasons.is_empty() => Err("it denies without a reason".into()),
        types::Verdict::Deny(denied) => Ok(PluginAnswer {
            verdict: Verdict::Deny { reasons: reasons(plugin, denied.reasons)? },
            changes: Vec::new(),
        }),
    }
}

/// What one plugin says.
pub(crate) struct PluginAnswer {
    pub(crate) verdict: Verdict,
    pub(crate) changes: Vec<Wish>,
}

/// A change that a plugin wants; whether it may is not known yet.
pub(crate) struct Wish {
    pub(crate) field: String,
    /// None when it's of a kind that no field has.
    pub(crate) value: Option<Value>,
    pub(crate) reason: String,
}

fn changes(changes: Vec<types::Change>) -> Result<Vec<Wish>, String> {
    if changes.len() > HOST_LIMITS.reasons {
        return Err(format!("it wants {} changes; at most {} are read", changes.len(), HOST_LIMITS.reasons));
    }
    let wish = |theirs: types::Change| Wish {
        field: one_line(&theirs.field).chars().take(64).collect(),
        value: match theirs.value {
            types::Value::Number(number) => Some(Value::Number(number)),
            types::Value::Text(text) => Some(Value::Text(text)),
            types::Value::Flag(_) | types::Value::Texts(_) => None,
        },
        reason: one_line(&theirs.reason).chars().take(1_000).collect(),
    };
    Ok(changes.into_iter().map(wish).collect())
}

/// A plugin's reasons, checked.
pub(crate) fn reasons(plugin: &str, reasons: Vec<types::Reason>) -> Result<Vec<Reason>, String> {
    if reasons.len() > HOST_LIMITS.reasons {
        return Err(format!("it gives {} reasons; at most {} are read", reasons.len(), HOST_LIMITS.reasons));
    }
    let bytes: usize = reasons.iter().map(text_bytes).sum();
    if bytes > HOST_LIMITS.answer_bytes {
        return Err(format!("its answer has {bytes} bytes; at most {} are read", HOST_LIMITS.answer_bytes));
    }
    reasons.into_iter().map(|theirs| reason(plugin, theirs)).collect()
}

fn text_bytes(reason: &types::Reason) -> usize {
    let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let attrs: usize = reason.attrs.iter().map(|(name, value)| name.len().saturating_add(value.len())).sum();
    [reason.code.len(), reason.message.len(), optional(&reason.field), optional(&reason.remedy), attrs]
        .iter()
        .sum()
}

fn reason(plugin: &str, theirs: types::Reason) -> Result<Reason, String> {
    if !is_code(&theirs.code) {
        let code: String = theirs.code.chars().take(64).collect();
        return Err(format!("{code:?} is not a code: 1 to 64 of a-z, 0-9 and -"));
    }
    Ok(Reason {
        plugin: plugin.to_owned(),
        code: theirs.code,
        severity: match theirs.severity {
            types::Severity::Low => Severity::Low,
            types::Severity::Medium => Severity::Medium,
            types::Severity::High => Severity::High,
            types::Severity::Critical => Severity::Critical,
        },
        message: one_line(&theirs.message),
        field: theirs.field.as_deref().map(one_line),
        remedy: theirs.remedy.as_deref().map(one_line),
        overridable: false,
        attrs: theirs.attrs.iter().map(|(name, value)| (one_line(name), one_line(value))).collect(),
    })
}

pub(crate) fn log_level(level: log::Level) -> LogLevel {
    match level {
        log::Level::Debug => LogLevel::Debug,
        log::Level::Info => LogLevel::Info,
        log::Level::Warn => LogLevel::Warn,
        log::Level::Error => LogLevel::Error,
    }
}
