//! The interface `releases`: a device out, a ruling in.

use super::{attrs, bindings::device::exports::casemate::policy::releases as wit, reasons};
use casemate_policy::{self as ours, Reason};

pub(crate) fn device(device: &ours::ReleasedDevice) -> wit::ReleasedDevice {
    wit::ReleasedDevice {
        address: device.address.to_string(),
        vendor: device.vendor,
        device: device.device,
        subsystem_vendor: device.subsystem_vendor,
        subsystem_device: device.subsystem_device,
        class: device.class,
        pool: device.pool.clone(),
        guest: device.guest.clone(),
        tenant: device.tenant.clone(),
        checks: device.checks.iter().map(check).collect(),
        quarantined: device.quarantined.clone(),
        now_seconds: device.now_seconds,
        attrs: attrs(&device.attrs),
    }
}

fn check(check: &ours::Check) -> wit::Check {
    wit::Check {
        name: check.name.clone(),
        outcome: match check.outcome {
            ours::CheckOutcome::Passed => wit::Outcome::Passed,
            ours::CheckOutcome::Failed => wit::Outcome::Failed,
            ours::CheckOutcome::NotDone => wit::Outcome::NotDone,
        },
        detail: check.detail.clone(),
    }
}

/// A plugin's ruling, checked: whether the host may have the device, and reasons or warnings.
pub(crate) fn ruling(plugin: &str, ruling: wit::Ruling) -> Result<(bool, Vec<Reason>), String> {
    match ruling {
        wit::Ruling::GiveBack(warnings) => Ok((true, reasons(plugin, warnings)?)),
        wit::Ruling::Quarantine(why) if why.is_empty() => Err("it condemns without a reason".into()),
        wit::Ruling::Quarantine(why) => Ok((false, reasons(plugin, why)?)),
    }
}
