//! An answer's sense, before it's believed.
//!
//! Plugins run in a process that may be captured by one of them. It can say yes or no, which is its business; it can't change what the
//! bundle doesn't permit, nor allow what can't be, nor write on somebody's terminal.

use crate::{
    PolicyError,
    bundle::Entry,
    change::{self, Change, Value, invariants},
    process::broken,
    released::Ruling,
    request::Request,
    rule::Mode,
    text::{is_code, one_line},
    verdict::{Decision, LogLine, Override, PluginRun, Reason, Verdict},
};

/// A decision as far as it can be one of this bundle about this request.
pub(crate) fn checked(
    decision: Decision,
    request: &Request,
    override_why: Option<&str>,
    entries: &[Entry],
) -> Result<Decision, PolicyError> {
    let Decision { verdict, changes, overridden, plugins, elapsed } = decision;
    let changed = apply(&changes, request, entries)?;
    let verdict = match verdict {
        Verdict::Deny { reasons } if reasons.is_empty() => {
            return Err(broken("it denies without a reason".into()));
        }
        Verdict::Deny { reasons } => Verdict::Deny { reasons: tidy(reasons) },
        Verdict::Allow { .. } if !invariants(&changed).is_empty() => {
            return Err(broken("it allows what no plugin can allow".into()));
        }
        Verdict::Allow { warnings } => Verdict::Allow { warnings: tidy(warnings) },
    };
    let overridden = match (overridden, override_why) {
        (None, _) => None,
        (Some(_), None) => return Err(broken("it overrides what nobody has".into())),
        (Some(done), Some(why)) => Some(Override { why: one_line(why), reasons: tidy(done.reasons) }),
    };
    if plugins.len() > entries.len() {
        return Err(broken(format!("it tells of {} plugins", plugins.len())));
    }
    let changes = changes.into_iter().map(tidy_change).collect();
    let plugins = plugins.into_iter().map(|run| tidy_run(run, entries)).collect::<Result<_, _>>()?;
    Ok(Decision { verdict, changes, overridden, plugins, elapsed })
}

/// The request with these changes, each of which the bundle has to permit.
fn apply(changes: &[Change], request: &Request, entries: &[Entry]) -> Result<Request, PolicyError> {
    let mut changed = request.clone();
    for (at, Change { plugin, field, from, to, .. }) in changes.iter().enumerate() {
        let permits = |entry: &Entry| {
            entry.name == *plugin
                && entry.may_change.contains(field)
                && entry.rules.rule(request).mode == Mode::Enforce
        };
        let is_again = changes.iter().take(at).any(|before| before.field == *field);
        if !entries.iter().any(permits) || is_again || *from != field.value(&request.guest) {
            return Err(broken(format!("it changes {field}, which nobody may")));
        }
        change::apply(&mut changed.guest, *field, to)
            .map_err(|cause| broken(format!("it changes {field}: {cause}")))?;
    }
    Ok(changed)
}

fn tidy_run(run: PluginRun, entries: &[Entry]) -> Result<PluginRun, PolicyError> {
    if !entries.iter().any(|entry| entry.name == run.name) {
        return Err(broken("it tells of a plugin that the bundle doesn't have".into()));
    }
    let line = |line: LogLine| LogLine { message: one_line(&line.message), ..line };
    Ok(PluginRun {
        digest: one_line(&run.digest),
        log: run.log.into_iter().map(line).collect(),
        would_refuse: tidy(run.would_refuse),
        would_change: run.would_change.into_iter().map(tidy_change).collect(),
        error: run.error.map(|error| one_line(&error)),
        ..run
    })
}

fn tidy_change(change: Change) -> Change {
    let value = |value: Value| match value {
        Value::Text(text) => Value::Text(one_line(&text)),
        Value::Number(number) => Value::Number(number),
    };
    Change {
        plugin: one_line(&change.plugin),
        reason: one_line(&change.reason),
        from: value(change.from),
        to: value(change.to),
        ..change
    }
}

/// What is said of a device, in lines.
pub(crate) fn tidy_ruling(ruling: Ruling) -> Ruling {
    Ruling { quarantine: tidy(ruling.quarantine), warnings: tidy(ruling.warnings) }
}

/// Reasons in lines.
pub(crate) fn tidy(reasons: Vec<Reason>) -> Vec<Reason> {
    reasons.into_iter().map(tidy_reason).collect()
}

/// A reason in one line.
pub(crate) fn tidy_reason(reason: Reason) -> Reason {
    Reason {
        plugin: one_line(&reason.plugin),
        code: if is_code(&reason.code) { reason.code } else { "unreadable".into() },
        message: one_line(&reason.message),
        field: reason.field.as_deref().map(one_line),
        remedy: reason.remedy.as_deref().map(one_line),
        attrs: reason.attrs.iter().map(|(name, value)| (one_line(name), one_line(value))).collect(),
        ..reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Field;
    use proptest::prelude::*;
    use std::{path::Path, time::Duration};

    fn entries() -> Vec<Entry> {
        let digest = "0".repeat(64);
        let text = format!(
            "[[plugin]]\nname = \"small\"\npath = \"x\"\nsha256 = \"{digest}\"\nmay_change = [\"memory\"]\n"
        );
        crate::bundle::parse(Path::new("b.toml"), &text).unwrap()
    }

    fn request() -> Request {
        serde_json::from_str(include_str!("../examples/request.json")).unwrap()
    }

    fn decision(verdict: Verdict, changes: Vec<Change>) -> Decision {
        Decision { verdict, changes, overridden: None, plugins: Vec::new(), elapsed: Duration::ZERO }
    }

    fn change(plugin: &str, field: Field, to: Value) -> Change {
        let from = field.value(&request().guest);
        Change { plugin: plugin.into(), field, from, to, reason: "\x1b[2J".into() }
    }

    fn told(decision: Decision) -> Result<Decision, String> {
        checked(decision, &request(), None, &entries()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_the_bundle_permits_is_changed_and_nothing_else() {
        let allow = || Verdict::Allow { warnings: Vec::new() };
        let good = change("small", Field::Memory, Value::Number(1 << 30));
        let taken = told(decision(allow(), vec![good.clone()])).unwrap();
        assert_eq!(taken.changes[0].reason, "\u{fffd}[2J");
        let from_nowhere = Change { from: Value::Number(1), ..good.clone() };
        for changes in [
            vec![change("other", Field::Memory, Value::Number(1 << 30))],
            vec![change("small", Field::Vcpus, Value::Number(1))],
            vec![change("small", Field::Memory, Value::Number(1))],
            vec![change("small", Field::Memory, Value::Text("1".into()))],
            vec![good.clone(), good],
            vec![from_nowhere],
        ] {
            let error = told(decision(allow(), changes)).unwrap_err();
            assert!(
                error.contains("[policy-engine]") && error.contains("it changes memory")
                    || error.contains("it changes vcpus"),
                "{error}"
            );
        }
    }

    proptest! {
        /// Whatever a captured process makes of an answer: it's an error, or no character of it draws on a terminal, and nothing
        /// is otherwise than the bundle permits.
        #[test]
        fn no_answer_is_a_panic_or_paints(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            text in "[\\PC\x00-\x1f\u{80}-\u{9f}]{0,20}",
            memory in prop_oneof![Just(1 << 30), any::<u64>()],
        ) {
            let reason = Reason { remedy: Some(text.clone()), ..Reason::of_casemate("c", text.clone()) };
            let change = Change { reason: text, ..change("small", Field::Memory, Value::Number(memory)) };
            let verdict = Verdict::Deny { reasons: vec![reason] };
            let mut bytes = serde_json::to_vec(&decision(verdict, vec![change])).unwrap();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let Ok(answer) = serde_json::from_slice::<Decision>(&bytes) else { return Ok(()) };
            let Ok(taken) = told(answer) else { return Ok(()) };
            let refusals = taken.refusals();
            let changes = taken.changes.iter().map(ToString::to_string);
            let shown = refusals.iter().map(ToString::to_string).chain(changes);
            for line in shown {
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
            for change in &taken.changes {
                prop_assert_eq!((change.plugin.as_str(), change.field), ("small", Field::Memory));
            }
        }
    }

    #[test]
    fn what_no_plugin_can_allow_is_not_allowed() {
        let mut twice = request();
        twice.guest.devices.push(twice.guest.devices[0].clone());
        let allow = decision(Verdict::Allow { warnings: Vec::new() }, Vec::new());
        let error = checked(allow, &twice, None, &entries()).unwrap_err();
        assert!(error.to_string().contains("what no plugin can allow"), "{error}");
    }

    #[test]
    fn a_denial_has_reasons_and_an_override_somebody_who_has() {
        let deny = |reasons| decision(Verdict::Deny { reasons }, Vec::new());
        assert!(told(deny(Vec::new())).unwrap_err().contains("without a reason"));
        let reason = Reason { code: "No Code\n".into(), ..Reason::of_casemate("c", "a\nb".into()) };
        let Verdict::Deny { reasons } = told(deny(vec![reason])).unwrap().verdict else { panic!("allowed") };
        assert_eq!((reasons[0].code.as_str(), reasons[0].message.as_str()), ("unreadable", "a\u{fffd}b"));
        let allow = decision(Verdict::Allow { warnings: Vec::new() }, Vec::new());
        let done = Some(Override { why: "because".into(), reasons: Vec::new() });
        assert!(told(Decision { overridden: done, ..allow }).unwrap_err().contains("what nobody has"));
    }
}
