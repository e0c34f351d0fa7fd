//! The clock chip of a PC, as the data sheet of Motorola's MC146818 has it and Linux's `drivers/rtc/rtc-cmos.c` reads it: time of day and
//! date, in BCD and with 24 hours, and memory for as long as the machine lives.
//!
//! It interrupts nobody: there is no sleep that an alarm could end, and the guest's processors have timers. So interrupts and format,
//! which a real chip lets be chosen, can't be: their bits read as they are, whatever is written, and the device that ACPI tells of has
//! no interrupt.

use std::time::Duration;

/// First I/O port, which chooses a register; the second is that register.
pub const RTC_PORT: u16 = 0x70;
/// Number of I/O ports, from [`RTC_PORT`].
pub const RTC_PORTS: u16 = 2;
/// The register of the century, which the FADT tells.
pub(crate) const CENTURY: u8 = 0x32;

const REGISTER_A: u8 = 0xa;
const REGISTER_B: u8 = 0xb;
const REGISTER_C: u8 = 0xc;
const REGISTER_D: u8 = 0xd;
/// Those that hold the time: seconds, minutes, hours, day, month, year, century.
const TIME: [u8; 7] = [0, 2, 4, 7, 8, 9, CENTURY];
/// 1 is Sunday. Nobody sets it: it follows from the date.
const DAY_OF_WEEK: u8 = 6;
/// Register A: the time is about to change.
const UPDATING: u8 = 1 << 7;
/// Register A: what the divider of the crystal's 32,768 Hz does.
const DIVIDER: u8 = 0b111 << 4;
const DIVIDER_RUNS: u8 = 0b010 << 4;
/// With either third bit.
const DIVIDER_IN_RESET: u8 = 0b110 << 4;
/// Register B: the time stands while it's set.
const SET: u8 = 1 << 7;
const HOURS_24: u8 = 1 << 1;
/// Register D.
const VALID: u8 = 1 << 7;
/// One who finds [`UPDATING`] clear can read for so long before the time changes.
const UNDISTURBED: Duration = Duration::from_micros(244);
/// From the divider's start to the next second.
const FIRST_SECOND: Duration = Duration::from_millis(500);
const SECOND_NS: i128 = 1_000_000_000;
const DAY_SECONDS: i64 = 86_400;
/// Since 1970, the first second of the year 0 and the last of 9999: the registers tell no others.
const SECONDS: std::ops::RangeInclusive<i64> = -62_167_219_200..=253_402_300_799;

/// The clock chip. It has no clock of its own: its owner tells the time, UTC since 1970.
#[derive(Debug)]
pub struct Rtc {
    /// Which register is chosen.
    index: u8,
    /// All that the chip only keeps.
    memory: [u8; 128],
    register_a: u8,
    is_being_set: bool,
    /// How far it's ahead of its owner's time.
    ahead_ns: i128,
    standing: Option<Standing>,
}

/// The time while it stands.
#[derive(Clone, Copy, Debug)]
struct Standing {
    /// As [`TIME`] has them.
    registers: [u8; 7],
    /// Which part of its second has passed.
    passed: Duration,
}

impl Default for Rtc {
    fn default() -> Self {
        let register_a = DIVIDER_RUNS;
        Self { index: 0, memory: [0; 128], register_a, is_being_set: false, ahead_ns: 0, standing: None }
    }
}

impl Rtc {
    /// Reads at `offset` from [`RTC_PORT`].
    pub fn read(&self, offset: u16, data: &mut [u8], now: Duration) {
        for (port, byte) in (usize::from(offset)..).zip(data) {
            *byte = if port == 1 { self.register(now) } else { 0xff };
        }
    }

    /// Writes at `offset` from [`RTC_PORT`].
    pub fn write(&mut self, offset: u16, data: &[u8], now: Duration) {
        for (port, byte) in (usize::from(offset)..).zip(data) {
            match port {
                // The uppermost bit is not the chip's.
                0 => self.index = byte & 0x7f,
                1 => self.set_register(*byte, now),
                _ => {}
            }
        }
    }

    fn register(&self, now: Duration) -> u8 {
        match self.index {
            REGISTER_A => self.register_a | if self.is_updating(now) { UPDATING } else { 0 },
            REGISTER_B => HOURS_24 | if self.is_being_set { SET } else { 0 },
            REGISTER_C => 0,
            REGISTER_D => VALID,
            DAY_OF_WEEK => seconds(&self.time(now).registers).map_or(0, day_of_week),
            index => match TIME.iter().position(|register| *register == index) {
                Some(place) => self.time(now).registers.get(place).copied().unwrap_or_default(),
                None => self.memory.get(usize::from(index)).copied().unwrap_or_default(),
            },
        }
    }

    fn set_register(&mut self, value: u8, now: Duration) {
        match self.index {
            REGISTER_A => {
                self.register_a = value & !UPDATING;
                if self.divider_is_in_reset() {
                    self.stop(now).passed = FIRST_SECOND;
                }
                self.go_on(now);
            }
            REGISTER_B => {
                self.is_being_set = value & SET != 0;
                if self.is_being_set {
                    self.stop(now);
                }
                self.go_on(now);
            }
            REGISTER_C | REGISTER_D | DAY_OF_WEEK => {}
            index => {
                if let Some(place) = TIME.iter().position(|register| *register == index) {
                    if let Some(register) = self.stop(now).registers.get_mut(place) {
                        *register = value;
                    }
                    self.go_on(now);
                } else if let Some(byte) = self.memory.get_mut(usize::from(index)) {
                    *byte = value;
                }
            }
        }
    }

    fn divider_is_in_reset(&self) -> bool {
        self.register_a & DIVIDER & DIVIDER_IN_RESET == DIVIDER_IN_RESET
    }

    fn is_updating(&self, now: Duration) -> bool {
        self.standing.is_none() && Duration::from_secs(1) - self.time(now).passed <= UNDISTURBED
    }

    /// The time that stands, or that it is now.
    fn time(&self, now: Duration) -> Standing {
        self.standing.unwrap_or_else(|| {
            let time_ns = i128::try_from(now.as_nanos()).unwrap_or(i128::MAX).saturating_add(self.ahead_ns);
            let since_1970 = i64::try_from(time_ns.div_euclid(SECOND_NS)).unwrap_or(i64::MAX);
            let passed_ns = u64::try_from(time_ns.rem_euclid(SECOND_NS)).unwrap_or_default();
            let registers = registers(since_1970.clamp(*SECONDS.start(), *SECONDS.end()));
            Standing { registers, passed: Duration::from_nanos(passed_ns) }
        })
    }

    fn stop(&mut self, now: Duration) -> &mut Standing {
        let time = self.time(now);
        self.standing.insert(time)
    }

    /// Lets the time go on from what its registers hold, if nothing keeps it. What they hold may be no time: then it was as if not set.
    fn go_on(&mut self, now: Duration) {
        if self.is_being_set || self.divider_is_in_reset() {
            return;
        }
        let Some(standing) = self.standing.take() else { return };
        let passed_ns = i128::try_from(standing.passed.as_nanos()).unwrap_or_default();
        let time_ns = seconds(&standing.registers).map(|seconds| i128::from(seconds) * SECOND_NS + passed_ns);
        if let Some((time_ns, now_ns)) = time_ns.zip(i128::try_from(now.as_nanos()).ok()) {
            self.ahead_ns = time_ns - now_ns;
        }
    }
}

/// The registers at so many seconds since 1970, which lie within [`SECONDS`]. The date is by H. Hinnant's "chrono-compatible low-level
/// date algorithms": years begin in March, and eras of 400 of them with one that 400 divides.
fn registers(since_1970: i64) -> [u8; 7] {
    let (days, second) = (since_1970.div_euclid(DAY_SECONDS), since_1970.rem_euclid(DAY_SECONDS));
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    [second % 60, second / 60 % 60, second / 3_600, day, month, year % 100, year / 100].map(bcd)
}

/// Back again; none when they hold no time.
fn seconds(registers: &[u8; 7]) -> Option<i64> {
    let [second, minute, hour, day, month, year, century] = registers.map(binary);
    let (second, minute, hour, day, month) = (second?, minute?, hour?, day?, month?);
    let year = century? * 100 + year?;
    let is_time = second < 60 && minute < 60 && hour < 24 && (1..=12).contains(&month);
    if !is_time || !(1..=days_in(month, year)).contains(&day) {
        return None;
    }
    let from_march = if month > 2 { month - 3 } else { month + 9 };
    let year = year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * from_march + 2) / 5 + day - 1;
    let day_of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    Some(days * DAY_SECONDS + hour * 3_600 + minute * 60 + second)
}

fn days_in(month: i64, year: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// From 1, a Sunday. 1970 began with a Thursday.
fn day_of_week(since_1970: i64) -> u8 {
    u8::try_from((since_1970.div_euclid(DAY_SECONDS) + 4).rem_euclid(7) + 1).unwrap_or_default()
}

/// A number below 100, as two decimal digits.
fn bcd(number: i64) -> u8 {
    u8::try_from(number / 10 * 16 + number % 10).unwrap_or_default()
}

fn binary(bcd: u8) -> Option<i64> {
    let (tens, ones) = (bcd >> 4, bcd & 0xf);
    (tens < 10 && ones < 10).then(|| i64::from(tens * 10 + ones))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-02-28 23:59:58.25, a Saturday.
    const EVENING: Duration = Duration::from_millis(1_772_323_198_250);

    fn read(rtc: &mut Rtc, register: u8, now: Duration) -> u8 {
        rtc.write(0, &[register], now);
        let mut data = [0];
        rtc.read(1, &mut data, now);
        data[0]
    }

    fn write(rtc: &mut Rtc, register: u8, value: u8, now: Duration) {
        rtc.write(0, &[register], now);
        rtc.write(1, &[value], now);
    }

    fn time(rtc: &mut Rtc, now: Duration) -> [u8; 8] {
        [CENTURY, 9, 8, 7, 4, 2, 0, DAY_OF_WEEK].map(|register| read(rtc, register, now))
    }

    #[test]
    fn it_tells_its_owners_time() {
        let mut rtc = Rtc::default();
        assert_eq!(time(&mut rtc, EVENING), [0x20, 0x26, 2, 0x28, 0x23, 0x59, 0x58, 7]);
        assert_eq!(time(&mut rtc, EVENING + Duration::from_secs(2)), [0x20, 0x26, 3, 1, 0, 0, 0, 1]);
        let epoch = Duration::ZERO;
        assert_eq!(time(&mut rtc, epoch), [0x19, 0x70, 1, 1, 0, 0, 0, 5]);
        assert_eq!((read(&mut rtc, REGISTER_B, epoch), read(&mut rtc, REGISTER_D, epoch)), (HOURS_24, VALID));
    }

    #[test]
    fn one_who_may_read_reads_undisturbed() {
        let mut rtc = Rtc::default();
        let second = Duration::from_secs(100);
        let before = second - UNDISTURBED;
        assert_eq!(read(&mut rtc, REGISTER_A, before) & UPDATING, UPDATING);
        assert_eq!(read(&mut rtc, REGISTER_A, before - Duration::from_nanos(1)) & UPDATING, 0);
        assert_eq!(read(&mut rtc, REGISTER_A, second) & UPDATING, 0);
    }

    /// As Linux does it (`drivers/rtc/rtc-mc146818-lib.c`): with the divider in reset, so that the next second comes half a second later.
    #[test]
    fn it_goes_on_from_what_it_was_set_to() {
        let mut rtc = Rtc::default();
        write(&mut rtc, REGISTER_B, SET | HOURS_24, EVENING);
        write(&mut rtc, REGISTER_A, DIVIDER_RUNS | 0x70, EVENING);
        for (register, value) in
            [(0, 0x30), (2, 0x15), (4, 0x12), (7, 0x29), (8, 2), (9, 0x28), (CENTURY, 0x20)]
        {
            write(&mut rtc, register, value, EVENING);
        }
        let later = EVENING + Duration::from_secs(5);
        assert_eq!(time(&mut rtc, later)[6], 0x30, "it stands");
        write(&mut rtc, REGISTER_B, HOURS_24, later);
        assert_eq!(time(&mut rtc, later)[6], 0x30, "the divider is in reset");
        write(&mut rtc, REGISTER_A, DIVIDER_RUNS, later);
        assert_eq!(
            time(&mut rtc, later + Duration::from_millis(499)),
            [0x20, 0x28, 2, 0x29, 0x12, 0x15, 0x30, 3]
        );
        assert_eq!(time(&mut rtc, later + Duration::from_millis(500))[6], 0x31);
    }

    #[test]
    fn a_register_that_is_written_while_it_runs_leaves_the_others() {
        let mut rtc = Rtc::default();
        write(&mut rtc, 4, 0x11, EVENING);
        assert_eq!(
            time(&mut rtc, EVENING + Duration::from_millis(750)),
            [0x20, 0x26, 2, 0x28, 0x11, 0x59, 0x59, 7]
        );
    }

    #[test]
    fn what_is_no_time_was_not_set() {
        for (register, value) in [(0, 0x60), (0, 0x0a), (4, 0x24), (7, 0x30), (7, 0), (8, 0x13), (9, 0xf0)] {
            let mut rtc = Rtc::default();
            write(&mut rtc, register, value, EVENING);
            assert_eq!(time(&mut rtc, EVENING), [0x20, 0x26, 2, 0x28, 0x23, 0x59, 0x58, 7]);
        }
    }

    #[test]
    fn the_rest_is_memory() {
        let mut rtc = Rtc::default();
        write(&mut rtc, 0x80 | 0x40, 0x55, EVENING);
        assert_eq!(read(&mut rtc, 0x40, EVENING), 0x55);
        write(&mut rtc, 1, 0x12, EVENING);
        assert_eq!(read(&mut rtc, 1, EVENING), 0x12, "an alarm that nobody waits for");
        let mut both = [0; 4];
        rtc.read(0, &mut both, EVENING);
        assert_eq!(both, [0xff, 0x12, 0xff, 0xff]);
    }

    proptest! {
        #[test]
        fn each_second_is_told_and_read_back(since_1970 in SECONDS) {
            prop_assert_eq!(seconds(&registers(since_1970)), Some(since_1970));
        }

        #[test]
        fn dates_follow_each_other(day in -719_528i64..2_932_895) {
            let date = |day: i64| {
                let [.., day_of_month, month, year, century] = registers(day * DAY_SECONDS).map(|bcd| binary(bcd).unwrap());
                (century * 100 + year, month, day_of_month)
            };
            let (year, month, today) = date(day);
            let tomorrow = if today < days_in(month, year) {
                (year, month, today + 1)
            } else if month < 12 {
                (year, month + 1, 1)
            } else {
                (year + 1, 1, 1)
            };
            prop_assert_eq!(date(day + 1), tomorrow);
        }

        #[test]
        fn whatever_a_guest_does_it_tells_some_time(steps in proptest::collection::vec((0u16..4, any::<[u8; 2]>(), 0u64..u64::MAX), 0..64)) {
            let mut rtc = Rtc::default();
            for (offset, mut data, now) in steps {
                let now = Duration::from_nanos(now);
                rtc.write(offset, &data, now);
                rtc.read(offset, &mut data, now);
            }
            rtc.write(0, &[REGISTER_A, DIVIDER_RUNS], EVENING);
            rtc.write(0, &[REGISTER_B, HOURS_24], EVENING);
            let time = rtc.time(EVENING);
            prop_assert!(rtc.standing.is_none() && seconds(&time.registers).is_some());
        }
    }
}
