//! Many tests in one run of the lab, each a test of its own to the ordinary runner.
//!
//! A test is a function on a [`Ctx`], registered with its name in a table that the test program hands to [`main`].
//! Outside of the lab the program is a test runner (`--list`, filters and so on work as ever): the first test that is
//! wanted starts the lab, in which the same program, started with another argument, runs all that are wanted one after
//! another, each in a process and a cgroup of its own and with a deadline. Outcomes come back as lines of JSON in a file
//! on the lab's share. Should the lab die, the test that was running has failed, and a new lab runs the rest.

mod context;
mod failure;
mod guest;
mod inside;
mod lines;
mod outside;
mod process;
mod protocol;
mod tiny;

use std::{process::ExitCode, time::Duration};

pub use context::{Ctx, wait_until};
pub use failure::Failure;
pub use guest::{Disk, GuestFile, GuestImage, WITH_TOOLS};
pub use process::{Finished, Running, send_signal};
pub(crate) use protocol::LONG;
pub use protocol::NO_LABS;
pub use tiny::{tiny_kernel, tiny_kernel_that_ends};

/// By how much all waits are longer than a quick machine needs: how fast a processor is emulated differs several times
/// between machines, and a wait that is too long costs only a test that fails.
const PATIENCE: u32 = 3;

/// One test of the table.
#[derive(Clone, Copy, Debug)]
pub struct LabTest {
    pub(crate) name: &'static str,
    pub(crate) body: fn(&mut Ctx) -> Result<(), Failure>,
    pub(crate) deadline: Duration,
    pub(crate) long: Option<&'static str>,
}

impl LabTest {
    /// A test with a deadline of two minutes. Names are kebab-case: they name log files too.
    pub const fn new(name: &'static str, body: fn(&mut Ctx) -> Result<(), Failure>) -> Self {
        Self { name, body, deadline: Duration::from_secs(120), long: None }
    }

    /// The same test with another deadline.
    #[must_use]
    pub const fn deadline_seconds(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// The same test, skipped unless `CASEMATE_LONG=1`; `reason` says what makes it long.
    #[must_use]
    pub const fn long(mut self, reason: &'static str) -> Self {
        self.long = Some(reason);
        self
    }
}

/// The whole of a lab test program's `main`.
pub fn main(tests: &'static [LabTest]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [protocol::ALL] => inside::run_all(tests),
        [protocol::ONE, name] => inside::run_one(tests, name),
        _ if crate::machine::is_set(NO_LABS) => {
            println!("{} tests that need a lab are not run: {NO_LABS} is set", tests.len());
            ExitCode::SUCCESS
        }
        _ => outside::run(tests),
    }
}
