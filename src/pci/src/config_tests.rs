use super::*;
use proptest::prelude::*;

fn config() -> Config {
    let mut config = Config::new(Identity {
        vendor: 0x1af4,
        device: 0x1041,
        class: 0x02_00_00,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    });
    let bar = |index, size, kind| BarRequest { index, size, kind, prefetchable: index == 2 };
    config.add_bar(bar(0, 0x4000, BarKind::Memory32)).unwrap();
    config.add_bar(bar(2, 8 << 30, BarKind::Memory64)).unwrap();
    config.add_bar(bar(5, 16, BarKind::Memory32)).unwrap();
    config
        .add_capability(Capability {
            id: regs::CAP_ID_VNDR,
            body: &[5, 0x11, 0xff],
            writable: &[0, 0xf0],
            clear: &[0, 0, 0x0f],
            at: None,
        })
        .unwrap();
    config
}

fn read_u32(config: &Config, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_rom_is_sized_placed_and_turned_on_like_a_real_one() {
    let mut config = Config::new(Identity::default());
    for size in [0, 1 << 10, 5000, 1 << 25] {
        assert_eq!(config.add_rom(size), Err(ConfigError::BarSize { index: ROM_INDEX, size }));
    }
    config.add_rom(1 << 16).unwrap();
    assert_eq!(config.add_rom(1 << 16), Err(ConfigError::BarIndex(ROM_INDEX)));
    // As Linux sizes it: all ones but the enable bit.
    config.write(regs::EXPANSION_ROM, &0xffff_f800u32.to_le_bytes());
    assert_eq!(config.u32_at(regs::EXPANSION_ROM), 0xffff_0000);
    config.place_bar(ROM_INDEX, 0xc001_0000).unwrap();
    assert_eq!(config.u32_at(regs::EXPANSION_ROM), 0xc001_0000);
    config.write(regs::COMMAND, &regs::COMMAND_MEMORY.to_le_bytes());
    assert!(config.decoded().is_empty(), "it is not enabled");
    config.write(regs::EXPANSION_ROM, &0xc002_0001u32.to_le_bytes());
    assert_eq!(
        *config.decoded(),
        [DecodedBar { index: ROM_INDEX, space: Space::Memory, base: 0xc002_0000, size: 1 << 16 }]
    );
    config.reset();
    assert!(config.decoded().is_empty() && config.u32_at(regs::EXPANSION_ROM) == 0);
}

#[test]
fn header_says_what_it_is() {
    let config = config();
    assert_eq!(read_u32(&config, 0), 0x1041_1af4);
    assert_eq!(read_u32(&config, 8), 0x0200_0001);
    assert_eq!(read_u32(&config, 0x2c), 0x0040_1af4);
    assert_eq!(config.u16_at(regs::STATUS), regs::STATUS_CAP_LIST);
    assert_eq!(read_u32(&config, 0x100), 0);
}

#[test]
fn bars_are_sized_by_all_ones() {
    let mut config = config();
    for offset in (0x10..0x28).step_by(4) {
        config.write(offset, &[0xff; 4]);
    }
    let sizes: Vec<u32> = (0x10..0x28).step_by(4).map(|offset| read_u32(&config, offset)).collect();
    assert_eq!(sizes, [0xffff_c000, 0, 0x0000_000c, 0xffff_fffe, 0, 0xffff_fff0]);
    config.write(regs::COMMAND, &regs::COMMAND_MEMORY.to_le_bytes());
    assert!(config.decoded().is_empty(), "what sizing leaves is not an address: {:?}", config.decoded());
}

#[test]
fn decodes_where_it_was_placed_or_moved() {
    let mut config = config();
    config.place_bar(0, 0xc000_0000).unwrap();
    config.place_bar(2, 64 << 30).unwrap();
    assert!(config.decoded().is_empty());
    config.write(regs::COMMAND, &regs::COMMAND_MEMORY.to_le_bytes());
    let placed = [
        DecodedBar { index: 0, space: Space::Memory, base: 0xc000_0000, size: 0x4000 },
        DecodedBar { index: 2, space: Space::Memory, base: 64 << 30, size: 8 << 30 },
    ];
    assert_eq!(*config.decoded(), placed);
    config.write(0x1c, &32u32.to_le_bytes());
    assert_eq!(config.decoded()[1].base, 32 << 32);
    config.write(0x10, &[0; 4]);
    assert_eq!(config.decoded().len(), 1);
}

#[test]
fn ports_are_sized_placed_and_turned_on_apart_from_memory() {
    let mut config = config();
    assert!(!config.has_ports());
    config.write(regs::COMMAND, &regs::COMMAND_IO.to_le_bytes());
    assert_eq!(config.u16_at(regs::COMMAND), 0, "there is nothing to turn on");
    for size in [0, 2, 24, 512] {
        let bar = BarRequest { index: 1, size, kind: BarKind::Io, prefetchable: false };
        assert_eq!(config.add_bar(bar), Err(ConfigError::BarSize { index: 1, size }));
    }
    config.add_bar(BarRequest { index: 1, size: 32, kind: BarKind::Io, prefetchable: false }).unwrap();
    assert!(config.has_ports());
    config.write(0x14, &[0xff; 4]);
    assert_eq!(read_u32(&config, 0x14), 0xffe1, "ports have 16 bits");
    assert_eq!(config.place_bar(1, 0x1_0000), Err(ConfigError::BarBase { index: 1, base: 0x1_0000 }));
    config.place_bar(1, 0xc020).unwrap();
    assert_eq!(read_u32(&config, 0x14), 0xc021);
    config.place_bar(0, 0xc000_0000).unwrap();
    config.write(regs::COMMAND, &regs::COMMAND_MEMORY.to_le_bytes());
    assert_eq!(config.decoded().iter().map(|bar| bar.space).collect::<Vec<_>>(), [Space::Memory]);
    config.write(regs::COMMAND, &regs::COMMAND_IO.to_le_bytes());
    assert_eq!(*config.decoded(), [DecodedBar { index: 1, space: Space::Ports, base: 0xc020, size: 32 }]);
    config.write(0x14, &[0xff; 4]);
    assert!(config.decoded().is_empty(), "what sizing leaves is not a port");
}

#[test]
fn refuses_bars_that_cannot_be() {
    let bar = |index, size, kind| BarRequest { index, size, kind, prefetchable: false };
    for size in [0, 8, 0x3000, 1 << 32] {
        assert_eq!(
            config().add_bar(bar(1, size, BarKind::Memory32)),
            Err(ConfigError::BarSize { index: 1, size })
        );
    }
    for (index, kind) in [
        (0, BarKind::Memory32),
        (3, BarKind::Memory32),
        (1, BarKind::Memory64),
        (4, BarKind::Memory64),
        (6, BarKind::Memory32),
        (255, BarKind::Memory64),
    ] {
        assert_eq!(config().add_bar(bar(index, 0x1000, kind)), Err(ConfigError::BarIndex(index)));
    }
    for (index, base) in [(1, 0x1000), (0, 0x2000), (0, 1 << 32), (3, 0), (7, 0)] {
        assert_eq!(config().place_bar(index, base), Err(ConfigError::BarBase { index, base }));
    }
}

#[test]
fn capabilities_are_linked_in_order() {
    let mut config = config();
    let second = Capability { id: 0x11, body: &[0; 10], ..Capability::default() };
    assert_eq!(config.add_capability(second), Ok(0x48));
    assert_eq!(config.add_capability(Capability { id: 0x10, at: Some(0xc4), ..second }), Ok(0xc4));
    let found = crate::capabilities(&config.bytes[..]).unwrap();
    let plain: Vec<_> = found.iter().map(|c| (c.id, c.offset)).collect();
    assert_eq!(plain, [(0x09, 0x40), (0x11, 0x48), (0x10, 0xc4)]);
    for at in [0x3c, 0x42, 0x44, 0x4c, 0xc0, 0xf8] {
        let misplaced = Capability { at: Some(at), ..second };
        assert!(config.add_capability(misplaced).is_err(), "{at:#x}");
    }
    assert!(config.add_capability(Capability { body: &[0; 300], ..second }).is_err());
}

#[test]
fn masks_rule_capability_bodies() {
    let mut config = config();
    config.write(0x40, &[0xff; 4]);
    config.write(0x44, &[0xff; 4]);
    assert_eq!(read_u32(&config, 0x40), 0xf105_0009);
    assert_eq!(read_u32(&config, 0x44), 0x0000_00f0);
}

#[test]
fn misshapen_accesses_read_ones_and_write_nothing() {
    let mut config = config();
    let before = config.bytes.clone();
    for (offset, len) in [(4, 3), (4, 8), (4, 0), (5, 4), (7, 2), (0xfff, 2), (0x1000, 1), (0xffff, 4)] {
        let mut data = vec![0; len];
        config.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0xff), "{offset:#x} {len}");
        config.write(offset, &vec![0xff; len]);
    }
    assert_eq!(config.bytes, before);
}

#[test]
fn command_bits_are_told() {
    let mut config = config();
    assert!(!config.bus_master() && !config.intx_disabled());
    config.write(regs::COMMAND, &[0xff, 0xff]);
    assert!(config.bus_master() && config.intx_disabled());
    assert_eq!(config.u16_at(regs::COMMAND), 0x0546);
    config.set(regs::STATUS, &0xf910u16.to_le_bytes());
    config.write(regs::STATUS, &0x8000u16.to_le_bytes());
    assert_eq!(config.u16_at(regs::STATUS), 0x7910);
}

proptest! {
    #[test]
    fn any_writes_keep_the_invariants(
        writes in proptest::collection::vec(
            (prop_oneof![0u16..0x60, any::<u16>()], proptest::collection::vec(any::<u8>(), 0..=9)), 0..64),
    ) {
        let mut config = config();
        let first = config.clone();
        for (offset, data) in writes {
            config.write(offset, &data);
            let mut back = vec![0; data.len()];
            config.read(offset, &mut back);
            for bar in config.decoded().iter() {
                prop_assert!(bar.base != 0 && bar.base % bar.size == 0);
                let request = config.bars().find(|request| request.index == bar.index).unwrap();
                prop_assert_eq!(request.size, bar.size);
                let end = bar.base.checked_add(bar.size).unwrap();
                prop_assert!(request.kind == BarKind::Memory64 || end <= u64::from(u32::MAX));
            }
        }
        for at in 0..CONFIG_SPACE_BYTES {
            let fixed = !(config.writable[at] | config.clear[at]);
            prop_assert_eq!(config.bytes[at] & fixed, first.bytes[at] & fixed, "at {:#x}", at);
        }
        prop_assert_eq!(crate::capabilities(&config.bytes[..]), crate::capabilities(&first.bytes[..]));
    }
}
