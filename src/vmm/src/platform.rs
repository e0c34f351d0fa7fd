//! What a processor's accesses reach: the ports, the IOAPIC, the root bus.

use std::{
    fs::File,
    io::{self, Read},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use casemate_chipset::{
    IOAPIC_PINS, IoApic, Msi, MsiSink, PANIC_PORT, PANIC_PORTS, POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS,
    Power, PowerEvent, RTC_PORT, RTC_PORTS, Rtc, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS, Serial,
    WATCHDOG_PORT, WATCHDOG_PORTS, Watchdog, panic_read, panic_write,
};
use casemate_pci::{MsiMessage, Space};
use casemate_wire::{Counters, End};
use kvm_bindings::kvm_msi;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::{
    control::{Change, Requests},
    cpu::Bus,
    gate::Gate,
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
/// Who holds its lock may wait for the control thread, so control never waits for it.
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
    serial: Mutex<SerialPort>,
    /// The guest took input from the serial port while some waited for room.
    serial_room: Condvar,
    ioapic: SharedIoApic,
    intx: Vec<Intx>,
    power: Mutex<Power>,
    watchdog: Mutex<Watchdog>,
    rtc: Option<Mutex<Rtc>>,
    requests: Arc<Requests>,
    gate: Gate,
    /// One a processor.
    counters: Box<[ExitCounters]>,
}

/// What a platform is made of.
pub(crate) struct PlatformParts {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) root: RootBus,
    /// What the serial port writes to.
    pub(crate) console: File,
    /// Lines of the bus's functions.
    pub(crate) intx: Vec<Intx>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) vcpus: u8,
    /// Whether there is a clock chip.
    pub(crate) has_rtc: bool,
}

/// The serial port, and whether input waits for room in it.
struct SerialPort {
    port: Serial<File>,
    starved: bool,
}

/// The serial port's register that input is read from.
const SERIAL_DATA: u16 = 0;
/// How long input waits for room at most before it is offered again: a guest can make room without reading, by
/// resetting the port.
const SERIAL_PATIENCE: Duration = Duration::from_secs(1);

/// Exits to user space of one processor, which alone counts; on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct ExitCounters {
    pio: AtomicU64,
    mmio: AtomicU64,
    other: AtomicU64,
    bus_locks: AtomicU64,
}

impl ExitCounters {
    /// Counts one more; only the processor's own thread does.
    fn count(counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    fn read(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            pio_exits: of(&self.pio),
            mmio_exits: of(&self.mmio),
            other_exits: of(&self.other),
            bus_locks: of(&self.bus_locks),
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where in a device's ports an access of this length at `port` lies.
fn port_offset(port: u16, first: u16, count: u16, length: usize) -> Option<u16> {
    let offset = port.checked_sub(first)?;
    (usize::from(offset) + length <= usize::from(count)).then_some(offset)
}

/// The time of day, UTC.
fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

impl Platform {
    /// A platform of these parts.
    pub(crate) fn new(parts: PlatformParts) -> Self {
        let PlatformParts { vm, root, console, intx, requests, vcpus, has_rtc } = parts;
        let sink = SignalMsi { vm, requests: Arc::clone(&requests) };
        let ioapic = Arc::new(Mutex::new(IoApic::new(sink)));
        let pins = Arc::clone(&ioapic);
        let port = Serial::new(console, move || lock(&pins).pulse(SERIAL_GSI));
        Self {
            root,
            serial: Mutex::new(SerialPort { port, starved: false }),
            serial_room: Condvar::new(),
            ioapic,
            intx,
            power: Mutex::default(),
            gate: Gate::new(Arc::clone(&requests)),
            watchdog: Mutex::default(),
            rtc: has_rtc.then(Mutex::default),
            requests,
            counters: (0..vcpus).map(|_| ExitCounters::default()).collect(),
        }
    }

    /// Presses the power button; false when another thread has the IOAPIC, which may just wait for the control thread
    /// to route one of its pins: so that thread does not wait for it in turn.
    pub(crate) fn press_power_button(&self) -> bool {
        match self.ioapic.try_lock() {
            Ok(mut ioapic) => ioapic.pulse(POWER_BUTTON_GSI),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().pulse(POWER_BUTTON_GSI),
            Err(TryLockError::WouldBlock) => return false,
        }
        true
    }

    /// Gives the guest all of `input` by its serial port, as fast as it reads. Returns at the input's end.
    pub(crate) fn feed_serial(&self, mut input: File) {
        let mut buffer = [0; 64];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.type_in(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn type_in(&self, mut bytes: &[u8]) {
        let mut serial = lock(&self.serial);
        loop {
            let taken = serial.port.enqueue(bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            if bytes.is_empty() {
                return;
            }
            serial.starved = true;
            let waited = self.serial_room.wait_timeout(serial, SERIAL_PATIENCE);
            serial = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn rtc_at(&self, port: u16, length: usize) -> Option<(&Mutex<Rtc>, u16)> {
        self.rtc.as_ref().zip(port_offset(port, RTC_PORT, RTC_PORTS, length))
    }

    fn read_serial(&self, offset: u16, data: &mut [u8]) {
        let mut serial = lock(&self.serial);
        serial.port.read(offset, data);
        if serial.starved && offset == SERIAL_DATA {
            serial.starved = false;
            self.serial_room.notify_one();
        }
    }

    /// The PCI buses.
    pub(crate) fn root(&self) -> &RootBus {
        &self.root
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

    /// The guest's watchdog stands still from now on, or goes on: a guest that is paused can't keep it quiet.
    pub(crate) fn hold_watchdog(&self, held: bool) {
        let mut watchdog = lock(&self.watchdog);
        watchdog.hold(held, Instant::now());
        self.requests.watch(watchdog.deadline());
    }

    /// Where processors stand while the machine is paused.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The exits so far, a processor after the other.
    pub(crate) fn vcpu_counters(&self) -> Vec<Counters> {
        self.counters.iter().map(ExitCounters::read).collect()
    }

    /// The exits so far, of all processors.
    pub(crate) fn counters(&self) -> Counters {
        self.vcpu_counters().into_iter().fold(Counters::default(), |sum, one| Counters {
            pio_exits: sum.pio_exits.wrapping_add(one.pio_exits),
            mmio_exits: sum.mmio_exits.wrapping_add(one.mmio_exits),
            other_exits: sum.other_exits.wrapping_add(one.other_exits),
            bus_locks: sum.bus_locks.wrapping_add(one.bus_locks),
        })
    }

    /// Says that the guest has ended.
    pub(crate) fn end(&self, end: End) {
        self.requests.end(end);
    }
}

/// The view of one processor.
pub(crate) struct Processor {
    platform: Arc<Platform>,
    number: usize,
}

impl Processor {
    /// That of processor `number`, from 0.
    pub(crate) fn new(platform: Arc<Platform>, number: usize) -> Self {
        Self { platform, number }
    }

    fn count(&self, which: impl FnOnce(&ExitCounters) -> &AtomicU64) {
        if let Some(counters) = self.platform.counters.get(self.number) {
            ExitCounters::count(which(counters));
        }
    }
}

impl Bus for Processor {
    fn port_exit(&mut self) {
        self.count(|counters| &counters.pio);
    }

    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some(offset) = port_offset(port, SERIAL_PORT, SERIAL_PORTS, data.len()) {
            self.platform.read_serial(offset, data);
        } else if let Some(offset) = port_offset(port, POWER_PORT, POWER_PORTS, data.len()) {
            lock(&self.platform.power).read(offset, data);
        } else if let Some(offset) = port_offset(port, WATCHDOG_PORT, WATCHDOG_PORTS, data.len()) {
            lock(&self.platform.watchdog).read(offset, data, Instant::now());
        } else if port_offset(port, PANIC_PORT, PANIC_PORTS, data.len()).is_some() {
            panic_read(data);
        } else if let Some((rtc, offset)) = self.platform.rtc_at(port, data.len()) {
            lock(rtc).read(offset, data, since_1970());
        } else {
            self.platform.root.read(Space::Ports, port.into(), data);
        }
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        if let Some(offset) = port_offset(port, SERIAL_PORT, SERIAL_PORTS, data.len()) {
            lock(&self.platform.serial).port.write(offset, data);
        } else if let Some(offset) = port_offset(port, POWER_PORT, POWER_PORTS, data.len()) {
            let event = lock(&self.platform.power).write(offset, data);
            match event {
                Some(PowerEvent::PowerOff) => self.platform.end(End::PowerOff),
                Some(PowerEvent::Reset) => self.platform.end(End::Reset),
                None => {}
            }
        } else if let Some(offset) = port_offset(port, WATCHDOG_PORT, WATCHDOG_PORTS, data.len()) {
            let mut watchdog = lock(&self.platform.watchdog);
            watchdog.write(offset, data, Instant::now());
            self.platform.requests.watch(watchdog.deadline());
        } else if port_offset(port, PANIC_PORT, PANIC_PORTS, data.len()).is_some() {
            if panic_write(data) {
                self.platform.requests.panicked();
            }
        } else if let Some((rtc, offset)) = self.platform.rtc_at(port, data.len()) {
            lock(rtc).write(offset, data, since_1970());
        } else {
            self.platform.root.write(Space::Ports, port.into(), data);
        }
    }

    fn memory_read(&mut self, address: u64, data: &mut [u8]) {
        self.count(|counters| &counters.mmio);
        if let Some(offset) = layout::ECAM.offset(address, data.len()) {
            self.platform.root.config_read(offset, data);
        } else if let Some(offset) = layout::IOAPIC.offset(address, data.len()) {
            lock(&self.platform.ioapic).read(offset, data);
        } else {
            self.platform.root.read(Space::Memory, address, data);
        }
    }

    fn memory_write(&mut self, address: u64, data: &[u8]) {
        self.count(|counters| &counters.mmio);
        if let Some(offset) = layout::ECAM.offset(address, data.len()) {
            self.platform.root.config_write(offset, data);
        } else if let Some(offset) = layout::IOAPIC.offset(address, data.len()) {
            let ended = lock(&self.platform.ioapic).write(offset, data);
            self.platform.ended(ended);
        } else {
            self.platform.root.write(Space::Memory, address, data);
        }
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.count(|counters| &counters.other);
        let ended = lock(&self.platform.ioapic).eoi(vector);
        self.platform.ended(ended);
    }

    fn other_exit(&mut self) {
        self.count(|counters| &counters.other);
    }

    fn called(&mut self, vcpu: &mut VcpuFd) {
        self.platform.gate.pass(vcpu);
    }

    fn bus_lock(&mut self) {
        self.count(|counters| &counters.bus_locks);
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
