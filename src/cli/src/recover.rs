//! `casemate recover`.

use std::process::ExitCode;

use casemate_keep::{Paths, Step};

use crate::{
    output::{self, Failure},
    run::tell,
};

pub(crate) fn recover(paths: &Paths, json: bool) -> Result<ExitCode, Failure> {
    let steps = casemate_keep::recover(paths)?;
    if steps.is_empty() && !json {
        output::line("Nothing was left behind.");
    }
    steps.iter().for_each(|step| tell(step, json));
    let whole = |step: &Step| match step {
        Step::Recovered { devices, error, .. } => {
            error.is_none() && devices.iter().all(|device| device.clean)
        }
        _ => true,
    };
    Ok(if steps.iter().all(whole) { ExitCode::SUCCESS } else { ExitCode::from(4) })
}
