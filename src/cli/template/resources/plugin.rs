//! Governor `@name@`: who uses much for long gets a smaller share of the processors. Put your own rule in its place.

use casemate_plugin_sdk::{Action, Deed, Governor, Reason, Samples, act, export_governor};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Processors that a guest may use before it yields, on average over an interval.
    most: f64,
}

struct Plugin;

impl Governor for Plugin {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["busy", "calm"];
    const DEEDS: &'static [&'static str] = &["cpu-weight"];

    type Settings = Settings;
    /// Nothing is remembered. A type that serde can write and read would be.
    type State = ();

    fn tick(settings: Settings, samples: Samples, _: &mut ()) -> Vec<Action> {
        let mut actions = Vec::new();
        for guest in samples.guests.iter().filter(|guest| guest.governed) {
            let used = guest.cpu.processors(samples.interval_ms);
            if used > settings.most && guest.knobs.cpu_weight != 50 {
                let why = Reason::new("busy", format!("it uses {used:.1} processors, more than {}", settings.most));
                actions.push(act(guest, Deed::CpuWeight(50), why));
            } else if used <= settings.most && guest.knobs.cpu_weight != 100 {
                actions.push(act(guest, Deed::CpuWeight(100), Reason::new("calm", "it is calm again")));
            }
        }
        actions
    }
}

export_governor!(Plugin);

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::testing::{guest_sample, samples};

    use super::*;

    #[test]
    fn who_is_busy_yields() {
        let mut guest = guest_sample("web");
        guest.cpu.used_us = 1_500_000;
        let actions = Plugin::tick(Settings { most: 1.0 }, samples(vec![guest]), &mut ());
        assert_eq!(actions[0].deed, Deed::CpuWeight(50));
    }
}
