//! Policy `hardening`: no guest in a cell that lacks a part, with the host's kernel in its data path (vhost), or with guests of
//! its own, unless a setting says so by name.

use casemate_plugin_sdk::{Policy, Reason, Request, Severity, Verdict, attr, export_policy, verdict};
use serde::Deserialize;

/// Nothing is let through that isn't named.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// Parts of a cell that may be lacking, as the host's file names them; `*` is every part.
    weakened: Vec<String>,
    /// Tenants whose cards the kernel may serve; `*` is everybody.
    vhost: Vec<String>,
    /// Tenants whose guests may have guests.
    nested: Vec<String>,
    /// Whether a guest in a weaker cell may have a physical device of a pool that isn't trusted.
    untrusted_devices: bool,
}

struct Hardening;

impl Policy for Hardening {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["weakened", "vhost", "nested", "weak-with-device"];

    type Settings = Settings;

    fn admit(settings: Settings, request: Request) -> Verdict {
        let tenant = request.tenant.name.as_str();
        let mut reasons = Vec::new();
        let weakened: Vec<_> =
            attr(&request.host.attrs, "weakened").unwrap_or_default().split_whitespace().collect();
        let unwanted: Vec<_> =
            weakened.iter().filter(|part| !names(&settings.weakened, part)).copied().collect();
        if !unwanted.is_empty() {
            let message = format!("its cell would be without {}", unwanted.join(", "));
            reasons.push(
                Reason::new("weakened", message)
                    .severity(Severity::Critical)
                    .remedy("run it on a host that has them, or have an operator permit it by name"),
            );
        }
        let untrusted = |attrs| attr(attrs, "trusted") != Some("true");
        if !weakened.is_empty() && !settings.untrusted_devices {
            for (slot, device) in request.guest.devices.iter().enumerate() {
                if untrusted(&device.attrs) {
                    let message =
                        format!("{} would be in a cell without {}", device.address, weakened.join(", "));
                    reasons.push(
                        Reason::new("weak-with-device", message)
                            .field(format!("device[{slot}].address"))
                            .severity(Severity::Critical)
                            .remedy("remove it, or run the guest on a host that has all parts of a cell"),
                    );
                }
            }
        }
        for (slot, net) in request.guest.nets.iter().enumerate() {
            if attr(&net.attrs, "vhost") == Some("true") && !names(&settings.vhost, tenant) {
                let message = format!("the kernel would serve {} for tenant {tenant}", net.tap);
                reasons.push(
                    Reason::new("vhost", message)
                        .field(format!("net[{slot}].vhost"))
                        .severity(Severity::High)
                        .remedy("leave vhost out: the cell serves the card then"),
                );
            }
        }
        if attr(&request.guest.attrs, "nested") == Some("true") && !names(&settings.nested, tenant) {
            reasons.push(
                Reason::new("nested", format!("guests of tenant {tenant} may have no guests of their own"))
                    .field("cpu.nested")
                    .severity(Severity::High)
                    .remedy("leave nested out"),
            );
        }
        verdict(reasons, Vec::new())
    }
}

export_policy!(Hardening);

fn names(list: &[String], name: &str) -> bool {
    list.iter().any(|known| known == name || known == "*")
}

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Denied, testing::request};

    use super::*;

    fn codes(json: &str, request: &Request) -> Vec<String> {
        match Hardening::admit(serde_json::from_str(json).unwrap(), request.clone()) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => reasons.into_iter().map(|r| r.code).collect(),
        }
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.into(), value.into())
    }

    #[test]
    fn an_ordinary_guest_is_let_through() {
        assert_eq!(codes("{}", &request()), [""; 0]);
    }

    #[test]
    fn a_weaker_cell_is_refused_part_by_part() {
        let mut request = request();
        request.guest.devices.clear();
        request.host.attrs = vec![pair("weakened", "landlock io-limits")];
        assert_eq!(codes("{}", &request), ["weakened"]);
        assert_eq!(codes(r#"{"weakened": ["landlock"]}"#, &request), ["weakened"]);
        assert_eq!(codes(r#"{"weakened": ["landlock", "io-limits"]}"#, &request), [""; 0]);
        assert_eq!(codes(r#"{"weakened": ["*"]}"#, &request), [""; 0]);
    }

    #[test]
    fn a_device_that_strangers_share_wants_a_whole_cell() {
        let mut request = request();
        request.host.attrs = vec![pair("weakened", "landlock")];
        let allowed = r#"{"weakened": ["*"]}"#;
        assert_eq!(codes(allowed, &request), ["weak-with-device"]);
        assert_eq!(codes(r#"{"weakened": ["*"], "untrusted_devices": true}"#, &request), [""; 0]);
        request.guest.devices[0].attrs = vec![pair("trusted", "true")];
        assert_eq!(codes(allowed, &request), [""; 0]);
    }

    #[test]
    fn the_kernel_serves_cards_and_guests_have_guests_for_named_tenants_alone() {
        let mut request = request();
        request.guest.nets[0].attrs = vec![pair("vhost", "true")];
        request.guest.attrs = vec![pair("nested", "true")];
        assert_eq!(codes("{}", &request), ["vhost", "nested"]);
        assert_eq!(codes(r#"{"vhost": ["acme"], "nested": ["rival"]}"#, &request), ["nested"]);
        assert_eq!(codes(r#"{"vhost": ["*"], "nested": ["acme"]}"#, &request), [""; 0]);
    }
}
