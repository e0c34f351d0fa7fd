//! What the two halves of the test program say to each other.

use serde::{Deserialize, Serialize};

/// First argument inside the lab: run the tests that are dealt to it.
pub(crate) const ALL: &str = "--inside-lab";
/// First argument in a test's own process: run this one.
pub(crate) const ONE: &str = "--one-test";
/// The lab's share, as the inside sees it.
pub(crate) const SHARE: &str = "/lab/out";
/// On the share: one [`Event`] a line.
pub(crate) const EVENTS: &str = "events";
/// On the share: what the lab is to do, one [`Order`] a line.
pub(crate) const ORDERS: &str = "orders";
/// Where the programs under test lie; set outside, read inside.
pub(crate) const PROGRAMS: &str = "CASEMATE_PROGRAMS";
/// Set to 1, long tests run too.
pub(crate) const LONG: &str = "CASEMATE_LONG";

/// Set to 1, tests that need a lab are not run: whoever runs all of the workspace's runs these by themselves.
pub const NO_LABS: &str = "CASEMATE_NO_LABS";

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    Skipped(String),
}

/// What the outside wants next. A lab gets one at a time, so that none is idle while another has tests left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Order {
    /// The test of this name.
    Run(String),
    /// Nothing more.
    End,
}

/// What the inside tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Event {
    /// The lab is up.
    Ready,
    /// A test begins.
    Started { name: String },
    /// It has ended.
    Ended { name: String, outcome: Outcome, milliseconds: u64 },
}
