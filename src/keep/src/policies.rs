//! The bundle as a keep holds it while its guest runs: read anew when its file has changed or somebody asks, as a whole or not at all.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
    time::{Duration, Instant},
};

use casemate_policy::{Config, Engine, Fault, PolicyError};

use crate::{Happening, Paths};

/// What tells whether a file is another one.
type Stamp = Option<(u64, u64, i64, i64)>;

/// The bundle and the engine that was made of it.
pub(crate) struct Policies {
    paths: Paths,
    bundle: PathBuf,
    engine: Mutex<Arc<Engine>>,
    stamp: Mutex<[Stamp; 2]>,
    asked: Arc<AtomicBool>,
}

/// A bundle that is being read. Dropped, it is read to its end all the same: its engine then ends with this process's leave.
pub(crate) struct Opening(Option<JoinHandle<Opened>>);

/// A bundle that was read, or why it was not; and how long that took.
pub(crate) type Opened = (Result<Policies, PolicyError>, Duration);

impl Opening {
    /// Reads a bundle on a thread of its own: an engine takes as long to start as the rest of what is read.
    pub(crate) fn begin(paths: &Paths, bundle: &Path) -> io::Result<Self> {
        let (paths, bundle) = (paths.clone(), bundle.to_owned());
        let open = move || Policies::open_and_time(&paths, &bundle);
        Builder::new().name("policies".into()).spawn(open).map(|thread| Self(Some(thread)))
    }

    /// Waits for it.
    pub(crate) fn end(mut self) -> Opened {
        let opened = self.0.take().and_then(|thread| thread.join().ok());
        opened.unwrap_or_else(|| {
            let error = PolicyError::new(Fault::Engine, "policies", "the thread that read them was lost");
            (Err(error), Duration::ZERO)
        })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        drop(self.0.take().map(JoinHandle::join));
    }
}

impl Policies {
    /// Reads the bundle, and tells how long that took.
    pub(crate) fn open_and_time(paths: &Paths, bundle: &Path) -> Opened {
        let started = Instant::now();
        (Self::open(paths, bundle), started.elapsed())
    }

    /// Reads the bundle.
    fn open(paths: &Paths, bundle: &Path) -> Result<Self, PolicyError> {
        let stamp = Mutex::new(stamps(bundle));
        let engine = Mutex::new(Arc::new(open(paths, bundle)?));
        let bundle = bundle.to_owned();
        Ok(Self { paths: paths.clone(), bundle, engine, stamp, asked: Arc::default() })
    }

    /// What decides now. One whose process has ended is opened anew, as often as somebody asks: until that works, what is asked of
    /// it fails.
    pub(crate) fn current(&self) -> Arc<Engine> {
        let engine = Arc::clone(&lock(&self.engine));
        if engine.is_alive() || self.reload().is_err() {
            return engine;
        }
        Arc::clone(&lock(&self.engine))
    }

    /// Set to have the bundle read anew at the next look: by a signal or an operator.
    pub(crate) fn asked(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.asked)
    }

    /// Reads the bundle anew when somebody asked, or its file has changed. One that is no good changes nothing.
    pub(crate) fn reload_if_asked(&self) -> Option<Happening> {
        let now = stamps(&self.bundle);
        let changed = std::mem::replace(&mut *lock(&self.stamp), now) != now;
        if !self.asked.swap(false, Ordering::AcqRel) && !changed {
            return None;
        }
        Some(match self.reload() {
            Ok(sha256) => {
                let engine = self.current();
                let plugins = engine.plugins().iter();
                let plugins = plugins.map(|plugin| (plugin.name.clone(), plugin.digest.clone())).collect();
                Happening::BundleRead { sha256, plugins }
            }
            Err(error) => Happening::BundleRefused { code: error.code().into(), message: error.to_string() },
        })
    }

    /// Reads the bundle anew; gives the SHA-256 of its text. One that is no good changes nothing.
    pub(crate) fn reload(&self) -> Result<String, PolicyError> {
        let engine = open(&self.paths, &self.bundle)?;
        let sha256 = engine.bundle_digest().to_owned();
        *lock(&self.engine) = Arc::new(engine);
        Ok(sha256)
    }
}

fn open(paths: &Paths, bundle: &Path) -> Result<Engine, PolicyError> {
    let programs = paths.programs();
    let config = Config { bundle, cache: &paths.cache, programs: &programs, key: paths.required_key() };
    Engine::open(config)?.suspending()
}

/// The bundle's, and its signature's.
fn stamps(bundle: &Path) -> [Stamp; 2] {
    let mut signature = bundle.as_os_str().to_owned();
    signature.push(".minisig");
    [bundle, Path::new(&signature)].map(|path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
