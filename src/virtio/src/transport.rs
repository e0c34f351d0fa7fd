//! A virtio device as a PCI function (virtio 1.3, 4.1): modern, MSI-X only.

use std::{io, sync::Arc};

use casemate_pci::{
    BarKind, BarOffset, BarRequest, CONFIG_SPACE_BYTES, Capability, Config, ConfigError, DecodedBars,
    Function, Identity, Msix, MsixLayout, VectorSink, regs,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    active::{Active, Memory},
    common::{Action, COMMON_BYTES, Common},
    counters::Counters,
    device::{Device, Fault},
    device_config::DeviceConfig,
    interrupt::Interrupt,
    worker::{EVENTS_MAX, Remote, Worker, WorkerControl},
};

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device ids of modern functions begin here.
const MODERN_DEVICE: u16 = 0x1040;

// BAR 0 holds everything, each part on pages of its own.
const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0x5000;
const PAGE_BYTES: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

// cfg_type of the vendor capabilities (virtio 1.3, 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
// Within the PCI configuration access capability.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// What a [`PciTransport`] is made of.
pub struct PciParts {
    /// The device, which goes to the worker.
    pub device: Box<dyn Device>,
    /// Guest memory; the device sees it only while it is active.
    pub memory: Memory,
    /// An eventfd for each vector ([`vector_count`] of them, not blocking), written to interrupt.
    pub events: Vec<EventFd>,
    /// Who delivers what is written there, or keeps it while the vector is masked.
    pub vectors: Box<dyn VectorSink + Send>,
}

/// Why no function can be made of the parts.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Not one eventfd for each vector.
    #[error("{given} eventfds for {needed} vectors")]
    Events {
        /// How many there must be.
        needed: u16,
        /// How many there were.
        given: usize,
    },
    /// A device that describes itself wrongly.
    #[error("a device with {0}")]
    Device(&'static str),
    /// Configuration space.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An eventfd or epoll set of the worker's.
    #[error("cannot make the device's eventfds: {0}")]
    Io(#[from] io::Error),
}

/// Where the driver rings for a queue. A write there, of any value and width, is `event`.
#[derive(Debug)]
pub struct Doorbell<'a> {
    /// The BAR.
    pub bar: u8,
    /// Bytes from the BAR's base.
    pub offset: u64,
    /// What to tie to it; a write that reaches [`Function::bar_write`] instead does the same.
    pub event: &'a EventFd,
}

/// The number of MSI-X vectors of a function with `device`: one a queue, and one for the configuration.
pub fn vector_count(device: &dyn Device) -> u16 {
    u16::try_from(device.queue_sizes().len()).unwrap_or(u16::MAX).saturating_add(1)
}

/// A virtio device's PCI function.
///
/// It is inactive until the driver sets DRIVER_OK. A reset (a zero written to the status) returns when the worker
/// has given memory and queues up.
pub struct PciTransport {
    config: Config,
    /// Offset of the PCI configuration access capability.
    window: u16,
    msix: Msix,
    vectors: Box<dyn VectorSink + Send>,
    common: Common,
    device_config: Arc<DeviceConfig>,
    interrupt: Interrupt,
    doorbells: Arc<[EventFd]>,
    memory: Memory,
    worker: Remote,
    counters: Arc<Counters>,
    is_active: bool,
}

impl PciTransport {
    /// The function, and the thread that its device needs.
    ///
    /// # Errors
    /// When the parts do not fit each other, or a descriptor cannot be made.
    pub fn new(parts: PciParts) -> Result<(Self, Worker), SetupError> {
        let PciParts { device, memory, events, vectors } = parts;
        let (needed, given) = (vector_count(&*device), events.len());
        if usize::from(needed) != given {
            return Err(SetupError::Events { needed, given });
        }
        let sizes = device.queue_sizes();
        let events_max = EVENTS_MAX.saturating_sub(device.backends().len());
        if sizes.len() > events_max || !sizes.iter().all(|size| size.is_power_of_two() && *size <= 1 << 15) {
            return Err(SetupError::Device("too many queues, or sizes that are not powers of two"));
        }
        if device.config().len() as u64 > PAGE_BYTES {
            return Err(SetupError::Device("more configuration than a page"));
        }
        let (config, window, msix) = config_space(&*device, needed)?;
        let interrupt = Interrupt::new(events, sizes.len());
        let common = Common::new(device.features(), sizes, interrupt.clone());
        let fixed = || Arc::new(DeviceConfig::new(device.config().to_vec(), &[]));
        let device_config = device.changing_config().unwrap_or_else(fixed);
        let doorbells: Arc<[EventFd]> =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<Vec<_>, _>>()?.into();
        let counters = Arc::default();
        let (thread, worker) =
            Worker::new(device, doorbells.clone(), Arc::clone(&counters), Arc::clone(&device_config))?;
        let transport = Self {
            config,
            window,
            msix,
            vectors,
            common,
            device_config,
            interrupt,
            doorbells,
            memory,
            worker,
            counters,
            is_active: false,
        };
        Ok((transport, thread))
    }

    /// The doorbells, one a queue, to be tied to where BAR 0 was placed.
    pub fn doorbells(&self) -> impl Iterator<Item = Doorbell<'_>> {
        let offsets = (NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
        offsets.zip(self.doorbells.iter()).map(|(offset, event)| Doorbell { bar: BAR, offset, event })
    }

    /// Which rule the driver broke, when the device waits for a reset because of that.
    pub fn fault(&self) -> Option<String> {
        self.interrupt.fault()
    }

    /// What the device has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// What can be asked of the device's thread from outside.
    pub fn worker_control(&self) -> WorkerControl {
        self.worker.control().clone()
    }

    /// Interrupts of the device, for who changes its configuration from outside.
    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Activate => match self.activate() {
                Ok(()) => self.is_active = true,
                Err(fault) => {
                    self.counters.error();
                    self.interrupt.set_fault(fault);
                }
            },
            Action::Reset => {
                if std::mem::take(&mut self.is_active) {
                    self.worker.deactivate();
                }
                self.interrupt.reset();
                self.common.reset();
                self.device_config.reset();
            }
        }
    }

    fn activate(&self) -> Result<(), Fault> {
        let queues = self.common.queues(&self.memory)?;
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        let active =
            Active::new(memory, queues, interrupt, self.common.features(), Arc::clone(&self.counters));
        self.worker.activate(active)
    }

    /// The access that the driver has set in the PCI configuration access capability, as offset and width.
    fn window_access(&self) -> Option<(u64, usize)> {
        let bar = self.config.u16_at(self.window + WINDOW_BAR) & 0xff;
        let offset = u64::from(self.config.u32_at(self.window + WINDOW_OFFSET));
        let length = self.config.u32_at(self.window + WINDOW_LENGTH);
        let fits =
            matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into()) && bar == u16::from(BAR);
        fits.then_some((offset, length as usize))
    }

    fn is_window_data(&self, offset: u16, length: usize) -> bool {
        let data = u32::from(self.window + WINDOW_DATA);
        let start = u32::from(offset);
        start < data + 4 && data < start.saturating_add(u32::try_from(length).unwrap_or(u32::MAX))
    }
}

impl Function for PciTransport {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_window_data(offset, data.len())
            && let Some((at, length)) = self.window_access()
        {
            let mut bytes = [0; 4];
            if let Some(part) = bytes.get_mut(..length) {
                self.bar_read(BAR, at, part);
            }
            self.config.set(self.window + WINDOW_DATA, &bytes);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.config_written(&self.config, &mut self.vectors);
        if self.is_window_data(offset, data.len())
            && let Some((at, length)) = self.window_access()
        {
            let bytes = self.config.u32_at(self.window + WINDOW_DATA).to_le_bytes();
            if let Some(part) = bytes.get(..length) {
                self.bar_write(BAR, at, part);
            }
        }
    }

    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        // A read of the window's data is one of BAR 0, once the driver has said of what.
        self.window_access().is_none().then(|| self.config.image())
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.msix.bar_read(bar, offset, data, &self.vectors) {
            return;
        }
        data.fill(0xff);
        if bar != BAR {
            return;
        }
        match offset {
            COMMON..ISR => {
                let generation = self.device_config.generation();
                self.common.read(offset, data, generation);
            }
            ISR => {
                if let [isr] = data {
                    *isr = self.interrupt.take_isr();
                }
            }
            DEVICE..NOTIFY => {
                self.device_config.read((offset - DEVICE) as usize, data);
            }
            _ => {}
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if self.msix.bar_write(bar, offset, data, &mut self.vectors) || bar != BAR {
            return;
        }
        if offset < ISR {
            if let Some(action) = self.common.write(offset, data) {
                self.act(action);
            }
        } else if (DEVICE..NOTIFY).contains(&offset) {
            self.device_config.driver_writes((offset - DEVICE) as usize, data);
        } else if let Some(doorbell) = self.doorbells().find(|doorbell| doorbell.offset == offset) {
            // It fails only when the counter is full, and then the doorbell rings already.
            let _ = doorbell.event.write(1);
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

    fn reset(&mut self) {
        self.act(Action::Reset);
        self.config.reset();
        self.msix.reset(&self.config, &mut self.vectors);
    }
}

/// Configuration space of a function with `device`, the offset of its access window, and MSI-X.
fn config_space(device: &dyn Device, vectors: u16) -> Result<(Config, u16, Msix), ConfigError> {
    let kind = device.kind();
    let mut config = Config::new(Identity {
        vendor: VIRTIO_VENDOR,
        device: MODERN_DEVICE + kind.id(),
        class: kind.pci_class(),
        revision: 1,
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: 0x40 + kind.id(),
    });
    config.add_bar(BarRequest {
        index: BAR,
        size: BAR_BYTES,
        kind: BarKind::Memory64,
        prefetchable: false,
    })?;
    let queues = u64::from(vectors.saturating_sub(1));
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    let mut parts = vec![
        (CAP_COMMON, COMMON, COMMON_BYTES, &[][..]),
        (CAP_NOTIFY, NOTIFY, queues * u64::from(NOTIFY_MULTIPLIER), &multiplier),
        (CAP_ISR, ISR, 1, &[]),
    ];
    if !device.config().is_empty() {
        parts.push((CAP_DEVICE, DEVICE, device.config().len() as u64, &[]));
    }
    for (cfg_type, offset, length, more) in parts {
        let body = capability_body(cfg_type, offset, length, more);
        config.add_capability(Capability { id: regs::CAP_ID_VNDR, body: &body, ..Default::default() })?;
    }
    // The window: bar, offset, length and data are the driver's to write.
    let mut writable = [0xff; 18];
    let (fixed, _) = writable.split_at_mut(6);
    fixed.copy_from_slice(&[0, 0, 0xff, 0, 0, 0]);
    let body = capability_body(CAP_PCI, 0, 0, &[0; 4]);
    let window = config.add_capability(Capability {
        id: regs::CAP_ID_VNDR,
        body: &body,
        writable: &writable,
        ..Default::default()
    })?;
    let msix = Msix::add(
        &mut config,
        MsixLayout {
            vectors,
            table: BarOffset { bar: BAR, offset: MSIX_TABLE },
            pba: BarOffset { bar: BAR, offset: MSIX_PBA },
            capability_at: None,
        },
    )?;
    Ok((config, window.into(), msix))
}

/// struct virtio_pci_cap behind id and next, with what follows it.
fn capability_body(cfg_type: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let size = 16 + more.len() as u8;
    let place = [offset as u32, length as u32].map(u32::to_le_bytes).concat();
    [&[size, cfg_type, BAR, 0, 0, 0], &place[..], more].concat()
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
