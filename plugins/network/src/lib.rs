//! Policy `network`: which interfaces of the host's each tenant's cards may be on, with which addresses, how many, and whose
//! guests may have sockets to the host. What no grant covers is refused.

mod address;

use address::Network;
use casemate_plugin_sdk::{Net, Policy, Reason, Request, Severity, Verdict, attr, export_policy, verdict};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// What may be had, by whom. A card has to be covered by one of them.
    grant: Vec<Grant>,
    /// Tenants whose guests may have sockets to the host; everybody when left out.
    sockets: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grant {
    /// Tenants by name; `*` is everybody.
    tenants: Vec<String>,
    /// Names of interfaces; a `*` at the end stands for anything.
    taps: Vec<String>,
    /// Where the host's address on the interface may lie; it may have none of the guest file's when left out.
    #[serde(default)]
    host_addresses: Vec<Network>,
    /// How a MAC address that the guest's file asks for may begin.
    #[serde(default)]
    macs: Vec<String>,
    /// The most cards in one guest.
    most: Option<usize>,
}

impl Grant {
    fn is_for(&self, tenant: &str) -> bool {
        self.tenants.iter().any(|name| name == tenant || name == "*")
    }

    fn covers(&self, tap: &str) -> bool {
        self.taps.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => tap.starts_with(start),
            None => tap == pattern,
        })
    }

    /// What of a card that it covers it does not permit.
    fn objections(&self, net: &Net) -> Vec<(&'static str, &'static str, String)> {
        let mut found = Vec::new();
        if let Some(address) = attr(&net.attrs, "host-address")
            && !self.host_addresses.iter().any(|network| network.contains(address))
        {
            let message =
                format!("the host's address {address} on {} is in no network that is granted", net.tap);
            found.push(("host-address", "host_address", message));
        }
        if let Some(mac) = &net.mac
            && !self.macs.iter().any(|start| mac.starts_with(start.as_str()))
        {
            found.push(("mac", "mac", format!("the address {mac} is not one that is granted")));
        }
        found
    }
}

struct NetworkPolicy;

impl Policy for NetworkPolicy {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["not-granted", "too-many", "host-address", "mac", "socket"];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        for (index, grant) in settings.grant.iter().enumerate() {
            let mut wrong = |what: &str, message: String, remedy: &str| {
                let field = format!("settings.grant[{index}].{what}");
                reasons.push(Reason::new("bad-grant", message).field(field).remedy(remedy));
            };
            if grant.tenants.is_empty() {
                wrong("tenants", "it grants nobody anything".into(), "name a tenant, or \"*\"");
            }
            if grant.taps.is_empty() {
                wrong("taps", "it grants nothing".into(), "name interfaces, as \"acme*\"");
            }
            for start in grant.macs.iter().filter(|start| !address::begins_a_mac(start)) {
                wrong(
                    "macs",
                    format!("{start:?} begins no MAC address"),
                    "write it as \"02:ac\", in lower case",
                );
            }
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn admit(settings: Settings, request: Request) -> Verdict {
        let tenant = request.tenant.name.as_str();
        let grants: Vec<_> = settings.grant.iter().filter(|grant| grant.is_for(tenant)).collect();
        let mut given = vec![0usize; grants.len()];
        let mut reasons = Vec::new();
        for (slot, net) in request.guest.nets.iter().enumerate() {
            let mut refuse = |code: &str, key: &str, message: String, remedy: &str| {
                let field = format!("net[{slot}].{key}");
                let reason = Reason::new(code, message).field(field).severity(Severity::High);
                reasons.push(reason.remedy(remedy));
            };
            let covering: Vec<_> =
                grants.iter().enumerate().filter(|(_, grant)| grant.covers(&net.tap)).collect();
            let room: Vec<_> = covering
                .iter()
                .filter(|(index, grant)| grant.most.is_none_or(|most| given[*index] < most))
                .collect();
            if covering.is_empty() {
                let message = format!("interface {} is not granted to tenant {tenant}", net.tap);
                refuse(
                    "not-granted",
                    "tap",
                    message,
                    "choose one that is, or have an operator grant this one",
                );
            } else if room.is_empty() {
                let message = format!("{} is one more than tenant {tenant} may have in a guest", net.tap);
                refuse("too-many", "tap", message, "remove a card");
            } else {
                // The one that objects least: grants are alternatives.
                let objections = room.iter().map(|(index, grant)| (*index, grant.objections(net)));
                if let Some((index, objections)) = objections.min_by_key(|(_, found)| found.len()) {
                    given[index] += 1;
                    for (code, key, message) in objections {
                        refuse(code, key, message, "leave it out, or ask for one that is granted");
                    }
                }
            }
        }
        let has_sockets = attr(&request.guest.attrs, "vsock") == Some("true");
        let may = settings.sockets.as_ref().is_none_or(|list| list.iter().any(|n| n == tenant || n == "*"));
        if has_sockets && !may {
            reasons.push(
                Reason::new("socket", format!("guests of tenant {tenant} may have no sockets to the host"))
                    .field("vsock.socket")
                    .severity(Severity::High)
                    .remedy("leave [vsock] out"),
            );
        }
        verdict(reasons, Vec::new())
    }
}

export_policy!(NetworkPolicy);

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Denied, testing::request};

    use super::*;

    fn codes(json: &str, request: &Request) -> Vec<String> {
        match NetworkPolicy::admit(serde_json::from_str(json).unwrap(), request.clone()) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => reasons.into_iter().map(|r| r.code).collect(),
        }
    }

    fn one_card(address: Option<&str>, mac: Option<&str>) -> Request {
        let mut request = request();
        let net = &mut request.guest.nets[0];
        net.attrs = address.map(|address| ("host-address".into(), address.into())).into_iter().collect();
        net.mac = mac.map(Into::into);
        request
    }

    #[test]
    fn interfaces_are_granted_by_name_or_by_how_they_begin() {
        assert_eq!(codes("{}", &request()), ["not-granted"]);
        for (grant, good) in [
            (r#"{"tenants": ["acme"], "taps": ["web0"]}"#, true),
            (r#"{"tenants": ["*"], "taps": ["we*"]}"#, true),
            (r#"{"tenants": ["*"], "taps": ["*"]}"#, true),
            (r#"{"tenants": ["acme"], "taps": ["web"]}"#, false),
            (r#"{"tenants": ["rival"], "taps": ["*"]}"#, false),
        ] {
            let want: &[&str] = if good { &[] } else { &["not-granted"] };
            assert_eq!(codes(&format!(r#"{{"grant": [{grant}]}}"#), &request()), want, "{grant}");
        }
    }

    #[test]
    fn addresses_lie_where_it_is_granted() {
        let grant = r#"{"grant": [{"tenants": ["acme"], "taps": ["web*"], "host_addresses": ["192.0.2.0/25"], "macs": ["02:ac"]}]}"#;
        assert_eq!(codes(grant, &one_card(None, None)), [""; 0]);
        assert_eq!(codes(grant, &one_card(Some("192.0.2.1/28"), Some("02:ac:00:00:00:01"))), [""; 0]);
        assert_eq!(codes(grant, &one_card(Some("192.0.2.129/28"), None)), ["host-address"]);
        // A wider network than is granted reaches others' addresses.
        assert_eq!(codes(grant, &one_card(Some("192.0.2.1/24"), None)), ["host-address"]);
        assert_eq!(codes(grant, &one_card(None, Some("02:ad:00:00:00:01"))), ["mac"]);
        let bare = r#"{"grant": [{"tenants": ["acme"], "taps": ["web*"]}]}"#;
        assert_eq!(
            codes(bare, &one_card(Some("192.0.2.1/24"), Some("02:ac:00:00:00:01"))),
            ["host-address", "mac"]
        );
    }

    #[test]
    fn grants_are_alternatives_and_have_room_for_so_many() {
        let mut two = request();
        two.guest.nets.push(two.guest.nets[0].clone());
        let one = r#"{"tenants": ["acme"], "taps": ["web0"], "most": 1}"#;
        assert_eq!(codes(&format!(r#"{{"grant": [{one}]}}"#), &two), ["too-many"]);
        let wide = r#"{"tenants": ["acme"], "taps": ["*"], "host_addresses": ["0.0.0.0/0"]}"#;
        assert_eq!(codes(&format!(r#"{{"grant": [{one}, {wide}]}}"#), &two), [""; 0]);
        let card = one_card(Some("198.51.100.1/24"), None);
        assert_eq!(codes(&format!(r#"{{"grant": [{one}, {wide}]}}"#), &card), [""; 0]);
    }

    #[test]
    fn sockets_are_for_named_tenants() {
        let mut request = request();
        request.guest.attrs = vec![("vsock".into(), "true".into())];
        let all = r#""grant": [{"tenants": ["*"], "taps": ["*"]}]"#;
        assert_eq!(codes(&format!("{{{all}}}"), &request), [""; 0]);
        assert_eq!(codes(&format!(r#"{{{all}, "sockets": []}}"#), &request), ["socket"]);
        assert_eq!(codes(&format!(r#"{{{all}, "sockets": ["acme"]}}"#), &request), [""; 0]);
    }

    #[test]
    fn refuses_grants_that_grant_nothing() {
        for json in [
            r#"{"grant": [{"tenants": [], "taps": ["*"]}]}"#,
            r#"{"grant": [{"tenants": ["a"], "taps": []}]}"#,
            r#"{"grant": [{"tenants": ["a"], "taps": ["*"], "macs": ["zz"]}]}"#,
        ] {
            let settings = serde_json::from_str(json).unwrap();
            assert_eq!(NetworkPolicy::check(&settings).unwrap_err().len(), 1, "{json}");
        }
        let bad = r#"{"grant": [{"tenants": ["a"], "taps": ["*"], "host_addresses": ["192.0.2.0"]}]}"#;
        assert!(serde_json::from_str::<Settings>(bad).is_err());
    }
}
