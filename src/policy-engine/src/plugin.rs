//! One loaded plugin, and the call into it.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use casemate_policy::{
    Fault, Field, HOST_LIMITS, Kind, PluginLimits, PluginRun, PolicyError, Reason, ReleasedDevice, Rule,
    Rules, talk,
};
use wasmtime::{
    Store, Trap,
    component::{Component, HasSelf, Linker},
};

use crate::{
    contract::{
        self, Description, GatePre, GovernorPre, Meta, MetaPre, PluginAnswer, ReleasesPre,
        governor::Governed, types,
    },
    sandbox::{LogFlood, Sandbox, Ticker},
};

/// Names of what a component imports and exports.
pub(crate) fn surface(engine: &wasmtime::Engine, component: &Component) -> (Vec<String>, Vec<String>) {
    let ty = component.component_type();
    let imports = ty.imports(engine).map(|(name, _)| name.to_owned()).collect();
    (imports, ty.exports(engine).map(|(name, _)| name.to_owned()).collect())
}

/// A plugin that is ready to be asked.
pub(crate) struct Plugin {
    pub(crate) name: String,
    pub(crate) digest: String,
    limits: PluginLimits,
    settings: Option<String>,
    pub(crate) rules: Rules,
    pub(crate) may_change: Vec<Field>,
    pub(crate) may_do: Vec<String>,
    meta: MetaPre<Sandbox>,
    gate: Option<GatePre<Sandbox>>,
    governor: Option<GovernorPre<Sandbox>>,
    releases: Option<ReleasesPre<Sandbox>>,
    /// Failures since it last answered.
    failures: AtomicU32,
    /// Whether too many of them suspend it.
    pub(crate) suspends: bool,
}

/// An answer and what it took.
pub(crate) struct Answer<R> {
    pub(crate) value: R,
    pub(crate) run: PluginRun,
}

impl Plugin {
    /// Links a component: what it imports and exports is checked here, and nothing of it runs yet.
    pub(crate) fn link(
        engine: &wasmtime::Engine,
        plugin: talk::Plugin,
        component: &Component,
    ) -> Result<Self, PolicyError> {
        let name = plugin.name.as_str();
        let (imports, exports) = surface(engine, component);
        let off = |error: &dyn fmt::Display| {
            let cause =
                format!("it does not speak casemate:policy@1: {error}; it exports {}", exports.join(", "));
            PolicyError::new(Fault::Contract, name, cause)
        };
        // Told before anything that it wants: all of it has other names there.
        let is_of_others = |name: &&String| name.starts_with("casemate:policy/") && !name.contains("@1.");
        if let Some(other) = imports.iter().chain(&exports).find(is_of_others) {
            return Err(off(&format_args!("it was built for another version, {other}")));
        }
        let allowed = |import: &String| contract::IMPORTS.iter().any(|start| import.starts_with(start));
        if let Some(import) = imports.iter().find(|import| !allowed(import)) {
            let cause = format!("it imports {import:?}; a plugin may import the log and nothing else");
            return Err(PolicyError::new(Fault::Import, name, cause));
        }
        let unfit = |error: wasmtime::Error| off(&format_args!("{error:#}"));
        let kinds: Vec<_> = Kind::ALL
            .into_iter()
            .filter(|(_, start)| exports.iter().any(|export| export.starts_with(start)))
            .map(|(kind, _)| kind)
            .collect();
        if kinds.is_empty() {
            return Err(off(&"it exports no gate, no governor and no releases"));
        }
        let is = |kind: Kind| kinds.contains(&kind);
        let mut linker = Linker::<Sandbox>::new(engine);
        Meta::add_to_linker::<_, HasSelf<_>>(&mut linker, |sandbox| sandbox).map_err(unfit)?;
        let pre = linker.instantiate_pre(component).map_err(unfit)?;
        let gate = is(Kind::Admission).then(|| GatePre::new(pre.clone())).transpose().map_err(unfit)?;
        let governor = is(Kind::Resources).then(|| GovernorPre::new(pre.clone())).transpose();
        let releases = is(Kind::Device).then(|| ReleasesPre::new(pre.clone())).transpose();
        let meta = MetaPre::new(pre).map_err(unfit)?;
        let governor = governor.map_err(unfit)?;
        let releases = releases.map_err(unfit)?;
        let talk::Plugin { name, digest, settings, limits, rules, may_change, may_do } = plugin;
        Ok(Self {
            name,
            digest,
            limits,
            settings,
            rules,
            may_change,
            may_do,
            meta,
            gate,
            governor,
            releases,
            failures: AtomicU32::new(0),
            suspends: false,
        })
    }

    /// Whether it can be asked so.
    pub(crate) fn is(&self, kind: Kind) -> bool {
        match kind {
            Kind::Admission => self.gate.is_some(),
            Kind::Resources => self.governor.is_some(),
            Kind::Device => self.releases.is_some(),
        }
    }

    /// All ways in which it can be asked.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        Kind::ALL.into_iter().map(|(kind, _)| kind).filter(|kind| self.is(*kind)).collect()
    }

    /// Counts how a call ended. One that failed too often in a row isn't made any more.
    pub(crate) fn counted<R>(&self, call: impl FnOnce() -> Result<R, PolicyError>) -> Result<R, PolicyError> {
        if self.is_suspended() {
            let cause =
                format!("it failed {} times in a row, and is not asked any more", HOST_LIMITS.failures);
            return Err(PolicyError::new(Fault::Suspended, &self.name, cause));
        }
        let result = call();
        match &result {
            Ok(_) => self.failures.store(0, Ordering::Relaxed),
            Err(_) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        result
    }

    pub(crate) fn is_suspended(&self) -> bool {
        self.suspends && self.failures.load(Ordering::Relaxed) >= HOST_LIMITS.failures
    }

    /// What the plugin tells of itself.
    pub(crate) fn describe(&self, ticker: &Ticker) -> Result<Description, PolicyError> {
        let call = |store: &mut Store<Sandbox>| {
            self.meta.instantiate(&mut *store)?.casemate_policy_meta().call_describe(store)
        };
        Ok(self.call(ticker, HOST_LIMITS.crossing_bytes, call)?.value)
    }

    /// Whether the plugin takes the settings that the bundle gives it, if it does.
    pub(crate) fn check_settings(&self, ticker: &Ticker) -> Result<(), PolicyError> {
        let Some(settings) = &self.settings else { return Ok(()) };
        let call = |store: &mut Store<Sandbox>| {
            let plugin = self.meta.instantiate(&mut *store)?;
            plugin.casemate_policy_meta().call_check_settings(store, settings)
        };
        let answer = self.call(ticker, HOST_LIMITS.crossing_bytes, call)?.value;
        let Err(reasons) = answer else { return Ok(()) };
        let reasons = contract::reasons(&self.name, reasons).map_err(|cause| self.bad_answer(cause))?;
        let text: Vec<_> = reasons.iter().map(ToString::to_string).collect();
        Err(PolicyError::new(Fault::Settings, &self.name, text.join(" | ")))
    }

    /// Asks a plugin that admits.
    pub(crate) fn admit(
        &self,
        ticker: &Ticker,
        request: &types::Request,
    ) -> Result<Answer<PluginAnswer>, PolicyError> {
        let gate = self.gate.as_ref().ok_or_else(|| self.is_not(Kind::Admission))?;
        let call = |store: &mut Store<Sandbox>| {
            gate.instantiate(&mut *store)?.casemate_policy_gate().call_admit(store, self.settings(), request)
        };
        let Answer { value, run } = self.call(ticker, HOST_LIMITS.crossing_bytes, call)?;
        let value = contract::answer(&self.name, value).map_err(|cause| self.bad_answer(cause))?;
        Ok(Answer { value, run })
    }

    /// Asks a governor.
    pub(crate) fn tick(
        &self,
        ticker: &Ticker,
        samples: &contract::governor::WitSamples,
        state: &[u8],
    ) -> Result<Answer<Governed>, PolicyError> {
        let governor = self.governor.as_ref().ok_or_else(|| self.is_not(Kind::Resources))?;
        let call = |store: &mut Store<Sandbox>| {
            let plugin = governor.instantiate(&mut *store)?;
            plugin.casemate_policy_governor().call_tick(store, self.settings(), samples, state)
        };
        let Answer { value, run } = self.call(ticker, HOST_LIMITS.tick_crossing_bytes, call)?;
        let value = contract::governor::answer(&self.name, value).map_err(|cause| self.bad_answer(cause))?;
        Ok(Answer { value, run })
    }

    /// Asks a judge of devices: whether the host may have it back, and reasons or warnings.
    pub(crate) fn release(
        &self,
        ticker: &Ticker,
        device: &ReleasedDevice,
    ) -> Result<(bool, Vec<Reason>), PolicyError> {
        let releases = self.releases.as_ref().ok_or_else(|| self.is_not(Kind::Device))?;
        let device = contract::releases::device(device);
        let call = |store: &mut Store<Sandbox>| {
            let plugin = releases.instantiate(&mut *store)?;
            plugin.casemate_policy_releases().call_release(store, self.settings(), &device)
        };
        let ruling = self.call(ticker, HOST_LIMITS.crossing_bytes, call)?.value;
        contract::releases::ruling(&self.name, ruling).map_err(|cause| self.bad_answer(cause))
    }

    fn settings(&self) -> &str {
        self.settings.as_deref().unwrap_or("{}")
    }

    fn is_not(&self, kind: Kind) -> PolicyError {
        PolicyError::new(Fault::Contract, &self.name, format!("it is no plugin of the kind {kind}"))
    }

    /// What is known of a call before it's made.
    pub(crate) fn unasked(&self, rule: Rule) -> PluginRun {
        PluginRun {
            name: self.name.clone(),
            digest: self.digest.clone(),
            elapsed: Duration::ZERO,
            fuel: 0,
            log: Vec::new(),
            log_dropped_bytes: 0,
            rule,
            allowed: None,
            would_refuse: Vec::new(),
            would_change: Vec::new(),
            error: None,
        }
    }

    fn bad_answer(&self, cause: String) -> PolicyError {
        PolicyError::new(Fault::Answer, &self.name, cause)
    }

    /// Makes an instance, calls it, and drops it: nothing of one call is there in the next.
    fn call<R>(
        &self,
        ticker: &Ticker,
        crossing_bytes: usize,
        call: impl FnOnce(&mut Store<Sandbox>) -> wasmtime::Result<R>,
    ) -> Result<Answer<R>, PolicyError> {
        let start = Instant::now();
        let mut store = Store::new(self.meta.engine(), Sandbox::new(self.limits));
        store.limiter(|sandbox| sandbox);
        store.set_hostcall_fuel(crossing_bytes);
        store.set_epoch_deadline(self.limits.deadline_ms);
        let ticking = ticker.during_call();
        let answer = store.set_fuel(self.limits.fuel).and_then(|()| call(&mut store));
        drop(ticking);
        let fuel = self.limits.fuel.saturating_sub(store.get_fuel().unwrap_or(0));
        let sandbox = store.into_data();
        let value = answer.map_err(|error| self.fault(&error, &sandbox, crossing_bytes))?;
        let run = PluginRun {
            elapsed: start.elapsed(),
            fuel,
            log: sandbox.log,
            log_dropped_bytes: sandbox.log_dropped_bytes,
            ..self.unasked(Rule::default())
        };
        Ok(Answer { value, run })
    }

    /// What ended a call.
    fn fault(&self, error: &wasmtime::Error, sandbox: &Sandbox, crossing_bytes: usize) -> PolicyError {
        let limits = &self.limits;
        let root = error.root_cause().to_string();
        let (fault, cause) = match error.downcast_ref::<Trap>() {
            Some(Trap::OutOfFuel) => {
                (Fault::Timeout, format!("it used all of its {} units of fuel", limits.fuel))
            }
            Some(Trap::Interrupt) => {
                (Fault::Timeout, format!("it did not answer within {} ms", limits.deadline_ms))
            }
            _ if sandbox.memory_refused => {
                let most = limits.memory_bytes >> 20;
                (
                    Fault::Memory,
                    format!("it wanted more than the {most} MiB of memory that it may have: {root}"),
                )
            }
            Some(trap) => (Fault::Trap, format!("it stopped: {trap}")),
            None if error.is::<LogFlood>() => (Fault::Answer, root),
            // The type of this error is private to wasmtime.
            None if root.contains("fuel allocated for hostcalls") => {
                let most = crossing_bytes >> 10;
                (Fault::Answer, format!("it passes more than {most} KiB at once"))
            }
            None if root.contains("resource limit exceeded") => (Fault::Trap, format!("it stopped: {root}")),
            // What it gave couldn't be read: a pointer past its memory, a case that an enum doesn't have, no UTF-8.
            None => (Fault::Answer, format!("its answer is none of the contract's: {root}")),
        };
        PolicyError::new(fault, &self.name, cause)
    }
}
