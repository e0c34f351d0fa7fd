//! What a running guest's cell is, measured from its process: for an auditor, who believes neither the guest nor its keep.
//!
//! Every line says what a cell must be, what was found, and whether that is so. What the kernel tells nobody (Landlock,
//! what a device answered to its reset) comes from the keep's record, and the line says so.

mod descriptors;
mod host;
mod process;
mod seccomp;

use std::io;

use casemate_jail::{CellView, LimitsView, ThreadFilters, core_cookie, filters, inspect, limits};
use casemate_spec::Refusal;
use serde::Serialize;

use crate::{
    GuestRecord, Paths,
    record::{now_seconds, running, sha256},
};

/// Where a finding comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// From the kernel, about the running process.
    Measured,
    /// From what the keep wrote down when it started the guest.
    Recorded,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditLine {
    /// What part of the cell it is about.
    pub part: &'static str,
    /// What must be.
    pub wanted: String,
    /// What is.
    pub found: String,
    /// Where that comes from.
    pub source: Source,
    /// Whether the one is as the other.
    pub passed: bool,
}

/// The isolation report of one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Counts up when the form changes.
    pub version: u32,
    /// The guest.
    pub guest: String,
    /// Whose it is.
    pub tenant: String,
    /// Its VMM's process.
    pub pid: u32,
    /// SHA-256 of the guest's file.
    pub spec_sha256: String,
    /// When it was measured, in seconds since 1970.
    pub measured_seconds: u64,
    /// The host's name and kernel.
    pub host: String,
    /// For how long the thread that stood still longest did so, while its filters were read, in microseconds.
    pub stood_still_us: u64,
    /// The findings.
    pub lines: Vec<AuditLine>,
    /// Whether all of them are as they must be.
    pub passed: bool,
}

/// A report and its digest: SHA-256 of the report as one line of JSON, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SignedAudit {
    /// The report.
    #[serde(flatten)]
    pub audit: Audit,
    /// Its digest, last in the line.
    pub digest: String,
}

/// Everything that was measured, from which the lines are made.
struct Measured<'a> {
    record: &'a GuestRecord,
    view: CellView,
    limits: LimitsView,
    filters: Vec<ThreadFilters>,
    /// The core-scheduling cookie of each thread, where the kernel tells it.
    cookies: Vec<u64>,
}

/// Measures the cell of a running guest.
///
/// # Errors
/// `not-root`; `guest-not-running`; `audit-failed` when the kernel doesn't let it be measured.
pub fn audit(paths: &Paths, guest: &str) -> Result<SignedAudit, Refusal> {
    let records = running(paths)?;
    let record = records.iter().find(|record| record.guest == guest).ok_or_else(|| {
        let remedy = "see `casemate ps` for those that run";
        Refusal::new("guest-not-running", guest, "no guest of this name runs on this host", remedy)
    })?;
    let failed = |error: io::Error| {
        let remedy = "see whether it still runs; reading filters needs CONFIG_CHECKPOINT_RESTORE, no other tracer, and \
                      kernel.yama.ptrace_scope below 3";
        Refusal::new("audit-failed", guest, format_args!("its cell can't be measured: {error}"), remedy)
    };
    let measured = measure(record).map_err(failed)?;
    let audit = Audit {
        version: 1,
        guest: record.guest.clone(),
        tenant: record.tenant.clone(),
        pid: record.cell.pid,
        spec_sha256: record.spec_sha256.clone(),
        measured_seconds: now_seconds(),
        host: host::name(),
        stood_still_us: measured
            .filters
            .iter()
            .map(|thread| u64::try_from(thread.stood_still.as_micros()).unwrap_or(u64::MAX))
            .max()
            .unwrap_or(0),
        lines: Vec::new(),
        passed: true,
    };
    sign(Audit { lines: lines(&measured).map_err(failed)?, ..audit })
}

fn measure(record: &GuestRecord) -> io::Result<Measured<'_>> {
    let pid = record.cell.pid;
    let view = inspect(pid)?;
    let tids: Vec<u32> = view.threads.iter().map(|thread| thread.tid).collect();
    let measured = Measured {
        record,
        limits: limits(pid, std::path::Path::new("/sys/fs/cgroup"))?,
        filters: filters(&tids)?,
        cookies: tids.iter().filter_map(|tid| core_cookie(*tid)).collect(),
        view,
    };
    // The number may have become another's in between.
    if record.cell.is_alive(&casemate_host::Host::live()) {
        Ok(measured)
    } else {
        Err(io::Error::new(io::ErrorKind::NotFound, "it ended while it was looked at"))
    }
}

fn lines(measured: &Measured<'_>) -> io::Result<Vec<AuditLine>> {
    let mut lines = process::lines(measured)?;
    lines.extend(seccomp::lines(&measured.view, &measured.filters));
    lines.extend(process::limits(measured));
    lines.push(descriptors::line(&measured.view.descriptors, measured.record));
    lines.extend(host::lines(measured.record));
    Ok(lines)
}

fn sign(audit: Audit) -> Result<SignedAudit, Refusal> {
    let passed = audit.lines.iter().all(|line| line.passed);
    let audit = Audit { passed, ..audit };
    let text = serde_json::to_vec(&audit).map_err(|error| {
        Refusal::new(
            "audit-failed",
            &audit.guest,
            format_args!("the report can't be written: {error}"),
            "try again",
        )
    })?;
    Ok(SignedAudit { digest: sha256(&text), audit })
}

/// A line that was measured.
fn measured(
    part: &'static str,
    wanted: impl Into<String>,
    found: impl Into<String>,
    passed: bool,
) -> AuditLine {
    AuditLine { part, wanted: wanted.into(), found: found.into(), source: Source::Measured, passed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(passed: bool) -> AuditLine {
        measured("user", "a", "b", passed)
    }

    fn report(lines: Vec<AuditLine>) -> Audit {
        Audit {
            version: 1,
            guest: "g".into(),
            tenant: "t".into(),
            pid: 1,
            spec_sha256: String::new(),
            measured_seconds: 1,
            host: String::new(),
            stood_still_us: 0,
            lines,
            passed: true,
        }
    }

    #[test]
    fn one_line_that_fails_fails_the_report() {
        assert!(sign(report(vec![line(true)])).unwrap().audit.passed);
        assert!(!sign(report(vec![line(true), line(false)])).unwrap().audit.passed);
    }

    #[test]
    fn the_digest_is_of_the_line_without_it() {
        let signed = sign(report(vec![line(true)])).unwrap();
        let text = serde_json::to_string(&signed).unwrap();
        let (without, digest) = text.rsplit_once(",\"digest\":\"").unwrap();
        assert_eq!(digest, format!("{}\"}}", signed.digest));
        assert_eq!(sha256(format!("{without}}}").as_bytes()), signed.digest);
    }

    #[test]
    fn a_process_outside_of_a_cell_does_not_pass() {
        let record = crate::record::tests::record("g");
        let view = inspect(std::process::id()).unwrap();
        let limits = limits(std::process::id(), std::path::Path::new("/sys/fs/cgroup")).unwrap();
        let filters = vec![ThreadFilters {
            tid: std::process::id(),
            filters: Vec::new(),
            stood_still: std::time::Duration::ZERO,
        }];
        let lines = lines(&Measured { record: &record, view, limits, filters, cookies: Vec::new() }).unwrap();
        for part in ["user", "namespaces", "root", "dumping", "seccomp", "cgroup", "limits"] {
            assert!(lines.iter().any(|line| line.part == part && !line.passed), "{part}: {lines:#?}");
        }
    }
}
