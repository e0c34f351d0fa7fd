//! A governor that does as its settings say, for the tests of the host.

use casemate_plugin_sdk::{Action, Deed, Governor, Rate, Reason, Samples, act, export_governor};
use serde::Deserialize;

struct Steward;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    how: How,
    /// Of what is done.
    #[serde(default)]
    to: u64,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    Nothing,
    CpuWeight,
    CpuLimit,
    Balloon,
    DiskLimit,
    NetLimit,
    Pause,
    Resume,
    Stop,
    Alert,
    /// An alert that tells how often it was called.
    Count,
    /// As many bytes of state as `to` says.
    Hoard,
    /// As many actions as `to` says.
    Flood,
    BadCode,
    Trap,
    Spin,
}

impl Governor for Steward {
    const NAME: &'static str = env!("CARGO_PKG_NAME");
    const SUMMARY: &'static str = "Does as its settings say.";
    const VERSION: &'static str = env!("CARGO_PKG_VERSION");
    const REASONS: &'static [&'static str] = &["told"];
    const DEEDS: &'static [&'static str] =
        &["cpu-weight", "cpu-limit", "balloon", "disk-limit", "net-limit", "pause", "resume", "stop"];

    type Settings = Settings;
    type State = (u64, String);

    fn tick(settings: Settings, samples: Samples, state: &mut Self::State) -> Vec<Action> {
        state.0 += 1;
        let small = u32::try_from(settings.to).unwrap_or(u32::MAX);
        let rate = Rate { bytes_a_second: Some(settings.to), requests_a_second: None };
        let deed = match settings.how {
            How::Nothing => return Vec::new(),
            How::CpuWeight => Deed::CpuWeight(small),
            How::CpuLimit => Deed::CpuLimit((small > 0).then_some(small)),
            How::Balloon => Deed::Balloon(settings.to),
            How::DiskLimit => Deed::DiskLimit(rate),
            How::NetLimit => Deed::NetLimit(rate),
            How::Pause => Deed::Pause,
            How::Resume => Deed::Resume,
            How::Stop => Deed::Stop,
            How::Alert | How::Count | How::Flood | How::BadCode => Deed::Alert,
            How::Hoard => {
                state.1 = "x".repeat(usize::try_from(settings.to).unwrap_or(0));
                return Vec::new();
            }
            How::Trap => std::process::abort(),
            How::Spin => loop {
                state.0 = std::hint::black_box(state.0.wrapping_add(1));
            },
        };
        let reason = |text: String| match settings.how {
            How::BadCode => Reason::new("Not A Code", text),
            _ => Reason::new("told", text),
        };
        if let How::Flood = settings.how {
            let guest = &samples.guests[0];
            return (0..settings.to).map(|_| act(guest, Deed::Alert, reason(String::new()))).collect();
        }
        let text = match settings.how {
            How::Count => format!("call {}", state.0),
            _ => "its settings say so".to_owned(),
        };
        samples.guests.iter().map(|guest| act(guest, deed, reason(text.clone()))).collect()
    }
}

export_governor!(Steward);
