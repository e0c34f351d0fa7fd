//! Governors at work: a thread that looks at the guest and its neighbours once in a while, asks the bundle's governors, and does what they
//! want within the bounds of the guest's file and its tenant.
//!
//! - It never stands in the watch's way: it reads files, and asks the guest's VMM as any operator does.
//! - Each keep asks about all guests of the host, and acts on its own. It tells the others how its guest is in a file beside the sockets.
//! - What a governor that fails had set stays.
//! - All that is done, or wanted and not done, is an event.

mod act;
mod sample;
mod shared;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use casemate_policy::{Action, Deed, Kind, Memory, Samples};
use casemate_spec::{Refusal, ResourceBounds};

use crate::{Events, Happening, operator::Operator, policies::Policies};
use act::{Actor, Outcome};
use sample::Sampler;
use shared::Shared;

/// A guest that is looked after.
pub(crate) struct Charge {
    pub(crate) guest: String,
    pub(crate) tenant: String,
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    /// Its physical devices: they reach all of its memory.
    pub(crate) devices: Vec<String>,
    /// How many disks and network cards it has started with.
    pub(crate) disks: usize,
    pub(crate) nets: usize,
    pub(crate) bounds: ResourceBounds,
    /// Its cell's cgroup, and the processors that it may keep busy at most.
    pub(crate) cgroup: PathBuf,
    pub(crate) cpus_most: u32,
    /// Its VMM's process.
    pub(crate) pid: u32,
    pub(crate) interval_ms: u32,
    /// Where keeps tell each other of their guests.
    pub(crate) runtime: PathBuf,
    pub(crate) events: Events,
}

/// The thread; it ends when this is dropped.
pub(crate) struct Governing {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Governing {
    /// Starts looking after a guest.
    pub(crate) fn start(
        charge: Charge,
        policies: Arc<Policies>,
        operator: Operator,
    ) -> Result<Self, Refusal> {
        let guest = charge.guest.clone();
        let (stop, stopped) = channel();
        let run = move || Governor::new(charge, policies, operator).run(&stopped);
        let thread = thread::Builder::new().name("governor".into()).spawn(run).map_err(|error| {
            Refusal::new("keep-failed", guest, format_args!("no thread looks after it: {error}"), "try again")
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Governing {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Governor {
    charge: Charge,
    policies: Arc<Policies>,
    sampler: Sampler,
    shared: Shared,
    actor: Actor,
    memory: Memory,
    last_look: Option<Instant>,
    /// What was told last of each thing, so that what goes on is told once.
    told: BTreeMap<String, String>,
}

impl Governor {
    fn new(charge: Charge, policies: Arc<Policies>, operator: Operator) -> Self {
        Self {
            sampler: Sampler::new(&charge, operator.clone()),
            shared: Shared::new(&charge.runtime, &charge.guest),
            actor: Actor::new(&charge, operator),
            charge,
            policies,
            memory: Memory::new(),
            last_look: None,
            told: BTreeMap::new(),
        }
    }

    fn run(mut self, stopped: &Receiver<()>) {
        let interval = Duration::from_millis(self.charge.interval_ms.into());
        self.introduce();
        loop {
            match stopped.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => self.look(),
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn introduce(&mut self) {
        let engine = self.policies.current();
        let plugins: Vec<_> = engine
            .plugins()
            .iter()
            .filter(|plugin| plugin.kinds.contains(&Kind::Resources))
            .map(|plugin| plugin.name.clone())
            .collect();
        if !plugins.is_empty() {
            self.tell(Happening::Governed { interval_ms: self.charge.interval_ms, plugins });
        }
    }

    /// One look, and what comes of it.
    fn look(&mut self) {
        if let Some(what) = self.policies.reload_if_asked() {
            let read = matches!(what, Happening::BundleRead { .. });
            self.tell(what);
            if read {
                self.told.clear();
                self.introduce();
            }
        }
        let engine = self.policies.current();
        if !engine.has(Kind::Resources) {
            return;
        }
        let now = Instant::now();
        let since = self.last_look.replace(now).map_or(Duration::ZERO, |last| now.duration_since(last));
        let interval_ms = u32::try_from(since.as_millis()).unwrap_or(u32::MAX);
        let (mut own, balloon) = self.sampler.guest(&self.charge, interval_ms);
        self.actor.describe(&mut own, balloon.as_ref());
        self.shared.tell(&own);
        let mut guests = self.shared.others();
        guests.push(own);
        guests.sort_by(|one, other| one.name.cmp(&other.name));
        let samples = Samples {
            now_seconds: crate::record::now_seconds(),
            interval_ms,
            host: self.sampler.host(interval_ms),
            guests,
            attrs: BTreeMap::new(),
        };
        let tick = engine.tick(&samples, &mut self.memory);
        for failure in tick.failures {
            let key = format!("failed {}", failure.plugin);
            let what = Happening::PluginFailed {
                plugin: failure.plugin,
                code: failure.code.clone(),
                message: failure.message,
            };
            self.tell_once(key, failure.code, what);
        }
        let is_own = |action: &Action| action.guest == self.charge.guest;
        let actions: Vec<_> = tick.actions.into_iter().filter(is_own).collect();
        let watched: Vec<_> = tick.watched.into_iter().filter(is_own).collect();
        let forbidden: Vec<_> = tick.forbidden.into_iter().filter(is_own).collect();
        let conflicts: Vec<_> = tick.conflicts.into_iter().filter(|c| is_own(&c.one)).collect();
        for conflict in conflicts {
            let key = format!("conflict {:?}", conflict.one.deed.knob());
            let text = format!("{} {}", conflict.one, conflict.other);
            self.tell_once(key, text, Happening::Conflict { one: conflict.one, other: conflict.other });
        }
        for (actions, because) in
            [(watched, "the bundle only watches"), (forbidden, "the bundle does not permit it")]
        {
            actions.into_iter().for_each(|action| self.not_done(action, because.to_owned()));
        }
        actions.into_iter().for_each(|action| self.act(action));
    }

    fn act(&mut self, action: Action) {
        if action.deed == Deed::Alert {
            let key = format!("alert {}/{}", action.why.plugin, action.why.code);
            let text = action.why.message.clone();
            return self.tell_once(key, text, Happening::Alert { action });
        }
        match self.actor.act(&action.deed) {
            Outcome::AsItWas => {}
            Outcome::Done(done) => {
                self.told.remove(&key_of(&action));
                let instead = (done != action.deed).then(|| done.to_string());
                self.tell(Happening::Done { action, instead });
            }
            Outcome::Not(because) => self.not_done(action, because),
        }
    }

    fn not_done(&mut self, action: Action, because: String) {
        let text = format!("{} {because}", action.deed);
        self.tell_once(key_of(&action), text, Happening::NotDone { action, because });
    }

    fn tell_once(&mut self, key: String, text: String, what: Happening) {
        if self.told.get(&key) != Some(&text) {
            self.told.insert(key, text);
            self.tell(what);
        }
    }

    fn tell(&self, what: Happening) {
        self.charge.events.add(&self.charge.guest, &self.charge.tenant, what);
    }
}

fn key_of(action: &Action) -> String {
    format!("{} {:?}", action.why.plugin, action.deed.knob())
}
