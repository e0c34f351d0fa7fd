//! Opens a bundle, asks it.

use std::{
    io::Read,
    path::Path,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use crate::{
    Fault, PolicyError, bundle,
    cache::{Cache, hex},
    compiler::{Compiler, Launch, Plain},
    contract,
    limits::{HOST_LIMITS, PluginLimits},
    plugin::{Answer, Loader, Parts, Plugin, surface},
    request::Request,
    sandbox::Ticker,
    verdict::{Decision, Verdict},
};

/// The wasmtime that host and compiler are built with; a test holds it against both lock files.
const WASMTIME: &str = "48.0.8";

/// Counts up when [`engine_config`], or what the compiler adds to it, changes: what was compiled before is not used again.
const CONFIG_VERSION: u32 = 1;

/// Where things are.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    /// The bundle: `policies/default.toml`.
    pub bundle: &'a Path,
    /// A folder of Casemate's own for compiled plugins; it's made when it isn't there, and has to have mode 0700.
    pub cache: &'a Path,
    /// The program `casemate-policy-compiler`. It's started for plugins that aren't in the cache.
    pub compiler: &'a Path,
}

/// A plugin that was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// Its name in the bundle.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// What it says it does.
    pub summary: String,
    /// SHA-256 of its component, in hexadecimal.
    pub digest: String,
    /// How long compiling took; none when it was in the cache.
    pub compile_time: Option<Duration>,
}

/// A bundle that is ready to be asked. It can be shared among threads.
pub struct Engine {
    plugins: Vec<Plugin>,
    installed: Vec<Installed>,
    ticker: Ticker,
}

/// The engine's settings, on which what is compiled depends: host and compiler both start from these.
pub fn engine_config() -> wasmtime::Config {
    let mut config = wasmtime::Config::new();
    config
        .consume_fuel(true)
        .epoch_interruption(true)
        // What differs from one processor to another, or asks for threads, is not to be had.
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        .wasm_custom_page_sizes(false)
        // Bounds are checked in the code: no signal handler in the process that decides, no guard pages.
        .signals_based_traps(false)
        .memory_reservation(PluginLimits::MOST.memory_bytes as u64)
        .memory_guard_size(0)
        .guard_before_linear_memory(false)
        .max_wasm_stack(HOST_LIMITS.stack_bytes);
    config
}

impl Engine {
    /// Reads a bundle, loads its plugins, and has each check its settings. Plugins that this host has not seen before
    /// are compiled, which takes about a second each; else it takes a few milliseconds.
    ///
    /// # Errors
    /// Whatever is wrong with any of them: a bundle is taken whole or not at all.
    pub fn open(config: Config<'_>) -> Result<Self, PolicyError> {
        Self::open_with(config, &Plain)
    }

    /// The same, with another way to run the compiler.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(config: Config<'_>, launch: &dyn Launch) -> Result<Self, PolicyError> {
        let source = read_bundle(config.bundle)?;
        let entries = bundle::parse(config.bundle, &source)?;
        let cache = Cache::open(config.cache)?;
        let (engine, ticker) = start()?;
        let engine_tag = engine_tag();
        let compiler = Compiler { program: config.compiler, launch };
        let loader = Loader { engine: &engine, engine_tag: &engine_tag, cache: &cache, compiler };
        let mut opened = Self { plugins: Vec::new(), installed: Vec::new(), ticker };
        for entry in &entries {
            opened.add(&loader, entry).map_err(|error| error.at(entry.location.clone()))?;
        }
        Ok(opened)
    }

    fn add(&mut self, loader: &Loader<'_>, entry: &bundle::Entry) -> Result<(), PolicyError> {
        let bytes = read_component(&entry.path)?;
        let digest = hex(&Sha256::digest(&bytes));
        if digest != entry.digest {
            let cause = format!("its sha256 is {digest}, the bundle says {}", entry.digest);
            return Err(PolicyError::new(Fault::Digest, entry.path.display(), cause));
        }
        let loaded = loader.load(&entry.name, &digest, &bytes)?;
        let parts = Parts {
            name: &entry.name,
            digest: &digest,
            limits: entry.limits,
            settings: &entry.settings,
            component: &loaded.component,
        };
        let plugin = Plugin::link(loader.engine, parts)?;
        let description = plugin.describe(&self.ticker)?;
        plugin.check_settings(&self.ticker)?;
        self.plugins.push(plugin);
        self.installed.push(Installed {
            name: entry.name.clone(),
            version: contract::one_line(&description.version),
            summary: contract::one_line(&description.summary),
            digest,
            compile_time: loaded.compile_time,
        });
        Ok(())
    }

    /// The plugins, in the order in which they are asked.
    pub fn plugins(&self) -> &[Installed] {
        &self.installed
    }

    /// Asks all plugins. One denial is enough; all are asked nevertheless, so that a user learns everything at once.
    ///
    /// # Errors
    /// There is no verdict, and the guest must not start: the request is too large, or a plugin failed. That holds even
    /// when another plugin has denied already.
    pub fn admit(&self, request: &Request) -> Result<Decision, PolicyError> {
        let start = Instant::now();
        check_size(request)?;
        let question = contract::request(request);
        let (mut denials, mut warnings, mut runs) = (Vec::new(), Vec::new(), Vec::new());
        for plugin in &self.plugins {
            let Answer { value, run } = plugin.admit(&self.ticker, &question)?;
            match value {
                Verdict::Allow { warnings: new } => warnings.extend(new),
                Verdict::Deny { reasons } => denials.extend(reasons),
            }
            runs.push(run);
        }
        let verdict =
            if denials.is_empty() { Verdict::Allow { warnings } } else { Verdict::Deny { reasons: denials } };
        Ok(Decision { verdict, plugins: runs, elapsed: start.elapsed() })
    }
}

/// What a plugin's file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// SHA-256 of the component, in hexadecimal: what a bundle writes as `sha256`.
    pub digest: String,
    /// Size of the component.
    pub size_bytes: u64,
    /// The plugin's own name.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// What the plugin says it does.
    pub summary: String,
    /// A JSON Schema of its settings.
    pub settings_schema: Option<String>,
    /// Names of what it imports.
    pub imports: Vec<String>,
    /// Names of what it exports.
    pub exports: Vec<String>,
    /// How long compiling took; none when it was in the cache.
    pub compile_time: Option<Duration>,
}

/// Checks a plugin's file and compiles it into the cache, so that no bundle that names it has to wait. Nothing is
/// asked of the plugin but what it is.
///
/// # Errors
/// The file is no plugin that [`Engine::open`] would take, or it can't be compiled.
pub fn install(file: &Path, cache: &Path, compiler: &Path) -> Result<Inspection, PolicyError> {
    install_with(file, cache, compiler, &Plain)
}

/// The same, with another way to run the compiler.
///
/// # Errors
/// As [`install`].
pub fn install_with(
    file: &Path,
    cache: &Path,
    compiler: &Path,
    launch: &dyn Launch,
) -> Result<Inspection, PolicyError> {
    let bytes = read_component(file)?;
    let digest = hex(&Sha256::digest(&bytes));
    let cache = Cache::open(cache)?;
    let (engine, ticker) = start()?;
    let engine_tag = engine_tag();
    let compiler = Compiler { program: compiler, launch };
    let loader = Loader { engine: &engine, engine_tag: &engine_tag, cache: &cache, compiler };
    let name = file.display().to_string();
    let loaded = loader.load(&name, &digest, &bytes)?;
    let parts = Parts {
        name: &name,
        digest: &digest,
        limits: PluginLimits::DEFAULT,
        settings: "{}",
        component: &loaded.component,
    };
    let description = Plugin::link(&engine, parts)?.describe(&ticker)?;
    let (imports, exports) = surface(&engine, &loaded.component);
    Ok(Inspection {
        digest,
        size_bytes: bytes.len() as u64,
        name: contract::one_line(&description.name),
        version: contract::one_line(&description.version),
        summary: contract::one_line(&description.summary),
        settings_schema: description.settings_schema,
        imports,
        exports,
        compile_time: loaded.compile_time,
    })
}

fn start() -> Result<(wasmtime::Engine, Ticker), PolicyError> {
    let engine = wasmtime::Engine::new(&engine_config())
        .map_err(|error| PolicyError::new(Fault::Engine, "wasmtime", format!("{error:#}")))?;
    let ticker = Ticker::start(engine.clone())
        .map_err(|error| PolicyError::new(Fault::Engine, "policy-ticker", format!("no thread: {error}")))?;
    Ok((engine, ticker))
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

fn read_bundle(path: &Path) -> Result<String, PolicyError> {
    let fault = |fault, cause: String| PolicyError::new(fault, path.display(), cause);
    let bytes = read(path, HOST_LIMITS.bundle_bytes).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => fault(Fault::BundleMissing, "there is no such file".into()),
        _ => fault(Fault::Bundle, format!("it can't be read: {error}")),
    })?;
    let bytes = bytes.ok_or_else(|| {
        fault(Fault::Bundle, format!("it has more than {} bytes", HOST_LIMITS.bundle_bytes))
    })?;
    String::from_utf8(bytes).map_err(|_| fault(Fault::Bundle, "it isn't UTF-8".into()))
}

fn read_component(path: &Path) -> Result<Vec<u8>, PolicyError> {
    let bytes = read(path, HOST_LIMITS.component_bytes)
        .map_err(|error| PolicyError::new(Fault::Missing, path.display(), error))?;
    bytes.ok_or_else(|| {
        let cause = format!("it has more than {} MiB", HOST_LIMITS.component_bytes >> 20);
        PolicyError::new(Fault::Size, path.display(), cause)
    })
}

/// A regular file's bytes, or none when there are more than `most`.
fn read(path: &Path, most: usize) -> std::io::Result<Option<Vec<u8>>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it isn't a regular file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes).filter(|bytes| bytes.len() <= most))
}

fn check_size(request: &Request) -> Result<(), PolicyError> {
    struct Counter(usize);
    impl std::io::Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.saturating_add(bytes.len());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut counter = Counter(0);
    let subject = &request.guest.name;
    serde_json::to_writer(&mut counter, request)
        .map_err(|error| PolicyError::new(Fault::Request, subject, error))?;
    if counter.0 <= HOST_LIMITS.request_bytes {
        return Ok(());
    }
    let cause =
        format!("the request has {} bytes; at most {} are passed", counter.0, HOST_LIMITS.request_bytes);
    Err(PolicyError::new(Fault::Request, subject, cause))
}
