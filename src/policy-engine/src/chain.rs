//! From the answers of all plugins to one decision.
//!
//! 1. Those that may change something are asked about the guest as it was asked for. Two that want a field to be two
//!    things are refused, both named.
//! 2. All are asked about the guest as it is then. One that changed something has to be content with it.
//! 3. What no plugin can allow is checked last.

use std::{borrow::Cow, time::Instant};

use casemate_policy::{
    Change, Decision, Effect, Fault, Field, HOST_LIMITS, Kind, Mode, Override, PluginRun, PolicyError,
    Reason, Request, Rule, Value, Verdict, apply, invariants, one_line,
};

use crate::{
    contract::{self, PluginAnswer, Wish},
    judge::Judge,
    plugin::{Answer, Plugin},
};

impl Judge {
    /// Asks all plugins. One denial is enough; all are asked nevertheless, so that a user learns everything at once.
    ///
    /// With a reason to override, refusals of rules whose level is `soft` become warnings.
    ///
    /// # Errors
    /// There is no verdict, and the guest must not start: a plugin failed whose word counts. That holds even when another plugin has denied already.
    pub(crate) fn admit(
        &self,
        request: &Request,
        override_why: Option<&str>,
    ) -> Result<Decision, PolicyError> {
        let start = Instant::now();
        let (request, changes) = self.change(request)?;
        let question = contract::request(&request);
        let mut tally = Tally { override_why, ..Tally::default() };
        for plugin in self.plugins.iter().filter(|plugin| plugin.is(Kind::Admission)) {
            let rule = plugin.rules.rule(&request);
            let Some(effect) = rule.effect() else { continue };
            match plugin.counted(|| plugin.admit(&self.ticker, &question)) {
                Ok(Answer { value, run }) => tally.count(plugin, &request, (rule, effect), value, run)?,
                Err(error) if effect >= Effect::DenySoftly => return Err(error),
                Err(error) => tally.failed(plugin, (rule, effect), &error),
            }
        }
        tally.denials.extend(invariants(&request));
        Ok(tally.decide(changes, start))
    }

    /// The request with what plugins have changed, and what that was.
    fn change<'a>(&self, request: &'a Request) -> Result<(Cow<'a, Request>, Vec<Change>), PolicyError> {
        let mut changes: Vec<Change> = Vec::new();
        let changers = self.plugins.iter().filter(|plugin| {
            plugin.is(Kind::Admission)
                && !plugin.is_suspended()
                && !plugin.may_change.is_empty()
                && plugin.rules.rule(request).mode == Mode::Enforce
        });
        let mut question = None;
        for plugin in changers {
            let question = question.get_or_insert_with(|| contract::request(request));
            // Whatever goes wrong or is denied here is met again when all are asked.
            let Ok(answer) = plugin.admit(&self.ticker, question) else { continue };
            for wish in answer.value.changes {
                let change = permitted(plugin, request, wish)?;
                match changes.iter().find(|other| other.field == change.field) {
                    Some(other) if other.to != change.to => return Err(conflict(other, &change)),
                    Some(_) => {}
                    None => changes.push(change),
                }
            }
        }
        changes.retain(|change| change.from != change.to);
        if changes.is_empty() {
            return Ok((Cow::Borrowed(request), changes));
        }
        let mut changed = request.clone();
        for change in &changes {
            apply(&mut changed.guest, change.field, &change.to).map_err(|cause| {
                PolicyError::new(Fault::Change, &change.plugin, format!("{}: {cause}", change.field))
            })?;
        }
        Ok((Cow::Owned(changed), changes))
    }
}

/// A plugin's wish as a change, if it may have it.
fn permitted(plugin: &Plugin, request: &Request, wish: Wish) -> Result<Change, PolicyError> {
    let refuse = |cause: String| PolicyError::new(Fault::Change, &plugin.name, cause);
    let field = Field::named(&wish.field).filter(|field| plugin.may_change.contains(field));
    let field = field
        .ok_or_else(|| refuse(format!("it changes {}, which the bundle does not permit", wish.field)))?;
    let to =
        wish.value.ok_or_else(|| refuse(format!("it gives {field} a value of a kind that no field has")))?;
    if let Value::Text(text) = &to
        && text.len() > HOST_LIMITS.request_bytes
    {
        return Err(refuse(format!("it gives {field} a text of {} bytes", text.len())));
    }
    Ok(Change {
        plugin: plugin.name.clone(),
        from: field.value(&request.guest),
        field,
        to,
        reason: wish.reason,
    })
}

fn conflict(one: &Change, other: &Change) -> PolicyError {
    let subject = format!("{} and {}", one.plugin, other.plugin);
    PolicyError::new(Fault::Conflict, subject, format!("{one}, but {other}"))
}

#[derive(Default)]
struct Tally<'a> {
    override_why: Option<&'a str>,
    denials: Vec<Reason>,
    warnings: Vec<Reason>,
    overridden: Vec<Reason>,
    runs: Vec<PluginRun>,
}

impl Tally<'_> {
    fn count(
        &mut self,
        plugin: &Plugin,
        request: &Request,
        (rule, effect): (Rule, Effect),
        answer: PluginAnswer,
        mut run: PluginRun,
    ) -> Result<(), PolicyError> {
        run.rule = rule;
        run.allowed = Some(matches!(answer.verdict, Verdict::Allow { .. }));
        let makes_changes = rule.mode == Mode::Enforce;
        for wish in answer.changes {
            if makes_changes {
                let change = permitted(plugin, request, wish)?;
                if change.from != change.to {
                    let cause = format!("asked again about what it has changed, it wants {change}");
                    return Err(PolicyError::new(Fault::Unstable, &plugin.name, cause));
                }
            } else if let Ok(change) = permitted(plugin, request, wish)
                && change.from != change.to
            {
                run.would_change.push(change);
            }
        }
        match (answer.verdict, effect) {
            (Verdict::Allow { .. }, Effect::Record) => {}
            (Verdict::Allow { warnings }, _) => self.warnings.extend(warnings),
            (Verdict::Deny { reasons }, Effect::Record) => run.would_refuse = reasons,
            (Verdict::Deny { reasons }, Effect::Warn) => {
                self.warnings.extend(reasons.iter().cloned());
                run.would_refuse = reasons;
            }
            (Verdict::Deny { reasons }, Effect::DenySoftly) if self.override_why.is_some() => {
                self.overridden.extend(reasons);
            }
            (Verdict::Deny { reasons }, Effect::DenySoftly) => {
                self.denials.extend(reasons.into_iter().map(|reason| Reason { overridable: true, ..reason }));
            }
            (Verdict::Deny { reasons }, Effect::Deny) => self.denials.extend(reasons),
        }
        self.runs.push(run);
        Ok(())
    }

    /// A plugin whose word holds nothing up has failed: it's told, and that is all.
    fn failed(&mut self, plugin: &Plugin, (rule, effect): (Rule, Effect), error: &PolicyError) {
        if effect == Effect::Warn {
            self.warnings.push(Reason::of_casemate("plugin-failed", format!("{error}")));
        }
        self.runs.push(PluginRun { error: Some(error.to_string()), ..plugin.unasked(rule) });
    }

    fn decide(self, changes: Vec<Change>, start: Instant) -> Decision {
        let Self { override_why, denials, mut warnings, overridden, runs } = self;
        let overridden = override_why
            .filter(|_| denials.is_empty() && !overridden.is_empty())
            .map(|why| Override { why: one_line(why), reasons: overridden.clone() })
            .ok_or(overridden);
        let (overridden, denials) = match overridden {
            Ok(overridden) => {
                warnings.extend(overridden.reasons.iter().cloned());
                (Some(overridden), denials)
            }
            // Nothing is overridden for a guest that is refused anyway: all is told.
            Err(soft) => (None, denials.into_iter().chain(soft).collect()),
        };
        let verdict =
            if denials.is_empty() { Verdict::Allow { warnings } } else { Verdict::Deny { reasons: denials } };
        Decision { verdict, changes, overridden, plugins: runs, elapsed: start.elapsed() }
    }
}
