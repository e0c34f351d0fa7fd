//! What a plugin is for.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a plugin is for, by what it exports. One can be more than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// It admits guests: `gate`.
    Admission,
    /// It looks after those that run: `governor`.
    Resources,
    /// It judges devices that come back: `releases`.
    Device,
}

impl Kind {
    /// Each, and how the interface begins that makes a plugin one.
    pub const ALL: [(Self, &'static str); 3] = [
        (Self::Admission, "casemate:policy/gate@1."),
        (Self::Resources, "casemate:policy/governor@1."),
        (Self::Device, "casemate:policy/releases@1."),
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admission => "admission",
            Self::Resources => "resources",
            Self::Device => "device",
        })
    }
}
