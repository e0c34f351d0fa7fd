//! From the answers of all governors to one list of what is to be done.

use std::{cell::LazyCell, collections::BTreeMap};

use casemate_policy::{
    Action, Conflict, Deed, Effect, Failure, Kind, Knob, Memory, PolicyError, Samples, Tick,
};

use crate::{
    contract::{
        self,
        governor::{Governed, Wanted},
    },
    judge::Judge,
    plugin::{Answer, Plugin},
};

fn failure(plugin: &Plugin, error: &PolicyError) -> Failure {
    Failure { plugin: plugin.name.clone(), code: error.code().into(), message: error.to_string() }
}

impl Judge {
    /// Asks all governors what is to be done. `memory` is what they remember; empty at first.
    pub(crate) fn tick(&self, samples: Samples, memory: &mut Memory) -> Tick {
        let mut tick = Tick::default();
        let question = contract::governor::samples(samples);
        // Most looks come to nothing.
        let tenants: LazyCell<BTreeMap<&str, &str>, _> = LazyCell::new(|| {
            question.guests.iter().map(|guest| (guest.name.as_str(), guest.tenant.as_str())).collect()
        });
        for plugin in self.plugins.iter().filter(|plugin| plugin.is(Kind::Resources)) {
            if !plugin.rules.is_ever_asked() {
                continue;
            }
            let state = memory.get(&plugin.name).map_or(&[][..], Vec::as_slice);
            match plugin.counted(|| plugin.tick(&self.ticker, &question, state)) {
                Ok(Answer { value: Governed { wanted, state }, .. }) => {
                    memory.insert(plugin.name.clone(), state);
                    for Wanted { guest, deed, why } in wanted {
                        // A guest that isn't there any more, or never was.
                        let Some(tenant) = tenants.get(guest.as_str()) else { continue };
                        let rule = plugin.rules.rule_of(tenant);
                        sort(&mut tick, plugin, Action { guest, deed, why, rule });
                    }
                }
                Err(error) => tick.failures.push(failure(plugin, &error)),
            }
        }
        settle(&mut tick);
        tick
    }
}

fn sort(tick: &mut Tick, plugin: &Plugin, action: Action) {
    let alert = matches!(action.deed, Deed::Alert);
    let permitted = alert || plugin.may_do.iter().any(|deed| deed == action.deed.name());
    match action.rule.effect() {
        None => {}
        _ if !permitted => tick.forbidden.push(action),
        Some(Effect::Record) => tick.watched.push(action),
        Some(Effect::Warn) if !alert => tick.watched.push(action),
        Some(_) => tick.actions.push(action),
    }
}

/// Takes out what contradicts each other, and what is said twice.
fn settle(tick: &mut Tick) {
    let mut first: BTreeMap<(String, Knob), Action> = BTreeMap::new();
    let mut contested: Vec<(String, Knob)> = Vec::new();
    let mut settled = Vec::new();
    for action in std::mem::take(&mut tick.actions) {
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
                tick.conflicts.push(Conflict { one: one.clone(), other: action });
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
    tick.actions = settled;
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_policy::{Attrs, Reason, Rule, Severity};

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
        settle(&mut tick);
        let done: Vec<_> = tick.actions.iter().map(|a| format!("{} {}", a.guest, a.deed)).collect();
        assert_eq!(done, ["web alert", "web alert", "db cpu-weight 200", "web balloon 2"]);
        let named: Vec<_> =
            tick.conflicts.iter().map(|c| (c.one.why.plugin.as_str(), c.other.why.plugin.as_str())).collect();
        assert_eq!(named, [("a", "b"), ("a", "b")]);
    }
}
