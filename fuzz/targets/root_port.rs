//! A guest writes anything anywhere to a root port while cards come and go: no panic, no window that is none, and only the
//! host moves the card.
#![no_main]

use casemate_pci::{BRIDGE_WINDOW_BYTES, Function, MsiMessage, RootPort, VectorSink};
use libfuzzer_sys::fuzz_target;

struct Nobody;

impl VectorSink for Nobody {
    fn set(&mut self, _vector: u16, _message: Option<MsiMessage>) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

fuzz_target!(|accesses: &[u8]| {
    let Ok(mut port) = RootPort::new(1, Box::new(Nobody), Box::new(|| {})) else { return };
    let windows = [0xc000_0000..0xc010_0000, 0x10_0000_0000..0x10_1000_0000];
    let (Ok(()), mut card) = (port.place_windows(1, windows), false) else { return };
    for access in accesses.chunks_exact(8) {
        let [kind, low, high, length, data @ ..] = access else { return };
        let offset = u16::from_le_bytes([*low, *high]);
        let mut data = [data, data].concat();
        data.truncate(1 + usize::from(*length % 8));
        match *kind % 8 {
            0 => {
                card = !card;
                port.set_card(card);
            }
            1 => port.press_button(),
            2 => port.bar_read(0, offset.into(), &mut data),
            3 => port.bar_write(0, offset.into(), &data),
            4 => port.config_read(offset % 4096, &mut data),
            5 => port.reset(),
            _ => port.config_write(offset % 4096, &data),
        }
        port.tell();
        assert_eq!(port.has_card(), card);
        let forwarding = port.forwarding();
        for window in forwarding.windows.iter().flatten() {
            assert!(window.start().is_multiple_of(BRIDGE_WINDOW_BYTES) && window.start() < window.end());
        }
        assert!(forwarding.buses.is_none_or(|buses| *buses.start() > 0 && buses.start() <= buses.end()));
    }
});
