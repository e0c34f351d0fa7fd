use super::*;
use crate::mock::Mock;
use proptest::prelude::*;

fn u32_of(config: &Config, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn shows_what_the_filter_names_and_nothing_else() {
    let mut mock = Mock::nvme();
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    let config = &probe.config;
    let header: Vec<u32> = (0..0x40).step_by(4).map(|offset| u32_of(config, offset)).collect();
    #[rustfmt::skip]
    assert_eq!(header, [
        0x0010_1b36, 0x0010_0000, 0x0108_0202, 0,
        0x0000_0004, 0, 0x0000_0001, 0x0000_0008, 0, 0,
        0, 0x1100_1af4, 0, 0x0000_0040, 0, 0,
    ]);
    // MSI-X, PCI Express, vendor specific and Power Management stay where they are; MSI is gone, its body too.
    assert_eq!(
        [u32_of(config, 0x40), u32_of(config, 0x44), u32_of(config, 0x48)],
        [0x0040_8011, 0x2000, 0x3000]
    );
    assert_eq!(
        [u32_of(config, 0x80), u32_of(config, 0x84), u32_of(config, 0x88)],
        [0x0092_c010, 0x8001, 0x2830 & 0x78f0]
    );
    assert_eq!([u32_of(config, 0xf0), u32_of(config, 0xf4)], [0x0007_0001, 0x8]);
    assert_eq!([u32_of(config, 0xc0), u32_of(config, 0xc4)], [0xde08_f009, 0x55ef_bead]);
    for offset in (0x8c..0xc0).chain(0xc8..0xf0).chain(0x100..0x1000).step_by(4) {
        assert_eq!(u32_of(config, offset), 0, "{offset:#x}");
    }
    assert_eq!((probe.vectors(), probe.hidden_io_bars()), (65, &[][..]));
    assert!(mock.take_events().is_empty(), "probing changes nothing");
}

#[test]
fn in_a_slot_there_are_no_ports_but_a_link() {
    let mut mock = Mock::nvme();
    let probe = Probe::read(&mut mock, Seat::Slot).unwrap();
    let express: Vec<u32> = (0x80..0x94).step_by(4).map(|offset| u32_of(&probe.config, offset)).collect();
    // An endpoint, and the link's speed and width: no power states of it, no control.
    assert_eq!(express, [0x0002_c010, 0x8001, 0x2830 & 0x78f0, 0x0000_0011, 0x0011_0000]);
    assert_eq!((u32_of(&probe.config, 0x18), probe.hidden_io_bars()), (0, &[(2, 0x20)][..]));
    mock.bars[2].size = 512;
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    assert_eq!(probe.hidden_io_bars(), [(2, 512)], "more than a BAR of ports may have");
}

#[test]
fn a_vendors_capability_that_lies_about_its_length_is_left_out() {
    for length in [0, 2, 0x11, 0xff] {
        let mut mock = Mock::nvme();
        mock.space[0xc2] = length;
        let config = Probe::read(&mut mock, Seat::RootBus).unwrap().config;
        assert_eq!((u32_of(&config, 0x80), u32_of(&config, 0xc0)), (0x0092_f010, 0), "{length:#x}");
    }
}

#[test]
fn maps_pages_without_table_and_pending_bits() {
    let mut mock = Mock::nvme();
    mock.bars[0].offset = 7 << 40;
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    assert_eq!(probe.mappings, [Mapping { bar: 0, offset_in_bar: 0, size: 0x2000, file_offset: 7 << 40 }]);
    mock.bars[0].mappable.clear();
    assert!(Probe::read(&mut mock, Seat::RootBus).unwrap().mappings.is_empty());
}

#[test]
fn works_without_msix() {
    let mut mock = Mock::nvme();
    mock.space[0x34] = 0xf0;
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    assert_eq!((probe.vectors(), probe.mappings.len()), (0, 1));
    assert_eq!(probe.mappings[0].size, 0x4000);
}

#[test]
fn intx_is_told_where_there_is_nothing_better() {
    let mut mock = Mock::nvme();
    assert!(!Probe::read(&mut mock, Seat::RootBus).unwrap().intx(), "it has MSI-X");
    mock.space[0x34] = 0xf0;
    mock.space[0x3d] = 3;
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    assert!(probe.intx());
    assert_eq!(u32_of(&probe.config, 0x3c), 0x0100, "always INTA");
    mock.space[0x3d] = 0;
    let probe = Probe::read(&mut mock, Seat::RootBus).unwrap();
    assert_eq!((probe.intx(), u32_of(&probe.config, 0x3c)), (false, 0));
}

type Change<'a> = &'a dyn Fn(&mut Mock);

#[test]
fn refuses_broken_devices() {
    let refusal = |change: Change<'_>| {
        let mut mock = Mock::nvme();
        change(&mut mock);
        Probe::read(&mut mock, Seat::RootBus).map(|_| ()).unwrap_err().to_string()
    };
    let table: [(Change<'_>, &str); 18] = [
        (&|mock| mock.space.fill(0xff), "does not answer"),
        (&|mock| mock.space[0x0e] = 0x01, "header type 0x01"),
        (&|mock| mock.space[0xf1] = 0x40, "loops at 0x40"),
        (&|mock| mock.space[0xf1] = 0x20, "points to 0x20"),
        (
            &|mock| (mock.space[0x41], mock.space[0x45]) = (0x44, 0),
            "capability 0x11 at 0x40 runs into the next one",
        ),
        (&|mock| mock.space[0x81] = 0x90, "capability 0x10 at 0x80 runs into the next one"),
        (&|mock| mock.space[0x10] = 0x06, "BAR 0 is of unknown type"),
        (&|mock| mock.bars[0].size = 0x3000, "BAR 0 cannot have 0x3000 bytes"),
        (&|mock| mock.bars[0].size = 8, "BAR 0 cannot have 0x8 bytes"),
        (&|mock| mock.bars[3].size = 1 << 32, "BAR 3 cannot have 0x100000000 bytes"),
        (&|mock| mock.vectors = 64, "65 vectors, and the kernel says 64"),
        (&|mock| mock.space[0x44] = 0x05, "outside their BARs"),
        (&|mock| mock.space[0x46] = 0x01, "outside their BARs"),
        (&|mock| mock.space[0x49] = 0x20, "overlap"),
        (&|mock| (mock.space[0x34], mock.space[0xd2]) = (0xd0, 0x8c), "MSI capability is broken"),
        (&|mock| (mock.space[0x34], mock.space[0xd2]) = (0xd0, 0x82), "2 vectors, and the kernel says 1"),
        (
            &|mock| (mock.space[0x34], mock.space[0xd1]) = (0xd0, 0xd8),
            "capability 0x05 at 0xd0 runs into the next one",
        ),
        (&|mock| mock.failing = true, "there is nothing at 0x0 of region 7"),
    ];
    for (change, words) in table {
        let refused = refusal(change);
        assert!(refused.contains(words), "{words:?} is not in {refused:?}");
    }
}

#[test]
fn a_bar_of_64_bits_in_the_last_register_is_refused() {
    let mut mock = Mock::nvme();
    mock.space[0x24] = 0x04;
    mock.bars[5].size = 0x1000;
    assert!(matches!(
        Probe::read(&mut mock, Seat::RootBus),
        Err(ProbeError::Config(ConfigError::BarIndex(5)))
    ));
}

proptest! {
    #[test]
    fn any_device_is_read_or_refused(
        changes in proptest::collection::vec((0usize..256, any::<u8>()), 0..8),
        sizes in proptest::collection::vec((0usize..6, prop_oneof![1 => any::<u64>(), 9 => (4u32..64).prop_map(|bit| 1 << bit)]), 0..3),
        areas in proptest::collection::vec((0usize..6, any::<u64>(), any::<u64>()), 0..4),
        vectors in prop_oneof![9 => Just(65u32), 1 => 0u32..70],
    ) {
        let mut mock = Mock::nvme();
        for (at, value) in changes {
            mock.space[at] = value;
        }
        for (bar, size) in sizes {
            mock.bars[bar].size = size;
        }
        for (bar, start, end) in areas {
            mock.bars[bar].mappable.push(start.min(end)..end.max(start));
        }
        mock.vectors = vectors;
        let Ok(probe) = Probe::read(&mut mock, Seat::RootBus) else { return Ok(()) };
        for mapping in &probe.mappings {
            let bar = probe.config.bars().find(|bar| bar.index == mapping.bar).unwrap();
            prop_assert!(mapping.size > 0 && mapping.offset_in_bar + mapping.size <= bar.size);
            prop_assert!((mapping.offset_in_bar | mapping.size) % 4096 == 0);
        }
        // The guest's list holds what the filter names.
        let mut space = [0; 256];
        for (at, byte) in (0..).zip(&mut space) {
            probe.config.read(at, std::slice::from_mut(byte));
        }
        for found in capabilities(&space).unwrap() {
            prop_assert!(filter::capability_rule(found.id).is_some());
        }
    }
}
