//! Opens a bundle, asks it.

use std::{io::Read, path::Path, time::Duration};

use casemate_spec::Location;
use sha2::{Digest, Sha256};

use crate::{
    Fault, PolicyError, bundle,
    cache::{Cache, hex},
    chain::nobody_admits,
    change::Field,
    compiler::Compiler,
    contract::{self, Description},
    limits::{HOST_LIMITS, Lane, PluginLimits},
    oci,
    plugin::{Kind, Loader, Parts, Plugin, surface},
    rule::Rules,
    samples::Deed,
    sandbox::Ticker,
    signature,
};

/// The wasmtime that host and compiler are built with; a test holds it against both lock files.
const WASMTIME: &str = "48.0.8";

/// Counts up when [`engine_config`], or what the compiler adds to it, changes: what was compiled before is not used again.
const CONFIG_VERSION: u32 = 3;

/// Where things are.
#[derive(Clone, Copy)]
pub struct Config<'a> {
    /// The bundle: `policies/default.toml`.
    pub bundle: &'a Path,
    /// A folder of Casemate's own for compiled plugins; it's made when it isn't there, and has to have mode 0700.
    pub cache: &'a Path,
    /// The program `casemate-policy-compiler`. It's started for plugins that aren't in the cache.
    pub compiler: Compiler<'a>,
    /// A public key of minisign: with one, the bundle has to be signed by it.
    pub key: Option<&'a Path>,
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
    /// What it's for.
    pub kinds: Vec<Kind>,
    /// Codes of the reasons that it may give.
    pub reasons: Vec<String>,
    /// How long compiling took; none when it was in the cache.
    pub compile_time: Option<Duration>,
}

/// A bundle that is ready to be asked. It can be shared among threads.
pub struct Engine {
    pub(crate) plugins: Vec<Plugin>,
    installed: Vec<Installed>,
    bundle_digest: String,
    needs: Needs,
    pub(crate) ticker: Ticker,
}

/// What plugins have to know that costs the host time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// The kernel's digest: `kernel-sha256`.
    pub kernel_sha256: bool,
    /// The initrd's: `initrd-sha256`.
    pub initrd_sha256: bool,
    /// Those of disks that the guest may only read: `disk-sha256`.
    pub disk_sha256: bool,
}

impl Needs {
    /// Adds a need by its name; false when it's none.
    fn add(&mut self, name: &str) -> bool {
        match name {
            "kernel-sha256" => self.kernel_sha256 = true,
            "initrd-sha256" => self.initrd_sha256 = true,
            "disk-sha256" => self.disk_sha256 = true,
            _ => return false,
        }
        true
    }
}

/// A plugin's file that takes the place of the one that the bundle names, whatever its digest: to see what it would
/// say before the bundle is changed.
#[derive(Clone, Copy, Debug)]
pub struct Substitute<'a> {
    /// Whose place, by its name in the bundle; the plugin's own name when left out.
    pub name: Option<&'a str>,
    /// The component.
    pub file: &'a Path,
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
        .wasm_custom_page_sizes(false)
        // What passes text between the parts of a component sees the memories of both; all together are limited.
        .wasm_multi_memory(true)
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
        Self::open_with(config, None)
    }

    /// The same, with a plugin in the place of another.
    ///
    /// # Errors
    /// As [`Engine::open`], and `policy-bundle` when the bundle has no plugin of this name.
    pub fn open_with(config: Config<'_>, substitute: Option<Substitute<'_>>) -> Result<Self, PolicyError> {
        let source = read_bundle(config.bundle)?;
        if let Some(key) = config.key {
            signature::check(config.bundle, source.as_bytes(), key)?;
        }
        let mut entries = bundle::parse(config.bundle, &source)?;
        if let Some(substitute) = substitute {
            let bytes = read_component(substitute.file)?;
            let name = match substitute.name {
                Some(name) => name.to_owned(),
                None => install(substitute.file, config.cache, config.compiler)?.name,
            };
            let entry = entries.iter_mut().find(|entry| entry.name == name).ok_or_else(|| {
                let cause =
                    format!("it has no plugin {name:?} whose place {} could take", substitute.file.display());
                PolicyError::new(Fault::Bundle, config.bundle.display(), cause)
            })?;
            entry.path = substitute.file.to_owned();
            entry.digest = hex(&Sha256::digest(&bytes));
        }
        let engine = Self::load(config, hex(&Sha256::digest(&source)), &entries)?;
        if engine.has(Kind::Admission) { Ok(engine) } else { Err(nobody_admits(config.bundle.display())) }
    }

    /// One plugin as a bundle of its own, enforced, in this lane, with these settings (a JSON object).
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open_plugin(
        file: &Path,
        lane: Lane,
        settings: &str,
        cache: &Path,
        compiler: Compiler<'_>,
    ) -> Result<Self, PolicyError> {
        let seen = install(file, cache, compiler)?;
        let config = Config { bundle: file, cache, compiler, key: None };
        let may_change = seen.changes.iter().filter_map(|name| Field::named(name)).collect();
        let may_do = Deed::NAMES.into_iter().filter(|name| seen.changes.iter().any(|n| n == name)).collect();
        let entry = bundle::Entry {
            name: seen.name,
            path: file.to_owned(),
            digest: seen.digest.clone(),
            settings: settings.to_owned(),
            limits: lane.limits(),
            rules: Rules::default(),
            may_change,
            may_do,
            needs: None,
            location: Location { file: file.to_owned(), line: 1, key: "plugin".into() },
        };
        Self::load(config, seen.digest, &[entry])
    }

    fn load(
        config: Config<'_>,
        bundle_digest: String,
        entries: &[bundle::Entry],
    ) -> Result<Self, PolicyError> {
        let cache = Cache::open(config.cache)?;
        let (engine, ticker) = start()?;
        let engine_tag = engine_tag();
        let loader =
            Loader { engine: &engine, engine_tag: &engine_tag, cache: &cache, compiler: config.compiler };
        let (plugins, installed, needs) = (Vec::new(), Vec::new(), Needs::default());
        let mut opened = Self { plugins, installed, bundle_digest, needs, ticker };
        for entry in entries {
            opened.add(&loader, entry).map_err(|error| error.at(entry.location.clone()))?;
        }
        Ok(opened)
    }

    fn add(&mut self, loader: &Loader<'_>, entry: &bundle::Entry) -> Result<(), PolicyError> {
        let is_layout = entry.path.is_dir();
        let (bytes, digest) = if is_layout {
            oci::component(&entry.path, &entry.digest)?
        } else {
            let bytes = read_component(&entry.path)?;
            let digest = hex(&Sha256::digest(&bytes));
            (bytes, digest)
        };
        // Of a layout, the digest may be the manifest's; what it names was checked.
        if digest != entry.digest && !is_layout {
            let cause = format!("its sha256 is {digest}, the bundle says {}", entry.digest);
            return Err(PolicyError::new(Fault::Digest, entry.path.display(), cause));
        }
        let loaded = loader.load(&entry.name, &digest, &bytes)?;
        let parts = Parts {
            name: &entry.name,
            digest: &digest,
            limits: entry.limits,
            settings: &entry.settings,
            rules: entry.rules.clone(),
            may_change: entry.may_change.clone(),
            may_do: entry.may_do.clone(),
            component: &loaded.component,
        };
        let plugin = Plugin::link(loader.engine, parts)?;
        let description = plugin.describe(&self.ticker)?;
        plugin.check_settings(&self.ticker)?;
        self.permit(entry, &description)?;
        let kinds = plugin.kinds();
        self.plugins.push(plugin);
        self.installed.push(Installed {
            name: entry.name.clone(),
            version: contract::one_line(&description.version),
            summary: contract::one_line(&description.summary),
            digest,
            kinds,
            reasons: description.reasons.iter().map(|code| contract::one_line(code)).collect(),
            compile_time: loaded.compile_time,
        });
        Ok(())
    }

    /// Holds what the bundle permits against what the plugin says it wants.
    fn permit(&mut self, entry: &bundle::Entry, description: &Description) -> Result<(), PolicyError> {
        let fields = entry.may_change.iter().map(|field| ("change", field.name()));
        let mut permitted = fields.chain(entry.may_do.iter().map(|deed| ("do", *deed)));
        let unwanted = permitted.find(|(_, name)| !description.changes.iter().any(|known| known == name));
        if let Some((what, name)) = unwanted {
            let cause = format!("it may {what} {name}, and says that it never does");
            return Err(PolicyError::new(Fault::Bundle, &entry.name, cause));
        }
        if let Some(need) = entry.needs.iter().flatten().find(|need| !description.needs.contains(need)) {
            let cause = format!("{:?} is none of its needs: {}", need, description.needs.join(", "));
            return Err(PolicyError::new(Fault::Bundle, &entry.name, cause));
        }
        for need in &description.needs {
            let met =
                entry.rules.is_ever_asked() && entry.needs.as_ref().is_none_or(|needs| needs.contains(need));
            let needs = if met { &mut self.needs } else { &mut Needs::default() };
            if !needs.add(need) {
                let cause = format!("it needs {need:?}, which this Casemate does not know");
                return Err(PolicyError::new(Fault::Contract, &entry.name, cause));
            }
        }
        Ok(())
    }

    /// The plugins, in the order in which they are asked.
    pub fn plugins(&self) -> &[Installed] {
        &self.installed
    }

    /// Whether a plugin of this kind is among them.
    pub fn has(&self, kind: Kind) -> bool {
        self.plugins.iter().any(|plugin| plugin.is(kind))
    }

    /// The same, and a plugin that fails too often in a row (`HostLimits::failures`) isn't asked any more: for who keeps it open.
    #[must_use]
    pub fn suspending(mut self) -> Self {
        self.plugins.iter_mut().for_each(|plugin| plugin.suspends = true);
        self
    }

    /// Names of the plugins that aren't asked any more.
    pub fn suspended(&self) -> Vec<&str> {
        self.plugins
            .iter()
            .filter(|plugin| plugin.is_suspended())
            .map(|plugin| plugin.name.as_str())
            .collect()
    }

    /// SHA-256 of the bundle's text, in hexadecimal.
    pub fn bundle_digest(&self) -> &str {
        &self.bundle_digest
    }

    /// What the plugins have to know that costs the host time.
    pub fn needs(&self) -> Needs {
        self.needs
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
    /// What it's for.
    pub kinds: Vec<Kind>,
    /// A JSON Schema of its settings.
    pub settings_schema: Option<String>,
    /// Codes of the reasons that it may give.
    pub reasons: Vec<String>,
    /// Fields that it may want to change.
    pub changes: Vec<String>,
    /// What it has to know that costs the host time.
    pub needs: Vec<String>,
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
pub fn install(file: &Path, cache: &Path, compiler: Compiler<'_>) -> Result<Inspection, PolicyError> {
    let bytes = read_component(file)?;
    let digest = hex(&Sha256::digest(&bytes));
    let cache = Cache::open(cache)?;
    let (engine, ticker) = start()?;
    let engine_tag = engine_tag();
    let loader = Loader { engine: &engine, engine_tag: &engine_tag, cache: &cache, compiler };
    let name = file.display().to_string();
    let loaded = loader.load(&name, &digest, &bytes)?;
    let parts = Parts {
        name: &name,
        digest: &digest,
        // Nobody has said yet which lane it is for, and it's asked for its description alone.
        limits: PluginLimits::SCRIPTED,
        settings: "{}",
        rules: Rules::default(),
        may_change: Vec::new(),
        may_do: Vec::new(),
        component: &loaded.component,
    };
    let plugin = Plugin::link(&engine, parts)?;
    let description = plugin.describe(&ticker)?;
    let (imports, exports) = surface(&engine, &loaded.component);
    Ok(Inspection {
        digest,
        size_bytes: bytes.len() as u64,
        name: contract::one_line(&description.name),
        version: contract::one_line(&description.version),
        summary: contract::one_line(&description.summary),
        kinds: plugin.kinds(),
        settings_schema: description.settings_schema,
        reasons: description.reasons.iter().map(|text| contract::one_line(text)).collect(),
        changes: description.changes.iter().map(|text| contract::one_line(text)).collect(),
        needs: description.needs.iter().map(|text| contract::one_line(text)).collect(),
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
pub(crate) fn read(path: &Path, most: usize) -> std::io::Result<Option<Vec<u8>>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("it isn't a regular file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes).filter(|bytes| bytes.len() <= most))
}
