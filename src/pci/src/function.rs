//! What the PCI root holds.

use crate::{BarRequest, CONFIG_SPACE_BYTES, ConfigError, DecodedBars};

/// One PCI function behind the root: emulated or assigned.
///
/// Accesses come as the guest made them, little-endian, of any width and offset. One that a function does not
/// understand reads as all ones and writes nothing.
pub trait Function: Send {
    /// A read of the 4 KiB configuration space.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// A write to it. [`Function::decoded`] may differ afterwards.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// Its whole configuration space, where a read of it is nothing but a copy: one that has no effect, of what changes by
    /// [`Function::config_write`], [`Function::reset`] and what its owner calls alone. `None` where a read is more than that, and
    /// that may be another way after each of those.
    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        None
    }
    /// A read of BAR `bar`, `offset` bytes from its base.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// A write to BAR `bar`, `offset` bytes from its base.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// Every BAR it implements, for the VMM to place before the guest starts.
    fn bars(&self) -> Vec<BarRequest>;
    /// Writes a BAR as firmware would. It answers there once the guest turns memory decoding on.
    ///
    /// # Errors
    /// When there is no such BAR, or `base` is not a multiple of its size or does not fit its registers.
    fn place_bar(&mut self, bar: u8, base: u64) -> Result<(), ConfigError>;
    /// What it answers to right now. The root compares it around each configuration write and moves the maps; ranges
    /// that overlap others or leave the root's memory windows are the guest's doing, and the root's to leave unmapped.
    fn decoded(&self) -> DecodedBars;
    /// Brings it to the state after power-on, as a reset of its bus does: it answers to nothing, reaches no memory and
    /// interrupts nobody once this returns.
    fn reset(&mut self);
}
