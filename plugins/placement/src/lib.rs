//! Policy `placement`: on which processors guests run, beside whom, and whether all of a guest is of one NUMA node.
//!
//! A guest says where it runs by its pins; one that floats shares every core with everybody, and the host's core
//! scheduling keeps strangers off sibling threads then.

use std::collections::BTreeSet;

use casemate_plugin_sdk::{
    Neighbour, Policy, Processor, Reason, Request, Severity, Verdict, attr, export_policy, verdict,
};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// Tenants whose guests are pinned, to cores that nobody else has; `*` is everybody.
    dedicated: Vec<String>,
    /// Whether guests of two tenants may be pinned to threads of one core.
    share_cores: bool,
    /// Whether guests of two tenants may have devices of one IOMMU group.
    share_groups: bool,
    /// Processors that no guest is pinned to.
    reserved: BTreeSet<u32>,
    numa: Numa,
    /// Guests of which only one runs on a host; a `*` at the end stands for anything.
    apart: Vec<Vec<String>>,
    /// Tenants of which only one has guests on a host.
    tenants_apart: Vec<Vec<String>>,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Numa {
    #[default]
    Any,
    Prefer,
    Require,
}

struct Placement;

impl Policy for Placement {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &[
        "not-pinned",
        "core-taken",
        "shared-core",
        "shared-group",
        "reserved",
        "numa",
        "apart",
        "tenants-apart",
    ];

    type Settings = Settings;

    fn admit(settings: Settings, request: Request) -> Verdict {
        let mut reasons = processors(&settings, &request);
        reasons.extend(groups(&settings, &request));
        reasons.extend(neighbours(&settings, &request));
        let mut warnings = Vec::new();
        match (settings.numa, split(&request)) {
            (Numa::Require, Some(reason)) => reasons.push(reason),
            (Numa::Prefer, Some(reason)) => warnings.push(reason.severity(Severity::Low)),
            _ => {}
        }
        verdict(reasons, warnings)
    }
}

export_policy!(Placement);

/// The others, without the guest itself as it was.
fn others(request: &Request) -> impl Iterator<Item = &Neighbour> {
    request.beside.iter().filter(|guest| guest.name != request.guest.name)
}

/// The cores that these processors are threads of; one that the host doesn't tell of is a core of its own.
fn cores(processors: &[Processor], pins: &[u32]) -> BTreeSet<(u32, u32, u32)> {
    let core = |number: &u32| match processors.iter().find(|one| one.number == *number) {
        Some(one) => (0, one.package, one.core),
        None => (1, 0, *number),
    };
    pins.iter().map(core).collect()
}

fn processors(settings: &Settings, request: &Request) -> Vec<Reason> {
    let (pins, all) = (request.guest.pins(), request.host.processors());
    let tenant = request.tenant.name.as_str();
    let pinned =
        |code: &str, message: String| Reason::new(code, message).field("cpu.pins").severity(Severity::High);
    let mut reasons = Vec::new();
    let reserved: Vec<_> = pins.iter().filter(|pin| settings.reserved.contains(pin)).collect();
    if let Some(pin) = reserved.first() {
        let message = format!("processor {pin} is kept from guests");
        reasons.push(pinned("reserved", message).remedy("pin it to others"));
    }
    let is_dedicated = settings.dedicated.iter().any(|name| name == tenant || name == "*");
    // Each of its vCPUs has a processor of its own where there are as many.
    if is_dedicated && (pins.len() as u64) < u64::from(request.guest.vcpus) {
        let message = format!(
            "guests of tenant {tenant} have processors of their own: {} vCPUs are pinned to {}",
            request.guest.vcpus,
            pins.len()
        );
        reasons.push(pinned("not-pinned", message).remedy("pin each vCPU to a processor"));
    }
    let mine = cores(&all, &pins);
    for other in others(request) {
        let theirs = other.pins();
        if mine.is_disjoint(&cores(&all, &theirs)) {
            continue;
        }
        if is_dedicated || settings.dedicated.iter().any(|name| *name == other.tenant || name == "*") {
            let message = format!("guest {} has one of its cores", other.name);
            reasons.push(pinned("core-taken", message).remedy("pin it to free cores"));
        } else if other.tenant != tenant && !settings.share_cores {
            let message = format!("a core would be shared with guest {} of another tenant", other.name);
            reasons.push(pinned("shared-core", message).remedy("pin it to other cores, or let it float"));
        }
    }
    reasons
}

/// Devices of a group that another tenant's guest has devices of: they can reach each other without the IOMMU.
fn groups(settings: &Settings, request: &Request) -> Vec<Reason> {
    if settings.share_groups {
        return Vec::new();
    }
    let mut reasons = Vec::new();
    for (slot, device) in request.guest.devices.iter().enumerate() {
        let Some(group) = device.group else { continue };
        let has = |guest: &&Neighbour| {
            let list = attr(&guest.attrs, "iommu-groups").unwrap_or_default();
            guest.tenant != request.tenant.name
                && list.split_whitespace().any(|number| number.parse() == Ok(group))
        };
        if let Some(other) = others(request).find(has) {
            let message = format!(
                "{} is of IOMMU group {group}, of which guest {} has a device",
                device.address, other.name
            );
            reasons.push(
                Reason::new("shared-group", message)
                    .field(format!("device[{slot}].address"))
                    .severity(Severity::Critical)
                    .remedy("choose a device of a group of its own"),
            );
        }
    }
    reasons
}

/// Who may not be on one host.
fn neighbours(settings: &Settings, request: &Request) -> Vec<Reason> {
    let named = |pattern: &String, name: &str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    };
    let is_of = |group: &Vec<String>, name: &str| group.iter().any(|pattern| named(pattern, name));
    let mut reasons = Vec::new();
    for group in settings.apart.iter().filter(|group| is_of(group, &request.guest.name)) {
        if let Some(other) = others(request).find(|other| is_of(group, &other.name)) {
            let message =
                format!("guest {} runs here, and only one of {} does", other.name, group.join(", "));
            let reason = Reason::new("apart", message).field("name");
            reasons.push(reason.remedy("run it on another host"));
        }
    }
    for group in settings.tenants_apart.iter().filter(|group| group.contains(&request.tenant.name)) {
        let is_rival =
            |other: &&Neighbour| other.tenant != request.tenant.name && group.contains(&other.tenant);
        if let Some(other) = others(request).find(is_rival) {
            let message = format!("tenant {} has guests here", other.tenant);
            let reason = Reason::new("tenants-apart", message).field("tenant").severity(Severity::High);
            reasons.push(reason.remedy("run it on another host"));
        }
    }
    reasons
}

/// More than one NUMA node in a guest, as far as it can be told.
fn split(request: &Request) -> Option<Reason> {
    let all = request.host.processors();
    let pins = request.guest.pins();
    let node_of = |pin: &u32| all.iter().find(|one| one.number == *pin).map(|one| one.node);
    let mut nodes: BTreeSet<u32> = pins.iter().filter_map(node_of).collect();
    let number = |attrs| attr(attrs, "numa-node").and_then(|node| node.parse::<u32>().ok());
    nodes.extend(number(&request.guest.attrs));
    nodes.extend(request.guest.devices.iter().filter_map(|device| number(&device.attrs)));
    if nodes.len() < 2 {
        return None;
    }
    let list: Vec<_> = nodes.iter().map(ToString::to_string).collect();
    let message = format!("its processors, memory and devices are of NUMA nodes {}", list.join(" and "));
    let reason = Reason::new("numa", message).field("cpu.pins");
    Some(reason.remedy("pin it, and take its memory and devices, from one node"))
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Allowed, Attrs, Denied, testing::request};

    use super::*;

    /// Two nodes of one package each; each of two cores of two threads.
    const TOPOLOGY: &str = "0@0.0.0 1@0.0.1 2@1.1.0 3@1.1.1 4@0.0.0 5@0.0.1 6@1.1.0 7@1.1.1";

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.into(), value.into())
    }

    fn pinned(pins: &str) -> Request {
        let mut request = request();
        request.guest.devices.clear();
        request.host.attrs = vec![pair("cpu-topology", TOPOLOGY)];
        request.guest.attrs = vec![pair("cpu-pins", pins)];
        request
    }

    fn beside(name: &str, tenant: &str, attrs: Attrs) -> Neighbour {
        Neighbour {
            name: name.into(),
            tenant: tenant.into(),
            vcpus: 1,
            memory_bytes: 1,
            devices: vec![],
            attrs,
        }
    }

    fn codes(json: &str, request: &Request) -> Vec<String> {
        match Placement::admit(serde_json::from_str(json).unwrap(), request.clone()) {
            Verdict::Allow(Allowed { warnings, .. }) => {
                warnings.into_iter().map(|warning| format!("warning {}", warning.code)).collect()
            }
            Verdict::Deny(Denied { reasons, .. }) => reasons.into_iter().map(|r| r.code).collect(),
        }
    }

    #[test]
    fn strangers_do_not_share_a_core() {
        let mut request = pinned("0 1");
        request.beside = vec![beside("db", "rival", vec![pair("cpu-pins", "4")])];
        assert_eq!(codes("{}", &request), ["shared-core"], "4 is the sibling of 0");
        assert_eq!(codes(r#"{"share_cores": true}"#, &request), [""; 0]);
        request.beside[0].tenant = "acme".into();
        assert_eq!(codes("{}", &request), [""; 0]);
        request.beside =
            vec![beside("db", "rival", vec![pair("cpu-pins", "2 6")]), beside("x", "rival", vec![])];
        assert_eq!(codes("{}", &request), [""; 0], "guests that float are the host's to keep apart");
    }

    #[test]
    fn dedicated_cores_are_pinned_and_nobody_elses() {
        let settings = r#"{"dedicated": ["acme"]}"#;
        assert_eq!(codes(settings, &pinned("")), ["not-pinned"]);
        assert_eq!(codes(settings, &pinned("0")), ["not-pinned"]);
        let mut request = pinned("0 1");
        assert_eq!(codes(settings, &request), [""; 0]);
        request.beside = vec![beside("db", "acme", vec![pair("cpu-pins", "5")])];
        assert_eq!(codes(settings, &request), ["core-taken"], "of its own tenant too");
        assert_eq!(codes(r#"{"dedicated": ["rival"], "share_cores": true}"#, &request), [""; 0]);
        request.beside[0].tenant = "rival".into();
        assert_eq!(codes(r#"{"dedicated": ["rival"], "share_cores": true}"#, &request), ["core-taken"]);
    }

    #[test]
    fn processors_of_the_hosts_are_kept() {
        assert_eq!(codes(r#"{"reserved": [0, 4]}"#, &pinned("4 5")), ["reserved"]);
        assert_eq!(codes(r#"{"reserved": [0]}"#, &pinned("4 5")), [""; 0]);
    }

    #[test]
    fn one_node_holds_all_of_a_guest() {
        let mut request = pinned("0 2");
        assert_eq!(codes("{}", &request), [""; 0]);
        assert_eq!(codes(r#"{"numa": "prefer"}"#, &request), ["warning numa"]);
        assert_eq!(codes(r#"{"numa": "require"}"#, &request), ["numa"]);
        request.guest.attrs = vec![pair("cpu-pins", "0 1"), pair("numa-node", "0")];
        assert_eq!(codes(r#"{"numa": "require"}"#, &request), [""; 0]);
        request.guest.devices = vec![casemate_plugin_sdk::testing::nic()];
        request.guest.devices[0].attrs = vec![pair("numa-node", "1")];
        assert_eq!(codes(r#"{"numa": "require"}"#, &request), ["numa"]);
    }

    #[test]
    fn strangers_do_not_share_a_group() {
        let mut request = request();
        request.beside = vec![beside("db", "rival", vec![pair("iommu-groups", "2 3")])];
        assert_eq!(codes("{}", &request), ["shared-group"]);
        assert_eq!(codes(r#"{"share_groups": true}"#, &request), [""; 0]);
        request.beside[0].tenant = "acme".into();
        assert_eq!(codes("{}", &request), [""; 0]);
    }

    #[test]
    fn some_are_kept_apart() {
        let mut request = pinned("");
        request.beside = vec![beside("web-2", "rival", vec![])];
        assert_eq!(codes(r#"{"apart": [["web*"]]}"#, &request), ["apart"]);
        assert_eq!(codes(r#"{"apart": [["web", "db"], ["web-2"]]}"#, &request), [""; 0]);
        assert_eq!(codes(r#"{"tenants_apart": [["acme", "rival"]]}"#, &request), ["tenants-apart"]);
        assert_eq!(codes(r#"{"tenants_apart": [["acme", "other"]]}"#, &request), [""; 0]);
        // As it was before a change, it stands among the others.
        request.beside = vec![beside("web", "acme", vec![])];
        assert_eq!(codes(r#"{"apart": [["web*"]]}"#, &request), [""; 0]);
    }
}
