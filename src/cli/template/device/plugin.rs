//! Policy `@name@`: devices of some classes go back to the host only with these checks passed. Put your own rule in its place.

use casemate_plugin_sdk::{Outcome, Reason, ReleasedDevice, Releases, Ruling, export_releases, ruling};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Checks that have to be passed: `scrub`, `firmware`.
    wants: Vec<String>,
}

struct Plugin;

impl Releases for Plugin {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["unproven"];

    type Settings = Settings;

    fn release(settings: Settings, device: ReleasedDevice) -> Ruling {
        // Class 01: what stores data.
        if device.class >> 16 != 1 {
            return ruling(Vec::new());
        }
        let passed = |check: &String| device.outcome(check) == Some(Outcome::Passed);
        let failed = settings.wants.iter().filter(|check| !passed(check));
        ruling(failed.map(|check| Reason::new("unproven", format!("{check} was not passed"))).collect())
    }
}

export_releases!(Plugin);

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::testing::released;

    use super::*;

    #[test]
    fn a_drive_has_to_pass() {
        let mut drive = released();
        drive.class = 0x01_08_02;
        let wants = |check: &str| Settings { wants: vec![check.into()] };
        assert!(matches!(Plugin::release(wants("reset"), drive.clone()), Ruling::GiveBack(_)));
        assert!(matches!(Plugin::release(wants("scrub"), drive), Ruling::Quarantine(_)));
    }
}
