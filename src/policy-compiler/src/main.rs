//! Compiles policy plugins ahead of time, in a program of its own.
//!
//! A component on standard input, compiled code on standard output, one line of complaint on standard error. Compiling
//! an unknown component is the one thing in Casemate that runs a compiler, and wasmtime promises no bound on it: so it
//! happens here. Before a byte of the component was read, privileges are gone, memory and time are bounded, and a seccomp
//! filter (`jail/filters/compiler.toml`) is on: it can open nothing, no file and no socket, and start nothing. Root's
//! Casemate starts it in a cell besides.
//!
//! Exit code 2: the component is none. Any other: the compiler is at fault, or its bounds.

use std::{
    fmt::Display,
    io::{Read, Write},
    process::ExitCode,
};

use casemate_filters::{Role, install};
use casemate_policy::{EXIT_INVALID, HOST_LIMITS};
use casemate_policy_engine::engine_config;
use rustix::{
    io::Errno,
    process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, geteuid, set_dumpable_behavior, setrlimit},
    thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// Address space; a component of 18 MB took 381 MB.
const MEMORY_BYTES: u64 = 2 << 30;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, cause)) => {
            // Whoever started this reads one line; that it can't be written changes nothing.
            let _ = writeln!(std::io::stderr(), "{}", cause.replace('\n', ": "));
            ExitCode::from(code)
        }
    }
}

type Failure = (u8, String);

fn broken(what: &str) -> impl Fn(&dyn Display) -> Failure + '_ {
    move |error| (1, format!("{what}: {error}"))
}

fn run() -> Result<(), Failure> {
    confine().map_err(|error| broken("this process can't be confined")(&error))?;
    let mut component = Vec::new();
    let most = HOST_LIMITS.component_bytes as u64;
    let read = std::io::stdin().take(most + 1).read_to_end(&mut component);
    read.map_err(|error| broken("the component can't be read")(&error))?;
    if component.len() as u64 > most {
        return Err(invalid(&format!("more than {} MiB", most >> 20)));
    }
    let mut config = engine_config();
    config.cranelift_nan_canonicalization(true).generate_address_map(false);
    let engine = wasmtime::Engine::new(&config).map_err(|error| broken("no engine")(&error))?;
    let code = engine.precompile_component(&component).map_err(|error| invalid(&format!("{error:#}")))?;
    std::io::stdout().write_all(&code).map_err(|error| broken("the code can't be written")(&error))
}

fn invalid(cause: &str) -> Failure {
    (u8::try_from(EXIT_INVALID).unwrap_or(1), cause.to_owned())
}

/// Root's share: nobody. The number is the kernel's own overflow uid.
const NOBODY: u32 = 65_534;

/// Gives up what isn't needed. Standard input, output and error stay; with room for three descriptors, no other can be
/// made.
fn confine() -> rustix::io::Result<()> {
    let seconds = HOST_LIMITS.compile_ms.div_ceil(1_000);
    let limit = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    limit(Resource::As, MEMORY_BYTES)?;
    limit(Resource::Cpu, seconds)?;
    limit(Resource::Fsize, HOST_LIMITS.compiled_bytes as u64)?;
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, 3)?;
    if geteuid().is_root() {
        // Of this thread, and there is no other.
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
    }
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    install(Role::Compiler).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}
