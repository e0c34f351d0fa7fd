//! A judge of devices that does as its settings say, for the tests of the host.

use casemate_plugin_sdk::{Outcome, Reason, ReleasedDevice, Releases, Ruling, export_releases, ruling};
use serde::Deserialize;

struct Warden;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Checks that have to be passed.
    #[serde(default)]
    wants: Vec<String>,
    /// Stops.
    #[serde(default)]
    trap: bool,
    /// Puts it into quarantine and says no reason.
    #[serde(default)]
    mute: bool,
}

impl Releases for Warden {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Wants checks to be passed.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["not-passed"];

    type Settings = Settings;

    fn release(settings: Settings, device: ReleasedDevice) -> Ruling {
        if settings.trap {
            std::process::abort();
        }
        if settings.mute {
            return Ruling::Quarantine(Vec::new());
        }
        let passed = |check: &String| device.outcome(check) == Some(Outcome::Passed);
        let failed = settings.wants.iter().filter(|check| !passed(check));
        let reason = |check: &String| Reason::new("not-passed", format!("{check} was not passed"));
        ruling(failed.map(reason).collect())
    }
}

export_releases!(Warden);
