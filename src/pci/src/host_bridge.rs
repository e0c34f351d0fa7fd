//! The function at 00:00.0.

use crate::{BarRequest, CONFIG_SPACE_BYTES, Config, ConfigError, DecodedBars, Function, Identity};

/// A host bridge without registers of its own: guests expect one at 00:00.0, and find the rest of the bus by ACPI.
#[derive(Debug)]
pub struct HostBridge {
    config: Config,
}

impl HostBridge {
    /// Class 0600 under the ids of QEMU's generic PCIe host bridge, for which no guest has a quirk.
    pub fn new() -> Self {
        let identity = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_00_00, ..Identity::default() };
        Self { config: Config::new(identity) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl Function for HostBridge {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        Some(self.config.image())
    }
    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bars(&self) -> Vec<BarRequest> {
        Vec::new()
    }
    fn place_bar(&mut self, bar: u8, base: u64) -> Result<(), ConfigError> {
        self.config.place_bar(bar, base)
    }
    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_host_bridge() {
        let mut bridge = HostBridge::new();
        let mut class = [0; 4];
        bridge.config_read(crate::regs::REVISION_ID, &mut class);
        assert_eq!(class, [0, 0, 0x00, 0x06]);
        bridge.config_write(crate::regs::COMMAND, &[0xff, 0xff]);
        assert!(bridge.decoded().is_empty());
        assert!(bridge.place_bar(0, 0x1000).is_err());
    }
}
