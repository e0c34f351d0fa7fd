//! `casemate ps` and `casemate audit`.

use std::{
    io::{IsTerminal, stdout},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use casemate_keep::{
    AuditLine, GuestRecord, GuestState, OperatorRequest, Paths, Source, audit, operate, running,
};
use casemate_spec::ByteSize;
use clap::Args;
use serde::Serialize;

use crate::output::{self, Failure};

#[derive(Args)]
pub(crate) struct Options {
    /// The guest's name.
    guest: String,
}

pub(crate) fn ps(paths: &Paths, as_json: bool) -> Result<ExitCode, Failure> {
    let guests: Vec<Listed> = running(paths)?.into_iter().map(|record| Listed::of(paths, record)).collect();
    if as_json {
        guests.iter().for_each(output::json);
        return Ok(ExitCode::SUCCESS);
    }
    if guests.is_empty() {
        output::line("no guest runs on this host");
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["GUEST", "TENANT", "STATE", "PID", "UID", "VCPUS", "MEMORY", "UP", "CELL", "DEVICES"]
        .map(str::to_owned)
        .to_vec();
    let rows = [head].into_iter().chain(guests.iter().map(row)).collect::<Vec<_>>();
    output::line(output::table(&rows).trim_end());
    Ok(ExitCode::SUCCESS)
}

/// A guest's record, and how it is now.
#[derive(Serialize)]
struct Listed {
    /// `None` when its keep does not say.
    state: Option<GuestState>,
    #[serde(flatten)]
    record: GuestRecord,
}

impl Listed {
    fn of(paths: &Paths, record: GuestRecord) -> Self {
        let told = operate(paths, &record.guest, &OperatorRequest::State).ok();
        let state = told.and_then(|told| serde_json::from_value(told.get("state")?.clone()).ok());
        Self { state, record }
    }
}

fn row(Listed { state, record: guest }: &Listed) -> Vec<String> {
    let devices: Vec<String> = guest.devices.iter().map(|device| device.address.to_string()).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let up = now.saturating_sub(Duration::from_secs(guest.started_seconds)).as_secs();
    vec![
        guest.guest.clone(),
        guest.tenant.clone(),
        state.map_or("?".into(), |state| state.to_string()),
        guest.cell.pid.to_string(),
        guest.uid.to_string(),
        guest.vcpus.to_string(),
        ByteSize::from_bytes(guest.memory_bytes).to_string(),
        format!("{}:{:02}:{:02}", up / 3600, up / 60 % 60, up % 60),
        match guest.weakened.as_slice() {
            [] => "whole".into(),
            parts => format!("weakened: {}", parts.join(" ")),
        },
        if devices.is_empty() { "-".into() } else { devices.join(" ") },
    ]
}

/// Ends with 5 when a line is not as it must be.
pub(crate) fn report(paths: &Paths, options: &Options, as_json: bool) -> Result<ExitCode, Failure> {
    let signed = audit(paths, &options.guest)?;
    if as_json {
        output::json(&signed);
    } else {
        let rows: Vec<Vec<String>> = signed.audit.lines.iter().map(line).collect();
        output::line(output::table(&rows).trim_end());
        let failed = signed.audit.lines.iter().filter(|line| !line.passed).count();
        let verdict = match failed {
            0 => format!("guest {}: all {} lines pass", signed.audit.guest, rows.len()),
            _ => format!("guest {}: {failed} of {} lines FAIL", signed.audit.guest, rows.len()),
        };
        output::line(&format!(
            "{verdict}; no thread stood still longer than {} µs",
            signed.audit.stood_still_us
        ));
        output::line(&format!("sha256 {} (of the line that --json prints, without it)", signed.digest));
    }
    Ok(if signed.audit.passed { ExitCode::SUCCESS } else { ExitCode::from(5) })
}

fn line(line: &AuditLine) -> Vec<String> {
    let terminal = stdout().is_terminal();
    let verdict = if line.passed {
        output::paint("32", "pass", terminal)
    } else {
        output::paint("1;31", "FAIL", terminal)
    };
    let source = match line.source {
        Source::Measured => "",
        Source::Recorded => " (by the keep's record)",
    };
    let found = format!("{}{source}", line.found);
    let told = if line.passed { found } else { format!("{found}; it must be: {}", line.wanted) };
    vec![verdict, line.part.to_owned(), told]
}
