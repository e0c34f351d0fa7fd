//! What is done: within the guest's bounds, and not too often.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use casemate_broker::{Knob, hands};
use casemate_policy::{Bounds, Deed, GuestSample, Knob as Turned, Rate};
use casemate_spec::{Refusal, ResourceBounds};
use casemate_wire::{Ask, BalloonStatistics, DeviceKind, Limits, Which};

use super::Charge;
use crate::operator::{GuestState, Operator, Order};

/// The period over which cgroups count processor time, as the jail sets it.
const CPU_PERIOD_US: u64 = 100_000;
/// A balloon is given a new target in whole pieces of this size.
const BALLOON_STEP: u64 = 2 << 20;
/// What a balloon leaves any guest, as its VMM has it.
const LEFT_LEAST: u64 = 64 << 20;

/// What came of a deed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It's done, or nearly that: held to the bounds.
    Done(Deed),
    /// It was so already.
    AsItWas,
    /// It isn't done, and why.
    Not(String),
}

/// Turns the guest's knobs.
pub(super) struct Actor {
    operator: Operator,
    cgroup: PathBuf,
    bounds: ResourceBounds,
    cpus_most: u32,
    memory_bytes: u64,
    pinned: bool,
    disks: usize,
    nets: usize,
    /// What governors have set, so far.
    cpu_limit: Option<u32>,
    balloon_bytes: u64,
    disk_limit: Rate,
    net_limit: Rate,
    /// Whether it was a governor that paused it.
    paused: bool,
    /// When each was turned last.
    turned: BTreeMap<Turned, Instant>,
}

impl Actor {
    pub(super) fn new(charge: &Charge, operator: Operator) -> Self {
        Self {
            operator,
            cgroup: charge.cgroup.clone(),
            bounds: charge.bounds,
            cpus_most: charge.cpus_most,
            memory_bytes: charge.memory_bytes,
            pinned: !charge.devices.is_empty(),
            disks: charge.disks,
            nets: charge.nets,
            cpu_limit: None,
            balloon_bytes: charge.memory_bytes,
            disk_limit: Rate::default(),
            net_limit: Rate::default(),
            paused: false,
            turned: BTreeMap::new(),
        }
    }

    /// Tells what is in force, and how far it may go. A balloon that somebody else has told otherwise is as that one said.
    pub(super) fn describe(&mut self, sample: &mut GuestSample, balloon: Option<&BalloonStatistics>) {
        if let Some(balloon) = balloon {
            self.balloon_bytes = self.memory_bytes.saturating_sub(balloon.target_bytes);
        }
        let knobs = &mut sample.knobs;
        knobs.cpu_limit = self.cpu_limit;
        knobs.balloon_bytes = self.balloon_bytes;
        (knobs.disk_limit, knobs.net_limit) = (self.disk_limit, self.net_limit);
        let ResourceBounds {
            cpu_weight_least,
            cpu_weight_most,
            cpu_limit_least,
            memory_least_bytes,
            pause,
            stop,
        } = self.bounds;
        sample.bounds = Bounds {
            cpu_weight_least,
            cpu_weight_most,
            cpu_limit_least,
            memory_least_bytes,
            may_pause: pause,
            may_stop: stop,
            ..Bounds::default()
        };
    }

    /// Does it, as far as it may be done.
    pub(super) fn act(&mut self, deed: &Deed) -> Outcome {
        match self.within(deed) {
            Err(because) => Outcome::Not(because),
            Ok(deed) if self.is_so(&deed) => Outcome::AsItWas,
            Ok(deed) => {
                if let Some(wait) = self.too_soon(&deed) {
                    return Outcome::Not(format!("it was turned less than {} s ago", wait.as_secs()));
                }
                match self.turn(&deed) {
                    Ok(()) => {
                        self.turned.insert(deed.knob(), Instant::now());
                        Outcome::Done(deed)
                    }
                    Err(because) => Outcome::Not(because),
                }
            }
        }
    }

    /// The deed, held to the bounds.
    fn within(&self, deed: &Deed) -> Result<Deed, String> {
        let bounds = &self.bounds;
        Ok(match *deed {
            Deed::CpuWeight(weight) => {
                Deed::CpuWeight(weight.clamp(bounds.cpu_weight_least, bounds.cpu_weight_most))
            }
            // More than its cell may have in any case is no limit.
            Deed::CpuLimit(Some(limit)) if limit >= self.cpus_most.saturating_mul(1_000) => {
                Deed::CpuLimit(None)
            }
            Deed::CpuLimit(limit) => Deed::CpuLimit(limit.map(|limit| limit.max(bounds.cpu_limit_least))),
            Deed::Balloon(_) if self.pinned => {
                return Err("its physical devices reach all of its memory".into());
            }
            Deed::Balloon(bytes) => {
                let bytes = bytes.clamp(bounds.memory_least_bytes.max(LEFT_LEAST), u64::MAX / 2);
                let bytes = bytes.next_multiple_of(BALLOON_STEP);
                Deed::Balloon(bytes.min(self.memory_bytes))
            }
            Deed::Pause if !bounds.pause => {
                return Err("its file or its tenant's does not let it be paused".into());
            }
            Deed::Stop if !bounds.stop => {
                return Err("its file or its tenant's does not let it be stopped".into());
            }
            Deed::Resume if self.operator.state() == GuestState::Paused && !self.paused => {
                return Err("an operator has paused it".into());
            }
            deed => deed,
        })
    }

    fn is_so(&self, deed: &Deed) -> bool {
        match *deed {
            Deed::CpuWeight(weight) => {
                let now = fs::read_to_string(self.cgroup.join("cpu.weight")).unwrap_or_default();
                now.trim().parse() == Ok(weight)
            }
            Deed::CpuLimit(limit) => limit == self.cpu_limit,
            Deed::Balloon(bytes) => bytes == self.balloon_bytes,
            Deed::DiskLimit(rate) => rate == self.disk_limit,
            Deed::NetLimit(rate) => rate == self.net_limit,
            Deed::Pause => matches!(self.operator.state(), GuestState::Paused | GuestState::Pausing),
            Deed::Resume => self.operator.state() == GuestState::Running,
            Deed::Stop => self.operator.state() == GuestState::Ending,
            Deed::Alert => true,
        }
    }

    /// How long must be between two turns of this, if it's not over yet.
    fn too_soon(&self, deed: &Deed) -> Option<Duration> {
        let wait = Duration::from_secs(match deed {
            // What takes memory is slow; what gives it back is needed at once.
            Deed::Balloon(bytes) if *bytes < self.balloon_bytes => 5,
            Deed::Pause => 10,
            Deed::Stop => 60,
            _ => return None,
        });
        self.turned.get(&deed.knob()).is_some_and(|last| last.elapsed() < wait).then_some(wait)
    }

    fn turn(&mut self, deed: &Deed) -> Result<(), String> {
        let in_words = |refusal: Refusal| refusal.to_string();
        match *deed {
            Deed::CpuWeight(weight) => hands::turn(&self.cgroup, Knob::CpuWeight(weight))?,
            Deed::CpuLimit(limit) => {
                let most = u64::from(self.cpus_most) * CPU_PERIOD_US;
                let quota = limit.map_or(most, |limit| (u64::from(limit) * CPU_PERIOD_US / 1_000).min(most));
                hands::turn(&self.cgroup, Knob::CpuQuota(quota.max(1_000)))?;
                self.cpu_limit = limit;
            }
            Deed::Balloon(bytes) => {
                let target_bytes = self.memory_bytes.saturating_sub(bytes);
                drop(self.operator.ask(Ask::Balloon { target_bytes }, Vec::new()).map_err(in_words)?);
                self.balloon_bytes = bytes;
            }
            Deed::DiskLimit(rate) => {
                self.limit(DeviceKind::Disk, self.disks, rate)?;
                self.disk_limit = rate;
            }
            Deed::NetLimit(rate) => {
                self.limit(DeviceKind::Net, self.nets, rate)?;
                self.net_limit = rate;
            }
            Deed::Pause => {
                drop(self.operator.ask(Ask::Pause, Vec::new()).map_err(in_words)?);
                self.paused = true;
            }
            Deed::Resume => {
                drop(self.operator.ask(Ask::Resume, Vec::new()).map_err(in_words)?);
                self.paused = false;
            }
            Deed::Stop => drop(self.operator.order(Order::PowerOff).map_err(in_words)?),
            Deed::Alert => {}
        }
        Ok(())
    }

    /// Limits all its disks or network cards, each to its part.
    fn limit(&self, kind: DeviceKind, count: usize, rate: Rate) -> Result<(), String> {
        if count == 0 {
            return Err("it has none".into());
        }
        let limits = share(rate, count);
        for number in (0..count).filter_map(|number| u16::try_from(number).ok()) {
            let asked =
                self.operator.ask(Ask::Limit { kind, device: Which::Number(number), limits }, Vec::new());
            drop(asked.map_err(|refusal| refusal.to_string())?);
        }
        Ok(())
    }
}

/// What one of so many devices may do when all of them together may do this; what is done in a second may be done at once.
fn share(rate: Rate, count: usize) -> Limits {
    let share = |whole: Option<u64>| {
        let whole = whole?;
        let per_second = whole.div_ceil(u64::try_from(count).unwrap_or(u64::MAX).max(1)).max(1);
        Some(casemate_wire::Rate { per_second, burst: per_second })
    };
    Limits { bytes: share(rate.bytes_a_second), operations: share(rate.requests_a_second) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator;

    /// A guest of 1 GiB in a cgroup that is a folder.
    fn actor(pinned: bool) -> (tempfile::TempDir, Actor, operator::Orders) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cpu.weight"), "100\n").unwrap();
        let (operator, orders) = operator::pair("web").unwrap();
        orders.set_state(GuestState::Running);
        let bounds = ResourceBounds {
            cpu_weight_least: 50,
            cpu_weight_most: 200,
            cpu_limit_least: 200,
            memory_least_bytes: 512 << 20,
            pause: false,
            stop: false,
        };
        let actor = Actor {
            operator,
            cgroup: folder.path().into(),
            bounds,
            cpus_most: 3,
            memory_bytes: 1 << 30,
            pinned,
            disks: 2,
            nets: 1,
            cpu_limit: None,
            balloon_bytes: 1 << 30,
            disk_limit: Rate::default(),
            net_limit: Rate::default(),
            paused: false,
            turned: BTreeMap::new(),
        };
        (folder, actor, orders)
    }

    #[test]
    fn weights_and_limits_are_held_to_the_bounds() {
        let (folder, mut actor, _orders) = actor(false);
        let file = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(actor.act(&Deed::CpuWeight(100)), Outcome::AsItWas);
        for (wanted, done) in [(10_000, 200), (0, 50), (77, 77)] {
            assert_eq!(actor.act(&Deed::CpuWeight(wanted)), Outcome::Done(Deed::CpuWeight(done)));
            assert_eq!(file("cpu.weight"), done.to_string());
        }
        let limit = |limit: u32| Deed::CpuLimit(Some(limit));
        assert_eq!(actor.act(&limit(1)), Outcome::Done(limit(200)));
        assert_eq!(file("cpu.max"), "20000 100000");
        assert_eq!(actor.act(&limit(1_500)), Outcome::Done(limit(1_500)));
        assert_eq!(file("cpu.max"), "150000 100000");
        assert_eq!(actor.act(&limit(u32::MAX)), Outcome::Done(Deed::CpuLimit(None)));
        assert_eq!(file("cpu.max"), "300000 100000", "never more than its cell has in any case");
    }

    #[test]
    fn a_guest_is_not_paused_stopped_or_drained_beyond_what_its_file_says() {
        let (_folder, mut one, orders) = actor(false);
        for deed in [Deed::Pause, Deed::Stop] {
            assert!(matches!(one.act(&deed), Outcome::Not(_)), "{deed}");
        }
        assert_eq!(one.act(&Deed::Resume), Outcome::AsItWas);
        assert_eq!(one.within(&Deed::Balloon(0)), Ok(Deed::Balloon(512 << 20)));
        assert_eq!(one.within(&Deed::Balloon((600 << 20) + 1)), Ok(Deed::Balloon(602 << 20)));
        assert_eq!(one.within(&Deed::Balloon(u64::MAX)), Ok(Deed::Balloon(1 << 30)));
        orders.set_state(GuestState::Paused);
        let Outcome::Not(because) = one.act(&Deed::Resume) else { panic!("it was resumed") };
        assert_eq!(because, "an operator has paused it");
        let (_folder, pinned, _orders) = actor(true);
        assert!(pinned.within(&Deed::Balloon(1 << 30)).is_err());
    }

    #[test]
    fn memory_is_taken_slowly_and_given_back_at_once() {
        let (_folder, mut one, _orders) = actor(false);
        one.balloon_bytes = 600 << 20;
        one.turned.insert(Turned::Balloon, Instant::now());
        assert!(one.too_soon(&Deed::Balloon(512 << 20)).is_some());
        assert!(one.too_soon(&Deed::Balloon(700 << 20)).is_none());
    }

    #[test]
    fn a_limit_is_of_all_devices_together() {
        let rate = Rate { bytes_a_second: Some(1_000_001), requests_a_second: None };
        let Limits { bytes, operations } = share(rate, 2);
        assert_eq!(bytes, Some(casemate_wire::Rate { per_second: 500_001, burst: 500_001 }));
        assert_eq!(operations, None);
        let nothing = Rate { bytes_a_second: Some(0), requests_a_second: Some(1) };
        assert_eq!(share(nothing, 8).bytes.map(|rate| rate.per_second), Some(1), "0 is no rate");
        let (_folder, mut one, _orders) = actor(false);
        one.nets = 0;
        assert_eq!(one.act(&Deed::NetLimit(rate)), Outcome::Not("it has none".into()));
    }

    #[test]
    fn what_cannot_be_written_is_not_done() {
        let (folder, mut one, _orders) = actor(false);
        drop(folder);
        let Outcome::Not(because) = one.act(&Deed::CpuWeight(60)) else { panic!("done") };
        assert!(because.contains("cpu.weight cannot be set to 60"), "{because}");
    }
}
