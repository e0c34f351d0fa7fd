//! `casemate doctor`.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use casemate_host::{CheckState, Host};

use crate::output::{self, Failure, paint};

/// Shows what this host can do. Exit code 0 also when something is missing: it answers a question.
pub(crate) fn doctor(json: bool) -> Result<ExitCode, Failure> {
    let checks = casemate_host::doctor(&Host::live());
    if json {
        checks.iter().for_each(output::json);
        return Ok(ExitCode::SUCCESS);
    }
    let terminal = io::stdout().is_terminal();
    let widest = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for check in &checks {
        let mark = match check.state {
            CheckState::Ok => paint("32", "ok     ", terminal),
            CheckState::Warn => paint("33", "limited", terminal),
            CheckState::Missing => paint("31", "missing", terminal),
        };
        output::line(&format!("{mark}  {:widest$}  {}", check.name, check.found));
        if let Some(remedy) = &check.remedy {
            output::line(&format!("{:9}{:widest$}  → {remedy}", "", ""));
        }
    }
    let missing = checks.iter().filter(|check| check.state == CheckState::Missing).count();
    output::line(&match missing {
        0 => "This host can run guests with devices.".to_owned(),
        count => format!("{count} of {} things are missing.", checks.len()),
    });
    Ok(ExitCode::SUCCESS)
}
