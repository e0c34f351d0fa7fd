//! What surrounds one call: memory bounds, the log, and the clock that ends it.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use wasmtime::ResourceLimiter;

use casemate_policy::{HOST_LIMITS, LogLine, PluginLimits, one_line};

use crate::contract::{self, log, types};

/// The state of a store: it lives for one call.
pub(crate) struct Sandbox {
    limits: PluginLimits,
    memory_bytes: usize,
    /// Set when the plugin asked for more memory than it may have: whatever it does next, this is why.
    pub(crate) memory_refused: bool,
    pub(crate) log: Vec<LogLine>,
    log_bytes: usize,
    pub(crate) log_dropped_bytes: usize,
}

impl Sandbox {
    pub(crate) fn new(limits: PluginLimits) -> Self {
        Self {
            limits,
            memory_bytes: 0,
            memory_refused: false,
            log: Vec::new(),
            log_bytes: 0,
            log_dropped_bytes: 0,
        }
    }
}

impl ResourceLimiter for Sandbox {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let all = self.memory_bytes.saturating_sub(current).saturating_add(desired);
        if all > self.limits.memory_bytes {
            self.memory_refused = true;
            return Ok(false);
        }
        self.memory_bytes = all;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let fits = desired <= self.limits.table_elements;
        self.memory_refused |= !fits;
        Ok(fits)
    }

    fn instances(&self) -> usize {
        self.limits.instances
    }

    fn memories(&self) -> usize {
        self.limits.instances
    }

    fn tables(&self) -> usize {
        self.limits.instances
    }
}

impl types::Host for Sandbox {}

impl log::Host for Sandbox {
    fn write(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        if self.log_bytes.saturating_add(message.len()) <= HOST_LIMITS.log_bytes {
            self.log_bytes += message.len();
            let message = one_line(&message);
            self.log.push(LogLine { level: contract::log_level(level), message });
            return Ok(());
        }
        // Copying costs no fuel. A plugin that goes on writing is stopped, at the same byte on every host.
        self.log_dropped_bytes = self.log_dropped_bytes.saturating_add(message.len());
        if self.log_dropped_bytes > HOST_LIMITS.log_flood_bytes {
            wasmtime::bail!(LogFlood);
        }
        Ok(())
    }
}

/// A plugin floods the log.
#[derive(Debug, thiserror::Error)]
#[error("it writes more than {} bytes to the log", HOST_LIMITS.log_flood_bytes)]
pub(crate) struct LogFlood;

/// Moves an engine's epoch on, once a millisecond, while calls are under way; it sleeps when there are none.
pub(crate) struct Ticker {
    shared: Arc<Shared>,
}

struct Shared {
    calls: Mutex<Calls>,
    changed: Condvar,
}

#[derive(Default)]
struct Calls {
    running: usize,
    closed: bool,
}

impl Shared {
    /// Changes it. The thread sleeps where no call runs, and is woken when the first begins: it's no use to wake it at each.
    fn change(&self, change: impl FnOnce(&mut Calls)) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let was_idle = calls.running == 0;
        change(&mut calls);
        let wakes = was_idle && (calls.running > 0 || calls.closed);
        drop(calls);
        if wakes {
            self.changed.notify_one();
        }
    }
}

impl Ticker {
    /// A tick: the unit of a store's epoch deadline.
    const TICK: Duration = Duration::from_millis(1);

    /// Starts the thread; `enter` is what it does first.
    pub(crate) fn start(
        engine: wasmtime::Engine,
        enter: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { calls: Mutex::default(), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("policy-ticker".into()).spawn(move || {
            enter();
            tick(&theirs, &engine);
        })?;
        Ok(Self { shared })
    }

    /// Ticks until what this gives is dropped.
    pub(crate) fn during_call(&self) -> impl Drop + '_ {
        self.shared.change(|calls| calls.running += 1);
        Running(&self.shared)
    }
}

struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.change(|calls| calls.running = calls.running.saturating_sub(1));
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.change(|calls| calls.closed = true);
    }
}

fn tick(shared: &Shared, engine: &wasmtime::Engine) {
    let mut calls = shared.calls.lock().unwrap_or_else(PoisonError::into_inner);
    while !calls.closed {
        if calls.running == 0 {
            calls = shared.changed.wait(calls).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(calls);
        thread::sleep(Ticker::TICK);
        engine.increment_epoch();
        calls = shared.calls.lock().unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(memory_bytes: usize) -> Sandbox {
        Sandbox::new(PluginLimits { memory_bytes, ..PluginLimits::DEFAULT })
    }

    #[test]
    fn memories_are_bounded_together() {
        let mut sandbox = sandbox(10);
        assert!(sandbox.memory_growing(0, 6, None).unwrap());
        assert!(sandbox.memory_growing(0, 4, None).unwrap());
        assert!(!sandbox.memory_growing(4, 5, None).unwrap());
        assert!(sandbox.memory_refused);
    }

    #[test]
    fn tables_are_bounded() {
        let mut sandbox = sandbox(10);
        assert!(sandbox.table_growing(0, PluginLimits::DEFAULT.table_elements, None).unwrap());
        assert!(!sandbox.table_growing(0, PluginLimits::DEFAULT.table_elements + 1, None).unwrap());
    }

    #[test]
    fn the_log_keeps_what_fits_counts_the_rest_and_ends_a_flood() {
        use log::Host as _;
        let mut sandbox = sandbox(10);
        let line = "x".repeat(1 << 10);
        let lines = (HOST_LIMITS.log_bytes + HOST_LIMITS.log_flood_bytes) / line.len();
        for _ in 0..lines {
            sandbox.write(log::Level::Info, line.clone()).unwrap();
        }
        assert_eq!(sandbox.log.len() * line.len(), HOST_LIMITS.log_bytes);
        assert_eq!(sandbox.log_dropped_bytes, HOST_LIMITS.log_flood_bytes);
        assert!(sandbox.write(log::Level::Info, line).unwrap_err().is::<LogFlood>());
    }
}
