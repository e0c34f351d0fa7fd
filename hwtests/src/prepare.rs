//! Making the lab, once, and keeping it.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    process::Command,
};

use crate::{
    LabError, Layout,
    command::output_of,
    images::{self, GUEST, HOST, OTHER_GUEST, Recipe},
    kernel::{Kernel, OTHERS},
    packages::Apt,
    tools,
};

/// Raised when what the code below makes changes in a way that the recipes' hash does not see.
const RECIPE_VERSION: u32 = 1;
const SHARED_DISK_BYTES: u64 = 16 << 20;

/// Installs and builds whatever the lab lacks, and tells each step through `say`. Nothing is done, and nothing said,
/// when all is there and of the present recipe. Needs root only when packages must be installed or downloaded.
///
/// # Errors
/// What can't be installed or built, with a remedy.
pub fn prepare(layout: &Layout, say: &mut dyn FnMut(&str)) -> Result<(), LabError> {
    let root = layout.root();
    for directory in [root.to_path_buf(), layout.logs(), layout.runs()] {
        fs::create_dir_all(&directory).map_err(|error| LabError::io("create", &directory, error))?;
    }
    let _only_one = lock(&root.join("lock"))?;
    let mut apt = Apt::new(layout.logs().join("apt.log"));
    apt.install_missing(say)?;
    let kernel = Kernel::own(layout, &mut apt, say)?;
    let booted = layout.lab_kernel();
    if booted.name.is_none() {
        image(&HOST, &kernel, &booted.initramfs, say)?;
    }
    image(&GUEST, &kernel, &layout.guest_initramfs(), say)?;
    let mut is_known = booted.name.is_none();
    for series in OTHERS {
        let other = Kernel::other(layout, series, &mut apt, say)?;
        image(&OTHER_GUEST, &other, &layout.other_guest(series.name).1, say)?;
        if booted.name.as_deref() == Some(series.name) {
            image(&HOST, &other, &booted.initramfs, say)?;
            is_known = true;
        }
    }
    if let Some(name) = booted.name.filter(|_| !is_known) {
        let names = OTHERS.map(|series| series.name).join(", ");
        let remedy = format!("name one of {names}, or none");
        return Err(LabError::new(format_args!("CASEMATE_LAB_KERNEL names {name:?}"), remedy));
    }
    tools(&layout.guest_tools(), say)?;
    shared_disk(&layout.shared_disk())
}

/// One preparation at a time; the lock goes with the file's handle.
fn lock(path: &Path) -> Result<fs::File, LabError> {
    let file = fs::File::create(path).map_err(|error| LabError::io("create", path, error))?;
    file.lock().map_err(|error| LabError::io("lock", path, error))?;
    Ok(file)
}

/// Builds an image unless it is there and was made by this recipe.
fn image(recipe: &Recipe, kernel: &Kernel, target: &Path, say: &mut dyn FnMut(&str)) -> Result<(), LabError> {
    let key = key_of(recipe, kernel);
    let stamp = target.with_extension("key");
    if target.exists() && fs::read_to_string(&stamp).is_ok_and(|found| found == key) {
        return Ok(());
    }
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    say(&format!("builds {name} with {} drivers of Linux {}", recipe.modules.len(), kernel.release));
    let bytes = images::build(recipe, kernel, &target.with_extension("scratch"))?;
    write_whole(target, &bytes)?;
    write_whole(&stamp, key.as_bytes())
}

fn key_of(recipe: &Recipe, kernel: &Kernel) -> String {
    let mut hasher = DefaultHasher::new();
    (RECIPE_VERSION, recipe.init, recipe.directories, recipe.modules, recipe.if_there).hash(&mut hasher);
    format!("{} {:016x}", kernel.release, hasher.finish())
}

/// The disk with programs for guests, made anew when it's to have others.
fn tools(target: &Path, say: &mut dyn FnMut(&str)) -> Result<(), LabError> {
    let (key, programs) = (target.with_extension("key"), tools::PROGRAMS.join(" "));
    if target.exists() && fs::read_to_string(&key).is_ok_and(|known| known == programs) {
        return Ok(());
    }
    say(&format!("builds a disk with {programs}"));
    tools::build(target, &target.with_extension("scratch"))?;
    write_whole(&key, programs.as_bytes())
}

/// A small ext2 file system.
fn shared_disk(path: &Path) -> Result<(), LabError> {
    if path.exists() {
        return Ok(());
    }
    let partial = path.with_extension("partial");
    let sized = fs::File::create(&partial).and_then(|file| file.set_len(SHARED_DISK_BYTES));
    sized.map_err(|error| LabError::io("write", &partial, error))?;
    output_of(Command::new("busybox").args(["mke2fs", "-F"]).arg(&partial))?;
    fs::rename(&partial, path).map_err(|error| LabError::io("rename", &partial, error))
}

/// Writes so that a reader, or a second try after an interruption, never sees half of it.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    let partial = path.with_extension("partial");
    fs::write(&partial, bytes).map_err(|error| LabError::io("write", &partial, error))?;
    fs::rename(&partial, path).map_err(|error| LabError::io("rename", &partial, error))
}
