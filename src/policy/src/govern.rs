//! What governors want together, and what of it is believed.
//!
//! Two that want one thing of a guest to be two things get neither, and both are named. One that fails leaves everything as
//! it is. What may be done at all is the bundle's word; how far is for who does it.

use std::{cell::LazyCell, collections::BTreeMap};

use serde::{Deserialize, Serialize};

use crate::{
    PolicyError,
    bundle::Entry,
    change::CASEMATE,
    decision::tidy_reason,
    limits::HOST_LIMITS,
    process::broken,
    rule::Effect,
    samples::{Action, Deed, Samples},
    talk::Remembered,
    text::{one_line, unhex},
};

/// What governors remember between two ticks, by their names in the bundle: kept by who asks.
pub type Memory = BTreeMap<String, Vec<u8>>;

/// What governors want together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tick {
    /// To be done, in the order of the bundle.
    pub actions: Vec<Action>,
    /// Not to be done, since the bundle only watches these plugins for these tenants: what they wanted.
    pub watched: Vec<Action>,
    /// Not to be done, since the bundle doesn't permit it.
    pub forbidden: Vec<Action>,
    /// Not to be done, since two plugins want it otherwise.
    pub conflicts: Vec<Conflict>,
    /// Who failed.
    pub failures: Vec<Failure>,
}

/// Two plugins that want one thing of a guest to be two things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// The one that comes first in the bundle.
    pub one: Action,
    /// The other.
    pub other: Action,
}

/// A plugin that gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Its name in the bundle.
    pub plugin: String,
    /// The stable code: `policy-trap`, `policy-suspended`.
    pub code: String,
    /// All of the message.
    pub message: String,
}

/// A process that fails gives no answer: everything stays as it is.
pub(crate) fn failed(error: &PolicyError) -> Tick {
    let failure = Failure { plugin: CASEMATE.into(), code: error.code().into(), message: error.to_string() };
    Tick { failures: vec![failure], ..Tick::default() }
}

/// What governors want, and remember, as far as it can be an answer of this bundle to these samples. What is to be done is
/// held against the bundle here, where no plugin runs.
pub(crate) fn checked(
    tick: Tick,
    now: &Remembered,
    samples: &Samples,
    entries: &[Entry],
) -> Result<(Tick, Memory), PolicyError> {
    let known = |name: &str| entries.iter().find(|entry| entry.name == name);
    let mut memory = Memory::new();
    for (name, state) in now {
        let state =
            unhex(state).filter(|state| known(name).is_some() && state.len() <= HOST_LIMITS.state_bytes);
        memory.insert(name.clone(), state.ok_or_else(|| broken("it remembers what nobody may".into()))?);
    }
    // Most looks come to nothing.
    let tenants: LazyCell<BTreeMap<&str, &str>, _> = LazyCell::new(|| {
        samples.guests.iter().map(|guest| (guest.name.as_str(), guest.tenant.as_str())).collect()
    });
    let action = |action: Action| {
        let entry = known(&action.why.plugin);
        let tenant = tenants.get(action.guest.as_str());
        let (Some(entry), Some(tenant)) = (entry, tenant) else {
            return Err(broken("it wants something of a guest or for a plugin that isn't there".into()));
        };
        let rule = entry.rules.rule_of(tenant);
        Ok((Action { why: tidy_reason(action.why), rule, ..action }, entry))
    };
    let only = |action_: Action| action(action_).map(|(action, _)| action);
    let to_do = |wanted: Action| {
        let (action, entry) = action(wanted)?;
        let alert = matches!(action.deed, Deed::Alert);
        let permitted = alert || entry.may_do.contains(&action.deed.name());
        match action.rule.effect() {
            Some(Effect::Warn) if alert => Ok(action),
            Some(Effect::DenySoftly | Effect::Deny) if permitted => Ok(action),
            _ => {
                Err(broken(format!("it wants {} done, which the bundle does not permit", action.deed.name())))
            }
        }
    };
    let failure = |failure: Failure| Failure {
        plugin: one_line(&failure.plugin),
        code: one_line(&failure.code),
        message: one_line(&failure.message),
    };
    let conflict =
        |conflict: Conflict| Ok(Conflict { one: only(conflict.one)?, other: only(conflict.other)? });
    let Tick { actions, watched, forbidden, conflicts, failures } = tick;
    let tick = Tick {
        actions: actions.into_iter().map(to_do).collect::<Result<_, _>>()?,
        watched: watched.into_iter().map(only).collect::<Result<_, _>>()?,
        forbidden: forbidden.into_iter().map(only).collect::<Result<_, _>>()?,
        conflicts: conflicts.into_iter().map(conflict).collect::<Result<_, PolicyError>>()?,
        failures: failures.into_iter().map(failure).collect(),
    };
    Ok((tick, memory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GuestSample, verdict::Reason};
    use std::path::Path;

    fn entries() -> Vec<Entry> {
        let plugin = |name: &str, rest: &str| {
            let digest = "0".repeat(64);
            format!("[[plugin]]\nname = {name:?}\npath = \"x\"\nsha256 = {digest:?}\n{rest}")
        };
        let text = plugin("a", "may_do = [\"pause\"]\n")
            + &plugin("b", "mode = \"monitor\"\nmay_do = [\"pause\"]\n");
        crate::bundle::parse(Path::new("b.toml"), &text).unwrap()
    }

    fn told(plugin: &str, guest: &str, deed: Deed) -> Result<Tick, String> {
        let guests =
            vec![GuestSample { name: "web".into(), tenant: "acme".into(), ..GuestSample::default() }];
        let samples = Samples { guests, ..Samples::default() };
        let why = Reason { plugin: plugin.into(), ..Reason::of_casemate("c", "m\n".into()) };
        let action = Action { guest: guest.into(), deed, why, rule: crate::Rule::default() };
        let tick = Tick { actions: vec![action], ..Tick::default() };
        checked(tick, &Vec::new(), &samples, &entries()).map(|(tick, _)| tick).map_err(|e| e.to_string())
    }

    #[test]
    fn what_the_bundle_does_not_permit_is_not_done_whoever_says_so() {
        assert_eq!(told("a", "web", Deed::Pause).unwrap().actions[0].why.message, "m\u{fffd}");
        assert!(told("a", "web", Deed::Alert).is_ok());
        assert!(told("a", "web", Deed::Stop).unwrap_err().contains("wants stop done"));
        assert!(told("b", "web", Deed::Pause).unwrap_err().contains("wants pause done"));
        assert!(told("c", "web", Deed::Pause).unwrap_err().contains("isn't there"));
        assert!(told("a", "db", Deed::Pause).unwrap_err().contains("isn't there"));
    }

    #[test]
    fn nobody_remembers_more_than_may_be_kept() {
        let check = |name: &str, state: String| {
            let tick = checked(Tick::default(), &vec![(name.into(), state)], &Samples::default(), &entries());
            tick.map(|(_, memory)| memory)
        };
        let memory = check("a", "00ff".into()).unwrap();
        assert_eq!(memory, Memory::from([("a".to_owned(), vec![0, 0xff])]));
        for (name, state) in [
            ("c", "00".into()),
            ("a", "0".into()),
            ("a", "zz".into()),
            ("a", "é0".into()),
            ("a", "00".repeat((64 << 10) + 1)),
        ] {
            assert!(check(name, state).is_err());
        }
    }
}
