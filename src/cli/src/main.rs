//! The program casemate.

fn main() {}
