//! A victim is a program that starts as a captured casemate-vmm would go on: in the very cell, with the very filters, and
//! tries to get out. It shows that a cell holds, and by which layer.
//!
//! `casemate-victim ATTEMPT ROLE` makes one attempt under the filter of a role (or of none: `-`) and tells over descriptor
//! 2 how it went, if it lives to tell. `casemate-jail-probe` starts a cell for each attempt and role, and prints what
//! stopped it, one JSON object a line; it fails when anything gets through, or is stopped by less than the table in
//! [`ATTEMPTS`] promises.
//!
//! Each attempt is one run, since what seccomp stops does not come back.
// The attempts are raw system calls with arguments that no library makes.
#![allow(unsafe_code)]

mod attempts;
mod calls;
pub mod trace;

pub use attempts::{ATTEMPTS, Attempt, Beneath, Expected};
pub use calls::{Stopped, allocate_as_the_vmm};

use casemate_filters::Role;

/// What a victim says when its filters are on and it is about to try.
pub const REACHED: &str = "reached";
/// What a victim says when the attempt succeeded.
pub const THROUGH: &str = "through";
/// What a victim says, with the call and the error's number after it, when the kernel refused.
pub const STOPPED: &str = "stopped";
/// The abstract unix socket, of the host's network namespace, that attempts connect to.
pub const ABSTRACT_NAME: &[u8] = b"casemate-jail-probe";

/// The attempt of this name.
pub fn attempt(name: &str) -> Option<&'static Attempt> {
    ATTEMPTS.iter().find(|attempt| attempt.name == name)
}

/// Where a role's filters, as far as the attempt meets them, lead.
pub fn expected(attempt: &Attempt, role: Option<Role>) -> Expected {
    role.map_or(Expected::Beneath(attempt.beneath), attempt.in_role)
}
