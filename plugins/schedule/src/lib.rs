//! Policy `schedule`: when guests may start. Only by the time that comes with the question; the plugin has no clock.

use casemate_plugin_sdk::{Operation, Policy, Reason, Request, Verdict, export_policy, verdict};
use serde::{Deserialize, Deserializer, de::Error};

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// Minutes by which local time is ahead of UTC; the same all year.
    utc_offset_minutes: i32,
    /// Guests start only within one of these; without any, always.
    open: Vec<Window>,
    /// Nothing starts within one of these, whatever is open: maintenance.
    closed: Vec<Window>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Window {
    /// Days on which it begins; all when left out.
    #[serde(default = "Day::all")]
    days: Vec<Day>,
    from: Minute,
    /// Before `from`: on the next day.
    to: Minute,
    /// Only for these tenants; all when left out.
    tenants: Option<Vec<String>>,
}

/// In the order of 1970-01-01, a Thursday.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Day {
    Thu,
    Fri,
    Sat,
    Sun,
    Mon,
    Tue,
    Wed,
}

impl Day {
    const ALL: [Self; 7] = [Self::Thu, Self::Fri, Self::Sat, Self::Sun, Self::Mon, Self::Tue, Self::Wed];

    fn all() -> Vec<Self> {
        Self::ALL.to_vec()
    }

    /// The day that many days after 1970-01-01.
    fn after(days: i64) -> Self {
        Self::ALL[usize::try_from(days.rem_euclid(7)).unwrap_or(0)]
    }
}

/// Minutes since midnight, written `08:30`; `24:00` is the day's end.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
struct Minute(i64);

impl Minute {
    fn parse(text: &str) -> Option<Self> {
        let (hours, minutes) = text.split_once(':')?;
        let number = |text: &str| {
            let good = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
            good.then(|| text.parse::<i64>().ok()).flatten()
        };
        let (hours, minutes) = (number(hours)?, number(minutes)?);
        let all = hours * 60 + minutes;
        (minutes < 60 && all <= 24 * 60).then_some(Self(all))
    }
}

impl<'de> Deserialize<'de> for Minute {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is not a time; write it as \"08:30\"")))
    }
}

impl Window {
    fn is_for(&self, tenant: &str) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.iter().any(|name| name == tenant))
    }

    fn holds(&self, day: i64, minute: Minute) -> bool {
        let begins = |day| self.days.contains(&Day::after(day));
        if self.from < self.to {
            return begins(day) && self.from <= minute && minute < self.to;
        }
        (begins(day) && self.from <= minute) || (begins(day - 1) && minute < self.to)
    }
}

struct Schedule;

impl Policy for Schedule {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = env!("CARGO_PKG_DESCRIPTION");
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const SETTINGS_SCHEMA: Option<&'static str> = Some(include_str!("settings.schema.json"));
    const REASONS: &'static [&'static str] = &["not-open", "closed"];

    type Settings = Settings;

    fn check(settings: &Settings) -> Result<(), Vec<Reason>> {
        if (-14 * 60..=14 * 60).contains(&settings.utc_offset_minutes) {
            return Ok(());
        }
        let message = format!("{} minutes from UTC are nowhere", settings.utc_offset_minutes);
        Err(vec![
            Reason::new("no-offset", message).field("settings.utc_offset_minutes").remedy("give -840 to 840"),
        ])
    }

    fn admit(settings: Settings, request: Request) -> Verdict {
        // A guest that runs may be changed, and plugged, at any time.
        if matches!(request.operation, Operation::Update | Operation::HotPlug) {
            return verdict(Vec::new(), Vec::new());
        }
        let minutes = i64::try_from(request.now_seconds / 60).unwrap_or(i64::MAX / 2)
            + i64::from(settings.utc_offset_minutes);
        let (day, minute) = (minutes.div_euclid(1440), Minute(minutes.rem_euclid(1440)));
        let tenant = request.tenant.name.as_str();
        let open: Vec<_> = settings.open.iter().filter(|window| window.is_for(tenant)).collect();
        let now = format!("{:02}:{:02}", minute.0 / 60, minute.0 % 60);
        let mut reasons = Vec::new();
        if !settings.open.is_empty() && !open.iter().any(|window| window.holds(day, minute)) {
            let message = format!("it is {now}, and tenant {tenant} starts no guests then");
            reasons.push(Reason::new("not-open", message).remedy("wait until a window opens"));
        }
        if settings.closed.iter().any(|window| window.is_for(tenant) && window.holds(day, minute)) {
            let message = format!("it is {now}, and the host is kept free for maintenance");
            reasons.push(Reason::new("closed", message).remedy("wait until it is over"));
        }
        verdict(reasons, Vec::new())
    }
}

export_policy!(Schedule);

#[cfg(test)]
mod tests {
    use casemate_plugin_sdk::{Denied, testing::request};

    use super::*;

    /// 2026-11-24 00:00:00 UTC, a Tuesday.
    const TUESDAY: u64 = 1_795_478_400;

    fn codes_of(json: &str, seconds: u64, operation: Operation) -> Vec<String> {
        let mut request = request();
        request.now_seconds = seconds;
        request.operation = operation;
        match Schedule::admit(serde_json::from_str(json).unwrap(), request) {
            Verdict::Allow(_) => vec![],
            Verdict::Deny(Denied { reasons, .. }) => reasons.into_iter().map(|r| r.code).collect(),
        }
    }

    fn at(json: &str, hour: u64, minute: u64) -> Vec<String> {
        codes_of(json, TUESDAY + hour * 3600 + minute * 60, Operation::Create)
    }

    #[test]
    fn a_window_is_open_from_its_first_minute_to_before_its_last() {
        let json = r#"{"open": [{"days": ["tue"], "from": "08:00", "to": "18:00"}]}"#;
        assert_eq!(at(json, 7, 59), ["not-open"]);
        assert_eq!(at(json, 8, 0), [""; 0]);
        assert_eq!(at(json, 17, 59), [""; 0]);
        assert_eq!(at(json, 18, 0), ["not-open"]);
        assert_eq!(at(json, 24 + 9, 0), ["not-open"], "Wednesday");
        assert_eq!(at("{}", 3, 0), [""; 0]);
    }

    #[test]
    fn a_window_may_go_past_midnight() {
        let json = r#"{"closed": [{"days": ["tue"], "from": "22:00", "to": "02:00"}]}"#;
        for (hour, closed) in [(1, false), (21, false), (22, true), (25, true), (26, false), (46, false)] {
            assert_eq!(!at(json, hour, 0).is_empty(), closed, "{hour}");
        }
        let always = r#"{"closed": [{"from": "00:00", "to": "24:00"}]}"#;
        assert_eq!(at(always, 23, 59), ["closed"]);
    }

    #[test]
    fn local_time_moves_the_day_too() {
        let json =
            r#"{"utc_offset_minutes": 120, "open": [{"days": ["wed"], "from": "00:00", "to": "01:00"}]}"#;
        assert_eq!(at(json, 22, 30), [""; 0]);
        assert_eq!(at(json, 23, 0), ["not-open"]);
        let early =
            r#"{"utc_offset_minutes": -60, "open": [{"days": ["wed"], "from": "23:00", "to": "24:00"}]}"#;
        assert_eq!(codes_of(early, 0, Operation::Create), [""; 0], "before 1970");
    }

    #[test]
    fn windows_of_others_open_nothing_and_a_running_guest_is_left_alone() {
        let json = r#"{"open": [{"from": "00:00", "to": "24:00", "tenants": ["rival"]}]}"#;
        assert_eq!(at(json, 9, 0), ["not-open"]);
        assert_eq!(codes_of(json, TUESDAY, Operation::HotPlug), [""; 0]);
        assert_eq!(codes_of(json, u64::MAX, Operation::Create), ["not-open"]);
    }

    #[test]
    fn refuses_times_that_are_none() {
        for text in ["8:00", "24:01", "12:60", "12", "ab:cd", "+8:00", ""] {
            assert!(Minute::parse(text).is_none(), "{text}");
        }
        assert!(Schedule::check(&Settings { utc_offset_minutes: 900, ..Settings::default() }).is_err());
    }
}
