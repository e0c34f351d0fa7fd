//! The project's own commands: demo, test, lab, tidy.

fn main() {}
