//! Opens a bundle, asks it.

use std::{borrow::Cow, io::Read, path::Path, time::Duration};

use casemate_spec::Location;
use sha2::{Digest, Sha256};

use crate::{
    Code, Fault, PolicyError, Programs, bundle,
    change::Field,
    decision,
    govern::{self, Memory, Tick},
    kind::Kind,
    limits::{HOST_LIMITS, Lane, PluginLimits},
    loader::{Loaded, Loader},
    oci,
    process::{Process, broken},
    released::{ReleasedDevice, Ruling},
    request::Request,
    rule::{Effect, Rules},
    samples::{Deed, Samples},
    signature,
    talk::{self, Ask, Described, Reply},
    text::{hex, one_line},
    verdict::{Decision, Reason},
};

/// Where things are.
#[derive(Clone, Copy)]
pub struct Config<'a> {
    /// The bundle: `policies/default.toml`.
    pub bundle: &'a Path,
    /// A folder of Casemate's own for compiled plugins; it's made when it isn't there, and has to have mode 0700.
    pub cache: &'a Path,
    /// The programs that compile and run plugins.
    pub programs: &'a Programs,
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

/// A bundle that is ready to be asked: the plugins run in a process of their own, `casemate-policy-engine`, and end when this is
/// dropped. It can be shared among threads; questions wait for each other.
pub struct Engine {
    entries: Vec<bundle::Entry>,
    installed: Vec<Installed>,
    bundle_digest: String,
    needs: Needs,
    process: Process,
    /// For an answer of all plugins, at worst.
    patience: Duration,
}

/// Beyond what the plugins may take: for the way there and back, on a host that stalls.
const SLACK: Duration = Duration::from_secs(10);

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
                None => install(substitute.file, config.cache, config.programs)?.name,
            };
            let entry = entries.iter_mut().find(|entry| entry.name == name).ok_or_else(|| {
                let cause =
                    format!("it has no plugin {name:?} whose place {} could take", substitute.file.display());
                PolicyError::new(Fault::Bundle, config.bundle.display(), cause)
            })?;
            entry.path = substitute.file.to_owned();
            entry.digest = hex(&Sha256::digest(&bytes));
        }
        let engine = Self::load(config, hex(&Sha256::digest(&source)), entries)?;
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
        programs: &Programs,
    ) -> Result<Self, PolicyError> {
        let seen = install(file, cache, programs)?;
        let config = Config { bundle: file, cache, programs, key: None };
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
        Self::load(config, seen.digest, vec![entry])
    }

    fn load(
        config: Config<'_>,
        bundle_digest: String,
        entries: Vec<bundle::Entry>,
    ) -> Result<Self, PolicyError> {
        let code = config.programs.code(config.cache)?;
        let process = Process::start(config.programs)?;
        // One that may change something is asked twice.
        let most: u64 = entries.iter().map(|entry| entry.limits.deadline_ms.saturating_mul(2)).sum();
        let patience = SLACK + Duration::from_millis(most);
        let (installed, needs) = (Vec::new(), Needs::default());
        let mut opened = Self { entries: Vec::new(), installed, bundle_digest, needs, process, patience };
        for entry in entries {
            opened.add(&*code, &entry).map_err(|error| error.at(entry.location.clone()))?;
            opened.entries.push(entry);
        }
        opened.ready(false)?;
        Ok(opened)
    }

    fn ready(&self, suspends: bool) -> Result<(), PolicyError> {
        match self.process.ask(&Ask::Ready { suspends }, None, SLACK)? {
            Reply::Ready => Ok(()),
            _ => Err(other_answer()),
        }
    }

    fn add(&mut self, code: &dyn Code, entry: &bundle::Entry) -> Result<(), PolicyError> {
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
        let plugin = talk::Plugin {
            name: entry.name.clone(),
            digest: digest.clone(),
            settings: Some(entry.settings.clone()),
            limits: entry.limits,
            rules: entry.rules.clone(),
            may_change: entry.may_change.clone(),
            may_do: entry.may_do.iter().map(|&deed| deed.to_owned()).collect(),
        };
        let loader = Loader { process: &self.process, code };
        let Loaded { described, compile_time } = loader.load(&plugin, &bytes)?;
        self.permit(entry, &described)?;
        self.installed.push(Installed {
            name: entry.name.clone(),
            version: described.version,
            summary: described.summary,
            digest,
            kinds: described.kinds,
            reasons: described.reasons,
            compile_time,
        });
        Ok(())
    }

    /// Holds what the bundle permits against what the plugin says it wants.
    fn permit(&mut self, entry: &bundle::Entry, description: &Described) -> Result<(), PolicyError> {
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
        self.installed.iter().any(|plugin| plugin.kinds.contains(&kind))
    }

    /// The same, and a plugin that fails too often in a row (`HostLimits::failures`) isn't asked any more: for who keeps it open.
    ///
    /// # Errors
    /// `policy-engine`.
    pub fn suspending(self) -> Result<Self, PolicyError> {
        self.ready(true)?;
        Ok(self)
    }

    /// Names of the plugins that aren't asked any more.
    ///
    /// # Errors
    /// `policy-engine`.
    pub fn suspended(&self) -> Result<Vec<String>, PolicyError> {
        match self.process.ask(&Ask::Suspended, None, SLACK)? {
            Reply::Suspended(names) => Ok(names.iter().map(|name| one_line(name)).collect()),
            _ => Err(other_answer()),
        }
    }

    /// Asks all plugins. One denial is enough; all are asked nevertheless, so that a user learns everything at once.
    ///
    /// With a reason to override, refusals of rules whose level is `soft` become warnings.
    ///
    /// # Errors
    /// There is no verdict, and the guest must not start: the request is too large, a plugin failed whose word
    /// counts, or the process in which they run did. That holds even when another plugin has denied already.
    pub fn admit(&self, request: &Request, override_why: Option<&str>) -> Result<Decision, PolicyError> {
        let start = std::time::Instant::now();
        if !self.has(Kind::Admission) {
            return Err(nobody_admits("the bundle"));
        }
        let ask =
            Ask::Admit { request: Cow::Borrowed(request), override_why: override_why.map(Cow::Borrowed) };
        let message = talk::encode_ask(&ask).map_err(|error| broken(error.to_string()))?;
        if message.len() > HOST_LIMITS.request_bytes {
            let most = HOST_LIMITS.request_bytes;
            let cause = format!("the request has {} bytes; at most {most} are passed", message.len());
            return Err(PolicyError::new(Fault::Request, &request.guest.name, cause));
        }
        let Reply::Decided(decision) = self.process.send(&message, None, self.patience)? else {
            return Err(other_answer());
        };
        let mut decision = decision::checked(*decision, request, override_why, &self.entries)?;
        decision.elapsed = start.elapsed();
        Ok(decision)
    }

    /// Asks all governors what is to be done. `memory` is what they remember; empty at first.
    pub fn tick(&self, samples: &Samples, memory: &mut Memory) -> Tick {
        let asked = |entry: &bundle::Entry| entry.rules.is_ever_asked();
        if !self.has(Kind::Resources) || !self.entries.iter().any(asked) {
            return Tick::default();
        }
        let ask = Ask::Tick { samples: Cow::Borrowed(samples), memory: Cow::Borrowed(memory) };
        let answer = match self.process.ask(&ask, None, self.patience) {
            Ok(Reply::Ticked { tick, memory: now }) => govern::checked(tick, &now, samples, &self.entries),
            Ok(_) => Err(other_answer()),
            Err(error) => Err(error),
        };
        match answer {
            Ok((tick, now)) => {
                memory.extend(now);
                tick
            }
            Err(error) => govern::failed(&error),
        }
    }

    /// Asks all plugins that judge devices. A plugin that fails and whose word counts condemns the device: nobody knows what it
    /// would have said. So does a process that fails.
    pub fn release(&self, device: &ReleasedDevice) -> Ruling {
        let effects = self.installed.iter().zip(&self.entries).filter_map(|(plugin, entry)| {
            plugin.kinds.contains(&Kind::Device).then(|| entry.rules.rule_of(&device.tenant).effect())?
        });
        let Some(effect) = effects.max() else { return Ruling::default() };
        let error = match self.process.ask(&Ask::Release(Cow::Borrowed(device)), None, self.patience) {
            Ok(Reply::Ruled(ruling)) => return decision::tidy_ruling(ruling),
            Ok(_) => other_answer(),
            Err(error) => error,
        };
        let reason = Reason::of_casemate("plugin-failed", error.to_string());
        let mut ruling = Ruling::default();
        if effect >= Effect::DenySoftly { &mut ruling.quarantine } else { &mut ruling.warnings }.push(reason);
        ruling
    }

    /// Whether it can still be asked: one whose process has failed is to be opened anew.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// The process in which the plugins run.
    pub fn pid(&self) -> u32 {
        self.process.pid()
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
pub fn install(file: &Path, cache: &Path, programs: &Programs) -> Result<Inspection, PolicyError> {
    let bytes = read_component(file)?;
    let digest = hex(&Sha256::digest(&bytes));
    let code = programs.code(cache)?;
    let process = Process::start(programs)?;
    let plugin = talk::Plugin {
        name: file.display().to_string(),
        digest: digest.clone(),
        settings: None,
        // Nobody has said yet which lane it is for, and it's asked for its description alone.
        limits: PluginLimits::SCRIPTED,
        rules: Rules::default(),
        may_change: Vec::new(),
        may_do: Vec::new(),
    };
    let Loaded { described, compile_time } =
        Loader { process: &process, code: &*code }.load(&plugin, &bytes)?;
    let Described {
        name,
        version,
        summary,
        kinds,
        settings_schema,
        reasons,
        changes,
        needs,
        imports,
        exports,
    } = described;
    Ok(Inspection {
        digest,
        size_bytes: bytes.len() as u64,
        name,
        version,
        summary,
        kinds,
        settings_schema,
        reasons,
        changes,
        needs,
        imports,
        exports,
        compile_time,
    })
}

/// No plugin of it admits guests: nobody would be asked.
fn nobody_admits(subject: impl std::fmt::Display) -> PolicyError {
    PolicyError::new(Fault::Empty, subject, "none of the bundle's plugins admits guests")
}

/// The process answers another question than it was asked.
pub(crate) fn other_answer() -> PolicyError {
    broken("it answers what it was not asked".into())
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
