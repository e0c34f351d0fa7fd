//! The Wasm host: loads policy plugins and asks them for verdicts.
//!
//! 1. **A policy decides, and can do nothing else.** A plugin is a component that may import one interface, the log.
//!    It has no clock, no randomness, no files, no network; whatever it may know comes in with the question.
//! 2. **It fails closed.** No bundle, no plugin, another digest, a trap, an endless loop, an answer out of bounds:
//!    each is a [`PolicyError`] with a code of its own, and no guest starts. A [`PolicyError`] is never a denial and
//!    never counts as a yes.
//! 3. **The same question gives the same answer.** NaNs are canonical, relaxed SIMD and threads are off, and what ends
//!    a plugin that runs too long is its fuel, which counts instructions. The deadline on the clock stands behind it.
//! 4. **No call sees another.** Each is made in a store of its own, which is dropped when the answer is here.
//! 5. **No compiler lives here.** This crate links wasmtime's runtime alone. `casemate-policy-compiler`, a program of
//!    its own in a workspace of its own, compiles when a plugin is first seen; what it made is kept in a private cache
//!    and authenticated with a key that never leaves this host, since machine code is trusted once it's loaded.
//!
//! [`Engine::open`] reads a bundle (`policies/*.toml`), [`Engine::admit`] asks it about a guest that wants to start or change,
//! [`Engine::tick`] about those that run, [`Engine::release`] about a device that comes back. `docs/policies.md` is the handbook.

// Loading compiled code is unsafe by nature; it happens in `plugin` alone. `cache` takes a lease on a file, for which there is no
// safe wrapper.
#![allow(unsafe_code)]

mod bundle;
mod cache;
mod cases;
mod chain;
mod change;
mod compiler;
mod contract;
mod engine;
mod error;
mod govern;
mod limits;
mod oci;
mod plugin;
mod record;
mod release;
mod released;
mod request;
mod rule;
mod samples;
mod sandbox;
mod signature;
mod signer;
mod verdict;

pub use cases::{CaseResult, Coverage, run_cases};
pub use change::{Change, Field, Value};
pub use compiler::{Compiler, EXIT_INVALID, Ended, Launch, Plain, Streams};
pub use engine::{Config, Engine, Inspection, Installed, Needs, Substitute, engine_config, install};
pub use error::{Fault, PolicyError};
pub use govern::{Conflict, Failure, Memory, Tick};
pub use limits::{HOST_LIMITS, HostLimits, Lane, PluginLimits};
pub use plugin::Kind;
pub use record::{Difference, Outcome, Record, Stance, replay};
pub use released::{Check, CheckOutcome, ReleasedDevice, Ruling};
pub use request::{
    Amounts, Attrs, Device, Disk, File, GuestSpec, HostState, Neighbour, Net, Operation, Request, Tenant,
};
pub use rule::{Level, Mode, Rule};
pub use samples::{
    Action, Bounds, CpuSample, Deed, DiskSample, GuestSample, HostSample, Knob, Knobs, MemorySample,
    NetSample, Pressure, Rate, Samples,
};
pub use signer::{Claim, Signers, Witness};
pub use verdict::{Decision, LogLevel, LogLine, Override, PluginRun, Reason, Severity, Verdict};
