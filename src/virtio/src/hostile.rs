//! A guest that breaks every rule it can: what it does is read from bytes, so that a fuzzer finds what to do, and tests do
//! anything at all. For tests and `fuzz/`; the VMM is built without it.

use std::{fs::File, os::fd::OwnedFd, sync::Arc, thread};

use casemate_pci::{Function, MsiMessage, VectorSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Device, PciParts, PciTransport, vector_count};

/// The guest's memory: two pieces that do not touch, so that there is an outside in the middle.
const PIECE_BYTES: u64 = 0x2_0000;
const SECOND: u64 = 0x4_0000;
/// Steps of one play.
const STEPS_MAX: usize = 512;

struct Vectors;

impl VectorSink for Vectors {
    fn set(&mut self, _vector: u16, _message: Option<MsiMessage>) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

/// The bytes that a play is read from; zeros when there are no more.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A place in memory more often than not.
    fn address(&mut self) -> u64 {
        let [low, high, kind, ..] = self.long().to_le_bytes();
        let within = u64::from(u16::from_le_bytes([low, high]));
        match kind % 8 {
            0..=3 => within,
            4 | 5 => SECOND + within,
            // Across an edge, or nowhere.
            6 => (PIECE_BYTES - 64) + within % 128,
            _ => within << 48 | 0xfff0,
        }
    }
}

/// Plays the guest of `script` against `device`. It ends; and nothing of the device is left then.
///
/// # Panics
/// When the device did, or could not be made.
#[allow(clippy::unwrap_used)]
pub fn play(device: Box<dyn Device>, script: &[u8]) {
    let regions = [(GuestAddress(0), PIECE_BYTES as usize), (GuestAddress(SECOND), PIECE_BYTES as usize)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
    let events = (0..vector_count(&*device)).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    let queues = device.queue_sizes().len() as u64;
    let parts = PciParts { device, memory: Arc::clone(&memory), events, vectors: Box::new(Vectors) };
    let (mut function, worker) = PciTransport::new(parts).unwrap();
    let worker = thread::spawn(move || worker.run());
    let mut script = Script(script);
    for _ in 0..STEPS_MAX {
        if script.0.is_empty() {
            break;
        }
        step(&mut function, &memory, queues, &mut script);
    }
    drop(function);
    worker.join().unwrap();
}

fn step(function: &mut PciTransport, memory: &GuestMemoryMmap, queues: u64, script: &mut Script<'_>) {
    let queue = u64::from(script.byte()) % (queues + 1);
    match script.byte() % 12 {
        // Anything to anywhere in the BAR and in configuration space, in every width.
        0 => {
            let (offset, data) = (script.long() % 0x8010, script.long().to_le_bytes());
            let length = usize::from(script.byte()) % 9;
            function.bar_write(0, offset, data.get(..length).unwrap_or(&data));
        }
        1 => {
            let (offset, length) = (script.long() % 0x8010, usize::from(script.byte()) % 9);
            let mut data = [0; 8];
            function.bar_read(0, offset, data.get_mut(..length).unwrap_or(&mut []));
        }
        2 => {
            let (offset, data) = (script.long() as u16 % 4096, script.long().to_le_bytes());
            let length = usize::from(script.byte()) % 5;
            function.config_write(offset, data.get(..length).unwrap_or(&data));
            function.config_read(offset, &mut [0; 4]);
        }
        // A queue is set up, wherever.
        3 | 4 => {
            common(function, 0x16, queue, 2);
            common(function, 0x18, 1 << (script.byte() % 9), 2);
            for register in [0x20, 0x28, 0x30] {
                let address = script.address() & !0xf;
                common(function, register, address, 8);
            }
            common(function, 0x1c, 1, 2);
        }
        // The device is started with any of the features that it has.
        5 => {
            let mask = script.long();
            common(function, 0x14, 3, 1);
            for (half, must) in [(0, 0), (1, 1)] {
                common(function, 0x00, half, 4);
                let mut offered = [0; 4];
                function.bar_read(0, 0x04, &mut offered);
                common(function, 0x08, half, 4);
                common(
                    function,
                    0x0c,
                    u64::from(u32::from_le_bytes(offered)) & (mask >> (32 * half)) | must,
                    4,
                );
            }
            common(function, 0x14, 11, 1);
            common(function, 0x14, 15, 1);
        }
        6 => common(function, 0x14, u64::from(script.byte() & 1), 1),
        // A descriptor, an index, or anything, in the way of a ring or not.
        7 | 8 => {
            let (table, index) = (script.address() & !0xf, u64::from(script.byte() % 16));
            let (address, length) = (script.address(), script.long() as u32 >> (script.byte() % 32));
            let flags = u16::from(script.byte() % 8);
            let next = u16::from(script.byte() % 18);
            let parts = [
                &address.to_le_bytes()[..],
                &length.to_le_bytes(),
                &flags.to_le_bytes(),
                &next.to_le_bytes(),
            ];
            let _ = memory.write_slice(&parts.concat(), GuestAddress(table + index * 16));
        }
        9 => {
            let (ring, count) = (script.address() & !0xf, u16::from(script.byte()));
            let heads: Vec<u8> = (0..16).map(|_| script.byte() % 17).flat_map(|head| [head, 0]).collect();
            let _ =
                memory.write_slice(&[&[0, 0], &count.to_le_bytes()[..], &heads].concat(), GuestAddress(ring));
        }
        10 => {
            let (at, data) = (script.address(), script.long());
            let _ = memory.write_slice(&data.to_le_bytes(), GuestAddress(at));
        }
        _ => function.bar_write(0, 0x3000 + queue * 4, &[0, 0]),
    }
}

/// A write to the common configuration.
fn common(function: &mut PciTransport, offset: u64, value: u64, length: usize) {
    let data = value.to_le_bytes();
    function.bar_write(0, offset, data.get(..length).unwrap_or(&data));
}

/// A file in memory that holds `content` and zeros, for a device to have.
///
/// # Panics
/// When there is none to be had.
#[allow(clippy::unwrap_used)]
pub fn file(content: &[u8], size_bytes: u64) -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("hostile", flags).unwrap());
    rustix::io::pwrite(&file, content, 0).unwrap();
    file.set_len(size_bytes.max(content.len() as u64)).unwrap();
    file.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use proptest::prelude::*;

    use super::*;
    use crate::{Balloon, Blk, BlkBackend, BlkFormat, Net, Rng, qcow2};

    fn disk(file: OwnedFd, format: BlkFormat, size_bytes: u64) -> Option<Box<dyn Device>> {
        let backend =
            BlkBackend { file, format, size_bytes, read_only: false, serial: "hostile".into(), queues: 2 };
        Blk::new(backend).ok().map(|disk| Box::new(disk) as Box<dyn Device>)
    }

    fn card() -> (Box<dyn Device>, UnixDatagram) {
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        for _ in 0..8 {
            wire.send(&[7; 1526]).unwrap();
        }
        let taps = vec![tap.try_clone().unwrap().into(), tap.into()];
        (Box::new(Net::new(taps, [2, 0, 0, 0, 0, 1]).unwrap()), wire)
    }

    /// A guest that first sets up queue 0 and starts the device, so that most of what follows reaches it.
    fn scripts() -> impl Strategy<Value = Vec<u8>> {
        let address = |at: u16| [&at.to_le_bytes()[..], &[0; 6]].concat();
        let queue = |number: u8, base: u16| {
            [&[number, 3, 4][..], &address(base), &address(base + 0x1000), &address(base + 0x2000)].concat()
        };
        let begin = [queue(0, 0x1000), queue(1, 0x5000), [&[0, 5][..], &[0xff; 8]].concat()].concat();
        prop::collection::vec(any::<u8>(), 0..2000).prop_map(move |more| [begin.clone(), more].concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_device_minds(script in scripts(), content in prop::collection::vec(any::<u8>(), 0..4096)) {
            let raw = disk(file(&content, 1 << 16), BlkFormat::Raw, 1 << 16);
            let mut image = qcow2::tests::empty(3, false);
            // Behind the header, where the tables are.
            for (place, byte) in image.iter_mut().skip(4096).zip(content.iter()).step_by(7) {
                *place = *byte;
            }
            let format = BlkFormat::Qcow2 { file_bytes_max: 8 << 20, below: None };
            let qcow2 = disk(file(&image, 0), format, qcow2::tests::SIZE as u64);
            let (net, _wire) = card();
            let devices = [raw, qcow2, Some(net), Some(Box::new(Rng::new())), Some(Box::new(Balloon::new().unwrap()))];
            devices.into_iter().flatten().for_each(|device| play(device, &script));
        }
    }
}
