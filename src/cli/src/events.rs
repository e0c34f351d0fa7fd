//! `casemate events`.

use std::process::ExitCode;

use casemate_keep::{Events, LoggedEvent, Paths};
use clap::Args;

use crate::output::{self, Failure};

#[derive(Args)]
pub(crate) struct Options {
    /// Of this guest alone.
    guest: Option<String>,
    /// Go on, and show each as it happens.
    #[arg(long, short)]
    follow: bool,
    /// The last so many of those that are kept.
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    last: usize,
}

pub(crate) fn events(paths: &Paths, options: &Options, as_json: bool) -> Result<ExitCode, Failure> {
    let events = Events::below(&paths.state);
    let guest = options.guest.as_deref();
    let kept = events.read(guest)?;
    let from = kept.len().saturating_sub(options.last);
    kept.iter().skip(from).for_each(|event| show(event, as_json));
    if options.follow {
        events.follow(guest, &mut |event| {
            show(&event, as_json);
            true
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(event: &LoggedEvent, as_json: bool) {
    if as_json {
        output::json(event);
        return;
    }
    let time = crate::policy::utc(event.time_ms / 1_000);
    output::line(&format!("{time} {}/{}: {}", event.tenant, event.guest, event.what));
}
