//! A policy that changes what its settings name, well or badly, for the tests of the host.

use casemate_plugin_sdk::{Change, Policy, Request, Value, Verdict, allow, export_policy};
use serde::Deserialize;

struct Changer;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    field: String,
    number: Option<u64>,
    text: Option<String>,
    /// Another value each time it's asked: what it sees, and one more.
    #[serde(default)]
    restless: bool,
    /// Only when the guest has this many vCPUs.
    only_vcpus: Option<u32>,
}

impl Policy for Changer {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Changes what its settings name.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &[];
    const CHANGES: &'static [&'static str] = &["vcpus", "memory", "boot.command_line", "name"];

    type Settings = Settings;

    fn admit(settings: Settings, request: Request) -> Verdict {
        if settings.only_vcpus.is_some_and(|vcpus| vcpus != request.guest.vcpus) {
            return allow();
        }
        let value = match (settings.number, settings.text) {
            _ if settings.restless => Value::Number(u64::from(request.guest.vcpus) + 1),
            (Some(number), _) => Value::Number(number),
            (None, Some(text)) => Value::Text(text),
            (None, None) => Value::Flag(true),
        };
        allow().with_changes(vec![Change::new(&settings.field, value, "the settings say so")])
    }
}

export_policy!(Changer);
