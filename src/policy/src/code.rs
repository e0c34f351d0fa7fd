//! Compiled code: where it is kept, and who makes it. A process that decides about guests need not be one that may write there.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Launch, PolicyError,
    cache::{Cache, EntryKey},
    compiler,
};

/// Compiled plugins, by the SHA-256 of the component (`digest`) and what the code is for (`engine`).
pub trait Code {
    /// A file that begins with the compiled code, and to which nobody can write; none when it was never compiled for this. It may
    /// be the cache's own, where `may_be_shared` says so; else it's a copy in memory.
    ///
    /// # Errors
    /// `policy-cache`, `policy-cache-tampered`.
    fn load(&self, digest: &str, engine: &str, may_be_shared: bool) -> Result<Option<File>, PolicyError>;

    /// Compiles a component and keeps what comes of it; `name` is how an error calls it.
    ///
    /// # Errors
    /// `policy-invalid`, `policy-compiler`, `policy-cache`.
    fn compile(&self, name: &str, digest: &str, engine: &str, component: &[u8]) -> Result<(), PolicyError>;
}

/// A cache of this user's own, and the compiler.
pub struct OwnCode {
    cache: Cache,
    compiler: PathBuf,
    launch: Arc<dyn Launch>,
}

impl OwnCode {
    /// Opens the cache at `path`, which is made when it isn't there.
    ///
    /// # Errors
    /// `policy-cache`.
    pub fn open(path: &Path, compiler: &Path, launch: Arc<dyn Launch>) -> Result<Self, PolicyError> {
        Ok(Self { cache: Cache::open(path)?, compiler: compiler.to_owned(), launch })
    }
}

impl Code for OwnCode {
    fn load(&self, digest: &str, engine: &str, may_be_shared: bool) -> Result<Option<File>, PolicyError> {
        self.cache.load(&EntryKey { digest, engine }, may_be_shared)
    }

    fn compile(&self, name: &str, digest: &str, engine: &str, component: &[u8]) -> Result<(), PolicyError> {
        let code = compiler::compile(&*self.launch, &self.compiler, name, component)?;
        self.cache.store(&EntryKey { digest, engine }, &code)
    }
}
