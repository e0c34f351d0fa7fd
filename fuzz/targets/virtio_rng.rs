//! A hostile guest of the entropy source.
#![no_main]

use casemate_virtio::{Rng, hostile};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| hostile::play(Box::new(Rng::new()), script));
