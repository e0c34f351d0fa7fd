//! A guest writes anything to the IOAPIC while lines rise and fall: no panic, no more messages in one step than there are
//! pins, and none that goes anywhere but to local APICs.
#![no_main]

use casemate_chipset::{IOAPIC_PINS, IoApic, Msi, MsiSink};
use libfuzzer_sys::fuzz_target;

#[derive(Default)]
struct Sent(Vec<Msi>);

impl MsiSink for Sent {
    fn send(&mut self, msi: Msi) {
        self.0.push(msi);
    }
}

fuzz_target!(|steps: &[u8]| {
    let mut ioapic = IoApic::new(Sent::default());
    for step in steps.chunks_exact(8) {
        let [kind, what, length, data @ ..] = step else { return };
        let mut data = [data, data].concat();
        data.truncate(usize::from(*length % 9));
        // The three registers far more often than the rest of the window.
        let offset = [0, 0x10, 0x40, u64::from(*what) << 4][usize::from(*what % 4)];
        let ended = match kind % 6 {
            0 | 1 => ioapic.write(offset, &data),
            2 => {
                ioapic.set_level(*what, length & 1 == 1);
                0
            }
            3 => {
                ioapic.raise_until_eoi(*what);
                0
            }
            4 => ioapic.eoi(*what),
            _ => {
                ioapic.read(offset, &mut data);
                0
            }
        };
        assert_eq!(ended >> IOAPIC_PINS, 0);
        let sent = std::mem::take(&mut ioapic.sink_mut().0);
        assert!(sent.len() <= IOAPIC_PINS.into());
        assert!(sent.iter().all(|msi| msi.address >> 20 == 0xfee));
    }
});
