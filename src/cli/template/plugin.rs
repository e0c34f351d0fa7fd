//! Policy `@name@`: how long guests' names may be. Put your own rule in its place.

use casemate_plugin_sdk::{Policy, Reason, Request, Verdict, export_policy, verdict};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// The most characters that a guest's name may have.
    longest: usize,
}

struct Plugin;

impl Policy for Plugin {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["long-name"];

    type Settings = Settings;

    fn admit(settings: Settings, request: Request) -> Verdict {
        let (length, longest) = (request.guest.name.len(), settings.longest);
        let mut reasons = Vec::new();
        if length > longest {
            let message = format!("{length} characters are more than the {longest} that a name may have");
            reasons.push(Reason::new("long-name", message).field("name").remedy("choose a shorter name"));
        }
        verdict(reasons, Vec::new())
    }
}

export_policy!(Plugin);

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::testing::request;

    use super::*;

    #[test]
    fn a_name_may_be_exactly_so_long() {
        assert!(matches!(Plugin::admit(Settings { longest: 3 }, request()), Verdict::Allow(_)));
        assert!(matches!(Plugin::admit(Settings { longest: 2 }, request()), Verdict::Deny(_)));
    }
}
