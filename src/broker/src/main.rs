//! `casemate-broker`: started by a keep, with a socket to it as standard input.

use std::{os::fd::AsFd, process::ExitCode};

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).without_time().init();
    // The terminal's signals are the keep's. Nothing ends this but the keep's end.
    let _ = rustix::process::setsid();
    let socket = std::io::stdin().as_fd().try_clone_to_owned();
    let served = match socket {
        // Descriptor 0 stays open as long as this process; what is heard is that the keep has closed its end.
        Ok(socket) => casemate_broker::serve(socket),
        Err(error) => {
            tracing::error!("there is no socket to a keep: {error}");
            return ExitCode::FAILURE;
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            tracing::error!("{refusal}");
            ExitCode::FAILURE
        }
    }
}
