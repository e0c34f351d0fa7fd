//! An assigned function behind the guest's PCI root.

use std::sync::Arc;

use casemate_pci::{
    BarRequest, CONFIG_SPACE_BYTES, Config, ConfigError, DecodedBars, Function, Msi, MsiMessage,
    MsiTransition, Msix, MsixTransition, VectorSink,
};
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    filter::{self, Has},
    mapping::Mapping,
    probe::Probe,
    seam::{Region, VectorKind, Vfio, VfioError},
};

/// What an assigned function is made of.
pub struct Parts<V, S> {
    /// The device.
    pub vfio: V,
    /// What was found of it.
    pub probe: Probe,
    /// Who routes its vectors into the guest: an irqfd for each eventfd of `triggers`.
    pub sink: S,
    /// The eventfds that its vectors trigger, [`Probe::vectors`] of them.
    pub triggers: Arc<[EventFd]>,
}

/// One function that a guest owns.
pub struct AssignedFunction<V, S> {
    vfio: V,
    sink: S,
    triggers: Arc<[EventFd]>,
    config: Config,
    msix: Option<Msix>,
    msi: Option<Msi>,
    /// Which vectors of MSI-X were made at the device; empty where all are made at once.
    made: Vec<bool>,
    regions: [Region; casemate_pci::BAR_COUNT],
    mappings: Vec<Mapping>,
    has: Has,
    /// What each forwarded register of the device was set to last, in the filter's order.
    forwarded: Vec<u16>,
}

impl<V: Vfio, S: VectorSink + Send> AssignedFunction<V, S> {
    /// The function as a guest first meets it: bus master off, memory decoding on at the device, MSI-X off, and
    /// INTx off unless the guest is told of it.
    ///
    /// # Errors
    /// When there are more or fewer eventfds than vectors, or the device can't be brought to that state.
    pub fn new(parts: Parts<V, S>) -> Result<Self, VfioError> {
        let Parts { mut vfio, probe, sink, triggers } = parts;
        if triggers.len() != usize::from(probe.vectors()) {
            let problem = format!("{} eventfds were made for {} vectors", triggers.len(), probe.vectors());
            return Err(VfioError::Unexpected(problem));
        }
        let has = Has { intx: probe.intx, ports: probe.config.has_ports() };
        let mut forwarded = Vec::new();
        for (offset, _, always) in filter::forwarded(has) {
            write_config(&mut vfio, offset, always)?;
            forwarded.push(always);
        }
        let Probe { config, msix, msi, dynamic, regions, mappings, .. } = probe;
        let made = if dynamic { vec![false; triggers.len()] } else { Vec::new() };
        Ok(Self { vfio, sink, triggers, config, msix, msi, made, regions, mappings, has, forwarded })
    }

    /// The parts of its BARs to be mapped from the device's file into the guest. Accesses to the rest are to be
    /// trapped, and brought to [`Function::bar_read`] and [`Function::bar_write`].
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Writes those registers of the device whose forwarded bits the guest has changed. An error is with whoever
    /// implements [`Vfio`]; the next change tries again.
    fn forward(&mut self) {
        for ((offset, guest, always), last) in filter::forwarded(self.has).zip(&mut self.forwarded) {
            let value = self.config.u16_at(offset) & guest | always;
            if value != *last && write_config(&mut self.vfio, offset, value).is_ok() {
                *last = value;
            }
        }
    }

    /// Turns MSI-X as a whole on or off at the device, and makes the vectors that the guest has unmasked for the first time.
    /// The sink was told of them before, so their irqfds stand when the device begins to trigger. A failure is with whoever
    /// implements [`Vfio`].
    fn make_vectors(&mut self, transition: Option<MsixTransition>, unmasked: &[u16]) {
        let all = u16::try_from(self.triggers.len()).unwrap_or(u16::MAX);
        match transition {
            Some(MsixTransition::Enabled) => {
                // The kernel turns MSI-X on with one vector at least.
                let count = if self.made.is_empty() { all } else { 1 };
                let _ = self.vfio.set_vectors(VectorKind::Msix, &self.triggers, count);
                self.made.iter_mut().take(1).for_each(|made| *made = true);
            }
            Some(MsixTransition::Disabled) => {
                let _ = self.vfio.set_vectors(VectorKind::Msix, &self.triggers, 0);
                self.made.fill(false);
            }
            None => {}
        }
        if !self.msix.as_ref().is_some_and(Msix::enabled) {
            return;
        }
        for vector in unmasked {
            if let Some(made) = self.made.get_mut(usize::from(*vector)).filter(|made| !**made) {
                *made = self.vfio.add_vector(*vector, &self.triggers).is_ok();
            }
        }
    }

    /// Turns MSI on or off at the device, after the guest's write to configuration space or a reset. As with MSI-X, a failure
    /// is with whoever implements [`Vfio`].
    fn turn_msi(&mut self) {
        let msi = self.msi.as_mut().and_then(|msi| msi.config_written(&self.config, &mut self.sink));
        let _ = match msi {
            Some(MsiTransition::Enabled(count)) => {
                self.vfio.set_vectors(VectorKind::Msi, &self.triggers, count)
            }
            Some(MsiTransition::Disabled) => self.vfio.set_vectors(VectorKind::Msi, &self.triggers, 0),
            None => Ok(()),
        };
    }

    /// The region of `bar`, when an access of `len` bytes at `offset` is aligned and inside it.
    fn region(&self, bar: u8, offset: u64, len: usize) -> Option<&Region> {
        let len = u64::try_from(len).ok().filter(|len| matches!(len, 1 | 2 | 4 | 8))?;
        let region = self.regions.get(usize::from(bar))?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= region.size);
        (inside && offset.is_multiple_of(len)).then_some(region)
    }
}

fn write_config<V: Vfio>(vfio: &mut V, offset: u16, value: u16) -> Result<(), VfioError> {
    vfio.region_write(VFIO_PCI_CONFIG_REGION_INDEX, u64::from(offset), &value.to_le_bytes())
}

impl<V: Vfio, S: VectorSink + Send> Function for AssignedFunction<V, S> {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some(msi) = &self.msi {
            msi.show_pending(&mut self.config, &self.sink);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let mut noting = Noting { sink: &mut self.sink, unmasked: Vec::new() };
        let msix = self.msix.as_mut().and_then(|msix| msix.config_written(&self.config, &mut noting));
        let unmasked = noting.unmasked;
        self.make_vectors(msix, &unmasked);
        self.turn_msi();
        self.forward();
    }

    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        let pends = self.msi.as_ref().is_some_and(Msi::has_pending);
        (!pends).then(|| self.config.image())
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.msix.as_ref().is_some_and(|msix| msix.bar_read(bar, offset, data, &self.sink)) {
            return;
        }
        let readable = self.region(bar, offset, data.len()).is_some_and(|region| region.readable);
        if !readable || self.vfio.region_read(u32::from(bar), offset, data).is_err() {
            data.fill(0xff);
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        let mut noting = Noting { sink: &mut self.sink, unmasked: Vec::new() };
        if self.msix.as_mut().is_some_and(|msix| msix.bar_write(bar, offset, data, &mut noting)) {
            let unmasked = noting.unmasked;
            self.make_vectors(None, &unmasked);
            return;
        }
        if self.region(bar, offset, data.len()).is_some_and(|region| region.writable) {
            // A failure is with whoever implements Vfio; to the guest, a posted write never fails.
            let _ = self.vfio.region_write(u32::from(bar), offset, data);
        }
    }

    fn bars(&self) -> Vec<BarRequest> {
        self.config.bars().collect()
    }

    fn place_bar(&mut self, bar: u8, base: u64) -> Result<(), ConfigError> {
        self.config.place_bar(bar, base)
    }

    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }

    /// What fails here is with whoever implements [`Vfio`]; each step is tried all the same.
    fn reset(&mut self) {
        self.config.reset();
        let msix = self.msix.as_mut().and_then(|msix| msix.reset(&self.config, &mut self.sink));
        self.make_vectors(msix, &[]);
        self.turn_msi();
        // Bus master is off before the reset, and after it, whatever the reset made of it.
        self.forward();
        let _ = self.vfio.reset();
        for ((offset, _, always), last) in filter::forwarded(self.has).zip(&mut self.forwarded) {
            let _ = write_config(&mut self.vfio, offset, always);
            *last = always;
        }
    }
}

/// A sink that notes which vectors are to deliver from now on.
struct Noting<'a, S> {
    sink: &'a mut S,
    unmasked: Vec<u16>,
}

impl<S: VectorSink> VectorSink for Noting<'_, S> {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        self.sink.set(vector, message);
        if message.is_some() {
            self.unmasked.push(vector);
        }
    }
    fn is_pending(&self, vector: u16) -> bool {
        self.sink.is_pending(vector)
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
