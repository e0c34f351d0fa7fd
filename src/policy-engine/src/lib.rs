//! Runs policy plugins: the Wasm host, in a process of its own.
//!
//! 1. **The same question gives the same answer.** NaNs are canonical, relaxed SIMD and threads are off, and what ends
//!    a plugin that runs too long is its fuel, which counts instructions. The deadline on the clock stands behind it.
//! 2. **No call sees another.** Each is made in a store of its own, which is dropped when the answer is here.
//! 3. **Whoever escapes from a plugin is nowhere.** The process has one socket, the mapped code, and no file. Root's Casemate starts it
//!    in a cell. While plugins are loaded, its filter lets it take code by descriptor and make it executable; before the
//!    first question it gives that up (`jail/filters/policy.toml`).
//! 4. **No compiler lives here.** This crate links wasmtime's runtime alone. What it's handed was compiled by
//!    `casemate-policy-compiler` and authenticated by whoever asks, [`casemate_policy`].
//!
//! The program is [`serve`]; the compiler begins with [`engine_config`].

// Mapping compiled code and running it is unsafe by nature; it happens in `code` alone.
#![allow(unsafe_code)]

mod chain;
mod code;
mod contract;
mod govern;
mod judge;
mod plugin;
mod release;
mod sandbox;
mod serve;

pub use serve::{Entered, serve};

use casemate_policy::{HOST_LIMITS, PluginLimits};

/// The engine's settings, on which what is compiled depends: host and compiler both start from these.
pub fn engine_config() -> wasmtime::Config {
    let mut config = wasmtime::Config::new();
    config
        .consume_fuel(true)
        .epoch_interruption(true)
        // What differs from one processor to another, or asks for threads, is not to be had.
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .wasm_custom_page_sizes(false)
        // What passes text between the parts of a component sees the memories of both; all together are limited.
        .wasm_multi_memory(true)
        // Bounds are checked in the code: no signal handler in the process that decides, no guard pages.
        .signals_based_traps(false)
        .memory_reservation(PluginLimits::MOST.memory_bytes as u64)
        .memory_guard_size(0)
        .guard_before_linear_memory(false)
        // An instance's first memory is copied, not mapped from a file in memory: plugins have little of it, and no file is made.
        .memory_init_cow(false)
        .max_wasm_stack(HOST_LIMITS.stack_bytes);
    config
}
