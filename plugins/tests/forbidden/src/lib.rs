//! A policy that wants what no policy gets: an import that isn't the log.

use casemate_plugin_sdk::{Policy, Request, Verdict, allow, export_policy, serde::Deserialize};

#[allow(missing_docs, reason = "generated")]
mod network {
    wit_bindgen::generate!({
        inline: "
            package tests:network@1.0.0;
            interface connect { open: func(address: string) -> u32; }
            world networked { import connect; }
        ",
        generate_all,
    });
}

struct Forbidden;

#[derive(Deserialize)]
#[serde(crate = "casemate_plugin_sdk::serde")]
struct Nothing {}

impl Policy for Forbidden {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Wants the network.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &[];

    type Settings = Nothing;

    fn admit(_: Nothing, request: Request) -> Verdict {
        network::tests::network::connect::open(&request.tenant.name);
        allow()
    }
}

export_policy!(Forbidden);
