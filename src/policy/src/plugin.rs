//! One loaded plugin, and the call into it.

use std::time::{Duration, Instant};

use wasmtime::{
    Store, Trap,
    component::{Component, HasSelf, Linker},
};

use crate::{
    Fault, PolicyError,
    cache::{Cache, EntryKey},
    change::Field,
    compiler::{self, Compiler},
    contract::{self, Admission, AdmissionPre, Description, PluginAnswer, types},
    limits::{HOST_LIMITS, PluginLimits},
    rule::{Rule, Rules},
    sandbox::{LogFlood, Sandbox, Ticker},
    verdict::PluginRun,
};

/// What loading needs.
pub(crate) struct Loader<'a> {
    pub(crate) engine: &'a wasmtime::Engine,
    /// Engine version, settings and what the processor can do, as text.
    pub(crate) engine_tag: &'a str,
    pub(crate) cache: &'a Cache,
    pub(crate) compiler: Compiler<'a>,
}

/// Compiled code in memory, and how long compiling took when it wasn't in the cache.
pub(crate) struct Loaded {
    pub(crate) component: Component,
    pub(crate) compile_time: Option<Duration>,
}

impl Loader<'_> {
    /// Compiled code for a component; `name` is how errors call it, `digest` the SHA-256 of `bytes`.
    pub(crate) fn load(&self, name: &str, digest: &str, bytes: &[u8]) -> Result<Loaded, PolicyError> {
        let key = EntryKey { digest, engine: self.engine_tag };
        if let Some(code) = self.cache.load(&key)?
            && let Ok(component) = deserialize(self.engine, &code)
        {
            return Ok(Loaded { component, compile_time: None });
        }
        // Not there, or made by a Casemate whose engine was set up otherwise.
        let start = Instant::now();
        self.cache.store(&key, &compiler::compile(self.compiler, name, bytes)?)?;
        let compile_time = Some(start.elapsed());
        let broken = |cause: String| PolicyError::new(Fault::Compiler, name, cause);
        let code = self.cache.load(&key)?.ok_or_else(|| broken("what was compiled has vanished".into()))?;
        let component = deserialize(self.engine, &code)
            .map_err(|error| broken(format!("the compiler is not of this version of Casemate: {error:#}")))?;
        Ok(Loaded { component, compile_time })
    }
}

fn deserialize(engine: &wasmtime::Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the code must come unchanged from wasmtime's own serialization. The one caller takes it from the cache,
    // which gives nothing but what carries a valid tag under this host's key, and the one thing that is tagged is the
    // output of the compiler that Casemate started. It's in memory: nobody changes it between the check and here. That
    // version, settings and processor match is checked by wasmtime itself.
    unsafe { Component::deserialize(engine, code) }
}

/// Names of what a component imports and exports.
pub(crate) fn surface(engine: &wasmtime::Engine, component: &Component) -> (Vec<String>, Vec<String>) {
    let ty = component.component_type();
    let imports = ty.imports(engine).map(|(name, _)| name.to_owned()).collect();
    (imports, ty.exports(engine).map(|(name, _)| name.to_owned()).collect())
}

/// What makes a plugin: its code, and what the bundle says of it.
pub(crate) struct Parts<'a> {
    pub(crate) name: &'a str,
    pub(crate) digest: &'a str,
    pub(crate) limits: PluginLimits,
    pub(crate) settings: &'a str,
    pub(crate) rules: Rules,
    pub(crate) may_change: Vec<Field>,
    pub(crate) component: &'a Component,
}

/// A plugin that is ready to be asked.
pub(crate) struct Plugin {
    pub(crate) name: String,
    pub(crate) digest: String,
    limits: PluginLimits,
    settings: String,
    pub(crate) rules: Rules,
    pub(crate) may_change: Vec<Field>,
    pre: AdmissionPre<Sandbox>,
}

/// An answer and what it took.
pub(crate) struct Answer<R> {
    pub(crate) value: R,
    pub(crate) run: PluginRun,
}

impl Plugin {
    /// Links a component: what it imports and exports is checked here, and nothing of it runs yet.
    pub(crate) fn link(engine: &wasmtime::Engine, parts: Parts<'_>) -> Result<Self, PolicyError> {
        let Parts { name, digest, limits, settings, rules, may_change, component } = parts;
        let (imports, exports) = surface(engine, component);
        let allowed = |import: &String| contract::IMPORTS.iter().any(|start| import.starts_with(start));
        if let Some(import) = imports.iter().find(|import| !allowed(import)) {
            let cause = format!("it imports {import:?}; a plugin may import the log and nothing else");
            return Err(PolicyError::new(Fault::Import, name, cause));
        }
        let off = |error: wasmtime::Error| {
            let cause =
                format!("it does not speak casemate:policy@1: {error:#}; it exports {}", exports.join(", "));
            PolicyError::new(Fault::Contract, name, cause)
        };
        let mut linker = Linker::<Sandbox>::new(engine);
        Admission::add_to_linker::<_, HasSelf<_>>(&mut linker, |sandbox| sandbox).map_err(off)?;
        let pre = linker.instantiate_pre(component).and_then(AdmissionPre::new).map_err(off)?;
        let (name, digest, settings) = (name.into(), digest.into(), settings.into());
        Ok(Self { name, digest, limits, settings, rules, may_change, pre })
    }

    /// What the plugin tells of itself.
    pub(crate) fn describe(&self, ticker: &Ticker) -> Result<Description, PolicyError> {
        let call = |plugin: &Admission, store: &mut Store<Sandbox>| {
            plugin.casemate_policy_meta().call_describe(store)
        };
        Ok(self.call(ticker, call)?.value)
    }

    /// Whether the plugin takes the settings that the bundle gives it.
    pub(crate) fn check_settings(&self, ticker: &Ticker) -> Result<(), PolicyError> {
        let call = |plugin: &Admission, store: &mut Store<Sandbox>| {
            plugin.casemate_policy_meta().call_check_settings(store, &self.settings)
        };
        let Err(reasons) = self.call(ticker, call)?.value else { return Ok(()) };
        let reasons = contract::reasons(&self.name, reasons).map_err(|cause| self.bad_answer(cause))?;
        let text: Vec<_> = reasons.iter().map(ToString::to_string).collect();
        Err(PolicyError::new(Fault::Settings, &self.name, text.join(" | ")))
    }

    /// Asks the plugin.
    pub(crate) fn admit(
        &self,
        ticker: &Ticker,
        request: &types::Request,
    ) -> Result<Answer<PluginAnswer>, PolicyError> {
        let call = |plugin: &Admission, store: &mut Store<Sandbox>| {
            plugin.casemate_policy_gate().call_admit(store, &self.settings, request)
        };
        let Answer { value, run } = self.call(ticker, call)?;
        let value = contract::answer(&self.name, value).map_err(|cause| self.bad_answer(cause))?;
        Ok(Answer { value, run })
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
        call: impl FnOnce(&Admission, &mut Store<Sandbox>) -> wasmtime::Result<R>,
    ) -> Result<Answer<R>, PolicyError> {
        let start = Instant::now();
        let mut store = Store::new(self.pre.engine(), Sandbox::new(self.limits));
        store.limiter(|sandbox| sandbox);
        store.set_hostcall_fuel(HOST_LIMITS.crossing_bytes);
        store.set_epoch_deadline(self.limits.deadline_ms);
        let ticking = ticker.during_call();
        let answer = store
            .set_fuel(self.limits.fuel)
            .and_then(|()| self.pre.instantiate(&mut store))
            .and_then(|plugin| call(&plugin, &mut store));
        drop(ticking);
        let fuel = self.limits.fuel.saturating_sub(store.get_fuel().unwrap_or(0));
        let sandbox = store.into_data();
        let value = answer.map_err(|error| self.fault(&error, &sandbox))?;
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
    fn fault(&self, error: &wasmtime::Error, sandbox: &Sandbox) -> PolicyError {
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
                let most = HOST_LIMITS.crossing_bytes >> 10;
                (Fault::Answer, format!("it passes more than {most} KiB at once"))
            }
            None => (Fault::Trap, format!("it stopped: {root}")),
        };
        PolicyError::new(fault, &self.name, cause)
    }
}
