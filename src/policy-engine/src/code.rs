//! Compiled code: mapped from a descriptor, to be run.

use std::{
    fs::File,
    io,
    ops::Range,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect};
use wasmtime::{CustomCodeMemory, component::Component};

/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// An engine, and the way to map code for it.
pub(crate) struct Codes {
    pub(crate) engine: wasmtime::Engine,
    mapped: Arc<Mapped>,
}

/// Where the component lies that is being loaded. It's mapped as what may be run, since nothing becomes so in this process; what of
/// it isn't code is then taken that right.
#[derive(Default)]
struct Mapped(Mutex<Range<usize>>);

impl CustomCodeMemory for Mapped {
    fn required_alignment(&self) -> usize {
        PAGE_BYTES
    }

    fn publish_executable(&self, start: *const u8, length: usize) -> wasmtime::Result<()> {
        let whole = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let code = start.addr()..start.addr().saturating_add(length);
        if code.start < whole.start || code.end > whole.end {
            return Err(io::Error::other("code lies outside of its file").into());
        }
        for rest in [whole.start..code.start, code.end..whole.end] {
            // SAFETY: it's of the mapping that `load` has just made, which is for reading; nothing in it was run yet.
            unsafe {
                mprotect(ptr::with_exposed_provenance_mut(rest.start), rest.len(), MprotectFlags::READ)?
            };
        }
        Ok(())
    }

    fn unpublish_executable(&self, start: *const u8, length: usize) -> wasmtime::Result<()> {
        // SAFETY: wasmtime names code that it was given, and promises that nothing of it runs any more.
        unsafe { mprotect(start.cast_mut().cast(), length, MprotectFlags::READ)? };
        Ok(())
    }
}

impl Codes {
    /// An engine with the settings that the compiler has.
    pub(crate) fn new() -> wasmtime::Result<Self> {
        let mapped = Arc::<Mapped>::default();
        let mut config = crate::engine_config();
        config.with_custom_code_memory(Some(Arc::<Mapped>::clone(&mapped)));
        Ok(Self { engine: wasmtime::Engine::new(&config)?, mapped })
    }

    /// The component at the beginning of a file. It's mapped, and stays so for as long as this process lives: only what runs takes
    /// memory, and all processes that have it share that.
    pub(crate) fn load(&self, file: &File) -> wasmtime::Result<Component> {
        let length = usize::try_from(file.metadata()?.len())?;
        if length == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let protection = ProtFlags::READ | ProtFlags::EXEC;
        // SAFETY: the mapping is new, at a place that the kernel chooses, and never unmapped.
        let start =
            unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::PRIVATE, file, 0) }?.cast::<u8>();
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let address = start.as_ptr().expose_provenance();
        let end = address.saturating_add(length).next_multiple_of(PAGE_BYTES);
        *self.mapped.0.lock().unwrap_or_else(PoisonError::into_inner) = address..end;
        // SAFETY: the memory has so many bytes and lives as long as the process. The code must come unchanged from wasmtime's own
        // serialization, and stay so: whoever starts this process hands over nothing but what carries a valid tag under its host's
        // key, of which nobody had the file open for writing, or a sealed copy. One who lies about it owns this process anyway: it
        // has nothing that its parent has not given it. That version, settings and processor match is checked by wasmtime.
        unsafe { Component::deserialize_raw(&self.engine, NonNull::slice_from_raw_parts(start, length)) }
    }
}
