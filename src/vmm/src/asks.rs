//! What the keep asks while the guest runs, and the answers.
//!
//! The control thread hears and answers. It waits for nobody: what takes its time is answered later, by its number.

use casemate_virtio::Kind;
use casemate_wire::{Answer, Ask, Descriptors, DeviceKind, DeviceStatistics, Refused, Statistics};

use crate::{error::bounded, machine::Running};

/// Asks of one kind that may wait for their answer at a time.
const WAITING_MOST: usize = 16;

/// An answer, with the number of what was asked.
pub(crate) type Reply = (u32, Result<Answer, Refused>);

/// Asks that are not answered yet.
#[derive(Default)]
pub(crate) struct Asks {
    pausing: Vec<u32>,
}

impl Asks {
    /// Does what was asked, or begins to. `None`: the answer comes later, out of [`Asks::due`].
    pub(crate) fn take(
        &mut self,
        id: u32,
        ask: Ask,
        descriptors: Descriptors,
        running: &Running,
    ) -> Option<Reply> {
        if let Err(error) = descriptors.finish() {
            return Some((id, refuse("ask-malformed", error.to_string())));
        }
        match ask {
            Ask::Pause if self.pausing.len() >= WAITING_MOST => {
                Some((id, refuse("ask-again", "too many wait for the same".into())))
            }
            Ask::Pause => {
                self.pausing.push(id);
                running.platform.gate().close();
                None
            }
            Ask::Resume => {
                running.platform.gate().open();
                Some((id, Ok(Answer::Done)))
            }
            Ask::Statistics => Some((id, Ok(Answer::Statistics(Box::new(statistics(running)))))),
        }
    }

    /// Answers that are due now.
    pub(crate) fn due(&mut self, running: &Running) -> Vec<Reply> {
        if self.pausing.is_empty() {
            return Vec::new();
        }
        let gate = running.platform.gate();
        let answer = match (gate.is_full(), gate.is_closed()) {
            (true, _) => Ok(Answer::Done),
            (false, false) => refuse("ask-overtaken", "it was resumed before all processors stood".into()),
            (false, true) => return Vec::new(),
        };
        self.pausing.drain(..).map(|id| (id, answer.clone())).collect()
    }
}

fn refuse(code: &str, message: String) -> Result<Answer, Refused> {
    Err(Refused { code: code.to_owned(), message: bounded(message) })
}

fn statistics(running: &Running) -> Statistics {
    let mut numbers = [0_u16; 4];
    let devices = running.devices.iter().map(|device| {
        let (kind, place) = match device.kind {
            Kind::Entropy => (DeviceKind::Entropy, 0),
            Kind::Block => (DeviceKind::Disk, 1),
            Kind::Net => (DeviceKind::Net, 2),
            Kind::Balloon => (DeviceKind::Balloon, 3),
        };
        let counted = device.counters.read();
        let next = numbers.get_mut(place).map(|next| std::mem::replace(next, next.saturating_add(1)));
        DeviceStatistics {
            kind,
            number: next.unwrap_or_default(),
            requests: counted.requests,
            bytes_to_guest: counted.bytes_to_guest,
            bytes_from_guest: counted.bytes_from_guest,
            errors: counted.errors,
        }
    });
    Statistics { vcpus: running.platform.vcpu_counters(), devices: devices.collect() }
}
