//! What a plugin is told of a device that comes back, and its ruling, in types of ours.

use casemate_spec::PciAddress;
use serde::{Deserialize, Serialize};

use crate::{request::Attrs, verdict::Reason};

/// What came of a look at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckOutcome {
    /// As it has to be.
    Passed,
    /// It isn't.
    Failed,
    /// Nobody looked.
    NotDone,
}

/// One thing that the host looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// `reset`, `bus-master`, `config`, `scrub`, `firmware`.
    pub name: String,
    /// What came of it.
    pub outcome: CheckOutcome,
    /// How it was done, or why it failed.
    #[serde(default)]
    pub detail: String,
}

/// A physical function that a guest had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleasedDevice {
    /// Where it sits.
    pub address: PciAddress,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    #[serde(default)]
    pub subsystem_vendor: u16,
    /// Subsystem id.
    #[serde(default)]
    pub subsystem_device: u16,
    /// Base class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// The pool of the host's that it is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Who had it.
    pub guest: String,
    /// Whose guest that was.
    pub tenant: String,
    /// What the host looked at.
    pub checks: Vec<Check>,
    /// Why the host puts it into quarantine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantined: Option<String>,
    /// In seconds since 1970-01-01T00:00:00Z.
    #[serde(default)]
    pub now_seconds: u64,
    /// What is known besides.
    #[serde(default, skip_serializing_if = "Attrs::is_empty")]
    pub attrs: Attrs,
}

/// What all plugins say of a device together. A plugin can be stricter than the host, never more lenient.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ruling {
    /// Why nobody may have it; empty when the host may have it back.
    pub quarantine: Vec<Reason>,
    /// For an operator; they hold nothing up. What was only watched stands here too.
    pub warnings: Vec<Reason>,
}
