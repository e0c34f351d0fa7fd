//! A device that says anything, and a guest that does anything to it: no panic, and no write reaches the device's
//! configuration space but to the command register's bits.
#![no_main]

use std::sync::{Arc, Mutex};

use casemate_passthrough::{AssignedFunction, IrqInfo, Parts, Probe, Region, Seat, VectorKind, Vfio, VfioError};
use casemate_pci::{Function, MsiMessage, VectorSink};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;

/// VFIO's number of configuration space.
const CONFIG: u32 = 7;

#[derive(Clone)]
struct Device {
    space: Vec<u8>,
    sizes: [u64; 6],
    vectors: u32,
    flags: u32,
    /// Writes to configuration space.
    written: Arc<Mutex<Vec<(u64, Vec<u8>)>>>,
}

impl Vfio for Device {
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError> {
        let size = self.sizes.get(index as usize).copied().unwrap_or(0);
        let mappable = if size == 0 { Vec::new() } else { std::iter::once(0..size).collect() };
        Ok(Region { size, offset: u64::from(index) << 40, readable: true, writable: true, mappable })
    }
    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        if index == CONFIG {
            let start = offset as usize;
            data.copy_from_slice(&self.space[start..start + data.len()]);
        }
        Ok(())
    }
    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        if index == CONFIG {
            self.written.lock().expect("one thread").push((offset, data.to_vec()));
        } else {
            assert!(offset + data.len() as u64 <= self.sizes[index as usize], "outside of BAR {index}");
        }
        Ok(())
    }
    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError> {
        Ok(IrqInfo { count: if index == 0 { 1 } else { self.vectors }, flags: self.flags })
    }
    fn set_vectors(&mut self, _: VectorKind, events: &Arc<[EventFd]>, count: u16) -> Result<(), VfioError> {
        assert!(usize::from(count) <= events.len());
        Ok(())
    }
    fn add_vector(&mut self, vector: u16, events: &Arc<[EventFd]>) -> Result<(), VfioError> {
        assert!(usize::from(vector) < events.len());
        Ok(())
    }
    fn reset(&mut self) -> Result<(), VfioError> {
        panic!("a guest has reset the device");
    }
}

struct Sink;

impl VectorSink for Sink {
    fn set(&mut self, _: u16, _: Option<MsiMessage>) {}
    fn is_pending(&self, vector: u16) -> bool {
        vector % 3 == 0
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((space, rest)) = input.split_at_checked(256) else { return };
    let Some((numbers, accesses)) = rest.split_at_checked(8) else { return };
    let mut device = Device {
        space: space.to_vec(),
        sizes: std::array::from_fn(|bar| 1u64.checked_shl(numbers[bar].into()).unwrap_or(0) & !1),
        vectors: u32::from(numbers[6]) + 1,
        flags: u32::from(numbers[7]),
        written: Arc::default(),
    };
    let seat = if numbers[7] & 1 == 0 { Seat::RootBus } else { Seat::Slot };
    let Ok(probe) = Probe::read(&mut device, seat) else { return };
    // More than a fuzzer should open.
    if probe.vectors() > 64 {
        return;
    }
    let written = Arc::clone(&device.written);
    assert!(written.lock().expect("one thread").is_empty(), "probing changes nothing");
    let triggers = (0..probe.vectors()).filter_map(|_| EventFd::new(0).ok()).collect();
    let parts = Parts { vfio: device, probe, sink: Sink, triggers };
    let Ok(mut function) = AssignedFunction::new(parts) else { return };
    for access in accesses.chunks_exact(12) {
        let [kind, low, high, length, data @ ..] = access else { return };
        let offset = u16::from_le_bytes([*low, *high]);
        let mut data = [data, data].concat();
        data.truncate(usize::from(*length % 10));
        match *kind % 4 {
            0 => function.config_read(offset, &mut data),
            1 => function.config_write(offset, &data),
            2 => function.bar_read(kind >> 2, offset.into(), &mut data),
            _ => function.bar_write(kind >> 2, offset.into(), &data),
        }
        for (offset, value) in written.lock().expect("one thread").drain(..) {
            let value = u16::from_le_bytes(value.try_into().expect("a register of 16 bits"));
            assert!(offset == 4 && value & !0x0407 == 0 && value & 2 != 0, "{value:#x} at {offset:#x}");
        }
    }
});
