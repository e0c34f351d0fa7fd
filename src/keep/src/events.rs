//! The log of events: what happened to guests while they ran, and who wanted it. Beside the log of decisions, in a folder of its own.
//!
//! A file is put aside before a line would take it past 4 MiB, and the fourth older one is the last: 20 MiB at most. It's not synced
//! line by line: a crash may cost the last seconds.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::Path,
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use casemate_broker::{Journal, Log, hands};
use casemate_policy::Action;
use casemate_spec::Refusal;
use serde::{Deserialize, Serialize};

/// How often a reader that follows looks.
const LOOK: Duration = Duration::from_millis(200);

/// Something that happened. A later Casemate may add kinds and keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedEvent {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub time_ms: u64,
    /// The guest.
    pub guest: String,
    /// Whose it is.
    pub tenant: String,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Happening {
    /// Governors look after it from now on.
    Governed {
        /// How often, in milliseconds.
        interval_ms: u32,
        /// By their names in the bundle.
        plugins: Vec<String>,
    },
    /// What a governor wanted was done.
    Done {
        /// What it wanted.
        action: Action,
        /// What was done where that is not the same: it was held to its bounds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instead: Option<String>,
    },
    /// It was not done.
    NotDone {
        /// What it wanted.
        action: Action,
        /// Why not.
        because: String,
    },
    /// A governor wants somebody to know.
    Alert {
        /// What.
        action: Action,
    },
    /// Two governors want one thing of it to be two things; neither is done.
    Conflict {
        /// The one.
        one: Action,
        /// The other.
        other: Action,
    },
    /// A governor gave no answer; what was set last stays.
    PluginFailed {
        /// Its name in the bundle.
        plugin: String,
        /// The stable code.
        code: String,
        /// All of the message.
        message: String,
    },
    /// The bundle was read anew and decides from now on.
    BundleRead {
        /// SHA-256 of its text.
        sha256: String,
        /// The plugins, by name and digest.
        plugins: Vec<(String, String)>,
    },
    /// Policies had something to say about a device that it gave back.
    DeviceJudged {
        /// Where it sits.
        device: String,
        /// Why nobody gets it; empty when the host has it back.
        quarantine: Vec<String>,
        /// What an operator should know.
        warnings: Vec<String>,
    },
    /// The host wants a device back that it has, so it comes to its end in order; or lets the device go, where it came into a
    /// slot.
    DeviceWanted {
        /// Where it sits.
        device: String,
        /// The slot, from 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<u8>,
    },
    /// Somebody has reset the physical function of a virtual one that it has, so it comes to its end in order; or lets the device
    /// go, where it came into a slot.
    ParentReset {
        /// Where the virtual function sits.
        device: String,
        /// The slot, from 1.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<u8>,
    },
    /// Devices of the host's came into one of its slots.
    DevicesAttached {
        /// Where they sit on the host.
        devices: Vec<String>,
        /// The slot, from 1.
        slot: u8,
    },
    /// They were taken out, and this became of them.
    DevicesDetached {
        /// Where they sit on the host.
        devices: Vec<String>,
        /// The slot, from 1.
        slot: u8,
        /// Those that nobody gets, each with the reason.
        quarantined: Vec<String>,
    },
    /// A device asked for memory that the guest doesn't have, and the IOMMU stopped it. Of many such times the first, the second,
    /// the fourth and so on are told.
    DmaStopped {
        /// Where it sits.
        device: String,
        /// How often the kernel has told so by now; it leaves out most where there are many.
        count: u64,
    },
    /// A device reported an error that was not corrected: the guest is stopped, and the device goes into quarantine.
    DeviceFailed {
        /// Where it sits.
        device: String,
    },
    /// The bundle was read anew and is no good; the one before it goes on.
    BundleRefused {
        /// The stable code.
        code: String,
        /// All of the message.
        message: String,
    },
}

impl std::fmt::Display for Happening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of = |action: &Action| {
            format!("{} ({}/{}: {})", action.deed, action.why.plugin, action.why.code, action.why.message)
        };
        match self {
            Self::Governed { interval_ms, plugins } => {
                write!(f, "governed every {interval_ms} ms by {}", plugins.join(", "))
            }
            Self::Done { action, instead: None } => write!(f, "done: {}", of(action)),
            Self::Done { action, instead: Some(instead) } => {
                write!(f, "done: {instead}, instead of {}", of(action))
            }
            Self::NotDone { action, because } => write!(f, "not done, {because}: {}", of(action)),
            Self::Alert { action } => {
                write!(f, "ALERT {}/{}: {}", action.why.plugin, action.why.code, action.why.message)
            }
            Self::Conflict { one, other } => {
                write!(f, "not done, two want it otherwise: {}; {}", of(one), of(other))
            }
            Self::PluginFailed { plugin, message, .. } => write!(f, "{plugin} failed: {message}"),
            Self::BundleRead { plugins, .. } => {
                let names: Vec<_> = plugins.iter().map(|(name, _)| name.as_str()).collect();
                write!(f, "the bundle was read anew: {}", names.join(", "))
            }
            Self::DeviceJudged { device, quarantine, warnings } => {
                let what = if quarantine.is_empty() { "given back" } else { "put into quarantine" };
                let said: Vec<_> = quarantine.iter().chain(warnings).map(String::as_str).collect();
                write!(f, "{device} was {what}: {}", said.join("; "))
            }
            Self::DeviceWanted { device, slot: None } => {
                write!(f, "the host wants {device} back, and the guest is to end")
            }
            Self::DeviceWanted { device, slot: Some(slot) } => {
                write!(f, "the host wants {device} back, and the guest is to let it go from slot {slot}")
            }
            Self::ParentReset { device, slot } => {
                let goes = slot.map_or("end".to_owned(), |slot| format!("let it go from slot {slot}"));
                write!(f, "the card of {device} was reset, and the guest is to {goes}")
            }
            Self::DevicesAttached { devices, slot } => {
                write!(f, "{} came into slot {slot}", devices.join(", "))
            }
            Self::DevicesDetached { devices, slot, quarantined } => {
                write!(f, "{} came out of slot {slot}", devices.join(", "))?;
                quarantined.iter().try_for_each(|why| write!(f, "; in quarantine: {why}"))
            }
            Self::DmaStopped { device, count } => {
                write!(f, "{device} asked for memory that isn't the guest's, and was stopped ({count} times)")
            }
            Self::DeviceFailed { device } => {
                write!(f, "{device} reported an error that was not corrected, and the guest is stopped")
            }
            Self::BundleRefused { message, .. } => {
                write!(f, "the bundle was read anew and refused, the one before goes on: {message}")
            }
        }
    }
}

/// The log below a folder for state. Holds nothing open.
#[derive(Clone, Debug)]
pub struct Events(Journal);

impl Events {
    /// The log.
    pub fn below(state: &Path) -> Self {
        Self(Log::Events.below(state))
    }

    /// Adds an event of now. One that can't be kept holds nothing up.
    pub(crate) fn add(&self, guest: &str, tenant: &str, what: Happening) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let event = LoggedEvent { time_ms, guest: guest.into(), tenant: tenant.into(), what };
        let written = serde_json::to_vec(&event).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            hands::append(&self.0, &line)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "an event could not be kept");
        }
    }

    /// All events that are kept, oldest first; of one guest when it's named.
    ///
    /// # Errors
    /// `events-unusable`.
    pub fn read(&self, guest: Option<&str>) -> Result<Vec<LoggedEvent>, Refusal> {
        let mut events = Vec::new();
        let take = &mut |line: &[u8]| events.extend(event(line, guest));
        self.0.each(take).map_err(|error| self.unusable(&error))?;
        Ok(events)
    }

    /// Gives `take` each event as it comes, for ever, or until `take` says false.
    ///
    /// # Errors
    /// `events-unusable`.
    pub fn follow(
        &self,
        guest: Option<&str>,
        take: &mut dyn FnMut(LoggedEvent) -> bool,
    ) -> Result<(), Refusal> {
        let unusable = |error: io::Error| self.unusable(&error);
        let mut open: Option<(u64, BufReader<File>)> = None;
        // What is there already was read before.
        let mut from = SeekFrom::End(0);
        let mut line = Vec::new();
        loop {
            let inode = std::fs::metadata(self.0.file(0)).ok().map(|metadata| metadata.ino());
            if open.is_none() && inode.is_some() {
                let mut file = File::open(self.0.file(0)).map_err(unusable)?;
                file.seek(from).map_err(unusable)?;
                open = Some((file.metadata().map_err(unusable)?.ino(), BufReader::new(file)));
            }
            from = SeekFrom::Start(0);
            let Some((opened, reader)) = &mut open else {
                sleep(LOOK);
                continue;
            };
            let put_aside = inode != Some(*opened);
            // A line that is being written comes in pieces.
            while reader.read_until(b'\n', &mut line).map_err(unusable)? > 0 && line.ends_with(b"\n") {
                let event = event(line.strip_suffix(b"\n").unwrap_or(&line), guest);
                line.clear();
                if let Some(event) = event
                    && !take(event)
                {
                    return Ok(());
                }
            }
            if put_aside {
                line.clear();
                open = None;
            } else {
                sleep(LOOK);
            }
        }
    }

    fn unusable(&self, error: &io::Error) -> Refusal {
        Refusal::new(
            "events-unusable",
            self.0.folder.display(),
            error,
            "run as root, and see to the disk there",
        )
    }
}

fn event(line: &[u8], guest: Option<&str>) -> Option<LoggedEvent> {
    let event: LoggedEvent = serde_json::from_slice(line).ok()?;
    guest.is_none_or(|guest| guest == event.guest).then_some(event)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use std::{sync::mpsc, thread};

    fn governed(interval_ms: u32) -> Happening {
        Happening::Governed { interval_ms, plugins: vec!["fair-share".into()] }
    }

    #[test]
    fn events_are_read_by_guest_and_followed_into_the_next_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::below(folder.path());
        events.0.bounds.file_bytes = 400;
        assert_eq!(events.read(None).unwrap(), []);
        events.add("web", "acme", governed(1));
        events.add("db", "acme", governed(2));
        let web = events.read(Some("web")).unwrap();
        assert_eq!(web.iter().map(|event| event.what.clone()).collect::<Vec<_>>(), [governed(1)]);

        let (send, receive) = mpsc::channel();
        let following = events.clone();
        let reader = thread::spawn(move || {
            let mut count = 0;
            following.follow(Some("web"), &mut |event| {
                count += 1;
                send.send(event.what).unwrap();
                count < 6
            })
        });
        // It begins with what comes after it was started; a first one tells that it was.
        let mut seen = Vec::new();
        while seen.is_empty() {
            events.add("web", "acme", governed(0));
            seen.extend(receive.recv_timeout(Duration::from_millis(300)));
        }
        seen.extend(receive.try_iter());
        for number in 10..20 {
            events.add("db", "acme", governed(number));
            events.add("web", "acme", governed(number));
            sleep(LOOK + LOOK);
            if reader.is_finished() {
                break;
            }
        }
        reader.join().unwrap().unwrap();
        seen.extend(receive.try_iter());
        assert_eq!(seen.len(), 6);
        let numbers: Vec<_> = seen.into_iter().filter(|what| *what != governed(0)).collect();
        let expected: Vec<_> = (10..).take(numbers.len()).map(governed).collect();
        assert_eq!(numbers, expected, "each comes once, and none is lost");
        assert!(folder.path().join("events/events.1.jsonl").exists(), "no file was put aside");
    }
}
