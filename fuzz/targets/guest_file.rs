//! Any text is a guest or is refused, in one line.
#![no_main]

use std::path::Path;

use casemate_spec::parse_guest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(refusal) = parse_guest(Path::new("guest.toml"), text) {
        assert_eq!(refusal.to_string().lines().count(), 1, "{refusal}");
    }
});
