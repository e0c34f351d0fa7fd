use std::{thread, time::Duration};

use casemate_pci::MsiMessage;
use proptest::prelude::*;

use super::*;
use crate::{
    Blk, BlkBackend, BlkFormat, Rng,
    device::{Kind, Progress},
    testing::{MEMORY_BYTES, Ring, fill, memory},
};

const VERSION_1_HIGH: u32 = 1;
const EVENT_IDX: u32 = 1 << 29;

struct Vectors;

impl VectorSink for Vectors {
    fn set(&mut self, _: u16, _: Option<MsiMessage>) {}
    fn is_pending(&self, _: u16) -> bool {
        false
    }
}

/// A function with its thread, and the other ends of its vectors.
struct Guest {
    function: Option<PciTransport>,
    thread: Option<thread::JoinHandle<()>>,
    events: Vec<EventFd>,
    memory: Memory,
}

impl Guest {
    fn with(device: Box<dyn Device>) -> Self {
        let memory = memory();
        let blocking = || EventFd::new(0).unwrap();
        let events: Vec<EventFd> = (0..vector_count(&*device)).map(|_| blocking()).collect();
        let given = events.iter().map(|event| event.try_clone().unwrap()).collect();
        let parts = PciParts { device, memory: memory.clone(), events: given, vectors: Box::new(Vectors) };
        let (function, worker) = PciTransport::new(parts).unwrap();
        let thread = Some(thread::spawn(move || worker.run()));
        Self { function: Some(function), thread, events, memory }
    }

    fn function(&mut self) -> &mut PciTransport {
        self.function.as_mut().unwrap()
    }

    fn write(&mut self, offset: u64, value: u64, length: usize) {
        self.function().bar_write(BAR, offset, &value.to_le_bytes()[..length]);
    }

    fn read(&mut self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.function().bar_read(BAR, offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    fn status(&mut self) -> u64 {
        self.read(0x14, 1)
    }

    /// The steps of virtio 1.3, 3.1.1, up to FEATURES_OK.
    fn negotiate(&mut self, low: u32, high: u32) {
        self.write(0x14, 0, 1);
        self.write(0x14, 3, 1);
        for (select, features) in [(0, low), (1, high)] {
            self.write(0x08, select, 4);
            self.write(0x0c, features.into(), 4);
        }
        self.write(0x14, 0xb, 1);
    }

    /// Sets up queue 0 at `ring`, with vector 1, and says DRIVER_OK.
    fn start(&mut self, ring: &Ring) {
        self.write(0x10, 0, 2);
        self.write(0x16, 0, 2);
        self.write(0x18, ring.size.into(), 2);
        self.write(0x1a, 1, 2);
        for (register, address) in [(0x20, ring.base), (0x28, ring.base + 0x1000), (0x30, ring.base + 0x2000)]
        {
            self.write(register, address & 0xffff_ffff, 4);
            self.write(register + 4, address >> 32, 4);
        }
        self.write(0x1c, 1, 2);
        self.write(0x14, 0xf, 1);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.function = None;
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || thread::panicking());
    }
}

/// One that reports each of its calls to the test, and holds on until told to go on.
struct Probe {
    calls: std::sync::mpsc::Sender<()>,
    go_on: std::sync::mpsc::Receiver<()>,
}

impl Device for Probe {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn queue_ready(&mut self, _: &mut Active, _: usize) -> Result<Progress, Fault> {
        self.calls.send(()).unwrap();
        self.go_on.recv().unwrap();
        Ok(Progress::Idle)
    }
}

#[test]
fn shows_a_modern_virtio_function() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    let mut space = [0; 256];
    for (offset, dword) in (0u16..).step_by(4).zip(space.chunks_exact_mut(4)) {
        guest.function().config_read(offset, dword);
    }
    assert_eq!((&space[..4], space[8]), (&[0xf4, 0x1a, 0x44, 0x10][..], 1));
    let found = casemate_pci::capabilities(&space).unwrap();
    let mut types: Vec<u8> = found
        .iter()
        .filter(|c| c.id == regs::CAP_ID_VNDR)
        .map(|c| space[usize::from(c.offset) + 3])
        .collect();
    types.sort_unstable();
    assert_eq!(types, [CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_PCI], "no device configuration: it has none");
    assert!(found.iter().any(|c| c.id == regs::CAP_ID_MSIX));
    let bars = guest.function().bars();
    assert_eq!((bars.len(), bars[0].size, bars[0].kind), (1, BAR_BYTES, BarKind::Memory64));
}

#[test]
fn a_driver_gets_random_bytes() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    guest.negotiate(EVENT_IDX, VERSION_1_HIGH);
    assert_eq!(guest.status(), 0xb);
    let mut ring = Ring::new(&guest.memory, 0x1000, 8);
    guest.start(&ring);
    assert_eq!(guest.status(), 0xf);
    for round in 0..20 {
        let head = ring.offer(&[(0x10000, 64, true)]);
        guest.write(NOTIFY, 0, 2);
        // The eventfd blocks until the interrupt is there.
        guest.events[1].read().unwrap();
        assert_eq!(ring.take(), Some((head, 64)), "round {round}");
    }
    assert_eq!(guest.function().fault(), None);
}

#[test]
fn the_doorbells_are_where_the_capability_says() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    let doorbells: Vec<_> = guest.function().doorbells().map(|d| (d.bar, d.offset)).collect();
    assert_eq!(doorbells, [(0, 0x3000)]);
    // Rung as the kernel would ring it, by the eventfd alone.
    guest.negotiate(EVENT_IDX, VERSION_1_HIGH);
    let mut ring = Ring::new(&guest.memory, 0x1000, 8);
    guest.start(&ring);
    let head = ring.offer(&[(0x10000, 8, true)]);
    guest.function().doorbells().next().unwrap().event.write(1).unwrap();
    guest.events[1].read().unwrap();
    assert_eq!(ring.take(), Some((head, 8)));
}

#[test]
fn features_must_be_offered_and_modern() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    for (low, high) in [(EVENT_IDX, 0), (1 << 5, VERSION_1_HIGH), (0, VERSION_1_HIGH | 1 << 2)] {
        guest.negotiate(low, high);
        assert_eq!(guest.status(), 3, "{low:#x} {high:#x}");
        guest.write(0x14, 0xf, 1);
        assert_eq!(guest.status(), 3, "no DRIVER_OK without FEATURES_OK");
    }
    guest.negotiate(0, VERSION_1_HIGH);
    guest.write(0x0c, 0xffff_ffff, 4);
    assert_eq!((guest.status(), guest.read(0x0c, 4)), (0xb, 1), "fixed once agreed on");
}

#[test]
fn a_queue_outside_memory_is_a_fault_that_a_reset_clears() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    // The last byte of the used ring behind memory; misaligned; in no memory; at the end of all addresses.
    for base in [MEMORY_BYTES as u64 - 0x2080, 0x1008, 0x1_0000_0000, u64::MAX - 0x2fff] {
        guest.negotiate(0, VERSION_1_HIGH);
        let ring = Ring::new(&guest.memory, base, 16);
        guest.start(&ring);
        assert_eq!(guest.status(), 0x4f, "{base:#x}");
        assert!(guest.function().fault().unwrap().contains("queue 0"));
        guest.events[0].read().unwrap();
        assert_eq!(guest.read(ISR, 1), 2);
        assert_eq!(guest.read(ISR, 1), 0, "reading clears it");
    }
    guest.write(0x14, 0, 1);
    assert_eq!((guest.status(), guest.read(0x18, 2), guest.read(0x1a, 2)), (0, 64, 0xffff));
    assert_eq!(guest.function().fault(), None);
}

#[test]
fn a_broken_chain_asks_for_a_reset_and_then_all_is_well() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    guest.negotiate(EVENT_IDX, VERSION_1_HIGH);
    let mut ring = Ring::new(&guest.memory, 0x1000, 8);
    guest.start(&ring);
    ring.offer(&[(MEMORY_BYTES as u64, 8, true)]);
    guest.write(NOTIFY, 0, 2);
    guest.events[0].read().unwrap();
    assert_eq!(guest.status(), 0x4f);

    guest.negotiate(EVENT_IDX, VERSION_1_HIGH);
    fill(&guest.memory, 0x1000, &[0; 0x3000]);
    let mut ring = Ring::new(&guest.memory, 0x1000, 8);
    guest.start(&ring);
    let head = ring.offer(&[(0x10000, 8, true)]);
    guest.write(NOTIFY, 0, 2);
    guest.events[1].read().unwrap();
    assert_eq!(ring.take(), Some((head, 8)));
}

#[test]
fn a_reset_waits_for_the_work_in_hand_and_takes_the_memory_back() {
    let (calls, called) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel();
    let mut guest = Guest::with(Box::new(Probe { calls, go_on: wait }));
    guest.negotiate(0, VERSION_1_HIGH);
    let ring = Ring::new(&guest.memory, 0x1000, 8);
    guest.start(&ring);
    called.recv().unwrap();
    // This ring, the guest and its function hold the memory; beside them the active device.
    assert_eq!(Arc::strong_count(&guest.memory), 4);
    let release = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        go_on.send(()).unwrap();
        go_on
    });
    guest.write(0x14, 0, 1);
    assert!(release.is_finished() || release.join().is_ok());
    assert_eq!(Arc::strong_count(&guest.memory), 3, "given up before the reset is seen");
    guest.write(NOTIFY, 0, 2);
    assert!(called.recv_timeout(Duration::from_millis(50)).is_err(), "and no more work is done");
}

#[test]
fn the_access_window_reaches_the_bar() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    let window = guest.function().window;
    let function = guest.function();
    assert!(function.config_image().is_some());
    function.config_write(window + WINDOW_LENGTH, &2u32.to_le_bytes());
    assert!(function.config_image().is_none(), "a read of the window's data is one of the BAR");
    function.config_write(window + WINDOW_OFFSET, &0x12u32.to_le_bytes());
    let mut data = [0; 4];
    function.config_read(window + WINDOW_DATA, &mut data);
    assert_eq!(data, [1, 0, 0, 0], "num_queues");
    function.config_write(window + WINDOW_OFFSET, &0x16u32.to_le_bytes());
    function.config_write(window + WINDOW_DATA, &[3, 0, 0, 0]);
    assert_eq!(guest.read(0x16, 2), 3, "queue_select");
    for length in [0u32, 3, 8, u32::MAX] {
        let function = guest.function();
        function.config_write(window + WINDOW_LENGTH, &length.to_le_bytes());
        function.config_read(window + WINDOW_DATA, &mut data);
        function.config_write(window + WINDOW_DATA, &[9; 4]);
    }
    assert_eq!(guest.read(0x16, 2), 3, "other lengths do nothing");
}

#[test]
fn registers_take_whole_accesses_only() {
    let mut guest = Guest::with(Box::new(Rng::new()));
    guest.write(0x16, 0, 2);
    guest.write(0x18, 6, 2);
    assert_eq!(guest.read(0x18, 2), 64, "not a power of two");
    guest.write(0x18, 128, 2);
    assert_eq!(guest.read(0x18, 2), 64, "too large");
    guest.write(0x20, 0x1234_5678_9abc_def0, 8);
    assert_eq!((guest.read(0x20, 8), guest.read(0x24, 4)), (0x1234_5678_9abc_def0, 0x1234_5678));
    guest.write(0x18, 32, 4);
    assert_eq!((guest.read(0x18, 2), guest.read(0x18, 4)), (64, 0xffff_ffff));
    guest.write(0x1a, 2, 2);
    assert_eq!(guest.read(0x1a, 2), 0xffff, "there are two vectors");
    guest.write(0x16, 1, 2);
    assert_eq!(guest.read(0x18, 2), 0, "there is one queue");
}

#[test]
fn parts_must_fit_each_other() {
    let parts = PciParts {
        device: Box::new(Rng::new()),
        memory: memory(),
        events: vec![],
        vectors: Box::new(Vectors),
    };
    assert!(matches!(PciTransport::new(parts), Err(SetupError::Events { needed: 2, given: 0 })));
}

fn blk() -> Box<dyn Device> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let serial = "x".into();
    let backend = BlkBackend {
        file: file.into(),
        format: BlkFormat::Raw,
        size_bytes: 1 << 16,
        read_only: false,
        serial,
        queues: 2,
    };
    Box::new(Blk::new(backend).unwrap())
}

#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>, bool),
    Bar(u8, u64, Vec<u8>, bool),
    /// A register of the common configuration, with a value that might mean something.
    Common(u64, u64, usize),
    Start,
}

fn step() -> impl Strategy<Value = Step> {
    let data = || prop::collection::vec(any::<u8>(), 0..10);
    let register = prop::sample::select(vec![
        (0x08, 4),
        (0x0c, 4),
        (0x10, 2),
        (0x14, 1),
        (0x16, 2),
        (0x18, 2),
        (0x1a, 2),
        (0x1c, 2),
        (0x20, 4),
        (0x28, 4),
        (0x30, 4),
        (0x24, 4),
        (0x3000, 2),
    ]);
    let value = prop_oneof![0u64..16, Just(64u64), (0u64..256).prop_map(|page| page << 12), any::<u64>()];
    prop_oneof![
        (0u16..4200, data(), any::<bool>()).prop_map(|(o, d, w)| Step::Config(o, d, w)),
        (0u16..256, data(), any::<bool>()).prop_map(|(o, d, w)| Step::Config(o, d, w)),
        (0u8..7, 0..BAR_BYTES + 64, data(), any::<bool>()).prop_map(|(b, o, d, w)| Step::Bar(b, o, d, w)),
        (any::<u64>(), data(), any::<bool>()).prop_map(|(o, d, w)| Step::Bar(0, o, d, w)),
        (register, value).prop_map(|((o, n), v)| Step::Common(o, v, n)),
        Just(Step::Start),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn survives_any_access(steps in prop::collection::vec(step(), 1..150), content in prop::collection::vec(any::<u8>(), 4096)) {
        let mut guest = Guest::with(blk());
        for at in (0..MEMORY_BYTES as u64).step_by(content.len()) {
            fill(&guest.memory, at, &content);
        }
        for step in steps {
            match step {
                Step::Config(offset, mut data, false) => guest.function().config_read(offset, &mut data),
                Step::Config(offset, data, true) => guest.function().config_write(offset, &data),
                Step::Bar(bar, offset, mut data, false) => guest.function().bar_read(bar, offset, &mut data),
                Step::Bar(bar, offset, data, true) => guest.function().bar_write(bar, offset, &data),
                Step::Common(offset, value, length) => guest.write(offset, value, length),
                Step::Start => {
                    guest.negotiate(0, VERSION_1_HIGH);
                    let ring = Ring::new(&guest.memory, 0x1000, 16);
                    guest.start(&ring);
                    guest.write(NOTIFY, 0, 2);
                }
            }
        }
        // The function still answers, and a reset brings it back to its start.
        guest.write(0x14, 0, 1);
        prop_assert_eq!(guest.status(), 0);
    }
}
