//! A hostile guest of a hostile qcow2 image: the last 512 bytes are what the guest does, the others are the image.
#![no_main]

use casemate_virtio::{Blk, BlkBackend, BlkBelow, BlkFormat, hostile};
use libfuzzer_sys::fuzz_target;

const FILE_MAX_BYTES: u64 = 16 << 20;

fuzz_target!(|input: &[u8]| {
    let (image, script) = input.split_at(input.len().saturating_sub(512));
    let Some(size) = image.get(24..32).and_then(|size| size.try_into().ok()) else { return };
    let below =
        BlkBelow { file: hostile::file(&[0xbe; 4096], 4096), size_bytes: 4096, format: BlkFormat::Raw };
    let backend = BlkBackend {
        file: hostile::file(image, 0),
        format: BlkFormat::Qcow2 {
            file_bytes_max: FILE_MAX_BYTES,
            below: script.first().is_some_and(|first| first & 1 == 1).then(|| Box::new(below)),
        },
        size_bytes: u64::from_be_bytes(size),
        read_only: false,
        serial: String::new(),
        queues: 1,
    };
    if let Ok(disk) = Blk::new(backend) {
        hostile::play(Box::new(disk), script);
    }
});
