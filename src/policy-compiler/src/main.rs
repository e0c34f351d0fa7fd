//! Compiles policy plugins ahead of time, in a program of its own.

fn main() {}
