//! From the answers of all governors to one list of what is to be done.
//!
//! Two that want one thing of a guest to be two things get neither, and both are named. One that fails leaves everything as
//! it is. What may be done at all is the bundle's word; how far is for who does it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    PolicyError,
    contract::{
        self,
        governor::{Governed, Wanted},
    },
    engine::Engine,
    plugin::{Answer, Kind, Plugin},
    rule::Effect,
    samples::{Action, Deed, Knob, Samples},
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

impl Failure {
    fn new(plugin: &Plugin, error: &PolicyError) -> Self {
        Self { plugin: plugin.name.clone(), code: error.code().into(), message: error.to_string() }
    }
}

impl Engine {
    /// Asks all governors what is to be done. `memory` is what they remember; empty at first.
    pub fn tick(&self, samples: &Samples, memory: &mut Memory) -> Tick {
        let mut tick = Tick::default();
        let mut question = None;
        let tenants: BTreeMap<&str, &str> =
            samples.guests.iter().map(|guest| (guest.name.as_str(), guest.tenant.as_str())).collect();
        for plugin in self.plugins.iter().filter(|plugin| plugin.is(Kind::Resources)) {
            if !plugin.rules.is_ever_asked() {
                continue;
            }
            let question = question.get_or_insert_with(|| contract::governor::samples(samples));
            let state = memory.get(&plugin.name).map_or(&[][..], Vec::as_slice);
            match plugin.counted(|| plugin.tick(&self.ticker, question, state)) {
                Ok(Answer { value: Governed { wanted, state }, .. }) => {
                    memory.insert(plugin.name.clone(), state);
                    for Wanted { guest, deed, why } in wanted {
                        // A guest that isn't there any more, or never was.
                        let Some(tenant) = tenants.get(guest.as_str()) else { continue };
                        let rule = plugin.rules.rule_of(tenant);
                        tick.sort(plugin, Action { guest, deed, why, rule });
                    }
                }
                Err(error) => tick.failures.push(Failure::new(plugin, &error)),
            }
        }
        tick.settle();
        tick
    }
}

impl Tick {
    fn sort(&mut self, plugin: &Plugin, action: Action) {
        let alert = matches!(action.deed, Deed::Alert);
        match action.rule.effect() {
            None => {}
            _ if !alert && !plugin.may_do.contains(&action.deed.name()) => self.forbidden.push(action),
            Some(Effect::Record) => self.watched.push(action),
            Some(Effect::Warn) if !alert => self.watched.push(action),
            Some(_) => self.actions.push(action),
        }
    }

    /// Takes out what contradicts each other, and what is said twice.
    fn settle(&mut self) {
        let mut first: BTreeMap<(String, Knob), Action> = BTreeMap::new();
        let mut contested: Vec<(String, Knob)> = Vec::new();
        let mut settled = Vec::new();
        for action in std::mem::take(&mut self.actions) {
            if action.deed.knob() == Knob::Alert {
                settled.push(action);
                continue;
            }
            let key = (action.guest.clone(), action.deed.knob());
            match first.get(&key) {
                // One plugin that changes its mind: its last word holds.
                Some(one) if one.why.plugin == action.why.plugin => {
                    first.insert(key, action);
                }
                Some(one) if one.deed == action.deed => {}
                Some(one) => {
                    self.conflicts.push(Conflict { one: one.clone(), other: action });
                    contested.push(key);
                }
                None => {
                    first.insert(key, action);
                }
            }
        }
        contested.iter().for_each(|key| {
            first.remove(key);
        });
        settled.extend(first.into_values());
        self.actions = settled;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        request::Attrs,
        rule::Rule,
        verdict::{Reason, Severity},
    };

    fn action(plugin: &str, guest: &str, deed: Deed) -> Action {
        let why = Reason {
            plugin: plugin.into(),
            code: "c".into(),
            severity: Severity::Low,
            message: String::new(),
            field: None,
            remedy: None,
            overridable: false,
            attrs: Attrs::new(),
        };
        Action { guest: guest.into(), deed, why, rule: Rule::default() }
    }

    #[test]
    fn two_that_fight_get_neither_and_both_are_named() {
        let actions = vec![
            action("a", "web", Deed::CpuWeight(100)),
            action("b", "web", Deed::CpuWeight(200)),
            action("b", "db", Deed::CpuWeight(200)),
            action("a", "web", Deed::Alert),
            action("b", "web", Deed::Alert),
            action("a", "db", Deed::Pause),
            action("b", "db", Deed::Resume),
            action("a", "web", Deed::Balloon(1)),
            action("b", "web", Deed::Balloon(1)),
            action("a", "web", Deed::Balloon(2)),
        ];
        let mut tick = Tick { actions, ..Tick::default() };
        tick.settle();
        let done: Vec<_> = tick.actions.iter().map(|a| format!("{} {}", a.guest, a.deed)).collect();
        assert_eq!(done, ["web alert", "web alert", "db cpu-weight 200", "web balloon 2"]);
        let named: Vec<_> =
            tick.conflicts.iter().map(|c| (c.one.why.plugin.as_str(), c.other.why.plugin.as_str())).collect();
        assert_eq!(named, [("a", "b"), ("a", "b")]);
    }
}
