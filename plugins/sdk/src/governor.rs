//! Governors: plugins that look after running guests.

use std::marker::PhantomData;

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    Reason,
    bindings::{exports::casemate::policy::meta, resources::exports::casemate::policy::governor},
    list, read_settings,
};
pub use governor::{
    Action, Answer, Bounds, CpuSample, Deed, DiskSample, GuestSample, HostSample, Knobs, MemorySample,
    NetSample, Pressure, Rate, Samples,
};

/// A governor: what a plugin's author writes for the world `resources`.
pub trait Governor {
    /// As the plugin's file is called: `fair-share`.
    const NAME: &'static str;
    /// One line for people.
    const SUMMARY: &'static str;
    /// The plugin's version: `env!("CARGO_PKG_VERSION")`.
    const VERSION: &'static str;
    /// A JSON Schema of the settings.
    const SETTINGS_SCHEMA: Option<&'static str> = None;
    /// The codes of all reasons that its actions have: `casemate policy test` tells which were never seen.
    const REASONS: &'static [&'static str];
    /// What it may want to do, by the names in `policies/wit/resources.wit`: `cpu-weight`, `balloon`. `alert` needs not be named.
    const DEEDS: &'static [&'static str];

    /// What the bundle's `settings` table is read into. Let serde refuse unknown fields.
    type Settings: DeserializeOwned;
    /// What it remembers from one call to the next: at most 64 KiB as JSON. `()` when nothing.
    type State: Default + Serialize + DeserializeOwned;

    /// What serde can't see: two settings that contradict each other.
    ///
    /// # Errors
    /// All that is wrong.
    fn check(_settings: &Self::Settings) -> Result<(), Vec<Reason>> {
        Ok(())
    }

    /// What is to be done?
    fn tick(settings: Self::Settings, samples: Samples, state: &mut Self::State) -> Vec<Action>;
}

/// Something to be done to a guest, and why.
pub fn act(guest: &GuestSample, deed: Deed, why: Reason) -> Action {
    Action { guest: guest.name.clone(), deed, why, attrs: Vec::new() }
}

impl Pressure {
    /// The share of an interval in which some task waited: 0 to 1.
    pub fn some_share(&self, interval_ms: u32) -> f64 {
        share(self.some_us, interval_ms)
    }

    /// The share of an interval in which all tasks waited: 0 to 1.
    pub fn full_share(&self, interval_ms: u32) -> f64 {
        share(self.full_us, interval_ms)
    }
}

impl CpuSample {
    /// How many processors it used, on average: 1.5 are one and a half.
    pub fn processors(&self, interval_ms: u32) -> f64 {
        match interval_ms {
            0 => 0.0,
            interval_ms => self.used_us as f64 / (f64::from(interval_ms) * 1_000.0),
        }
    }
}

fn share(part_us: u64, interval_ms: u32) -> f64 {
    match interval_ms {
        0 => 0.0,
        interval_ms => (part_us as f64 / (f64::from(interval_ms) * 1_000.0)).clamp(0.0, 1.0),
    }
}

/// Makes a [`Governor`] the component's exports.
#[macro_export]
macro_rules! export_governor {
    ($governor:ty) => {
        type CasemateGovernor = $crate::GovernorComponent<$governor>;
        $crate::bindings::export_meta!(CasemateGovernor with_types_in $crate::bindings);
        $crate::bindings::resources::export_governor!(CasemateGovernor with_types_in $crate::bindings::resources);
    };
}

/// A [`Governor`] as the contract's exports. Plugins get it from [`export_governor!`].
pub struct GovernorComponent<G>(PhantomData<G>);

impl<G: Governor> meta::Guest for GovernorComponent<G> {
    fn describe() -> meta::Description {
        meta::Description {
            name: G::NAME.into(),
            version: G::VERSION.into(),
            summary: G::SUMMARY.into(),
            settings_schema: G::SETTINGS_SCHEMA.map(Into::into),
            reasons: list(G::REASONS),
            changes: list(G::DEEDS),
            needs: Vec::new(),
            attrs: Vec::new(),
        }
    }

    fn check_settings(settings: String) -> Result<(), Vec<Reason>> {
        G::check(&read_settings(&settings).map_err(|reason| vec![reason])?)
    }
}

impl<G: Governor> governor::Guest for GovernorComponent<G> {
    fn tick(settings: String, samples: Samples, state: Vec<u8>) -> Answer {
        let Ok(settings) = read_settings::<G::Settings>(&settings) else {
            // They were checked when the bundle was opened.
            panic!("its settings cannot be read");
        };
        // What an earlier version left may be of another form.
        let mut state = serde_json::from_slice(&state).unwrap_or_default();
        let actions = G::tick(settings, samples, &mut state);
        Answer { actions, state: serde_json::to_vec(&state).unwrap_or_default(), attrs: Vec::new() }
    }
}
