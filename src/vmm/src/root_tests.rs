use std::{collections::BTreeMap, sync::Mutex};

use casemate_pci::{
    BarKind, BarRequest, CONFIG_SPACE_BYTES, Config, ConfigError, DecodedBar, DecodedBars, HostBridge,
    Identity, MsiMessage, Space, VectorSink, regs,
};
use proptest::prelude::*;

use super::*;
use crate::layout;

/// A function with a 64-bit, a 32-bit and an I/O BAR whose bytes tell who answered.
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
        for (index, kind, size) in
            [(0, BarKind::Memory64, 1 << 15), (2, BarKind::Memory32, 16), (4, BarKind::Io, 8)]
        {
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
    fn config_image(&self) -> Option<&[u8; CONFIG_SPACE_BYTES]> {
        (self.config.u16_at(regs::INTERRUPT_LINE) as u8 != NO_COPY).then(|| self.config.image())
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
    fn reset(&mut self) {
        self.config.reset();
    }
}

/// The interrupt line of a probe whose reads are said to be more than copies.
const NO_COPY: u8 = 0xee;

const WINDOWS: [Range; 2] = [layout::WINDOW32, Range { start: 1 << 32, size: 1 << 33 }];
const PORT_WINDOWS: PortWindows = PortWindows { memory_bytes: 2 << 20, prefetchable_bytes: 64 << 20 };

/// What control was asked to map.
type Mapped = Arc<Mutex<BTreeMap<Place, Vec<DecodedBar>>>>;

/// What the guest reads of the root bus without an exit is what it'd read with one.
fn mirrors_follow(bus: &RootBus) -> bool {
    bus.mirrors.iter().filter(|(_, mirror)| mirror.slot().is_some()).all(|(place, mirror)| {
        let start = ecam(0, place.device.into(), place.function.into(), 0);
        let registers = (0u64..).step_by(4).zip((mirror.reader())().as_chunks::<4>().0.to_vec());
        registers.into_iter().all(|(at, shown)| read_u32(bus, start + at) == u32::from_le_bytes(shown))
    })
}

/// Interrupts nobody.
struct Nobody;

impl VectorSink for Nobody {
    fn set(&mut self, _vector: u16, _message: Option<MsiMessage>) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

fn at(device: u8, function: u8) -> Place {
    Place { bus: 0, device, function }
}

fn function(mark: u8) -> Body {
    Body::Function(Probe::new(mark))
}

fn port(slot: u16) -> Body {
    Body::Port(Box::new(RootPort::new(slot, Box::new(Nobody), Box::new(|| {})).unwrap()))
}

fn bus() -> (RootBus, Mapped) {
    let mapped: Mapped = Arc::default();
    let seen = Arc::clone(&mapped);
    let requests = Requests::answered_by(move |change| {
        if let Change::Answer(answers) = change {
            seen.lock().unwrap().extend(answers.into_iter().map(|answer| (answer.place, answer.bars)));
        }
    });
    (bus_of(functions(), requests), mapped)
}

/// A bridge, two probes, a device of two probes, and two root ports.
fn functions() -> Vec<(Place, Body)> {
    vec![
        (at(0, 0), Body::Function(Box::new(HostBridge::new()))),
        (at(1, 0), function(0x10)),
        (at(2, 0), function(0x20)),
        (at(3, 0), function(0x30)),
        (at(3, 5), function(0x40)),
        (at(4, 0), port(1)),
        (at(4, 1), port(2)),
    ]
}

fn bus_of(functions: Vec<(Place, Body)>, requests: Arc<Requests>) -> RootBus {
    let parts = BusParts {
        functions,
        port_windows: PORT_WINDOWS,
        windows: WINDOWS,
        requests,
        let_go: Box::new(|_| {}),
    };
    RootBus::new(parts).unwrap()
}

/// Puts probes behind a port, as hot-plug does.
fn put_behind(bus: &RootBus, port: usize, marks: &[u8]) {
    bus.insert(port, marks.iter().map(|mark| -> Box<dyn Function> { Probe::new(*mark) }).collect());
}

fn ecam(bus: u64, device: u64, function: u64, register: u16) -> u64 {
    bus << 20 | device << 15 | function << 12 | u64::from(register)
}

fn read_u32(bus: &RootBus, offset: u64) -> u32 {
    let mut data = [0; 4];
    bus.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn read_bar(bus: &RootBus, function: u64, index: u16) -> u64 {
    let register = function + u64::from(regs::BASE_ADDRESS_0 + index * 4);
    u64::from(read_u32(bus, register + 4)) << 32 | u64::from(read_u32(bus, register) & !0xf)
}

fn write_bar(bus: &RootBus, function: u64, base: u64) {
    let register = function + u64::from(regs::BASE_ADDRESS_0);
    let [low, high] = [base as u32, (base >> 32) as u32].map(u32::to_le_bytes);
    bus.config_write(register, &low);
    bus.config_write(register + 4, &high);
}

fn enable(bus: &RootBus, function: u64) {
    bus.config_write(function + u64::from(regs::COMMAND), &regs::COMMAND_MEMORY.to_le_bytes());
}

fn who(bus: &RootBus, address: u64) -> u8 {
    let mut data = [0];
    bus.read(Space::Memory, address, &mut data);
    data[0]
}

fn count(mapped: &Mapped) -> usize {
    mapped.lock().unwrap().values().map(Vec::len).sum()
}

#[test]
fn bars_are_placed_apart_and_answer_when_enabled() {
    let (bus, mapped) = bus();
    let (first, second) = (read_bar(&bus, ecam(0, 1, 0, 0), 0), read_bar(&bus, ecam(0, 2, 0, 0), 0));
    assert!(WINDOWS[1].holds(first, 1 << 15) && WINDOWS[1].holds(second, 1 << 15) && first != second);
    assert_eq!(who(&bus, first), 0xff, "memory decoding is off");
    enable(&bus, ecam(0, 1, 0, 0));
    assert_eq!(who(&bus, first), 0x10);
    assert_eq!(count(&mapped), 2);
    bus.config_write(ecam(0, 1, 0, regs::COMMAND), &[0, 0]);
    assert_eq!(count(&mapped), 0);
}

#[test]
fn a_bar_over_another_is_answered_once_the_other_has_gone() {
    let (bus, mapped) = bus();
    let (one, two) = (ecam(0, 1, 0, 0), ecam(0, 2, 0, 0));
    enable(&bus, one);
    enable(&bus, two);
    let first = read_bar(&bus, one, 0);
    write_bar(&bus, two, first);
    assert_eq!(who(&bus, first), 0x10, "the first one stays");
    assert_eq!(count(&mapped), 3);
    // The hidden one's own registers are not touched: it appears because the other has moved away.
    write_bar(&bus, one, first + (1 << 20));
    assert_eq!((who(&bus, first), who(&bus, first + (1 << 20))), (0x20, 0x10));
    assert_eq!(count(&mapped), 4);
    write_bar(&bus, one, first);
    assert_eq!(who(&bus, first), 0x20, "and now it is the one who stays");
    bus.config_write(two + u64::from(regs::COMMAND), &[0, 0]);
    assert_eq!(who(&bus, first), 0x10);
}

#[test]
fn a_bar_outside_the_windows_is_not_answered() {
    let (bus, mapped) = bus();
    let one = ecam(0, 1, 0, 0);
    enable(&bus, one);
    write_bar(&bus, one, 0x10_0000);
    assert_eq!((who(&bus, 0x10_0000), count(&mapped)), (0xff, 1));
}

#[test]
fn ports_answer_beside_memory_and_not_behind_a_port() {
    let (bus, mapped) = bus();
    let who = |port: u64| {
        let mut data = [0; 2];
        bus.read(Space::Ports, port, &mut data);
        data[0]
    };
    let (one, two) = (ecam(0, 1, 0, 0), ecam(0, 2, 0, 0));
    let io = |function| read_u32(&bus, function + u64::from(regs::BASE_ADDRESS_0 + 4 * 4));
    let [first, second] = [one, two].map(|function| u64::from(io(function) & 0xfffc));
    assert!(layout::PORTS.holds(first, 8) && layout::PORTS.holds(second, 8) && first != second);
    assert_eq!(who(first), 0xff, "the decoding of ports is off");
    bus.config_write(one + u64::from(regs::COMMAND), &regs::COMMAND_IO.to_le_bytes());
    assert_eq!((who(first), who(first + 6), who(first + 7)), (0x14, 0x14, 0xff));
    assert_eq!((who(second), count(&mapped)), (0xff, 1));
    let both = regs::COMMAND_IO | regs::COMMAND_MEMORY;
    bus.config_write(one + u64::from(regs::COMMAND), &both.to_le_bytes());
    let mut data = [0];
    bus.read(Space::Memory, first, &mut data);
    assert_eq!((data[0], who(first)), (0xff, 0x14), "a port is no address of memory");
    // Where the platform's own ports are, no function answers.
    bus.config_write(one + u64::from(regs::BASE_ADDRESS_0 + 4 * 4), &0x601u32.to_le_bytes());
    assert_eq!((who(0x600), who(first)), (0xff, 0xff));
    put_behind(&bus, 0, &[0x50]);
    enable(&bus, ecam(0, 4, 0, 0));
    let behind = ecam(1, 0, 0, 0);
    bus.config_write(behind + u64::from(regs::BASE_ADDRESS_0 + 4 * 4), &0xd001u32.to_le_bytes());
    bus.config_write(behind + u64::from(regs::COMMAND), &both.to_le_bytes());
    assert_eq!((io(behind), who(0xd000)), (0xd001, 0xff));
}

#[test]
fn functions_of_one_device_say_so() {
    let (bus, _) = bus();
    let header = |device, function| {
        let mut data = [0];
        bus.config_read(ecam(0, device, function, regs::HEADER_TYPE), &mut data);
        data[0]
    };
    assert_eq!([header(1, 0), header(3, 0), header(3, 5), header(3, 1)], [0, 0x80, 0x80, 0xff]);
    assert_eq!([header(4, 0), header(4, 1), header(4, 2)], [0x81, 0x81, 0xff]);
    assert_eq!(
        read_u32(&bus, ecam(0, 3, 0, regs::CACHE_LINE_SIZE)).to_le_bytes()[2],
        0x80,
        "read as a dword"
    );
}

#[test]
fn what_is_behind_a_port_answers_by_the_ports_numbers_and_windows() {
    let (bus, mapped) = bus();
    put_behind(&bus, 1, &[0x50]);
    let (port, card) = (ecam(0, 4, 1, 0), ecam(2, 0, 0, 0));
    assert_eq!(read_u32(&bus, card), u32::MAX, "nobody has enabled the port, nor told the bus of it");
    enable(&bus, port);
    assert_eq!(read_u32(&bus, card), 0x1000_1af4);
    assert_eq!(read_u32(&bus, ecam(1, 0, 0, 0)), u32::MAX, "the other port's slot is empty");
    assert_eq!(read_u32(&bus, ecam(2, 1, 0, 0)), u32::MAX, "a slot has one device");
    let window = u64::from(read_u32(&bus, port + u64::from(regs::MEMORY_BASE)) & 0xfff0) << 16;
    enable(&bus, card);
    write_bar(&bus, card, window);
    assert_eq!(who(&bus, window), 0x50);
    write_bar(&bus, card, window + (2 << 20));
    assert_eq!(who(&bus, window + (2 << 20)), 0xff, "outside the port's window");
    write_bar(&bus, card, window);
    // The port is closed, and opened again: what is behind it needs no write.
    bus.config_write(port + u64::from(regs::COMMAND), &[0, 0]);
    assert_eq!((who(&bus, window), count(&mapped)), (0xff, 0));
    enable(&bus, port);
    assert_eq!(who(&bus, window), 0x50);
    // Another number for its bus.
    bus.config_write(port + u64::from(regs::SECONDARY_BUS), &[1, 1]);
    assert_eq!(read_u32(&bus, card), u32::MAX);
}

#[test]
fn a_reset_of_the_bus_behind_a_port_resets_the_card() {
    let (bus, _) = bus();
    put_behind(&bus, 0, &[0x50]);
    let (port, card) = (ecam(0, 4, 0, 0), ecam(1, 0, 0, 0));
    enable(&bus, port);
    enable(&bus, card);
    let control = port + u64::from(regs::BRIDGE_CONTROL);
    bus.config_write(control, &regs::BRIDGE_CONTROL_BUS_RESET.to_le_bytes());
    assert_eq!(read_u32(&bus, card), u32::MAX, "held in reset");
    bus.config_write(control, &[0, 0]);
    assert_eq!(read_u32(&bus, card + u64::from(regs::COMMAND)) & 0xffff, 0);
}

#[test]
fn a_card_that_goes_answers_no_more_and_another_takes_its_place() {
    let (bus, mapped) = bus();
    let (port, card) = (ecam(0, 4, 0, 0), ecam(1, 0, 0, 0));
    enable(&bus, port);
    let window = u64::from(read_u32(&bus, port + u64::from(regs::MEMORY_BASE)) & 0xfff0) << 16;
    for mark in [0x50, 0x60] {
        put_behind(&bus, 0, &[mark, mark]);
        assert_eq!(read_u32(&bus, card + u64::from(regs::CACHE_LINE_SIZE)).to_le_bytes()[2], 0x80);
        enable(&bus, card);
        write_bar(&bus, card, window);
        // The card's, and the port's own.
        assert_eq!((who(&bus, window), count(&mapped)), (mark, 2));
        assert_eq!(bus.remove(0).len(), 2);
        assert_eq!((who(&bus, window), count(&mapped)), (0xff, 1));
        assert_eq!(read_u32(&bus, card), u32::MAX);
        assert!(bus.remove(0).is_empty());
    }
}

#[test]
fn places_that_are_none_are_refused() {
    let new = |functions| {
        let requests = Requests::answered_by(|_| {});
        RootBus::new(BusParts {
            functions,
            port_windows: PORT_WINDOWS,
            windows: WINDOWS,
            requests,
            let_go: Box::new(|_| {}),
        })
        .is_err()
    };
    assert!(new(vec![(at(32, 0), function(0))]));
    assert!(new(vec![(at(1, 8), function(0))]));
    assert!(new(vec![(at(1, 0), function(0)), (at(1, 0), function(0))]));
    let many = (0..8).map(|function| (at(1, function), port(1))).collect();
    let large = PortWindows { memory_bytes: 128 << 20, ..PORT_WINDOWS };
    let requests = Requests::answered_by(|_| {});
    assert!(
        RootBus::new(BusParts {
            functions: many,
            port_windows: large,
            windows: WINDOWS,
            requests,
            let_go: Box::new(|_| {})
        })
        .is_err()
    );
}

#[test]
fn what_is_no_copy_is_an_exit_from_then_on() {
    let (tell, forgotten) = std::sync::mpsc::channel();
    let requests = Requests::answered_by(move |change| {
        if let Change::Forget(slot) = change {
            tell.send(slot.guest_address).unwrap();
        }
    });
    let mut bus = bus_of(functions(), requests);
    let slots = bus.mirror(9).unwrap();
    assert!(slots.iter().zip(9..).all(|(slot, number)| slot.slot == number && slot.read_only));
    let one = ecam(0, 1, 0, 0);
    let address = layout::ECAM.start + one;
    assert!(slots.iter().any(|slot| slot.guest_address == address && slot.size_bytes == 4096));
    for line in [7, NO_COPY, NO_COPY, 7] {
        bus.config_write(one + u64::from(regs::INTERRUPT_LINE), &[line]);
        assert!(mirrors_follow(&bus), "{line}");
    }
    assert!(bus.mirrors.get(&at(1, 0)).unwrap().slot().is_none());
    assert!(bus.mirrors.get(&at(2, 0)).unwrap().slot().is_some());
    assert_eq!(forgotten.try_iter().collect::<Vec<_>>(), [address], "once");
}

#[test]
fn a_slots_events_are_seen_without_an_exit() {
    let (mut bus, _) = bus();
    bus.mirror(9).unwrap();
    put_behind(&bus, 0, &[0x50]);
    assert!(mirrors_follow(&bus));
    bus.remove(0);
    assert!(mirrors_follow(&bus));
}

#[test]
fn a_guest_that_is_interrupted_can_read_why() {
    /// In the first capability of a port.
    const SLOT_CONTROL: u16 = regs::CAPABILITIES_START as u16 + 0x18;
    type Reader = Box<dyn Fn() -> Vec<u8> + Send>;
    let reader: Arc<Mutex<Option<Reader>>> = Arc::default();
    let (tell, told) = std::sync::mpsc::channel();
    let reads = Arc::clone(&reader);
    let interrupt = Box::new(move || {
        let page = reads.lock().unwrap().as_ref().unwrap()();
        tell.send(page[usize::from(SLOT_CONTROL) + 2]).unwrap();
    });
    let own = Body::Port(Box::new(RootPort::new(3, Box::new(Nobody), interrupt).unwrap()));
    let mut bus = bus_of(vec![(at(4, 0), own)], Requests::answered_by(|_| {}));
    bus.mirror(9).unwrap();
    *reader.lock().unwrap() = Some(Box::new(bus.mirrors.get(&at(4, 0)).unwrap().reader()));
    let port = ecam(0, 4, 0, 0);
    let mut msix = u64::from(read_u32(&bus, port + u64::from(regs::CAPABILITY_LIST)) as u8);
    while read_u32(&bus, port + msix) as u8 != regs::CAP_ID_MSIX {
        msix = u64::from((read_u32(&bus, port + msix) >> 8) as u8);
    }
    bus.config_write(port + msix + 2, &[0x00, 0x80]);
    bus.config_write(port + u64::from(SLOT_CONTROL), &[0x29, 0x13]);
    put_behind(&bus, 0, &[0x50]);
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [0x48], "a card is there, and was not before");
}

proptest! {
    #[test]
    fn no_write_of_a_guests_confuses_the_bus(
        writes in proptest::collection::vec(
            (0u64..4, 0u64..6, 0u64..2, 0u16..0x60, any::<[u8; 8]>(), 0usize..9), 1..60),
    ) {
        let (mut bus, mapped) = bus();
        prop_assert_eq!(bus.mirror(9).unwrap().len(), 7);
        put_behind(&bus, 0, &[0x50]);
        put_behind(&bus, 1, &[0x60, 0x70]);
        prop_assert!(mirrors_follow(&bus));
        for port in 0..2 {
            enable(&bus, ecam(0, 4, port, 0));
        }
        for (number, device, function, register, bytes, length) in writes {
            bus.config_write(ecam(number, device, function, register), &bytes[..length]);
            prop_assert!(mirrors_follow(&bus));
            let mapped = mapped.lock().unwrap();
            let bars: Vec<_> = mapped.values().flatten().collect();
            for (index, bar) in bars.iter().enumerate() {
                let ports = bar.space == Space::Ports;
                let windows = if ports { &[layout::PORTS][..] } else { &WINDOWS };
                prop_assert!(windows.iter().any(|window| window.holds(bar.base, bar.size)));
                for other in bars.iter().skip(index + 1).filter(|other| other.space == bar.space) {
                    prop_assert!(bar.base + bar.size <= other.base || other.base + other.size <= bar.base);
                }
            }
        }
    }
}
