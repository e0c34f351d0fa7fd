//! What a policy plugin for Casemate is written with.
//!
//! A plugin is one type that implements [`Policy`] and one line, `casemate_plugin_sdk::export_policy!(MyPolicy);`. It
//! is asked with a typed [`Request`] and answers with a [`Verdict`]; its settings are a type of its own that serde
//! reads. It has no clock, no files, no network and no randomness, it remembers nothing between two calls, and the
//! only thing it can call is [`log`]. The contract itself, with a word on each field, is `policies/wit`.
//!
//! There are two other kinds: [`Governor`] looks after running guests, [`Releases`] judges devices as they come back. Each has
//! a line of its own, `export_governor!` and `export_releases!`.
//!
//! A plugin's rules are ordinary functions: test them with `cargo test`, without any Wasm.

#[allow(missing_docs, reason = "generated from policies/wit, where each item is documented")]
pub mod bindings {
    //! Each exported interface has a macro of its own, so that a plugin of any kind is `meta` and one other.

    wit_bindgen::generate!({
        path: "../../policies/wit",
        world: "plugin",
        additional_derives: [Clone, PartialEq],
        pub_export_macro: true,
        export_macro_name: "export_meta",
        default_bindings_module: "casemate_plugin_sdk::bindings",
    });

    pub mod admission {
        wit_bindgen::generate!({
            path: "../../policies/wit",
            inline: "package casemate:sdk; world gate-alone {
                import casemate:policy/log@1.1.0;
                export casemate:policy/gate@1.1.0;
            }",
            world: "casemate:sdk/gate-alone",
            with: {
                "casemate:policy/types@1.1.0": crate::bindings::casemate::policy::types,
                "casemate:policy/log@1.1.0": crate::bindings::casemate::policy::log,
            },
            additional_derives: [Clone, PartialEq],
            pub_export_macro: true,
            export_macro_name: "export_gate",
            default_bindings_module: "casemate_plugin_sdk::bindings::admission",
        });
    }

    pub mod resources {
        wit_bindgen::generate!({
            path: "../../policies/wit",
            inline: "package casemate:sdk; world governor-alone {
                import casemate:policy/log@1.1.0;
                export casemate:policy/governor@1.1.0;
            }",
            world: "casemate:sdk/governor-alone",
            with: {
                "casemate:policy/types@1.1.0": crate::bindings::casemate::policy::types,
                "casemate:policy/log@1.1.0": crate::bindings::casemate::policy::log,
            },
            additional_derives: [Clone, PartialEq],
            pub_export_macro: true,
            export_macro_name: "export_governor",
            default_bindings_module: "casemate_plugin_sdk::bindings::resources",
        });
    }

    pub mod device {
        wit_bindgen::generate!({
            path: "../../policies/wit",
            inline: "package casemate:sdk; world releases-alone {
                import casemate:policy/log@1.1.0;
                export casemate:policy/releases@1.1.0;
            }",
            world: "casemate:sdk/releases-alone",
            with: {
                "casemate:policy/types@1.1.0": crate::bindings::casemate::policy::types,
                "casemate:policy/log@1.1.0": crate::bindings::casemate::policy::log,
            },
            additional_derives: [Clone, PartialEq],
            pub_export_macro: true,
            export_macro_name: "export_releases",
            default_bindings_module: "casemate_plugin_sdk::bindings::device",
        });
    }
}

mod attrs;
mod bytes;
mod governor;
mod pattern;
mod reason;
mod release;
mod settings;
#[cfg(not(target_arch = "wasm32"))]
pub mod testing;

use std::marker::PhantomData;

pub use attrs::{Processor, attr};
pub use bindings::casemate::policy::{
    log::Level,
    types::{
        Allowed, Amounts, Attrs, Change, Denied, Device, Disk, File, GuestSpec, HostState, Neighbour, Net,
        Operation, Reason, Request, Severity, Tenant, Value, Verdict,
    },
};
use bindings::{admission::exports::casemate::policy::gate, exports::casemate::policy::meta};
pub use bytes::Bytes;
pub use governor::{
    Action, Answer, Bounds, CpuSample, Deed, DiskSample, Governor, GovernorComponent, GuestSample,
    HostSample, Knobs, MemorySample, NetSample, Pressure, Rate, Samples, act,
};
pub use pattern::Pattern;
pub use reason::{allow, deny, verdict};
pub use release::{Check, Outcome, ReleasedDevice, Releases, ReleasesComponent, Ruling, ruling};
pub use serde;

/// A policy: what a plugin's author writes.
pub trait Policy {
    /// As the plugin's file is called: `limits`.
    const NAME: &'static str;
    /// One line for people.
    const SUMMARY: &'static str;
    /// The plugin's version: `env!("CARGO_PKG_VERSION")`.
    const VERSION: &'static str;
    /// A JSON Schema of the settings.
    const SETTINGS_SCHEMA: Option<&'static str> = None;
    /// The codes of all reasons that [`Policy::admit`] gives: `casemate policy test` tells which were never seen.
    const REASONS: &'static [&'static str];
    /// The fields that it may want to change: `boot.command_line`.
    const CHANGES: &'static [&'static str] = &[];
    /// What the host has to look up for it: `kernel-sha256`, `initrd-sha256`, `disk-sha256`.
    const NEEDS: &'static [&'static str] = &[];

    /// What the bundle's `settings` table is read into. Let serde refuse unknown fields.
    type Settings: serde::de::DeserializeOwned;

    /// What serde can't see: two settings that contradict each other.
    ///
    /// # Errors
    /// All that is wrong.
    fn check(_settings: &Self::Settings) -> Result<(), Vec<Reason>> {
        Ok(())
    }

    /// May this be done?
    fn admit(settings: Self::Settings, request: Request) -> Verdict;
}

/// Writes a line to the decision's log; nobody's decision depends on it.
pub fn log(level: Level, message: &str) {
    bindings::casemate::policy::log::write(level, message);
}

/// Makes a [`Policy`] the component's exports.
#[macro_export]
macro_rules! export_policy {
    ($policy:ty) => {
        type CasematePolicy = $crate::Component<$policy>;
        $crate::bindings::export_meta!(CasematePolicy with_types_in $crate::bindings);
        $crate::bindings::admission::export_gate!(CasematePolicy with_types_in $crate::bindings::admission);
    };
}

/// A [`Policy`] as the contract's exports. Plugins get it from [`export_policy!`].
pub struct Component<P>(PhantomData<P>);

impl<P: Policy> meta::Guest for Component<P> {
    fn describe() -> meta::Description {
        meta::Description {
            name: P::NAME.into(),
            version: P::VERSION.into(),
            summary: P::SUMMARY.into(),
            settings_schema: P::SETTINGS_SCHEMA.map(Into::into),
            reasons: list(P::REASONS),
            changes: list(P::CHANGES),
            needs: list(P::NEEDS),
            attrs: Vec::new(),
        }
    }

    fn check_settings(settings: String) -> Result<(), Vec<Reason>> {
        P::check(&read_settings(&settings).map_err(|reason| vec![reason])?)
    }
}

impl<P: Policy> gate::Guest for Component<P> {
    fn admit(settings: String, request: Request) -> Verdict {
        match read_settings(&settings) {
            Ok(settings) => P::admit(settings, request),
            Err(reason) => verdict(vec![reason], Vec::new()),
        }
    }
}

fn list(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn read_settings<S: serde::de::DeserializeOwned>(settings: &str) -> Result<S, Reason> {
    serde_json::from_str(settings).map_err(|error| settings::reason(settings, &error))
}
