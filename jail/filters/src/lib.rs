//! The seccomp filters of a cell, compiled from jail/filters/*.toml.
