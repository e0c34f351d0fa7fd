//! A watchdog that the guest finds by ACPI's watchdog action table (Microsoft's "Hardware Watchdog Timers Design
//! Specification"; Linux's side is `drivers/watchdog/wdat_wdt.c`): the table says by which reads and writes of which
//! ports it is started, stopped, told its time and kept quiet. So it needs no PCI function, and every kernel of Debian's,
//! cloud ones too, has its driver.

use std::time::{Duration, Instant};

use acpi_tables::{
    Aml, AmlSink,
    gas::{AccessSize, AddressSpace, GAS},
    sdt::Sdt,
};

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// First I/O port.
pub const WATCHDOG_PORT: u16 = 0x610;
/// Number of I/O ports, from [`WATCHDOG_PORT`].
pub const WATCHDOG_PORTS: u16 = 10;

/// The countdown that the guest sets, 32 bits; a write begins it anew.
const COUNTDOWN: u16 = 0;
/// What is left of it, 32 bits.
const LEFT: u16 = 4;
/// 1 while it runs; a write of 1 starts it, of 0 stops it.
const RUNNING: u16 = 8;
/// A write of 1 begins the countdown anew.
const KICK: u16 = 9;

/// One count.
const PERIOD: Duration = Duration::from_millis(100);
const COUNT_MIN: u32 = 10;
const COUNT_MAX: u32 = 36_000;
/// Before the guest has set one.
const COUNT_DEFAULT: u32 = 300;

/// The watchdog. It has no clock of its own: its owner tells the time and looks at [`Watchdog::deadline`].
#[derive(Debug)]
pub struct Watchdog {
    count: u32,
    deadline: Option<Instant>,
    /// Since when it stands still.
    held: Option<Instant>,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self { count: COUNT_DEFAULT, deadline: None, held: None }
    }
}

impl Watchdog {
    /// When the guest must have been heard of again; `None` while it is stopped or held.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| self.held.is_none())
    }

    /// Lets it stand still, or go on with what was left then.
    pub fn hold(&mut self, held: bool, now: Instant) {
        match (held, self.held) {
            (true, None) => self.held = Some(now),
            (false, Some(since)) => {
                let stood = now.saturating_duration_since(since);
                self.deadline = self.deadline.and_then(|deadline| deadline.checked_add(stood));
                self.held = None;
            }
            _ => {}
        }
    }

    /// Reads at `offset` from [`WATCHDOG_PORT`].
    pub fn read(&self, offset: u16, data: &mut [u8], now: Instant) {
        let value = match offset {
            COUNTDOWN => self.count,
            LEFT => self.left(now),
            RUNNING => self.deadline.is_some().into(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// Writes at `offset` from [`WATCHDOG_PORT`]. The countdown takes 32 bits, the other registers a byte.
    pub fn write(&mut self, offset: u16, data: &[u8], now: Instant) {
        match (offset, data) {
            (COUNTDOWN, &[a, b, c, d]) => {
                self.count = u32::from_le_bytes([a, b, c, d]).clamp(COUNT_MIN, COUNT_MAX);
                self.kick(now);
            }
            (RUNNING, [1]) if self.deadline.is_none() => self.begin(now),
            (RUNNING, [0]) => self.deadline = None,
            (KICK, [1]) => self.kick(now),
            _ => {}
        }
    }

    fn kick(&mut self, now: Instant) {
        if self.deadline.is_some() {
            self.begin(now);
        }
    }

    fn begin(&mut self, now: Instant) {
        self.deadline = now.checked_add(PERIOD * self.count);
    }

    fn left(&self, now: Instant) -> u32 {
        let left = self.deadline.map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(now));
        u32::try_from(left.as_millis() / PERIOD.as_millis()).unwrap_or(u32::MAX)
    }
}

/// What the guest's driver wants done.
#[derive(Clone, Copy)]
enum Action {
    Reset = 1,
    GetCurrentCountdown = 4,
    GetCountdown = 5,
    SetCountdown = 6,
    GetRunning = 8,
    SetRunning = 9,
    GetStopped = 10,
    SetStopped = 11,
}

/// How it is done.
#[derive(Clone, Copy)]
enum Instruction {
    ReadValue = 0,
    ReadCountdown = 1,
    WriteValue = 2,
    WriteCountdown = 3,
}

/// The watchdog action table.
pub(crate) fn table() -> Sdt {
    use Action::*;
    use Instruction::*;
    let count = |register| (register, 32, AccessSize::DwordAccess, u32::MAX);
    let flag = |register| (register, 8, AccessSize::ByteAccess, 1);
    let entries = [
        (Reset, WriteValue, flag(KICK), 1),
        (GetCurrentCountdown, ReadCountdown, count(LEFT), 0),
        (GetCountdown, ReadCountdown, count(COUNTDOWN), 0),
        (SetCountdown, WriteCountdown, count(COUNTDOWN), 0),
        (GetRunning, ReadValue, flag(RUNNING), 1),
        (SetRunning, WriteValue, flag(RUNNING), 1),
        (GetStopped, ReadValue, flag(RUNNING), 0),
        (SetStopped, WriteValue, flag(RUNNING), 0),
    ];
    const HEADER_SIZE_BYTES: u32 = 32;
    /// PCI segment, bus, device and function of a watchdog that is none of PCI's.
    const NO_PCI: [u8; 8] = [0xFF, 0, 0xFF, 0xFF, 0xFF, 0, 0, 0];
    const ENABLED: u32 = 1;
    let mut table = Sdt::new(*b"WDAT", 36, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&HEADER_SIZE_BYTES.to_le_bytes());
    table.append_slice(&NO_PCI);
    let period = u32::try_from(PERIOD.as_millis()).unwrap_or(u32::MAX);
    for word in [period, COUNT_MAX, COUNT_MIN, ENABLED, entries.len() as u32] {
        table.append_slice(&word.to_le_bytes());
    }
    for (action, instruction, (register, bits, access, mask), value) in entries {
        table.append_slice(&[action as u8, instruction as u8, 0, 0]);
        let mut region = Bytes(Vec::new());
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(WATCHDOG_PORT + register))
            .to_aml_bytes(&mut region);
        table.append_slice(&region.0);
        table.append_slice(&u32::to_le_bytes(value));
        table.append_slice(&u32::to_le_bytes(mask));
    }
    table
}

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_counts_down_while_it_runs_and_is_not_kicked() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watchdog = Watchdog::default();
        let read = |watchdog: &Watchdog, offset, ms| {
            let mut data = [0xEE; 4];
            watchdog.read(offset, &mut data, at(ms));
            u32::from_le_bytes(data)
        };
        // Setting its time or kicking it starts nothing.
        watchdog.write(COUNTDOWN, &20u32.to_le_bytes(), start);
        watchdog.write(KICK, &[1], start);
        assert_eq!((watchdog.deadline(), read(&watchdog, LEFT, 0)), (None, 0));
        watchdog.write(RUNNING, &[1], start);
        assert_eq!((read(&watchdog, RUNNING, 0), read(&watchdog, LEFT, 500)), (1, 15));
        // A second start is no kick.
        watchdog.write(RUNNING, &[1], at(500));
        assert_eq!(watchdog.deadline(), Some(at(2000)));
        watchdog.write(KICK, &[1], at(500));
        assert_eq!(watchdog.deadline(), Some(at(2500)));
        watchdog.write(COUNTDOWN, &0u32.to_le_bytes(), at(600));
        assert_eq!((watchdog.deadline(), read(&watchdog, COUNTDOWN, 0)), (Some(at(1600)), COUNT_MIN));
        assert_eq!(read(&watchdog, LEFT, 9000), 0);
        watchdog.write(RUNNING, &[0], at(700));
        assert_eq!(watchdog.deadline(), None);
    }

    #[test]
    fn while_it_is_held_no_time_passes() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watchdog = Watchdog::default();
        watchdog.write(COUNTDOWN, &20u32.to_le_bytes(), start);
        watchdog.write(RUNNING, &[1], start);
        watchdog.hold(true, at(500));
        watchdog.hold(true, at(900));
        assert_eq!(watchdog.deadline(), None);
        watchdog.hold(false, at(10_500));
        watchdog.hold(false, at(11_000));
        assert_eq!(watchdog.deadline(), Some(at(12_000)));
    }

    proptest! {
        #[test]
        fn whatever_is_written_it_stays_within_its_bounds(
            writes in proptest::collection::vec((0u16..WATCHDOG_PORTS, proptest::collection::vec(any::<u8>(), 0..6)), 0..20),
        ) {
            let now = Instant::now();
            let mut watchdog = Watchdog::default();
            for (offset, data) in writes {
                watchdog.write(offset, &data, now);
                let mut read = data.clone();
                watchdog.read(offset, &mut read, now);
                let most = now + PERIOD * COUNT_MAX;
                prop_assert!(watchdog.deadline().is_none_or(|deadline| deadline > now && deadline <= most));
            }
        }
    }
}
