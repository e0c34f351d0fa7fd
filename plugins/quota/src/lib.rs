//! Policy `quota`: how much each tenant may have at once, all its guests on this host together.
//!
//! What a tenant has comes from the host's account, or, where the host keeps none, is summed over the guests beside.

use std::collections::BTreeMap;

use casemate_plugin_sdk::{
    Amounts, Attrs, Bytes, Operation, Policy, Reason, Request, Severity, Verdict, attr, export_policy,
    verdict,
};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// By tenant.
    #[serde(default)]
    tenants: BTreeMap<String, Quota>,
    /// For tenants that aren't named; without it, these have nothing.
    default: Option<Quota>,
    /// All tenants together: what the host gives away.
    #[serde(default)]
    host: Quota,
}

/// What isn't set isn't limited.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Quota {
    guests: Option<u64>,
    vcpus: Option<u64>,
    memory: Option<Bytes>,
    devices: Option<u64>,
    /// Devices of each pool.
    pools: BTreeMap<String, u64>,
}

/// What somebody has, or asks for.
#[derive(Clone, Default)]
struct Sum {
    guests: u64,
    vcpus: u64,
    memory_bytes: u64,
    devices: u64,
    pools: BTreeMap<String, u64>,
}

impl Sum {
    fn add(mut self, other: Self) -> Self {
        for (pool, devices) in other.pools {
            let sum = self.pools.entry(pool).or_default();
            *sum = sum.saturating_add(devices);
        }
        Self {
            pools: self.pools,
            guests: self.guests.saturating_add(other.guests),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            devices: self.devices.saturating_add(other.devices),
        }
    }
}

impl From<&Amounts> for Sum {
    fn from(amounts: &Amounts) -> Self {
        Self {
            guests: amounts.guests.into(),
            vcpus: amounts.vcpus.into(),
            memory_bytes: amounts.memory_bytes,
            devices: amounts.devices.into(),
            pools: BTreeMap::new(),
        }
    }
}

struct QuotaPolicy;

impl Policy for QuotaPolicy {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &[
        "no-quota",
        "guests",
        "vcpus",
        "memory",
        "devices",
        "pool",
        "host-guests",
        "host-vcpus",
        "host-memory",
        "host-devices",
        "host-pool",
    ];

    type Settings = Settings;

    fn admit(settings: Settings, request: Request) -> Verdict {
        let asked = asked(&request);
        let mut reasons = Vec::new();
        let tenant = &request.tenant;
        let would = has(&request).add(asked.clone());
        let who = format!("tenant {}", tenant.name);
        match settings.tenants.get(&tenant.name).or(settings.default.as_ref()) {
            Some(quota) => reasons.extend(over(quota, &would, &who, "")),
            None => reasons.push(
                Reason::new("no-quota", format!("tenant {} has no quota here", tenant.name))
                    .field("tenant")
                    .remedy("have an operator give this tenant one"),
            ),
        }
        // What the host itself grants a tenant holds too.
        if let Some(granted) = &tenant.quota {
            let granted = Quota {
                guests: Some(granted.guests.into()),
                vcpus: Some(granted.vcpus.into()),
                memory: Some(Bytes(granted.memory_bytes)),
                devices: Some(granted.devices.into()),
                pools: BTreeMap::new(),
            };
            let more = over(&granted, &would, &who, "");
            let new: Vec<_> =
                more.into_iter().filter(|m| reasons.iter().all(|r: &Reason| r.code != m.code)).collect();
            reasons.extend(new);
        }
        let all = beside(&request, None).add(asked);
        reasons.extend(over(&settings.host, &all, "this host", "host-"));
        verdict(reasons, Vec::new())
    }
}

export_policy!(QuotaPolicy);

/// What the guest in question would have.
fn asked(request: &Request) -> Sum {
    let guest = &request.guest;
    let mut pools = BTreeMap::<_, u64>::new();
    for pool in guest.devices.iter().filter_map(|device| attr(&device.attrs, "pool")) {
        let count = pools.entry(pool.to_owned()).or_default();
        *count = count.saturating_add(1);
    }
    Sum {
        pools,
        guests: 1,
        vcpus: guest.vcpus.into(),
        memory_bytes: guest.memory_bytes,
        devices: guest.devices.len() as u64,
    }
}

/// What its tenant has without it.
fn has(request: &Request) -> Sum {
    let seen = beside(request, Some(&request.tenant.name));
    match &request.tenant.usage {
        // The account knows nothing of pools.
        Some(usage) => Sum { pools: seen.pools, ..Sum::from(usage) },
        None => seen,
    }
}

/// A neighbour's `pools`: `fast-nvme=2 slow=1`.
fn pools(attrs: &Attrs) -> BTreeMap<String, u64> {
    let list = attr(attrs, "pools").unwrap_or_default().split_whitespace();
    list.filter_map(|word| word.rsplit_once('='))
        .filter_map(|(pool, devices)| Some((pool.to_owned(), devices.parse().ok()?)))
        .collect()
}

/// What other guests have: a tenant's, or all.
fn beside(request: &Request, tenant: Option<&str>) -> Sum {
    request
        .beside
        .iter()
        .filter(|guest| tenant.is_none_or(|tenant| guest.tenant == tenant))
        // A guest that is changed, or comes back, may stand among the others.
        .filter(|guest| request.operation == Operation::Create || guest.name != request.guest.name)
        .map(|guest| Sum {
            guests: 1,
            vcpus: guest.vcpus.into(),
            memory_bytes: guest.memory_bytes,
            devices: guest.devices.len() as u64,
            pools: pools(&guest.attrs),
        })
        .fold(Sum::default(), Sum::add)
}

fn over(quota: &Quota, would: &Sum, who: &str, prefix: &str) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let mut check = |code: &str, field: &str, would: u64, most: Option<u64>, show: &dyn Fn(u64) -> String| {
        let Some(most) = most.filter(|most| would > *most) else { return };
        let message = format!("{who} would have {}, and may have {}", show(would), show(most));
        reasons.push(
            Reason::new(&format!("{prefix}{code}"), message)
                .field(field)
                .severity(if prefix.is_empty() { Severity::Medium } else { Severity::High })
                .remedy("ask for less, or stop another guest first"),
        );
    };
    let count = |noun: &'static str| {
        move |number: u64| format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
    };
    check("guests", "name", would.guests, quota.guests, &count("guest"));
    check("vcpus", "vcpus", would.vcpus, quota.vcpus, &count("vCPU"));
    check("memory", "memory", would.memory_bytes, quota.memory.map(|most| most.0), &|bytes| {
        Bytes(bytes).to_string()
    });
    check("devices", "device[0].address", would.devices, quota.devices, &count("device"));
    for (pool, most) in &quota.pools {
        let devices = would.pools.get(pool).copied().unwrap_or(0);
        check("pool", "device[0].pool", devices, Some(*most), &|number| {
            format!("{} of the pool {pool}", count("device")(number))
        });
    }
    reasons
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Denied, Neighbour, testing::request};

    use super::*;

    fn other(tenant: &str, name: &str) -> Neighbour {
        Neighbour {
            name: name.into(),
            tenant: tenant.into(),
            vcpus: 4,
            memory_bytes: 8 << 30,
            devices: vec!["0000:04:00.0".into()],
            attrs: vec![],
        }
    }

    fn codes(json: &str, request: Request) -> Vec<String> {
        match QuotaPolicy::admit(serde_json::from_str(json).unwrap(), request) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => reasons.into_iter().map(|r| r.code).collect(),
        }
    }

    #[test]
    fn each_amount_is_the_sum_of_what_is_there_and_what_is_asked() {
        let mut request = request();
        request.tenant.usage = None;
        request.beside = vec![other("acme", "db"), other("rival", "web")];
        let all = r#"{"tenants": {"acme": {"guests": 2, "vcpus": 6, "memory": "16 GiB", "devices": 2}}}"#;
        assert_eq!(codes(all, request.clone()), [""; 0]);
        for (from, to, code) in [
            (r#""guests": 2"#, r#""guests": 1"#, "guests"),
            (r#""vcpus": 6"#, r#""vcpus": 5"#, "vcpus"),
            ("16 GiB", "16383 MiB", "memory"),
            (r#""devices": 2"#, r#""devices": 1"#, "devices"),
        ] {
            assert_eq!(codes(&all.replace(from, to), request.clone()), [code]);
        }
        assert_eq!(codes(r#"{"default": {}, "host": {"guests": 3}}"#, request.clone()), [""; 0]);
        assert_eq!(codes(r#"{"default": {}, "host": {"guests": 2}}"#, request.clone()), ["host-guests"]);
        assert_eq!(codes(r#"{"default": {}, "host": {"vcpus": 9}}"#, request.clone()), ["host-vcpus"]);
        assert_eq!(
            codes(r#"{"default": {}, "host": {"memory": "23 GiB"}}"#, request.clone()),
            ["host-memory"]
        );
        assert_eq!(codes(r#"{"default": {}, "host": {"devices": 2}}"#, request), ["host-devices"]);
    }

    #[test]
    fn devices_of_a_pool_are_counted_whoever_has_them() {
        let mut request = request();
        request.guest.devices[0].attrs = vec![("pool".into(), "fast".into())];
        let mut other = other("acme", "db");
        other.attrs = vec![("pools".into(), "fast=1 slow=3".into())];
        let mut rival = other.clone();
        rival.tenant = "rival".into();
        request.beside = vec![other, rival];
        let quota = r#"{"default": {"pools": {"fast": 2, "slow": 3}}, "host": {"pools": {"fast": 3}}}"#;
        assert_eq!(codes(quota, request.clone()), [""; 0]);
        assert_eq!(codes(&quota.replace(r#""fast": 2"#, r#""fast": 1"#), request.clone()), ["pool"]);
        assert_eq!(codes(&quota.replace(r#""slow": 3"#, r#""slow": 2"#), request.clone()), ["pool"]);
        assert_eq!(codes(&quota.replace(r#""fast": 3"#, r#""fast": 2"#), request.clone()), ["host-pool"]);
        request.guest.devices.clear();
        assert_eq!(codes(r#"{"default": {"pools": {"fast": 0}}}"#, request), ["pool"], "db has one");
    }

    #[test]
    fn the_hosts_account_goes_before_what_is_seen_beside() {
        let mut request = request();
        request.beside = vec![other("acme", "db")];
        assert_eq!(codes(r#"{"default": {"guests": 1}}"#, request.clone()), [""; 0]);
        request.tenant.usage.as_mut().unwrap().guests = 1;
        assert_eq!(codes(r#"{"default": {"guests": 1}}"#, request), ["guests"]);
    }

    #[test]
    fn who_is_not_named_has_the_default_or_nothing() {
        assert_eq!(codes("{}", request()), ["no-quota"]);
        assert_eq!(codes(r#"{"tenants": {"rival": {}}}"#, request()), ["no-quota"]);
        assert_eq!(codes(r#"{"tenants": {"acme": {}}, "default": {"vcpus": 1}}"#, request()), [""; 0]);
        assert_eq!(codes(r#"{"default": {"vcpus": 1}}"#, request()), ["vcpus"]);
    }

    #[test]
    fn a_quota_of_the_hosts_holds_too_and_is_told_once() {
        let mut request = request();
        let granted = Amounts { guests: 1, vcpus: 1, memory_bytes: 8 << 30, devices: 1, attrs: vec![] };
        request.tenant.quota = Some(granted);
        assert_eq!(codes(r#"{"default": {}}"#, request.clone()), ["vcpus"]);
        assert_eq!(codes(r#"{"default": {"vcpus": 1}}"#, request), ["vcpus"]);
    }

    #[test]
    fn a_guest_that_changes_does_not_count_twice() {
        let mut request = request();
        request.tenant.usage = None;
        request.beside = vec![other("acme", "web")];
        assert_eq!(codes(r#"{"default": {"guests": 1}}"#, request.clone()), ["guests"]);
        request.operation = Operation::Update;
        assert_eq!(codes(r#"{"default": {"guests": 1}}"#, request), [""; 0]);
    }

    #[test]
    fn amounts_beyond_all_bounds_do_not_wrap() {
        let mut request = request();
        request.tenant.usage = None;
        let mut other = other("acme", "db");
        other.memory_bytes = u64::MAX;
        request.beside = vec![other];
        assert_eq!(codes(r#"{"default": {"memory": "1 TiB"}}"#, request), ["memory"]);
    }
}
