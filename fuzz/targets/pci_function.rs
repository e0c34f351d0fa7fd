//! A guest writes anything anywhere to a function with MSI-X: no panic, no BAR that it was not given, and the sink is
//! told of changes only.
#![no_main]

use casemate_pci::{
    BarKind, BarOffset, BarRequest, Config, Identity, MsiMessage, Msix, MsixLayout, VectorSink,
};
use libfuzzer_sys::fuzz_target;

const VECTORS: u16 = 8;
const BAR_BYTES: u64 = 0x4000;

#[derive(Default)]
struct Sink([Option<MsiMessage>; VECTORS as usize]);

impl VectorSink for Sink {
    fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
        let slot = &mut self.0[usize::from(vector)];
        assert_ne!(*slot, message, "told of no change");
        *slot = message;
    }
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

fuzz_target!(|accesses: &[u8]| {
    let mut config = Config::new(Identity::default());
    let bar = BarRequest { index: 0, size: BAR_BYTES, kind: BarKind::Memory64, prefetchable: false };
    let place = |offset| BarOffset { bar: 0, offset };
    let layout = MsixLayout { vectors: VECTORS, table: place(0), pba: place(0x1000), capability_at: None };
    let (Ok(()), mut sink) = (config.add_bar(bar), Sink::default()) else { return };
    let Ok(mut msix) = Msix::add(&mut config, layout) else { return };
    for access in accesses.chunks_exact(8) {
        let [kind, low, high, length, data @ ..] = access else { return };
        let offset = u16::from_le_bytes([*low, *high]);
        let mut data = [data, data].concat();
        data.truncate(1 + usize::from(*length % 8));
        match *kind % 4 {
            0 => config.read(offset % 4096, &mut data),
            1 => {
                config.write(offset % 4096, &data);
                let _ = msix.config_written(&config, &mut sink);
            }
            2 => _ = msix.bar_read(0, u64::from(offset), &mut data, &sink),
            _ => _ = msix.bar_write(0, u64::from(offset), &data, &mut sink),
        }
        for bar in config.decoded().iter() {
            assert!(
                bar.index == 0
                    && bar.size == BAR_BYTES
                    && bar.base.is_multiple_of(BAR_BYTES)
                    && bar.base != 0
            );
        }
    }
});
