//! Policies judge devices as they come back: told what the host found, they can be stricter than it.

use casemate_host::{PciFunction, Returned};
use casemate_policy::{Check, CheckOutcome, Engine, ReleasedDevice};
use casemate_spec::Guest;

use crate::{Events, Happening, facts, record::now_seconds};

/// Who judges what a guest gives back.
pub(crate) struct Releasing<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) guest: &'a Guest,
    /// The functions as they were before the guest, each with the pool that it is of.
    pub(crate) functions: Vec<(PciFunction, Option<String>)>,
    pub(crate) events: Events,
}

impl Releasing<'_> {
    /// Why it may go to nobody; none when all agree that the host has it back.
    pub(crate) fn judge(&self, returned: &Returned) -> Option<String> {
        let device = self.describe(returned);
        let ruling = self.engine.release(&device);
        let texts = |reasons: &[casemate_policy::Reason]| reasons.iter().map(ToString::to_string).collect();
        let (quarantine, warnings): (Vec<String>, Vec<String>) =
            (texts(&ruling.quarantine), texts(&ruling.warnings));
        if !(quarantine.is_empty() && warnings.is_empty()) {
            self.events.add(
                self.guest.name.as_str(),
                self.guest.tenant.as_str(),
                Happening::DeviceJudged {
                    device: returned.address.to_string(),
                    quarantine: quarantine.clone(),
                    warnings,
                },
            );
        }
        (!quarantine.is_empty()).then(|| format!("a policy refused it: {}", quarantine.join("; ")))
    }

    fn describe(&self, returned: &Returned) -> ReleasedDevice {
        let known = self.functions.iter().find(|(function, _)| function.address == returned.address);
        let (function, pool) = known.map(|(function, pool)| (function, pool.clone())).unzip();
        ReleasedDevice {
            address: returned.address,
            vendor: function.map_or(0, |function| function.vendor),
            device: function.map_or(0, |function| function.device),
            subsystem_vendor: function.map_or(0, |function| function.subsystem_vendor),
            subsystem_device: function.map_or(0, |function| function.subsystem_device),
            class: function.map_or(0, |function| function.class),
            pool: pool.flatten(),
            guest: self.guest.name.to_string(),
            tenant: self.guest.tenant.to_string(),
            checks: checks(returned),
            quarantined: returned.quarantined.clone(),
            now_seconds: now_seconds(),
            attrs: function.map(facts::device).unwrap_or_default(),
        }
    }
}

/// What the host looked at, by the names of `policies/wit/device.wit`.
fn checks(returned: &Returned) -> Vec<Check> {
    let check = |name: &str, outcome, detail: String| Check { name: name.into(), outcome, detail };
    let of = |is_so: bool| if is_so { CheckOutcome::Passed } else { CheckOutcome::Failed };
    let (reset, how) = match &returned.reset {
        Ok(()) => (CheckOutcome::Passed, returned.reset_method.clone()),
        Err(error) => (CheckOutcome::Failed, error.clone()),
    };
    let differences = match returned.config_differences.as_slice() {
        [] => String::new(),
        offsets => format!("differs at {offsets:#x?}").replace('\n', ""),
    };
    let (scrub, scrubbed) = match returned.scrubbed.clone() {
        None => (CheckOutcome::NotDone, String::new()),
        Some(Ok(how)) => (CheckOutcome::Passed, how),
        Some(Err(why)) => (CheckOutcome::Failed, why),
    };
    let firmware = returned.firmware_as_first_seen.map_or(CheckOutcome::NotDone, of);
    vec![
        check("reset", reset, how),
        check("bus-master", of(returned.bus_master_off), String::new()),
        check("config", of(returned.config_as_first_seen), differences),
        check("firmware", firmware, String::new()),
        check("scrub", scrub, scrubbed),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_found_is_told_by_name() {
        let mut returned = Returned {
            address: "0000:03:00.0".parse().unwrap(),
            reset_method: "flr".into(),
            reset: Ok(()),
            iommu_faults: Some(0),
            bus_master_off: true,
            config_as_first_seen: false,
            config_differences: vec![0x10, 0x44],
            scrubbed: None,
            firmware_as_first_seen: Some(true),
            untouched: None,
            returned_to: None,
            quarantined: None,
            error: None,
        };
        let told = |returned: &Returned| -> Vec<String> {
            checks(returned).iter().map(|c| format!("{} {:?} {}", c.name, c.outcome, c.detail)).collect()
        };
        assert_eq!(
            told(&returned),
            [
                "reset Passed flr",
                "bus-master Passed ",
                "config Failed differs at [    0x10,    0x44,]",
                "firmware Passed ",
                "scrub NotDone "
            ]
        );
        returned.scrubbed = Some(Ok("1 namespace formatted".into()));
        assert_eq!(told(&returned)[4], "scrub Passed 1 namespace formatted");
        (returned.reset, returned.firmware_as_first_seen) = (Err("EIO".into()), None);
        let told = told(&returned);
        assert_eq!((told[0].as_str(), told[3].as_str()), ("reset Failed EIO", "firmware NotDone "));
    }
}
