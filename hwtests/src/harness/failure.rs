//! Why a test did not pass.

use std::{error::Error, fmt};

/// A test's failure, or its reason not to run here. Any error turns into a failure by `?`.
#[derive(Debug)]
pub enum Failure {
    /// The test failed; the text says what was expected and what was seen.
    Failed(String),
    /// The test can't run here; the text says why.
    Skipped(String),
}

impl Failure {
    /// A failure with this message.
    pub fn new(message: impl fmt::Display) -> Self {
        Self::Failed(message.to_string())
    }

    /// Not run, for this reason.
    pub fn skip(reason: impl fmt::Display) -> Self {
        Self::Skipped(reason.to_string())
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Fails the test, from a function that returns `Result<_, Failure>`, unless the condition holds. Takes a message with
/// arguments, as `assert!` does.
#[macro_export]
macro_rules! expect {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::harness::Failure::new(format_args!($($message)+)));
        }
    };
}
