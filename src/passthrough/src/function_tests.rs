use super::*;
use crate::{
    mock::{Event, Mock},
    probe::Seat,
};
use casemate_pci::MsiMessage;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;
use vfio_bindings::bindings::vfio::VFIO_IRQ_INFO_NORESIZE;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<BTreeMap<u16, MsiMessage>>>);

impl VectorSink for Sink {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        let mut open = self.0.lock().unwrap();
        match message {
            Some(message) => open.insert(vector, message),
            None => open.remove(&vector),
        };
    }
    fn is_pending(&self, vector: u16) -> bool {
        vector == 3
    }
}

fn assign(mock: Mock) -> (AssignedFunction<Mock, Sink>, Mock, Sink) {
    assign_at(mock, Seat::Slot)
}

fn assign_at(mut mock: Mock, seat: Seat) -> (AssignedFunction<Mock, Sink>, Mock, Sink) {
    let sink = Sink::default();
    let probe = Probe::read(&mut mock, seat).unwrap();
    let triggers = (0..probe.vectors()).map(|_| EventFd::new(0).unwrap()).collect();
    let parts = Parts { vfio: mock.clone(), probe, sink: sink.clone(), triggers };
    let function = AssignedFunction::new(parts).unwrap();
    (function, mock, sink)
}

fn command(value: u16) -> Event {
    Event::Write { index: 7, offset: 4, data: value.to_le_bytes().to_vec() }
}

#[test]
fn bus_master_is_the_guests_and_off_before() {
    let (mut function, mock, _) = assign(Mock::nvme());
    assert_eq!(mock.take_events(), [command(0x0402)]);
    function.config_write(4, &0x0006u16.to_le_bytes());
    assert_eq!(mock.take_events(), [command(0x0406)]);
    function.config_write(4, &0x0546u16.to_le_bytes());
    assert_eq!(mock.take_events(), [], "no other bit is forwarded");
    function.config_write(4, &[0]);
    assert_eq!(mock.take_events(), [command(0x0402)]);
}

#[test]
fn ports_are_the_devices_by_exits() {
    let (mut function, mock, _) = assign_at(Mock::nvme(), Seat::RootBus);
    assert_eq!(mock.take_events(), [command(0x0403)], "the device decodes its ports from the start");
    assert!(function.mappings().iter().all(|mapping| mapping.bar != 2), "none of them is mapped");
    function.place_bar(2, 0xc020).unwrap();
    assert!(function.decoded().is_empty());
    function.config_write(4, &[1, 0]);
    assert_eq!(mock.take_events(), [], "what the guest decodes is its own affair");
    assert_eq!(function.decoded().iter().map(|bar| (bar.index, bar.base)).collect::<Vec<_>>(), [(2, 0xc020)]);
    let mut data = [0; 2];
    function.bar_read(2, 0x1e, &mut data);
    assert_eq!(data, [0x5a; 2]);
    function.bar_read(2, 0x1f, &mut data);
    assert_eq!(data, [0xff; 2], "an access must be aligned");
    function.bar_write(2, 0x10, &[7]);
    assert_eq!(mock.take_events(), [Event::Write { index: 2, offset: 0x10, data: vec![7] }]);
    function.reset();
    assert!(function.decoded().is_empty());
}

#[test]
fn answers_where_the_guest_put_it() {
    let (mut function, mock, _) = assign(Mock::nvme());
    let sizes: Vec<_> = function.bars().iter().map(|bar| (bar.index, bar.size, bar.prefetchable)).collect();
    assert_eq!(sizes, [(0, 0x4000, false), (3, 0x100, true)]);
    function.place_bar(0, 0x40_0000_0000).unwrap();
    function.place_bar(3, 0xc000_1000).unwrap();
    function.config_write(4, &[2, 0]);
    assert_eq!(function.decoded().len(), 2);
    function.config_write(0x10, &0x8000_0000u32.to_le_bytes());
    assert_eq!(function.decoded()[0].base, 0x40_8000_0000);
    assert_eq!(mock.take_events(), [command(0x0402)], "the device's own BARs stay");
}

#[test]
fn msix_goes_on_and_off_with_all_vectors() {
    let (mut function, mock, sink) = assign(Mock::nvme());
    mock.take_events();
    function.config_write(0x42, &0xc000u16.to_le_bytes());
    assert_eq!(mock.take_events(), [Event::Vectors(VectorKind::Msix, 65)]);
    function.bar_write(0, 0x2010, &0xfee0_0000u64.to_le_bytes());
    function.bar_write(0, 0x2018, &0x41u64.to_le_bytes());
    function.config_write(0x42, &0x8000u16.to_le_bytes());
    assert_eq!(*sink.0.lock().unwrap(), [(1, MsiMessage { address: 0xfee0_0000, data: 0x41 })].into());
    let mut pending = [0; 8];
    function.bar_read(0, 0x3000, &mut pending);
    assert_eq!(pending, [8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(mock.take_events(), [], "table and mask are no business of the device");
    function.config_write(0x42, &[0, 0]);
    assert_eq!(
        (mock.take_events(), sink.0.lock().unwrap().len()),
        (vec![Event::Vectors(VectorKind::Msix, 0)], 0)
    );
}

#[test]
fn vectors_are_made_when_unmasked_where_the_kernel_can() {
    let (mut function, mock, sink) = assign(Mock { irq_flags: 0, ..Mock::nvme() });
    mock.take_events();
    let unmask = |function: &mut AssignedFunction<Mock, Sink>, vector: u64, control: u64| {
        function.bar_write(0, 0x2000 + 16 * vector, &0xfee0_0000u64.to_le_bytes());
        function.bar_write(0, 0x2008 + 16 * vector, &(control << 32 | (0x40 + vector)).to_le_bytes());
    };
    unmask(&mut function, 3, 0);
    assert_eq!(mock.take_events(), [], "off as a whole");
    function.config_write(0x42, &0x8000u16.to_le_bytes());
    assert_eq!(mock.take_events(), [Event::Vectors(VectorKind::Msix, 1), Event::Vector(3)]);
    unmask(&mut function, 64, 0);
    unmask(&mut function, 0, 0);
    assert_eq!(mock.take_events(), [Event::Vector(64)]);
    unmask(&mut function, 3, 1);
    unmask(&mut function, 3, 0);
    assert_eq!((mock.take_events(), sink.0.lock().unwrap().len()), (vec![], 3));
    function.config_write(0x42, &[0, 0]);
    function.config_write(0x42, &0x8000u16.to_le_bytes());
    let all = [
        Event::Vectors(VectorKind::Msix, 0),
        Event::Vectors(VectorKind::Msix, 1),
        Event::Vector(3),
        Event::Vector(64),
    ];
    assert_eq!(mock.take_events(), all);
}

#[test]
fn msi_serves_functions_without_msix() {
    let mut mock = Mock::nvme();
    // The list begins at MSI: four vectors, each with a mask.
    mock.space[0x34] = 0xd0;
    mock.space[0xd2..0xd4].copy_from_slice(&0x0184u16.to_le_bytes());
    mock.msi_vectors = 4;
    mock.space[0x3d] = 1;
    let (mut function, mock, sink) = assign(mock);
    mock.take_events();
    function.config_write(0xd4, &0xfee0_0000u32.to_le_bytes());
    function.config_write(0xdc, &0x40u16.to_le_bytes());
    function.config_write(0xd2, &0x0021u16.to_le_bytes());
    assert_eq!(mock.take_events(), [Event::Vectors(VectorKind::Msi, 4)]);
    let told: Vec<_> = sink.0.lock().unwrap().values().map(|message| message.data).collect();
    assert_eq!(told, [0x40, 0x41, 0x42, 0x43]);
    function.config_write(0xe0, &[0xf]);
    let mut pending = [0; 4];
    function.config_read(0xe4, &mut pending);
    assert_eq!((pending, sink.0.lock().unwrap().len()), ([8, 0, 0, 0], 0));
    assert_eq!(mock.take_events(), [], "masks are no business of the device");
    let mut pin = [0];
    function.config_read(0x3d, &mut pin);
    assert_eq!(pin, [0], "INTx is hidden beside MSI");
    function.config_write(0xd2, &[0]);
    assert_eq!(mock.take_events(), [Event::Vectors(VectorKind::Msi, 0)]);
}

#[test]
fn trapped_parts_reach_the_device_when_well_shaped() {
    let (mut function, mock, _) = assign(Mock::nvme());
    mock.take_events();
    let read = |function: &mut AssignedFunction<Mock, Sink>, bar, offset, len| {
        let mut data = vec![0; len];
        function.bar_read(bar, offset, &mut data);
        data
    };
    for (bar, offset, len) in [(3, 0xfc, 4), (3, 0xff, 1), (0, 0x2410, 8), (0, 0x3010, 2)] {
        assert_eq!(read(&mut function, bar, offset, len), vec![0x5a; len]);
        function.bar_write(bar, offset, &vec![7; len]);
        let written = Event::Write { index: bar.into(), offset, data: vec![7; len] };
        assert_eq!(mock.take_events(), [written]);
    }
    // Past the end, unaligned, odd, I/O, absent, ROM, configuration space by its region's number.
    for (bar, offset, len) in
        [(3, 0x100, 1), (3, 0xfe, 4), (3, 0, 3), (3, 0, 16), (2, 0, 4), (1, 0, 4), (6, 0, 4), (7, 4, 2)]
    {
        assert_eq!(read(&mut function, bar, offset, len), vec![0xff; len], "{bar} {offset:#x} {len}");
        function.bar_write(bar, offset, &vec![7; len]);
        assert_eq!(mock.take_events(), [], "{bar} {offset:#x} {len}");
    }
}

#[test]
fn power_state_is_kept_from_the_device() {
    let (mut function, mock, _) = assign(Mock::nvme());
    mock.take_events();
    function.config_write(0xf4, &[0xff; 4]);
    let mut state = [0; 4];
    function.config_read(0xf4, &mut state);
    assert_eq!(state, [0x0b, 0, 0, 0]);
    assert_eq!(mock.take_events(), []);
}

#[test]
fn a_failing_device_reads_ones_and_is_tried_again() {
    let (mut function, mock, _) = assign(Mock::nvme());
    function.vfio.failing = true;
    let mut data = [0; 4];
    function.bar_read(3, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    function.config_write(4, &[4, 0]);
    function.vfio.failing = false;
    mock.take_events();
    function.config_write(0x0c, &[0]);
    assert_eq!(mock.take_events(), [command(0x0406)]);
}

#[test]
fn eventfds_must_match_the_vectors() {
    let mut mock = Mock::nvme();
    let probe = Probe::read(&mut mock, Seat::Slot).unwrap();
    let parts = Parts { vfio: mock, probe, sink: Sink::default(), triggers: Arc::new([]) };
    assert!(AssignedFunction::new(parts).is_err());
}

/// Every write of every width to every byte of configuration space, with patterns that set all and clear all.
#[test]
fn no_write_reaches_the_device_but_bus_master() {
    let (mut function, mock, _) = assign(Mock::nvme());
    mock.take_events();
    for pattern in [[0xff; 4], [0; 4], [0xa5; 4]] {
        for offset in 0..=0x1004u16 {
            for width in 0..=4 {
                function.config_write(offset, &pattern[..width]);
                for event in mock.take_events() {
                    let inside_command = (4..6).contains(&offset);
                    let inside_msix = (0x40..0x44).contains(&offset);
                    match event {
                        Event::Write { .. } => {
                            assert!(inside_command && (event == command(0x0402) || event == command(0x0406)));
                        }
                        Event::Vectors(kind, _) => {
                            assert!(inside_msix && kind == VectorKind::Msix, "{offset:#x} {width}");
                        }
                        Event::Vector(_) => panic!("all vectors were made at once"),
                        Event::Reset => panic!("a guest has reset the device"),
                    }
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn a_hostile_guest_reaches_what_the_filter_names(
        accesses in proptest::collection::vec((
            any::<bool>(),
            0u8..9,
            prop_oneof![0u64..0x110, 0x1ff0u64..0x3020, any::<u64>()],
            proptest::collection::vec(any::<u8>(), 0..=9),
        ), 0..64),
        dynamic: bool,
    ) {
        let irq_flags = if dynamic { 0 } else { VFIO_IRQ_INFO_NORESIZE };
        let (mut function, mock, _) = assign(Mock { irq_flags, ..Mock::nvme() });
        mock.take_events();
        for (is_config, bar, offset, mut data) in accesses {
            if is_config {
                function.config_write(offset as u16, &data);
                function.config_read(offset as u16, &mut data);
            } else {
                function.bar_write(bar, offset, &data);
                function.bar_read(bar, offset, &mut data);
            }
            for event in mock.take_events() {
                match event {
                    Event::Write { index: 7, .. } => {
                        prop_assert!(is_config && (event == command(0x0402) || event == command(0x0406)));
                    }
                    Event::Write { index, offset: at, data: written } => {
                        prop_assert!(!is_config && index == u32::from(bar) && at == offset && written.len() == data.len());
                        prop_assert!(index == 0 || index == 3);
                        prop_assert!(index != 0 || !(0x2000..0x2410).contains(&at) && !(0x3000..0x3010).contains(&at));
                    }
                    Event::Vectors(VectorKind::Msix, count) => {
                        let is_whole = if dynamic { count < 2 } else { count % 65 == 0 };
                        prop_assert!(is_config && is_whole);
                    }
                    Event::Vectors(VectorKind::Msi, _) => prop_assert!(false, "it has MSI-X"),
                    Event::Vector(vector) => prop_assert!(dynamic && vector < 65),
                    Event::Reset => prop_assert!(false, "a guest has reset the device"),
                }
            }
        }
    }
}
