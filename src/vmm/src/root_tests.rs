use std::sync::Mutex;

use casemate_pci::{BarRequest, Config, ConfigError, DecodedBars, HostBridge, Identity, regs};
use proptest::prelude::*;

use super::*;
use crate::layout;

/// A function with one 64-bit and one 32-bit BAR whose bytes tell who answered.
struct Probe {
    config: Config,
    mark: u8,
}

impl Probe {
    fn new(mark: u8) -> Box<Self> {
        let mut config = Config::new(Identity {
            vendor: 0x1af4,
            device: 0x1000,
            class: 0xff_00_00,
            ..Identity::default()
        });
        for (index, kind, size) in [(0, BarKind::Memory64, 1 << 15), (2, BarKind::Memory32, 16)] {
            config.add_bar(BarRequest { index, size, kind, prefetchable: false }).unwrap();
        }
        Box::new(Self { config, mark })
    }
}

impl Function for Probe {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bar_read(&mut self, bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.mark | bar);
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
    fn bars(&self) -> Vec<BarRequest> {
        self.config.bars().collect()
    }
    fn place_bar(&mut self, bar: u8, base: u64) -> Result<(), ConfigError> {
        self.config.place_bar(bar, base)
    }
    fn decoded(&self) -> DecodedBars {
        self.config.decoded()
    }
}

const WINDOW64: Range = Range { start: 1 << 32, size: 1 << 30 };

/// Which function's which BAR control was asked to map.
type Mapped = Arc<Mutex<Vec<(usize, DecodedBar)>>>;

/// A bus with two probes behind the bridge.
fn bus() -> (RootBus, Mapped) {
    let mapped = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&mapped);
    let requests = Requests::answered_by(move |change| {
        if let Change::Move { function, gone, come } = change {
            let mut mapped = seen.lock().unwrap();
            for bar in gone {
                let place = mapped.iter().position(|entry| *entry == (function, bar));
                mapped.remove(place.expect("only what is mapped is unmapped"));
            }
            mapped.extend(come.into_iter().map(|bar| (function, bar)));
        }
    });
    let functions: Vec<Box<dyn Function>> =
        vec![Box::new(HostBridge::new()), Probe::new(0x10), Probe::new(0x20)];
    (RootBus::new(functions, WINDOW64, requests).unwrap(), mapped)
}

fn ecam(device: u64, register: u16) -> u64 {
    device << 15 | u64::from(register)
}

fn read_bar(bus: &RootBus, device: u64, index: u16) -> u64 {
    let mut low = [0; 4];
    let mut high = [0; 4];
    bus.config_read(ecam(device, regs::BASE_ADDRESS_0 + index * 4), &mut low);
    bus.config_read(ecam(device, regs::BASE_ADDRESS_0 + index * 4 + 4), &mut high);
    u64::from(u32::from_le_bytes(high)) << 32 | u64::from(u32::from_le_bytes(low) & !0xf)
}

#[test]
fn bars_are_placed_apart_and_answer_when_enabled() {
    let (bus, mapped) = bus();
    let (first, second) = (read_bar(&bus, 1, 0), read_bar(&bus, 2, 0));
    assert!(WINDOW64.holds(first, 1 << 15) && WINDOW64.holds(second, 1 << 15) && first != second);
    let mut data = [0; 4];
    bus.memory_read(first, &mut data);
    assert_eq!(data, [0xff; 4], "memory decoding is off");
    bus.config_write(ecam(1, regs::COMMAND), &regs::COMMAND_MEMORY.to_le_bytes());
    bus.memory_read(first, &mut data);
    assert_eq!(data, [0x10; 4]);
    assert_eq!(mapped.lock().unwrap().len(), 2);
    bus.config_write(ecam(1, regs::COMMAND), &[0, 0]);
    assert!(mapped.lock().unwrap().is_empty());
}

#[test]
fn a_bar_over_another_or_outside_the_windows_is_not_answered() {
    let (bus, mapped) = bus();
    for device in [1, 2] {
        bus.config_write(ecam(device, regs::COMMAND), &regs::COMMAND_MEMORY.to_le_bytes());
    }
    let first = read_bar(&bus, 1, 0);
    bus.config_write(ecam(2, regs::BASE_ADDRESS_0), &(first as u32).to_le_bytes());
    let mut data = [0; 1];
    bus.memory_read(first, &mut data);
    assert_eq!(data, [0x10], "the first one stays");
    bus.config_write(ecam(1, regs::BASE_ADDRESS_0 + 4), &[0, 0, 0, 0]);
    assert!(mapped.lock().unwrap().iter().all(|(_, bar)| {
        [layout::WINDOW32, WINDOW64].iter().any(|window| window.holds(bar.base, bar.size))
    }));
}

proptest! {
    #[test]
    fn no_write_of_a_guests_confuses_the_bus(
        writes in proptest::collection::vec((0u64..4, 0u16..0x60, any::<[u8; 8]>(), 0usize..9), 1..60),
    ) {
        let (bus, mapped) = bus();
        for (device, register, bytes, length) in writes {
            bus.config_write(ecam(device, register), &bytes[..length]);
            let mapped = mapped.lock().unwrap();
            for (index, (_, bar)) in mapped.iter().enumerate() {
                prop_assert!([layout::WINDOW32, WINDOW64].iter().any(|window| window.holds(bar.base, bar.size)));
                for (_, other) in mapped.iter().skip(index + 1) {
                    prop_assert!(bar.base + bar.size <= other.base || other.base + other.size <= bar.base);
                }
            }
        }
    }
}
