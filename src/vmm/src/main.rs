//! `casemate-vmm`: runs one guest in the cell it finds itself in. It takes no arguments; the keep starts it.

use std::process::ExitCode;

fn main() -> ExitCode {
    casemate_vmm::enter()
}
