//! What a plugin may change of a guest, and the invariants that hold whatever plugins say.

use std::fmt;

use casemate_spec::{ByteSize, LIMITS};
use serde::{Deserialize, Serialize};

use crate::{
    request::{GuestSpec, Request},
    verdict::{Reason, Severity},
};

/// A field of the guest's file that a plugin may change, where the bundle permits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Field {
    /// Processors.
    #[serde(rename = "vcpus")]
    Vcpus,
    /// Memory, in bytes.
    #[serde(rename = "memory")]
    Memory,
    /// The kernel's command line.
    #[serde(rename = "boot.command_line")]
    CommandLine,
}

impl Field {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vcpus, Self::Memory, Self::CommandLine];

    /// The key in the guest's file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpus => "vcpus",
            Self::Memory => "memory",
            Self::CommandLine => "boot.command_line",
        }
    }

    /// The field of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|field| field.name() == name)
    }

    /// What the guest has there.
    pub fn value(self, guest: &GuestSpec) -> Value {
        match self {
            Self::Vcpus => Value::Number(guest.vcpus.into()),
            Self::Memory => Value::Number(guest.memory_bytes),
            Self::CommandLine => Value::Text(guest.command_line.clone()),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A field's value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// Of `vcpus` and `memory`.
    Number(u64),
    /// Of `boot.command_line`.
    Text(String),
}

/// What a plugin changed. Prints as a line of a diff.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The plugin, by its name in the bundle.
    pub plugin: String,
    /// The field.
    pub field: Field,
    /// What it was.
    pub from: Value,
    /// What it is.
    pub to: Value,
    /// Why, in the plugin's words.
    pub reason: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Value| match value {
            Value::Number(bytes) if self.field == Field::Memory => ByteSize::from_bytes(*bytes).to_string(),
            Value::Number(number) => number.to_string(),
            Value::Text(text) => format!("{text:?}"),
        };
        let (from, to) = (show(&self.from), show(&self.to));
        write!(f, "{}: {from} -> {to} ({}: {})", self.field, self.plugin, self.reason)
    }
}

/// Puts a value in its field.
///
/// # Errors
/// Why it can't be there.
pub fn apply(guest: &mut GuestSpec, field: Field, value: &Value) -> Result<(), String> {
    match (field, value) {
        (Field::Vcpus, Value::Number(vcpus)) => {
            let most = u64::from(LIMITS.vcpus);
            let vcpus = u32::try_from(*vcpus).ok().filter(|_| (1..=most).contains(vcpus));
            guest.vcpus = vcpus.ok_or_else(|| format!("a guest has 1 to {most} vCPUs"))?;
        }
        (Field::Memory, Value::Number(bytes)) => {
            let fits = (LIMITS.memory_least_bytes..=LIMITS.memory_most_bytes).contains(bytes)
                && bytes.is_multiple_of(LIMITS.memory_step_bytes);
            if !fits {
                return Err(format!("{bytes} bytes are not an amount of memory that a guest can have"));
            }
            guest.memory_bytes = *bytes;
        }
        (Field::CommandLine, Value::Text(line)) => {
            let printable = line.bytes().all(|b| (b' '..=b'~').contains(&b));
            if line.len() > LIMITS.command_line_bytes || !printable {
                let most = LIMITS.command_line_bytes;
                return Err(format!("a command line has at most {most} printable ASCII characters"));
            }
            guest.command_line.clone_from(line);
        }
        (_, Value::Number(_)) => return Err(format!("{field} is a text, not a number")),
        (_, Value::Text(_)) => return Err(format!("{field} is a number, not a text")),
    }
    Ok(())
}

/// The name under which Casemate's own reasons are given. No plugin can be called so.
pub const CASEMATE: &str = "casemate";

/// What no plugin can allow.
pub fn invariants(request: &Request) -> Vec<Reason> {
    let guest = &request.guest;
    let others = || request.beside.iter().filter(|other| other.name != guest.name);
    let mut reasons = Vec::new();
    let mut refuse = |code: &str, field: String, message: String, remedy: &str| {
        let reason = Reason::of_casemate(code, message);
        let (field, remedy) = (Some(field), Some(remedy.into()));
        reasons.push(Reason { severity: Severity::Critical, field, remedy, ..reason });
    };
    for (slot, device) in guest.devices.iter().enumerate() {
        let field = format!("device[{slot}].address");
        if let Some(other) = others().find(|other| other.devices.contains(&device.address)) {
            let message = format!("guest {} has {}", other.name, device.address);
            refuse("device-taken", field.clone(), message, "stop that guest first");
        }
        if guest.devices.iter().take(slot).any(|before| before.address == device.address) {
            refuse("device-twice", field, format!("{} is there twice", device.address), "remove one");
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guest() -> GuestSpec {
        let request: Request = serde_json::from_str(include_str!("../examples/request.json")).unwrap();
        request.guest
    }

    #[test]
    fn a_value_that_the_guests_file_could_not_have_is_not_taken() {
        for (field, value) in [
            (Field::Vcpus, Value::Number(0)),
            (Field::Vcpus, Value::Number(65)),
            (Field::Vcpus, Value::Number(u64::MAX)),
            (Field::Vcpus, Value::Text("2".into())),
            (Field::Memory, Value::Number(0)),
            (Field::Memory, Value::Number((1 << 30) + 1)),
            (Field::Memory, Value::Number(1 << 50)),
            (Field::CommandLine, Value::Text("x".repeat(2048))),
            (Field::CommandLine, Value::Text("a\nb".into())),
            (Field::CommandLine, Value::Number(1)),
        ] {
            let mut changed = guest();
            assert!(apply(&mut changed, field, &value).is_err(), "{field} {value:?}");
            assert_eq!(changed, guest());
        }
    }

    #[test]
    fn a_change_reads_as_a_diff() {
        let change = Change {
            plugin: "small".into(),
            field: Field::Memory,
            from: Value::Number(8 << 30),
            to: Value::Number(4 << 30),
            reason: "enough".into(),
        };
        assert_eq!(change.to_string(), "memory: 8 GiB -> 4 GiB (small: enough)");
        let json = serde_json::to_string(&change).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&json).unwrap(), change);
    }

    #[test]
    fn no_device_is_given_twice() {
        let mut request: Request = serde_json::from_str(include_str!("../examples/request.json")).unwrap();
        assert_eq!(invariants(&request), []);
        let device = request.guest.devices[0].clone();
        request.beside[0].devices.push(device.address);
        request.guest.devices.push(device);
        let codes: Vec<_> = invariants(&request).into_iter().map(|reason| reason.code).collect();
        assert_eq!(codes, ["device-taken", "device-taken", "device-twice"]);
    }

    proptest! {
        #[test]
        fn what_was_applied_is_what_is_there(number: u64, text in ".{0,40}") {
            for field in Field::ALL {
                for value in [Value::Number(number), Value::Text(text.clone())] {
                    let mut changed = guest();
                    if apply(&mut changed, field, &value).is_ok() {
                        prop_assert_eq!(field.value(&changed), value);
                    }
                }
            }
        }
    }
}
