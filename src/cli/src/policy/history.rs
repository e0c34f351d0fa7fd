//! Decisions that were made: listed, explained, asked again.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use casemate_keep::{Decisions, Paths, Reading};
use casemate_policy::{Engine, Operation, Outcome, PluginRun, Record, Stance, Substitute, Verdict, replay};
use casemate_spec::Refusal;
use clap::Args;
use serde_json::json;

use super::{BundleChoice, config};
use crate::output::{self, Failure};

/// How far back.
#[derive(Args)]
pub(crate) struct Span {
    /// How far back: 30m, 12h, 7d, 4w.
    #[arg(long, default_value = "7d", value_parser = seconds, value_name = "TIME")]
    since: u64,
}

#[derive(Args)]
pub(crate) struct Replay {
    #[command(flatten)]
    span: Span,
    #[command(flatten)]
    bundle: BundleChoice,
    /// A bundle (.toml) to ask instead, or a plugin (.wasm) to put in the place of the bundle's plugin of its name.
    #[arg(long, value_name = "NEW")]
    with: Option<PathBuf>,
    /// The name in the bundle whose place the plugin takes, when it's not the plugin's own.
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
}

fn seconds(text: &str) -> Result<u64, String> {
    let units = [("m", 60), ("h", 3_600), ("d", 86_400), ("w", 604_800)];
    units
        .iter()
        .find_map(|(unit, length)| text.strip_suffix(unit)?.parse::<u64>().ok()?.checked_mul(*length))
        .ok_or_else(|| "write it as 30m, 12h, 7d or 4w".to_owned())
}

fn read(paths: &Paths, span: &Span) -> Result<Reading, Refusal> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let reading = Decisions::below(&paths.state).since(now.saturating_sub(span.since))?;
    if reading.unreadable_lines > 0 {
        output::aside(&format!("{} lines of the log can't be read", reading.unreadable_lines));
    }
    Ok(reading)
}

pub(crate) fn list(paths: &Paths, span: &Span, as_json: bool) -> Result<ExitCode, Failure> {
    let reading = read(paths, span)?;
    let mut rows = Vec::new();
    for record in &reading.records {
        let stance = Stance::from(&record.outcome);
        if as_json {
            output::json(&json!({
                "decision": record.id, "time_seconds": record.time_seconds,
                "tenant": record.request.tenant.name, "guest": record.request.guest.name, "outcome": stance,
            }));
        } else {
            let request = &record.request;
            let guest = format!("{}/{}", request.tenant.name, request.guest.name);
            rows.push(vec![record.id.clone(), utc(record.time_seconds), guest, stance.to_string()]);
        }
    }
    if !rows.is_empty() {
        output::line(output::table(&rows).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn explain(paths: &Paths, id: &str, as_json: bool) -> Result<ExitCode, Failure> {
    let record = Decisions::below(&paths.state).find(id)?;
    if as_json {
        output::json(&record);
        return Ok(ExitCode::SUCCESS);
    }
    explanation(&record).iter().for_each(|line| output::line(line));
    Ok(ExitCode::SUCCESS)
}

fn explanation(record: &Record) -> Vec<String> {
    let request = &record.request;
    let guest = &request.guest;
    let verb = match request.operation {
        Operation::Create => "start",
        Operation::Update | Operation::HotPlug => "change",
        Operation::Resume => "go on",
        Operation::Migrate => "come",
    };
    let change = request.attrs.get("change").map_or_else(String::new, |change| format!(": {change}"));
    let mut lines = vec![
        format!("decision {} of {}", record.id, utc(record.time_seconds)),
        format!(
            "asked     may guest {} of tenant {} {verb} on {}{change}? (user {} asked)",
            guest.name, request.tenant.name, request.host.name, record.uid
        ),
        format!(
            "          {} vCPUs, {}, {} devices, {} disks, {} network cards; {} other guests run",
            guest.vcpus,
            casemate_spec::ByteSize::from_bytes(guest.memory_bytes),
            guest.devices.len(),
            guest.disks.len(),
            guest.nets.len(),
            request.beside.len()
        ),
        format!("bundle    {} {}", record.bundle, record.bundle_sha256.as_deref().unwrap_or("(not opened)")),
        format!("answered  {}", Stance::from(&record.outcome)),
    ];
    let decision = match &record.outcome {
        Outcome::Failed { message, .. } => {
            lines.push(format!("          {message}"));
            return lines;
        }
        Outcome::Decided(decision) => decision,
    };
    let reasons = match &decision.verdict {
        Verdict::Allow { warnings } => warnings,
        Verdict::Deny { reasons } => reasons,
    };
    lines.extend(decision.changes.iter().map(|change| format!("changed   {change}")));
    lines.extend(reasons.iter().map(|reason| format!("          {reason}")));
    if let Some(overridden) = &decision.overridden {
        lines.push(format!("override  {:?}", overridden.why));
    }
    for run in &decision.plugins {
        lines.extend(plugin(run));
    }
    lines
}

fn plugin(run: &PluginRun) -> Vec<String> {
    let said = match run.allowed {
        Some(true) => "allows",
        Some(false) => "denies",
        None => "failed",
    };
    let rule = serde_json::to_value(run.rule).unwrap_or_default();
    let word = |key: &str| rule.get(key).and_then(|value| value.as_str()).unwrap_or("?").to_owned();
    let mut lines = vec![format!(
        "plugin    {} {said} ({}, {}; {} µs, {} units of fuel; sha256 {})",
        run.name,
        word("mode"),
        word("level"),
        run.elapsed.as_micros(),
        run.fuel,
        run.digest
    )];
    lines.extend(run.would_refuse.iter().map(|reason| format!("          would refuse: {reason}")));
    lines.extend(run.would_change.iter().map(|change| format!("          would change: {change}")));
    lines.extend(run.error.iter().map(|error| format!("          {error}")));
    lines.extend(run.log.iter().map(|line| format!("          log: {}", line.message)));
    lines
}

pub(crate) fn replay_all(paths: &Paths, options: &Replay, as_json: bool) -> Result<ExitCode, Failure> {
    let is_plugin = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "wasm");
    let programs = paths.programs();
    let config = |bundle| config(paths, &programs, bundle);
    let engine = match &options.with {
        Some(file) if is_plugin(file) => {
            let substitute = Substitute { name: options.name.as_deref(), file };
            Engine::open_with(config(&options.bundle.policy), Some(substitute))
        }
        Some(bundle) => Engine::open(config(bundle)),
        None => Engine::open(config(&options.bundle.policy)),
    };
    let engine = engine.map_err(Refusal::from)?;
    let reading = read(paths, &options.span)?;
    let differences: Vec<_> = reading.records.iter().filter_map(|record| replay(&engine, record)).collect();
    for found in &differences {
        if as_json {
            output::json(found);
        } else {
            let who = format!("{}/{}", found.tenant, found.guest);
            output::line(&format!("{} {who}: was {}; would be {}", found.id, found.was, found.would_be));
        }
    }
    let (all, other) = (reading.records.len(), differences.len());
    if as_json {
        output::json(&json!({ "asked": all, "different": other }));
    } else {
        output::line(&format!(
            "{all} questions asked again: {} answered as before, {other} otherwise",
            all - other
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// `2026-11-24 08:00:00Z` (days to a date as in Howard Hinnant's "chrono-compatible low-level date algorithms").
pub(crate) fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days.saturating_add(719_468);
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_told() {
        assert_eq!(seconds("7d"), Ok(604_800));
        assert_eq!(seconds("30m"), Ok(1_800));
        for text in ["", "7", "d", "-1d", "7 d", "99999999999999999w"] {
            assert!(seconds(text).is_err(), "{text}");
        }
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_827_696, "2000-02-29 12:34:56Z"),
            (1_795_478_400, "2026-11-24 00:00:00Z"),
            (1_798_761_599, "2026-12-31 23:59:59Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
