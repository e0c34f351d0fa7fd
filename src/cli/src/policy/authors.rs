//! For those who write policies: try, test, measure.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use casemate_keep::{Decisions, OperatorRequest, Paths, Step, operate, try_guest};
use casemate_policy::{Request, run_cases};
use casemate_spec::Refusal;
use serde_json::json;

use super::open;
use crate::{
    output::{self, Failure},
    run,
};

/// What would happen to a guest now.
pub(crate) fn rehearse(
    paths: &Paths,
    file: &Path,
    bundle: &Path,
    as_json: bool,
) -> Result<ExitCode, Failure> {
    let report = try_guest(paths, file, bundle)?;
    if as_json {
        output::json(&report);
    } else {
        run::tell(&Step::Admitted { policy: report }, false);
        output::aside("it was only tried: nothing was started or recorded");
    }
    Ok(ExitCode::SUCCESS)
}

/// Has a running guest's bundle read anew.
pub(crate) fn reload(paths: &Paths, guest: &str, as_json: bool) -> Result<ExitCode, Failure> {
    let done = operate(paths, guest, &OperatorRequest::ReloadPolicies {})?;
    if as_json {
        output::json(&done);
    } else {
        let sha256 = done.get("bundle_sha256").and_then(serde_json::Value::as_str).unwrap_or("not known");
        output::line(&format!("guest {guest}: its bundle was read anew, sha256 {sha256}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Holds files of cases against what they name. Exit code 1 when one isn't met.
pub(crate) fn test(paths: &Paths, files: &[PathBuf], as_json: bool) -> Result<ExitCode, Failure> {
    let mut failed = 0;
    for file in files {
        let (results, coverage) = run_cases(file, &paths.cache, &paths.programs()).map_err(Refusal::from)?;
        for result in &results {
            failed += usize::from(result.instead.is_some());
            if as_json {
                output::json(
                    &json!({ "case": result.name, "met": result.instead.is_none(), "instead": result.instead }),
                );
            } else {
                let line = match &result.instead {
                    None => format!("ok      {}", result.name),
                    Some(instead) => format!("FAILED  {}: {instead}", result.name),
                };
                output::line(&line);
            }
        }
        if as_json {
            output::json(&json!({
                "seen": coverage.seen, "never_seen": coverage.never, "undeclared": coverage.undeclared,
            }));
            continue;
        }
        let all = coverage.seen.len() + coverage.never.len();
        output::line(&format!("{}: {} of {all} reasons were seen", file.display(), coverage.seen.len()));
        for (what, codes) in [("never seen", &coverage.never), ("not declared", &coverage.undeclared)] {
            if !codes.is_empty() {
                let codes: Vec<_> = codes.iter().map(String::as_str).collect();
                output::line(&format!("{what}: {}", codes.join(", ")));
            }
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Asks a bundle many times.
pub(crate) fn bench(
    paths: &Paths,
    bundle: &Path,
    request: Option<&Path>,
    times: u32,
    as_json: bool,
) -> Result<ExitCode, Failure> {
    let request: Request = match request {
        None => Decisions::below(&paths.state).find("last")?.request,
        Some(path) => {
            let bad = |error: &dyn std::fmt::Display| {
                Refusal::new("policy-request", path.display(), error, "name a request as JSON")
            };
            let text = fs::read_to_string(path).map_err(|error| bad(&error))?;
            serde_json::from_str(&text).map_err(|error| bad(&error))?
        }
    };
    open(paths, bundle)?;
    let start = Instant::now();
    let engine = open(paths, bundle)?;
    let load = start.elapsed();
    let mut elapsed = Vec::new();
    let mut fuel = 0u64;
    let start = Instant::now();
    for _ in 0..times {
        let decision = engine.admit(&request, None).map_err(Refusal::from)?;
        fuel = decision.plugins.iter().map(|run| run.fuel).sum();
        elapsed.push(decision.elapsed);
    }
    let all = start.elapsed();
    elapsed.sort_unstable();
    let at = |share: usize| -> Duration {
        let index = elapsed.len().saturating_sub(1).saturating_mul(share) / 100;
        elapsed.get(index).copied().unwrap_or_default()
    };
    let a_second = f64::from(times) / all.as_secs_f64().max(1e-9);
    let (p50, p99, worst) = (at(50), at(99), at(100));
    let plugins = engine.plugins().len();
    if as_json {
        output::json(&json!({
            "plugins": plugins, "times": times, "load_us": load.as_micros(), "p50_us": p50.as_micros(),
            "p99_us": p99.as_micros(), "worst_us": worst.as_micros(), "a_second": a_second.round(),
            "fuel": fuel, "resident_kib": resident_kib(),
        }));
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("{plugins} plugins, asked {times} times, one after the other"));
    output::line(&format!("opened from the cache in {load:?}"));
    output::line(&format!("p50 {p50:?}, p99 {p99:?}, worst {worst:?}; {a_second:.0} a second"));
    output::line(&format!("{fuel} units of fuel each"));
    if let Some(kib) = resident_kib() {
        output::line(&format!("this process has {kib} KiB resident"));
    }
    Ok(ExitCode::SUCCESS)
}

fn resident_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()
}
