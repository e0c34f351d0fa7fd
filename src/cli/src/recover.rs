//! `casemate recover`.

use std::process::ExitCode;

use casemate_keep::Paths;

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
    Ok(ExitCode::SUCCESS)
}
