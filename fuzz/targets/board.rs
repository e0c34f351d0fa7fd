//! A guest does anything to the small devices of the board (serial port, power control, panic notifier, watchdog, clock chip): no panic,
//! no more output than it wrote, and a watchdog whose time is never later than it may be.
#![no_main]

use std::time::{Duration, Instant};

use casemate_chipset::{Power, Rtc, Serial, Watchdog, panic_read, panic_write};
use libfuzzer_sys::fuzz_target;

/// More than the longest countdown.
const WATCHDOG_MOST: Duration = Duration::from_secs(1 << 17);

fuzz_target!(|steps: &[u8]| {
    let (mut serial, mut power, mut watchdog) =
        (Serial::new(std::io::sink(), || {}), Power, Watchdog::default());
    let mut now = Instant::now();
    let (mut rtc, mut since_1970) = (Rtc::default(), Duration::ZERO);
    for step in steps.chunks_exact(8) {
        let [kind, offset, length, data @ ..] = step else { return };
        let mut data = [data, data].concat();
        data.truncate(usize::from(*length % 9));
        let offset = u16::from(*offset);
        match kind % 12 {
            0 | 1 => serial.write(offset, &data),
            2 => serial.read(offset, &mut data),
            3 => assert!(serial.enqueue(&data) <= data.len()),
            4 => drop(power.write(offset, &data)),
            5 => power.read(offset, &mut data),
            6 => watchdog.write(offset, &data, now),
            7 => watchdog.read(offset, &mut data, now),
            8 => {
                now += Duration::from_millis(u64::from(offset) << (length % 16));
                watchdog.hold(length & 16 != 0, now);
                since_1970 += Duration::from_micros(u64::from(offset) << (length % 48));
            }
            9 => rtc.write(offset % 4, &data, since_1970),
            10 => rtc.read(offset % 4, &mut data, since_1970),
            _ => {
                panic_write(&data);
                panic_read(&mut data);
            }
        }
        let left = watchdog.deadline().map(|deadline| deadline.saturating_duration_since(now));
        assert!(left.is_none_or(|left| left <= WATCHDOG_MOST), "{left:?}");
    }
});
