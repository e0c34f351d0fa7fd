//! From a device to its driver: interrupts, and the word that a reset is needed.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU8, AtomicU16, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::device::Fault;

/// The vector that stands for none (virtio 1.3, 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// The interrupts of one device, shared by its transport and its worker.
///
/// Each MSI-X vector has an eventfd, which the VMM attaches to KVM. Which vector stands for which queue is the
/// driver's choice and may change at any time.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    events: Vec<EventFd>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
    fault: Mutex<Option<Fault>>,
}

impl Interrupt {
    pub(crate) fn new(events: Vec<EventFd>, queues: usize) -> Self {
        let none = || AtomicU16::new(NO_VECTOR);
        Self(Arc::new(Shared {
            events,
            config: none(),
            queues: std::iter::repeat_with(none).take(queues).collect(),
            isr: AtomicU8::new(0),
            fault: Mutex::new(None),
        }))
    }

    /// Tells the driver that buffers of queue `index` were used.
    pub fn signal_queue(&self, index: usize) {
        let vector = self.queue_vector(index);
        if vector == NO_VECTOR {
            // The ISR is for drivers without MSI-X, who here can only poll it.
            self.0.isr.fetch_or(ISR_QUEUE, Ordering::Release);
        }
        self.signal(vector);
    }

    /// Tells the driver that the device's configuration or status changed.
    pub fn signal_config(&self) {
        self.0.isr.fetch_or(ISR_CONFIG, Ordering::Release);
        self.signal(self.config_vector());
    }

    fn signal(&self, vector: u16) {
        if let Some(event) = self.0.events.get(usize::from(vector)) {
            // It fails only when the counter is full, and then the interrupt is pending already.
            let _ = event.write(1);
        }
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.0.config.load(Ordering::Acquire)
    }

    pub(crate) fn queue_vector(&self, index: usize) -> u16 {
        self.0.queues.get(index).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// What is written to interrupt for queue `index`, as its vector is now.
    pub(crate) fn queue_event(&self, index: usize) -> Option<&EventFd> {
        self.0.events.get(usize::from(self.queue_vector(index)))
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.0.config.store(self.known(vector), Ordering::Release);
    }

    pub(crate) fn set_queue_vector(&self, index: usize, vector: u16) {
        if let Some(place) = self.0.queues.get(index) {
            place.store(self.known(vector), Ordering::Release);
        }
    }

    /// `vector`, or none if there is no such.
    fn known(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.0.events.len() { vector } else { NO_VECTOR }
    }

    /// The ISR status, which reading clears.
    pub(crate) fn take_isr(&self) -> u8 {
        self.0.isr.swap(0, Ordering::AcqRel)
    }

    /// The device stopped because of `fault`; the first one is kept.
    pub(crate) fn set_fault(&self, fault: Fault) {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
        self.signal_config();
    }

    pub(crate) fn fault(&self) -> Option<String> {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Fault::to_string)
    }

    pub(crate) fn is_faulted(&self) -> bool {
        self.0.fault.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// As after power-on. The device must be inactive.
    pub(crate) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for index in 0..self.0.queues.len() {
            self.set_queue_vector(index, NO_VECTOR);
        }
        self.take_isr();
        *self.0.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
