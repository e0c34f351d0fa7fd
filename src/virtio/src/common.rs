//! The common configuration of a virtio PCI device (virtio 1.3, 4.1.4.3): features, status, queues.

use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vm_memory::GuestMemoryMmap;

use crate::{
    device::Fault,
    interrupt::Interrupt,
    ring::{Queue, RingPlace},
};

/// Size of the structure, without the fields of features that are not offered.
pub(crate) const COMMON_BYTES: u64 = 0x38;

// Registers by their offsets.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESCRIPTORS: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// Bits that are set without a condition.
const STATUS_PLAIN: u8 =
    VIRTIO_CONFIG_S_ACKNOWLEDGE as u8 | VIRTIO_CONFIG_S_DRIVER as u8 | VIRTIO_CONFIG_S_FAILED as u8;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// What every device offers.
const TRANSPORT_FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The driver is ready: make the device active.
    Activate,
    /// The driver resets the device: take its memory back, then call [`Common::reset`].
    Reset,
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Common {
    offered: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    interrupt: Interrupt,
}

#[derive(Clone, Copy, Debug, Default)]
struct QueueRegisters {
    size_max: u16,
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl Common {
    pub(crate) fn new(device_features: u64, queue_sizes: &[u16], interrupt: Interrupt) -> Self {
        let queue = |size: &u16| QueueRegisters { size_max: *size, size: *size, ..Default::default() };
        Self {
            offered: device_features | TRANSPORT_FEATURES,
            device_feature_select: 0,
            driver_feature_select: 0,
            features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(queue).collect(),
            interrupt,
        }
    }

    /// As after power-on.
    pub(crate) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Self::new(self.offered, &sizes, self.interrupt.clone());
    }

    /// What was negotiated.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// Reads a register as a whole, or half of a 64-bit one; anything else reads as all ones.
    /// `generation` is that of the device's own configuration.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8], generation: u8) {
        let value = match (offset, data.len()) {
            (CONFIG_GENERATION, 1) => Some(generation.into()),
            (_, length) => self.value(offset, length),
        };
        data.fill(0xff);
        for (to, from) in data.iter_mut().zip(value.unwrap_or(u64::MAX).to_le_bytes()) {
            *to = from;
        }
    }

    fn value(&self, offset: u64, length: usize) -> Option<u64> {
        let queue = self.queues.get(usize::from(self.queue_select)).copied().unwrap_or_default();
        let select = usize::from(self.queue_select);
        Some(match (offset, length) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select.into(),
            (DEVICE_FEATURE, 4) => word(self.offered, self.device_feature_select).into(),
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select.into(),
            (DRIVER_FEATURE, 4) => word(self.features, self.driver_feature_select).into(),
            (CONFIG_VECTOR, 2) => self.interrupt.config_vector().into(),
            (NUM_QUEUES, 2) => self.queues.len() as u64,
            (STATUS, 1) => u64::from(self.status | if self.interrupt.is_faulted() { NEEDS_RESET } else { 0 }),
            (QUEUE_SELECT, 2) => self.queue_select.into(),
            (QUEUE_SIZE, 2) => queue.size.into(),
            (QUEUE_VECTOR, 2) => self.interrupt.queue_vector(select).into(),
            (QUEUE_ENABLE, 2) => queue.enabled.into(),
            (QUEUE_NOTIFY_OFF, 2) => self.queue_select.into(),
            _ => {
                let (place, high) = address_place(offset, length)?;
                let address = match place {
                    QUEUE_DESCRIPTORS => queue.descriptors,
                    QUEUE_DRIVER => queue.driver,
                    _ => queue.device,
                };
                if high { address >> 32 } else { address }
            }
        })
    }

    /// Writes a register as a whole, or half of a 64-bit one; anything else goes nowhere.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        match (offset, data) {
            (STATUS, [value]) => return self.write_status(*value),
            (_, [low, high]) => self.write_16(offset, u16::from_le_bytes([*low, *high])),
            (_, [a, b, c, d]) => self.write_32(offset, u32::from_le_bytes([*a, *b, *c, *d])),
            (_, [a, b, c, d, e, f, g, h]) if address_place(offset, 8).is_some() => {
                self.write_32(offset, u32::from_le_bytes([*a, *b, *c, *d]));
                self.write_32(offset.saturating_add(4), u32::from_le_bytes([*e, *f, *g, *h]));
            }
            _ => {}
        }
        None
    }

    fn write_16(&mut self, offset: u64, value: u16) {
        let select = usize::from(self.queue_select);
        match offset {
            CONFIG_VECTOR => self.interrupt.set_config_vector(value),
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_VECTOR => self.interrupt.set_queue_vector(select, value),
            QUEUE_SIZE => {
                if let Some(queue) = self.settable_queue()
                    && value.is_power_of_two()
                    && value <= queue.size_max
                {
                    queue.size = value;
                }
            }
            QUEUE_ENABLE if value == 1 => {
                if let Some(queue) = self.settable_queue() {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_32(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE if self.status & FEATURES_OK == 0 => {
                set_half(&mut self.features, self.driver_feature_select, value);
            }
            _ => {
                let Some((place, high)) = address_place(offset, 4) else { return };
                let Some(queue) = self.settable_queue() else { return };
                let address = match place {
                    QUEUE_DESCRIPTORS => &mut queue.descriptors,
                    QUEUE_DRIVER => &mut queue.driver,
                    _ => &mut queue.device,
                };
                set_half(address, u32::from(high), value);
            }
        }
    }

    /// The selected queue, while the driver may still set it up.
    fn settable_queue(&mut self) -> Option<&mut QueueRegisters> {
        let ready = self.status & DRIVER_OK != 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !ready && !queue.enabled)
    }

    /// Bits are only ever set, until all are cleared at once (virtio 1.3, 2.1.2 and 3.1.1).
    fn write_status(&mut self, value: u8) -> Option<Action> {
        if value == 0 {
            return Some(Action::Reset);
        }
        self.status |= value & STATUS_PLAIN;
        let acceptable = self.features & !self.offered == 0 && self.features & VERSION_1 != 0;
        if value & FEATURES_OK != 0 && acceptable {
            self.status |= FEATURES_OK;
        }
        let starts = value & DRIVER_OK != 0 && self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        starts.then(|| {
            self.status |= DRIVER_OK;
            Action::Activate
        })
    }

    /// The queues that the driver enabled, each in its place.
    ///
    /// # Errors
    /// [`Fault::Queue`] when one is misaligned or not wholly in `memory`.
    pub(crate) fn queues(&self, memory: &GuestMemoryMmap) -> Result<Vec<Option<Queue>>, Fault> {
        let event_idx = self.features & EVENT_IDX != 0;
        let build = |(index, registers): (usize, &QueueRegisters)| match registers.enabled {
            true => registers.build(memory, event_idx).map(Some).ok_or(Fault::Queue(index)),
            false => Ok(None),
        };
        self.queues.iter().enumerate().map(build).collect()
    }
}

impl QueueRegisters {
    fn build(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Option<Queue> {
        let place = RingPlace {
            size: self.size,
            descriptors: self.descriptors,
            available: self.driver,
            used: self.device,
        };
        // An available ring at 0 is one that was not set.
        Queue::new(place, event_idx, memory).filter(|_| self.driver != 0)
    }
}

/// Which queue address an access of `length` bytes at `offset` is to, and whether to its upper half.
fn address_place(offset: u64, length: usize) -> Option<(u64, bool)> {
    let place = offset & !7;
    let high = offset & 7 == 4;
    let whole = offset == place && (length == 4 || length == 8);
    let known = matches!(place, QUEUE_DESCRIPTORS | QUEUE_DRIVER | QUEUE_DEVICE);
    (known && (whole || high && length == 4)).then_some((place, high))
}

/// Word `select` of `bits`; there are two.
fn word(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

/// Sets word `select` of `bits`, if there is such.
fn set_half(bits: &mut u64, select: u32, value: u32) {
    match select {
        0 => *bits = *bits & !0xffff_ffff | u64::from(value),
        1 => *bits = *bits & 0xffff_ffff | u64::from(value) << 32,
        _ => {}
    }
}
