//! The table `[hotplug]`: slots for what comes while the guest runs.

use serde::Deserialize;
use toml::Spanned;

use crate::{
    ByteSize, Refusal,
    guest::{LIMITS, Reader, short},
};

/// A bridge's windows are multiples of this.
const WINDOW_STEP_BYTES: u64 = 1 << 20;
/// Eight slots with the most of each fit into the guest's address space beside everything else.
const MEMORY_MOST_BYTES: u64 = 32 << 20;
const PREFETCHABLE_MOST_BYTES: u64 = 16 << 30;

/// Root ports of the guest, each with a slot that a disk, a network card or a device can be put into while it runs, and
/// the address space that is set aside for what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hotplug {
    /// How many; 0 to [`Limits::hotplug_slots`](crate::Limits::hotplug_slots).
    pub slots: u8,
    /// For each slot, addresses below 4 GiB for registers that are not prefetchable: 1 MiB to 32 MiB, whole MiB.
    pub memory: ByteSize,
    /// For each slot, addresses for prefetchable registers: 1 MiB to 16 GiB, whole MiB.
    pub prefetchable_memory: ByteSize,
}

impl Default for Hotplug {
    /// No slots.
    fn default() -> Self {
        Self {
            slots: 0,
            memory: ByteSize::from_bytes(8 << 20),
            prefetchable_memory: ByteSize::from_bytes(256 << 20),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawHotplug {
    slots: Option<Spanned<i64>>,
    memory: Option<Spanned<String>>,
    prefetchable_memory: Option<Spanned<String>>,
}

impl Reader<'_> {
    pub(crate) fn hotplug(&mut self, raw: RawHotplug) -> Result<Hotplug, Refusal> {
        let mut hotplug = Hotplug::default();
        if let Some(raw) = raw.slots {
            let location = self.note(&raw);
            let most = LIMITS.hotplug_slots;
            let slots = u8::try_from(*raw.get_ref()).ok().filter(|slots| *slots <= most);
            hotplug.slots = slots.ok_or_else(|| {
                let cause = format!("a guest cannot have {} slots for hot-plug", raw.get_ref());
                Refusal::new("bad-hotplug", "", cause, format_args!("use 0 to {most}")).at(Some(location))
            })?;
        }
        if let Some(raw) = raw.memory {
            hotplug.memory = self.window(&raw, MEMORY_MOST_BYTES)?;
        }
        if let Some(raw) = raw.prefetchable_memory {
            hotplug.prefetchable_memory = self.window(&raw, PREFETCHABLE_MOST_BYTES)?;
        }
        Ok(hotplug)
    }

    fn window(&mut self, raw: &Spanned<String>, most: u64) -> Result<ByteSize, Refusal> {
        let location = self.note(raw);
        let size: Option<ByteSize> = raw.get_ref().parse().ok();
        let good = |size: &ByteSize| {
            (WINDOW_STEP_BYTES..=most).contains(&size.bytes())
                && size.bytes().is_multiple_of(WINDOW_STEP_BYTES)
        };
        size.filter(good).ok_or_else(|| {
            let cause = format!("{:?} is not a size that a slot's window can have", short(raw.get_ref()));
            let remedy = format!("use whole MiB, from 1 MiB to {}", ByteSize::from_bytes(most));
            Refusal::new("bad-hotplug", "", cause, remedy).at(Some(location))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};

    fn with(table: &str) -> Result<Hotplug, Refusal> {
        parse(&format!("{GOOD}\n[hotplug]\n{table}")).map(|located| located.guest.hotplug)
    }

    #[test]
    fn there_are_no_slots_unless_asked_for() {
        assert_eq!(parse(GOOD).unwrap().guest.hotplug, Hotplug::default());
        assert_eq!(with("").unwrap().slots, 0);
        let asked = with("slots = 8\nmemory = \"32 MiB\"\nprefetchable_memory = \"16 GiB\"").unwrap();
        assert_eq!(
            (asked.slots, asked.memory.bytes(), asked.prefetchable_memory.bytes()),
            (8, 32 << 20, 16 << 30)
        );
    }

    #[test]
    fn what_no_port_can_have_is_refused() {
        for table in [
            "slots = 9",
            "slots = -1",
            "memory = \"0\"",
            "memory = \"33 MiB\"",
            "memory = \"1500 KiB\"",
            "prefetchable_memory = \"17 GiB\"",
            "prefetchable_memory = \"much\"",
        ] {
            let refusal = with(table).unwrap_err();
            assert_eq!(refusal.code, "bad-hotplug", "{table}");
            assert!(refusal.to_string().contains(":23: hotplug."), "{refusal}");
        }
    }
}
