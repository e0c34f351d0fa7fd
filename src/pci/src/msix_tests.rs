use super::*;
use crate::{BarKind, Identity};
use proptest::prelude::*;

/// Holds what it was told, and insists on being told of changes only.
#[derive(Default)]
struct Sink {
    vectors: Vec<Option<MsiMessage>>,
    pending: Vec<u16>,
    calls: usize,
}

impl VectorSink for Sink {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        let slot = &mut self.vectors[usize::from(vector)];
        assert_ne!(*slot, message, "told of no change");
        *slot = message;
        self.calls += 1;
    }
    fn is_pending(&self, vector: u16) -> bool {
        self.pending.contains(&vector)
    }
}

fn layout(vectors: u16) -> MsixLayout {
    MsixLayout {
        vectors,
        table: BarOffset { bar: 1, offset: 0x1000 },
        pba: BarOffset { bar: 1, offset: 0x800 },
        capability_at: None,
    }
}

fn try_add(layout: MsixLayout) -> Result<(Config, Msix, Sink), ConfigError> {
    let mut config = Config::new(Identity::default());
    config
        .add_bar(BarRequest { index: 1, size: 0x1_0000, kind: BarKind::Memory64, prefetchable: false })
        .unwrap();
    let msix = Msix::add(&mut config, layout)?;
    let sink = Sink { vectors: vec![None; layout.vectors.into()], ..Sink::default() };
    Ok((config, msix, sink))
}

fn control(config: &mut Config, msix: &mut Msix, sink: &mut Sink, value: u16) -> Option<MsixTransition> {
    config.write(0x42, &value.to_le_bytes());
    msix.config_written(config, sink)
}

#[test]
fn goes_the_way_linux_takes() {
    let (mut config, mut msix, mut sink) = try_add(layout(3)).unwrap();
    assert_eq!(config.u32_at(0x40), 0x0002_0011);
    assert_eq!(config.u32_at(0x44), 0x1001);
    assert_eq!(config.u32_at(0x48), 0x0801);

    // Enable with everything masked, program the table, open the function.
    assert_eq!(control(&mut config, &mut msix, &mut sink, 0xc000), Some(MsixTransition::Enabled));
    msix.bar_write(1, 0x1010, &0xfee0_1000u64.to_le_bytes(), &mut sink);
    msix.bar_write(1, 0x1018, &0x31u32.to_le_bytes(), &mut sink);
    msix.bar_write(1, 0x101c, &0u32.to_le_bytes(), &mut sink);
    assert_eq!(sink.calls, 0);
    assert_eq!(control(&mut config, &mut msix, &mut sink, 0x8000), None);
    let message = MsiMessage { address: 0xfee0_1000, data: 0x31 };
    assert_eq!(sink.vectors, [None, Some(message), None]);
    assert_eq!(sink.calls, 1);

    // Mask and unmask the vector; the same message written again is no change.
    msix.bar_write(1, 0x101c, &1u32.to_le_bytes(), &mut sink);
    assert_eq!(sink.vectors[1], None);
    msix.bar_write(1, 0x101c, &0u32.to_le_bytes(), &mut sink);
    msix.bar_write(1, 0x1018, &0x31u32.to_le_bytes(), &mut sink);
    assert_eq!((sink.vectors[1], sink.calls), (Some(message), 3));

    assert_eq!(control(&mut config, &mut msix, &mut sink, 0), Some(MsixTransition::Disabled));
    assert_eq!(sink.vectors, [None; 3]);
    assert_eq!(control(&mut config, &mut msix, &mut sink, 0x4000), None);
}

#[test]
fn pending_bits_are_the_sinks_while_masked() {
    let (mut config, mut msix, mut sink) = try_add(layout(70)).unwrap();
    sink.pending = vec![1, 33, 69];
    let pba = |msix: &Msix, sink: &Sink, offset| {
        let mut data = [0; 8];
        assert!(msix.bar_read(1, offset, &mut data, sink));
        u64::from_le_bytes(data)
    };
    assert_eq!(pba(&msix, &sink, 0x800), 1 << 1 | 1 << 33);
    assert_eq!(pba(&msix, &sink, 0x808), 1 << 5);
    msix.bar_write(1, 0x800, &[0xff; 8], &mut sink);
    msix.bar_write(1, 0x101c, &0u32.to_le_bytes(), &mut sink);
    control(&mut config, &mut msix, &mut sink, 0x8000);
    assert_eq!(pba(&msix, &sink, 0x800), 1 << 33);
}

#[test]
fn takes_only_what_is_its_own() {
    let (_, mut msix, mut sink) = try_add(layout(3)).unwrap();
    for (bar, offset) in
        [(0, 0x1000), (1, 0), (1, 0x7f8), (1, 0x808), (1, 0xff8), (1, 0x1030), (9, 0x800), (1, u64::MAX)]
    {
        assert!(!msix.bar_read(bar, offset, &mut [0; 4], &sink), "{bar} {offset:#x}");
        assert!(!msix.bar_write(bar, offset, &[0; 4], &mut sink), "{bar} {offset:#x}");
    }
    assert!(msix.bar_read(1, 0x102c, &mut [0; 4], &sink));
}

#[test]
fn refuses_layouts_that_cannot_be() {
    let good = layout(64);
    let table = |bar, offset| MsixLayout { table: BarOffset { bar, offset }, ..good };
    for bad in [
        layout(0),
        layout(2049),
        table(0, 0),
        table(7, 0),
        table(1, 0x1004),
        table(1, 0xfff0),
        table(1, 0x800),
        table(1, 0x7f8),
        table(1, 0xffff_fff8),
        MsixLayout { pba: BarOffset { bar: 1, offset: 0x1008 }, ..good },
        MsixLayout { pba: BarOffset { bar: 1, offset: 0x1_0000 }, ..good },
    ] {
        assert!(matches!(try_add(bad), Err(ConfigError::Msix(_))), "{bad:?}");
    }
    assert!(try_add(layout(2048)).is_ok());
}

proptest! {
    #[test]
    fn the_sink_always_knows(
        accesses in proptest::collection::vec(
            (0u8..4, prop_oneof![0x1000u64..0x1050, 0x7f0u64..0x810, any::<u64>()],
             proptest::collection::vec(any::<u8>(), 0..=9)), 0..96),
    ) {
        let (mut config, mut msix, mut sink) = try_add(layout(4)).unwrap();
        for (what, offset, mut data) in accesses {
            match what {
                0 => {
                    let was = msix.enabled();
                    config.write(0x40 + (offset % 4) as u16, &data);
                    let transition = msix.config_written(&config, &mut sink);
                    prop_assert_eq!(transition.is_some(), was != msix.enabled());
                }
                1 => { msix.bar_read(1, offset, &mut data, &sink); }
                _ => { msix.bar_write(1, offset, &data, &mut sink); }
            }
            // What the sink holds is what the guest can read of the table and message control.
            let open = config.u16_at(0x42) & 0xc000 == 0x8000;
            for vector in 0..4u16 {
                let mut entry = [0; 16];
                let (address, rest) = entry.split_at_mut(8);
                msix.bar_read(1, 0x1000 + 16 * u64::from(vector), address, &sink);
                msix.bar_read(1, 0x1008 + 16 * u64::from(vector), rest, &sink);
                let entry = u128::from_le_bytes(entry);
                let message = MsiMessage { address: entry as u64, data: (entry >> 64) as u32 };
                let masked = (entry >> 96) as u32 & 1 != 0;
                prop_assert_eq!(sink.vectors[usize::from(vector)], (open && !masked).then_some(message));
            }
        }
    }
}
