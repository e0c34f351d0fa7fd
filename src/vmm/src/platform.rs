//! What a processor's accesses reach: the ports, the IOAPIC, the root bus.

use std::{
    fs::File,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use casemate_chipset::{
    IOAPIC_PINS, IoApic, Msi, MsiSink, POWER_PORT, POWER_PORTS, Power, PowerEvent, SERIAL_GSI, SERIAL_PORT,
    SERIAL_PORTS, Serial,
};
use casemate_pci::MsiMessage;
use casemate_wire::{Counters, End};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;

use crate::{
    control::{Change, Requests},
    cpu::Bus,
    intx::Intx,
    layout,
    root::RootBus,
};

/// Sends the IOAPIC's interrupts by KVM.
pub(crate) struct SignalMsi {
    vm: Arc<VmFd>,
    requests: Arc<Requests>,
}

/// The IOAPIC, shared by processors and the threads that wait for INTx.
///
/// Who holds its lock may wait for the control thread, so control never takes it.
pub(crate) type SharedIoApic = Arc<Mutex<IoApic<SignalMsi>>>;

impl MsiSink for SignalMsi {
    fn send(&mut self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // A destination that is not there loses the interrupt, as on a real machine.
        let _ = self.vm.signal_msi(message);
    }

    fn route(&mut self, pin: u8, msi: Option<Msi>) {
        const LEVEL: u32 = 1 << 15;
        // A masked pin keeps its route: an interrupt that was delivered before may still be without its end, which KVM
        // tells of by the route. Edges have no end that matters.
        if let Some(Msi { address, data }) = msi.filter(|msi| msi.data & LEVEL != 0) {
            let message = MsiMessage { address, data };
            if let Err(error) = self.requests.change(Change::Pin { gsi: pin.into(), message }) {
                eprintln!("casemate-vmm: pin {pin}: {error}");
            }
        }
    }
}

/// The devices that all processors reach.
pub(crate) struct Platform {
    root: RootBus,
    serial: Mutex<Serial<File>>,
    ioapic: SharedIoApic,
    intx: Vec<Intx>,
    power: Mutex<Power>,
    requests: Arc<Requests>,
    counters: ExitCounters,
}

/// Exits to user space, counted by all processors.
#[derive(Default)]
struct ExitCounters {
    pio: AtomicU64,
    mmio: AtomicU64,
    other: AtomicU64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in a device's ports an access of this length at `port` lies.
fn port_offset(port: u16, first: u16, count: u16, length: usize) -> Option<u16> {
    let offset = port.checked_sub(first)?;
    (usize::from(offset) + length <= usize::from(count)).then_some(offset)
}

impl Platform {
    /// A platform around the root bus, whose serial port writes to `console`; `intx` are lines of its functions.
    pub(crate) fn new(
        vm: Arc<VmFd>,
        root: RootBus,
        console: File,
        intx: Vec<Intx>,
        requests: Arc<Requests>,
    ) -> Self {
        let sink = SignalMsi { vm, requests: Arc::clone(&requests) };
        let ioapic = Arc::new(Mutex::new(IoApic::new(sink)));
        let pins = Arc::clone(&ioapic);
        let serial = Mutex::new(Serial::new(console, move || lock(&pins).pulse(SERIAL_GSI)));
        let counters = ExitCounters::default();
        Self { root, serial, ioapic, intx, power: Mutex::default(), requests, counters }
    }

    /// The IOAPIC, for those who raise its lines.
    pub(crate) fn ioapic(&self) -> SharedIoApic {
        Arc::clone(&self.ioapic)
    }

    /// The guest has ended interrupts of these pins, a bit a pin: their devices may interrupt again.
    fn ended(&self, pins: u32) {
        for line in self.intx.iter().filter(|line| line.pin < IOAPIC_PINS && pins & 1 << line.pin != 0) {
            line.unmask();
        }
    }

    /// The exits so far.
    pub(crate) fn counters(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            pio_exits: of(&self.counters.pio),
            mmio_exits: of(&self.counters.mmio),
            other_exits: of(&self.counters.other),
        }
    }

    /// Says that the guest has ended.
    pub(crate) fn end(&self, end: End) {
        self.requests.end(end);
    }
}

/// The view of one processor.
pub(crate) struct Processor(pub(crate) Arc<Platform>);

impl Bus for Processor {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.0.counters.pio.fetch_add(1, Ordering::Relaxed);
        data.fill(0xFF);
        if let Some(offset) = port_offset(port, SERIAL_PORT, SERIAL_PORTS, data.len()) {
            lock(&self.0.serial).read(offset, data);
        } else if let Some(offset) = port_offset(port, POWER_PORT, POWER_PORTS, data.len()) {
            lock(&self.0.power).read(offset, data);
        }
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.0.counters.pio.fetch_add(1, Ordering::Relaxed);
        if let Some(offset) = port_offset(port, SERIAL_PORT, SERIAL_PORTS, data.len()) {
            lock(&self.0.serial).write(offset, data);
        } else if let Some(offset) = port_offset(port, POWER_PORT, POWER_PORTS, data.len()) {
            let event = lock(&self.0.power).write(offset, data);
            match event {
                Some(PowerEvent::PowerOff) => self.0.end(End::PowerOff),
                Some(PowerEvent::Reset) => self.0.end(End::Reset),
                None => {}
            }
        }
    }

    fn memory_read(&mut self, address: u64, data: &mut [u8]) {
        self.0.counters.mmio.fetch_add(1, Ordering::Relaxed);
        if let Some(offset) = layout::ECAM.offset(address, data.len()) {
            self.0.root.config_read(offset, data);
        } else if let Some(offset) = layout::IOAPIC.offset(address, data.len()) {
            lock(&self.0.ioapic).read(offset, data);
        } else {
            self.0.root.memory_read(address, data);
        }
    }

    fn memory_write(&mut self, address: u64, data: &[u8]) {
        self.0.counters.mmio.fetch_add(1, Ordering::Relaxed);
        if let Some(offset) = layout::ECAM.offset(address, data.len()) {
            self.0.root.config_write(offset, data);
        } else if let Some(offset) = layout::IOAPIC.offset(address, data.len()) {
            let ended = lock(&self.0.ioapic).write(offset, data);
            self.0.ended(ended);
        } else {
            self.0.root.memory_write(address, data);
        }
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.0.counters.other.fetch_add(1, Ordering::Relaxed);
        let ended = lock(&self.0.ioapic).eoi(vector);
        self.0.ended(ended);
    }

    fn other_exit(&mut self) {
        self.0.counters.other.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_must_lie_in_a_device_wholly() {
        assert_eq!(port_offset(0x3f8, SERIAL_PORT, SERIAL_PORTS, 1), Some(0));
        assert_eq!(port_offset(0x3ff, SERIAL_PORT, SERIAL_PORTS, 1), Some(7));
        assert_eq!(port_offset(0x3ff, SERIAL_PORT, SERIAL_PORTS, 2), None);
        assert_eq!(port_offset(0x3f7, SERIAL_PORT, SERIAL_PORTS, 1), None);
        assert_eq!(port_offset(0xffff, SERIAL_PORT, SERIAL_PORTS, 4), None);
    }
}
