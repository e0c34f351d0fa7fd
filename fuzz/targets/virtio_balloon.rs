//! A hostile guest of the balloon.
#![no_main]

use casemate_virtio::{Balloon, hostile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| {
    if let Ok(balloon) = Balloon::new() {
        hostile::play(Box::new(balloon), script);
    }
});
