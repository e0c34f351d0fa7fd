//! A hostile guest of a raw disk, with io_uring where the kernel has it.
#![no_main]

use casemate_virtio::{Blk, BlkBackend, BlkFormat, hostile};
use libfuzzer_sys::fuzz_target;

const DISK_BYTES: u64 = 1 << 16;

fuzz_target!(|script: &[u8]| {
    let Some((kind, script)) = script.split_first() else { return };
    let backend = BlkBackend {
        file: hostile::file(&[], DISK_BYTES),
        format: BlkFormat::Raw,
        size_bytes: DISK_BYTES,
        read_only: kind & 1 == 1,
        serial: "fuzz".into(),
        queues: 1 + u16::from(kind >> 1 & 3),
    };
    if let Ok(disk) = Blk::new(backend) {
        hostile::play(Box::new(disk), script);
    }
});
