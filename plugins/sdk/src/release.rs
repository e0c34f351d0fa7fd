//! Plugins that judge devices as they come back from guests.

use std::marker::PhantomData;

use serde::de::DeserializeOwned;

use crate::{
    Reason,
    bindings::{device::exports::casemate::policy::releases, exports::casemate::policy::meta},
    list, read_settings,
};
pub use releases::{Check, Outcome, ReleasedDevice, Ruling};

/// A judge of devices: what a plugin's author writes for the world `device`.
pub trait Releases {
    /// As the plugin's file is called.
    const NAME: &'static str;
    /// One line for people.
    const SUMMARY: &'static str;
    /// The plugin's version: `env!("CARGO_PKG_VERSION")`.
    const VERSION: &'static str;
    /// A JSON Schema of the settings.
    const SETTINGS_SCHEMA: Option<&'static str> = None;
    /// The codes of all reasons that it gives.
    const REASONS: &'static [&'static str];

    /// What the bundle's `settings` table is read into. Let serde refuse unknown fields.
    type Settings: DeserializeOwned;

    /// What serde can't see: two settings that contradict each other.
    ///
    /// # Errors
    /// All that is wrong.
    fn check(_settings: &Self::Settings) -> Result<(), Vec<Reason>> {
        Ok(())
    }

    /// May the host have it back?
    fn release(settings: Self::Settings, device: ReleasedDevice) -> Ruling;
}

impl ReleasedDevice {
    /// What came of a check; none when this host doesn't make it.
    pub fn outcome(&self, check: &str) -> Option<Outcome> {
        self.checks.iter().find(|made| made.name == check).map(|made| made.outcome)
    }
}

/// Quarantine when there is a reason, else the host may have it back.
pub fn ruling(reasons: Vec<Reason>) -> Ruling {
    if reasons.is_empty() { Ruling::GiveBack(Vec::new()) } else { Ruling::Quarantine(reasons) }
}

/// Makes a type that implements [`Releases`] the component's exports.
#[macro_export]
macro_rules! export_releases {
    ($releases:ty) => {
        type CasemateReleases = $crate::ReleasesComponent<$releases>;
        $crate::bindings::export_meta!(CasemateReleases with_types_in $crate::bindings);
        $crate::bindings::device::export_releases!(CasemateReleases with_types_in $crate::bindings::device);
    };
}

/// What implements [`Releases`] as the contract's exports. Plugins get it from [`export_releases!`].
pub struct ReleasesComponent<R>(PhantomData<R>);

impl<R: Releases> meta::Guest for ReleasesComponent<R> {
    fn describe() -> meta::Description {
        meta::Description {
            name: R::NAME.into(),
            version: R::VERSION.into(),
            summary: R::SUMMARY.into(),
            settings_schema: R::SETTINGS_SCHEMA.map(Into::into),
            reasons: list(R::REASONS),
            changes: Vec::new(),
            needs: Vec::new(),
            attrs: Vec::new(),
        }
    }

    fn check_settings(settings: String) -> Result<(), Vec<Reason>> {
        R::check(&read_settings(&settings).map_err(|reason| vec![reason])?)
    }
}

impl<R: Releases> releases::Guest for ReleasesComponent<R> {
    fn release(settings: String, device: ReleasedDevice) -> Ruling {
        match read_settings(&settings) {
            Ok(settings) => R::release(settings, device),
            Err(reason) => Ruling::Quarantine(vec![reason]),
        }
    }
}
