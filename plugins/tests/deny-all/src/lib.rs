//! A policy that says no to everything: tests put it in another's place and see the verdict flip.

use casemate_plugin_sdk::{Policy, Reason, Request, Verdict, deny, export_policy, serde::Deserialize};

struct DenyAll;

#[derive(Deserialize)]
#[serde(crate = "casemate_plugin_sdk::serde", deny_unknown_fields)]
struct Nothing {}

impl Policy for DenyAll {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Says no to everything.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["closed"];

    type Settings = Nothing;

    fn admit(_: Nothing, request: Request) -> Verdict {
        deny(
            Reason::new("closed", format!("nothing may start, {} neither", request.guest.name))
                .remedy("come back later"),
        )
    }
}

export_policy!(DenyAll);
