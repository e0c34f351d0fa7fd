//! A device's own part of its configuration space (virtio 1.3, 2.5), while it can change: by the device, of which the driver
//! is then told, and in a few places by the driver.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The bytes, shared by the transport, which shows them, by the device, and by who changes the device from outside. Its
/// lock is held for a copy at a time: nobody waits for anything meanwhile.
#[derive(Debug)]
pub struct DeviceConfig {
    state: Mutex<State>,
    /// Fields that the driver may write.
    writable: &'static [Range<usize>],
}

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    generation: u8,
}

impl DeviceConfig {
    /// Configuration that begins as `bytes`; the driver may write the fields `writable`, each as a whole.
    pub fn new(bytes: Vec<u8>, writable: &'static [Range<usize>]) -> Self {
        Self { state: Mutex::new(State { bytes, generation: 0 }), writable }
    }

    /// What a driver compares before and after it has read more than one field.
    pub(crate) fn generation(&self) -> u8 {
        self.lock().generation
    }

    /// Reads from `offset` on; bytes that are not there are left as they are in `data`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (to, from) in data.iter_mut().zip(self.lock().bytes.iter().skip(offset)) {
            *to = *from;
        }
    }

    /// A field of 4 bytes; 0 where there is none.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut field = [0; 4];
        self.read(offset, &mut field);
        u32::from_le_bytes(field)
    }

    /// The driver writes; what is not a whole field that it may write goes nowhere.
    pub(crate) fn driver_writes(&self, offset: usize, data: &[u8]) {
        let written = offset..offset.saturating_add(data.len());
        if self.writable.contains(&written) {
            self.lock().store(offset, data);
        }
    }

    /// The device is reset: what the driver wrote is forgotten.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        for field in self.writable {
            if let Some(bytes) = state.bytes.get_mut(field.clone()) {
                bytes.fill(0);
            }
        }
    }

    /// The device changes a field. The driver has to be told, by [`crate::Interrupt::signal_config`].
    pub fn set(&self, offset: usize, data: &[u8]) {
        let mut state = self.lock();
        state.store(offset, data);
        state.generation = state.generation.wrapping_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn store(&mut self, offset: usize, data: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_writes_whole_fields_of_its_own_and_a_reset_forgets_them() {
        let config = DeviceConfig::new(vec![1; 12], &[4..8, 10..12]);
        for (offset, data) in [(0, &[9; 4][..]), (4, &[9; 2]), (5, &[9; 4]), (4, &[9; 8]), (usize::MAX, &[9])]
        {
            config.driver_writes(offset, data);
        }
        assert_eq!(config.u32_at(4), 0x0101_0101);
        config.driver_writes(4, &[7; 4]);
        assert_eq!((config.u32_at(4), config.generation()), (0x0707_0707, 0));
        config.reset();
        assert_eq!((config.u32_at(0), config.u32_at(4), config.u32_at(8)), (0x0101_0101, 0, 0x0101));
    }

    #[test]
    fn a_change_by_the_device_is_another_generation() {
        let config = DeviceConfig::new(vec![0; 8], &[]);
        config.set(0, &5u64.to_le_bytes());
        config.set(6, &[1; 9]);
        assert_eq!((config.generation(), config.u32_at(0)), (2, 5));
        let mut data = [0xff; 4];
        config.read(6, &mut data);
        assert_eq!(data, [1, 1, 0xff, 0xff]);
        config.read(usize::MAX, &mut data);
    }
}
