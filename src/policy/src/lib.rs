//! What decides: policies, as everybody but who runs their plugins sees them.
//!
//! 1. **A policy decides, and can do nothing else.** A plugin is a component that may import one interface, the log.
//!    It has no clock, no randomness, no files, no network; whatever it may know comes in with the question.
//! 2. **It fails closed.** No bundle, no plugin, another digest, a trap, an endless loop, an answer out of bounds, a process
//!    that ends: each is a [`PolicyError`] with a code of its own, and no guest starts. A [`PolicyError`] is never a denial and
//!    never counts as a yes.
//! 3. **No plugin runs here.** This crate links no Wasm. `casemate-policy-engine` ([`talk`]) runs plugins, a process for each bundle
//!    that is open, and root's Casemate starts it in a cell. What it says is checked like a stranger's word (`decision`, `govern`).
//! 4. **No compiler runs there.** `casemate-policy-compiler`, a program of its own in a workspace of its own, compiles when
//!    a plugin is first seen; what it made is kept in a private cache and authenticated with a key that never leaves this host.
//!
//! [`Engine::open`] reads a bundle (`policies/*.toml`), [`Engine::admit`] asks it about a guest that wants to start or change,
//! [`Engine::tick`] about those that run, [`Engine::release`] about a device that comes back. `docs/policies.md` is the handbook.

// `cache` takes a lease on a file, for which there is no safe wrapper.
#![allow(unsafe_code)]

mod bundle;
mod cache;
mod cases;
mod change;
mod code;
mod compiler;
mod decision;
mod engine;
mod error;
mod govern;
mod kind;
mod limits;
mod loader;
mod oci;
mod process;
mod programs;
mod record;
mod released;
mod request;
mod rule;
mod samples;
mod signature;
mod signer;
pub mod talk;
mod text;
mod verdict;

pub use cases::{CaseResult, Coverage, run_cases};
pub use change::{CASEMATE, Change, Field, Value, apply, invariants};
pub use code::{Code, OwnCode};
pub use compiler::EXIT_INVALID;
pub use engine::{Config, Engine, Inspection, Installed, Needs, Substitute, install};
pub use error::{Fault, PolicyError};
pub use govern::{Conflict, Failure, Memory, Tick};
pub use kind::Kind;
pub use limits::{HOST_LIMITS, HostLimits, Lane, PluginLimits};
pub use programs::{Ended, EngineStreams, Launch, Plain, Programs, Running, Streams};
pub use record::{Difference, Outcome, Record, Stance, replay};
pub use released::{Check, CheckOutcome, ReleasedDevice, Ruling};
pub use request::{
    Amounts, Attrs, Device, Disk, File, GuestSpec, HostState, Neighbour, Net, Operation, Request, Tenant,
};
pub use rule::{Effect, Level, Mode, Rule, Rules, Selector};
pub use samples::{
    Action, Bounds, CpuSample, Deed, DiskSample, GuestSample, HostSample, Knob, Knobs, MemorySample,
    NetSample, Pressure, Rate, Samples,
};
pub use signer::{Claim, Signers, Witness};
pub use text::{is_code, one_line};
pub use verdict::{Decision, LogLevel, LogLine, Override, PluginRun, Reason, Severity, Verdict};
