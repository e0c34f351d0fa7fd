//! Policy `devices`: which tenant may have which physical devices. What no grant covers is refused.

use casemate_plugin_sdk::{
    Device, Pattern, Policy, Reason, Request, Severity, Verdict, export_policy, verdict,
};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// What may be had, by whom. A device has to be covered by one of them.
    #[serde(default)]
    grant: Vec<Grant>,
    /// Kinds that nobody gets, whatever is granted.
    #[serde(default)]
    never: Vec<Pattern>,
    /// Nobody gets a device whose driver on the host is one of these: what the host itself depends on.
    #[serde(default)]
    never_drivers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grant {
    /// Tenants by name; `*` is everybody.
    tenants: Vec<String>,
    /// Kinds, as `lspci -d` selects them.
    #[serde(default)]
    kinds: Vec<Pattern>,
    /// Single devices by address: `0000:03:00.0`.
    #[serde(default)]
    addresses: Vec<String>,
    /// The most of them in one guest.
    most: Option<usize>,
}

impl Grant {
    fn is_for(&self, tenant: &str) -> bool {
        self.tenants.iter().any(|name| name == tenant || name == "*")
    }

    fn covers(&self, device: &Device) -> bool {
        self.kinds.iter().any(|kind| kind.matches(device)) || self.addresses.contains(&device.address)
    }
}

struct Devices;

impl Policy for Devices {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["never", "driver", "not-granted", "too-many"];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        let mut reasons = Vec::new();
        for (index, grant) in settings.grant.iter().enumerate() {
            let mut wrong = |code: &str, what: &str, message: String, remedy: &str| {
                let field = format!("settings.grant[{index}].{what}");
                reasons.push(Reason::new(code, message).field(field).remedy(remedy));
            };
            if grant.tenants.is_empty() {
                wrong("no-tenant", "tenants", "it grants nobody anything".into(), "name a tenant, or \"*\"");
            }
            if grant.kinds.is_empty() && grant.addresses.is_empty() {
                wrong("no-device", "kinds", "it grants nothing".into(), "name kinds or addresses");
            }
            for address in grant.addresses.iter().filter(|address| !is_address(address)) {
                let remedy = "write it as `casemate devices` shows it: 0000:03:00.0";
                wrong("no-address", "addresses", format!("{address:?} is not a device's address"), remedy);
            }
        }
        if reasons.is_empty() { Ok(()) } else { Err(reasons) }
    }

    fn admit(settings: Settings, request: Request) -> Verdict {
        let tenant = request.tenant.name.as_str();
        let grants: Vec<_> = settings.grant.iter().filter(|grant| grant.is_for(tenant)).collect();
        let mut given = vec![0usize; grants.len()];
        let mut reasons = Vec::new();
        for (slot, device) in request.guest.devices.iter().enumerate() {
            let mut refuse = |reason: Reason| {
                reasons.push(reason.field(format!("device[{slot}].address")).severity(Severity::High));
            };
            if let Some(reason) = never(&settings, device) {
                refuse(reason);
                continue;
            }
            // The first grant that still has room: grants of single devices stand before those of kinds.
            let covering: Vec<_> =
                grants.iter().enumerate().filter(|(_, grant)| grant.covers(device)).collect();
            let room =
                covering.iter().find(|(index, grant)| grant.most.is_none_or(|most| given[*index] < most));
            match (room, covering.is_empty()) {
                (Some((index, _)), _) => given[*index] += 1,
                (None, true) => refuse(
                    Reason::new("not-granted", format!("{} is not granted to tenant {tenant}", name(device)))
                        .remedy("choose a device that is, or have an operator grant this one"),
                ),
                (None, false) => refuse(
                    Reason::new(
                        "too-many",
                        format!(
                            "{} is one more of its kind than tenant {tenant} may have in a guest",
                            name(device)
                        ),
                    )
                    .remedy("remove one"),
                ),
            }
        }
        verdict(reasons, Vec::new())
    }
}

export_policy!(Devices);

fn never(settings: &Settings, device: &Device) -> Option<Reason> {
    if let Some(kind) = settings.never.iter().find(|kind| kind.matches(device)) {
        let message = format!("{} is of a kind that no guest gets ({kind})", name(device));
        return Some(Reason::new("never", message).remedy("remove it"));
    }
    let driver =
        device.driver.as_deref().filter(|driver| settings.never_drivers.iter().any(|d| d == driver))?;
    let message = format!("{} is driven by {driver}, which the host keeps for itself", name(device));
    Some(Reason::new("driver", message).remedy("remove it, or unbind it from its driver first"))
}

fn name(device: &Device) -> String {
    format!("{} ({:04x}:{:04x}, class {:06x})", device.address, device.vendor, device.device, device.class)
}

/// `0000:03:00.0` in lower case, as the kernel writes it.
fn is_address(text: &str) -> bool {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    text.len() == 12
        && text.bytes().enumerate().all(|(index, b)| match index {
            4 | 7 => b == b':',
            10 => b == b'.',
            11 => (b'0'..=b'7').contains(&b),
            _ => hex(b),
        })
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{
        Denied,
        testing::{nic, request},
    };

    use super::*;

    fn settings(json: &str) -> Settings {
        serde_json::from_str(json).unwrap()
    }

    fn codes(json: &str, request: Request) -> Vec<(String, String)> {
        match Devices::admit(settings(json), request) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => {
                reasons.into_iter().map(|r| (r.code, r.field.unwrap())).collect()
            }
        }
    }

    fn first(code: &str) -> Vec<(String, String)> {
        vec![(code.into(), "device[0].address".into())]
    }

    #[test]
    fn what_no_grant_covers_is_refused() {
        assert_eq!(codes("{}", request()), first("not-granted"));
        for (grant, good) in [
            (r#"{"tenants": ["acme"], "kinds": ["8086:"]}"#, true),
            (r#"{"tenants": ["*"], "kinds": ["::02"]}"#, true),
            (r#"{"tenants": ["acme"], "addresses": ["0000:03:00.0"]}"#, true),
            (r#"{"tenants": ["rival"], "kinds": ["8086:"]}"#, false),
            (r#"{"tenants": ["acme"], "kinds": ["1af4:"], "addresses": ["0000:03:00.1"]}"#, false),
        ] {
            let want = if good { vec![] } else { first("not-granted") };
            assert_eq!(codes(&format!(r#"{{"grant": [{grant}]}}"#), request()), want, "{grant}");
        }
    }

    #[test]
    fn what_nobody_gets_goes_before_grants() {
        let all = r#""grant": [{"tenants": ["*"], "kinds": [":"]}]"#;
        assert_eq!(codes(&format!("{{{all}}}"), request()), []);
        assert_eq!(codes(&format!(r#"{{{all}, "never": ["::0200"]}}"#), request()), first("never"));
        assert_eq!(codes(&format!(r#"{{{all}, "never_drivers": ["e1000"]}}"#), request()), first("driver"));
    }

    #[test]
    fn a_grant_has_room_for_so_many_and_the_next_one_helps_out() {
        let mut two = request();
        let mut second = nic();
        second.address = "0000:04:00.0".into();
        two.guest.devices.push(second);
        let one = r#"{"tenants": ["acme"], "kinds": ["8086:"], "most": 1}"#;
        let over = vec![("too-many".to_owned(), "device[1].address".to_owned())];
        assert_eq!(codes(&format!(r#"{{"grant": [{one}]}}"#), two.clone()), over);
        assert_eq!(codes(&format!(r#"{{"grant": [{one}, {one}]}}"#), two), []);
    }

    #[test]
    fn refuses_grants_that_grant_nothing() {
        for json in [
            r#"{"grant": [{"tenants": [], "kinds": ["8086:"]}]}"#,
            r#"{"grant": [{"tenants": ["acme"]}]}"#,
            r#"{"grant": [{"tenants": ["acme"], "addresses": ["03:00.0"]}]}"#,
            r#"{"grant": [{"tenants": ["acme"], "addresses": ["0000:03:00.8"]}]}"#,
        ] {
            assert_eq!(Devices::check(&settings(json)).unwrap_err().len(), 1, "{json}");
        }
        assert!(serde_json::from_str::<Settings>(r#"{"grants": []}"#).is_err());
    }
}
