//! A plugin's way into the process that runs it: from the cache, or by way of the compiler.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use crate::{
    Code, Fault, PolicyError,
    engine::other_answer,
    process::Process,
    talk::{self, Ask, Described, Reply},
    text::one_line,
};

/// The wasmtime that engine and compiler are built with; a test holds it against both lock files.
const WASMTIME: &str = "48.0.8";

/// Counts up when the engine's settings, or what the compiler adds to them, change: what was compiled before is not used again.
const CONFIG_VERSION: u32 = 4;

/// Describing itself and looking at its settings, of a plugin that takes all the time that one may; on a host that stalls.
const PATIENCE: Duration = Duration::from_secs(60);

/// What loading needs.
pub(crate) struct Loader<'a> {
    pub(crate) process: &'a Process,
    pub(crate) code: &'a dyn Code,
}

/// A plugin that is loaded.
pub(crate) struct Loaded {
    pub(crate) described: Described,
    /// How long compiling took; none when it was in the cache.
    pub(crate) compile_time: Option<Duration>,
}

impl Loader<'_> {
    /// Has the process load a plugin, whose component is `bytes`.
    pub(crate) fn load(&self, plugin: &talk::Plugin, bytes: &[u8]) -> Result<Loaded, PolicyError> {
        let engine = engine_tag();
        if let Cached::Taken(described) = self.cached(&engine, plugin)? {
            return Ok(Loaded { described: *described, compile_time: None });
        }
        // Not there, or made by a Casemate whose engine was set up otherwise.
        let start = Instant::now();
        self.code.compile(&plugin.name, &plugin.digest, &engine, bytes)?;
        let compile_time = Some(start.elapsed());
        let broken = |cause: String| Err(PolicyError::new(Fault::Compiler, &plugin.name, cause));
        match self.cached(&engine, plugin)? {
            Cached::Taken(described) => Ok(Loaded { described: *described, compile_time }),
            Cached::Foreign(cause) => {
                broken(format!("the compiler is not of this version of Casemate: {cause}"))
            }
            Cached::Absent => broken("what was compiled has vanished".into()),
        }
    }

    /// What the cache has, as far as the engine takes it. The cache's own file is handed over where that may be: then only what
    /// runs takes memory, and all processes that decide share it. Else, and where no code may be mapped from the cache's file
    /// system (`noexec`), a copy is.
    fn cached(&self, engine: &str, plugin: &talk::Plugin) -> Result<Cached, PolicyError> {
        let mut cached = Cached::Absent;
        for may_be_shared in [true, false] {
            let Some(code) = self.code.load(&plugin.digest, engine, may_be_shared)? else { break };
            match self.hand_over(code, plugin)? {
                Reply::Loaded(described) => return Ok(Cached::Taken(Box::new(tidy(*described)))),
                Reply::Foreign(cause) => cached = Cached::Foreign(one_line(&cause)),
                _ => return Err(other_answer()),
            }
        }
        Ok(cached)
    }

    fn hand_over(&self, code: File, plugin: &talk::Plugin) -> Result<Reply, PolicyError> {
        self.process.ask(&Ask::Load(Box::new(plugin.clone())), Some(code), PATIENCE)
    }
}

enum Cached {
    Taken(Box<Described>),
    Foreign(String),
    Absent,
}

/// What a plugin says of itself, in lines. A schema has several, and is made fit where it's shown.
fn tidy(described: Described) -> Described {
    let all = |texts: Vec<String>| texts.iter().map(|text| one_line(text)).collect();
    Described {
        name: one_line(&described.name),
        version: one_line(&described.version),
        summary: one_line(&described.summary),
        reasons: all(described.reasons),
        changes: all(described.changes),
        needs: all(described.needs),
        imports: all(described.imports),
        exports: all(described.exports),
        ..described
    }
}

/// What compiled code depends on beside the component.
fn engine_tag() -> String {
    macro_rules! features {
        ($($name:tt)*) => { [$(($name, std::is_x86_feature_detected!($name))),*] };
    }
    // All that Cranelift's x86-64 back end looks at.
    let features = features!("sse3" "ssse3" "sse4.1" "sse4.2" "popcnt" "avx" "avx2" "fma" "bmi1" "bmi2"
        "avx512bitalg" "avx512dq" "avx512f" "avx512vl" "avx512vbmi" "lzcnt" "cmpxchg16b");
    let present: Vec<_> = features.iter().filter(|(_, present)| *present).map(|(name, _)| *name).collect();
    format!("wasmtime {WASMTIME} config {CONFIG_VERSION} x86_64 {}", present.join(" "))
}
