//! Debian's programs for tests' guests: a read-only file system with those that need libraries. A guest that wants them has
//! it as a disk, and reads what it uses; in the guest's own image they would cost each start seconds.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    LabError,
    command::{output_of, text_of},
};

/// The programs, with their libraries.
pub(crate) const PROGRAMS: &[&str] =
    &["/usr/bin/fio", "/usr/bin/iperf3", "/usr/bin/socat", "/usr/bin/stress-ng"];
/// Directories that a guest binds its own to.
const DIRECTORIES: &[&str] = &["dev", "proc", "sys", "tmp", "run"];

/// Builds the file system in `target`; `scratch` is a directory to work in.
pub(crate) fn build(target: &Path, scratch: &Path) -> Result<(), LabError> {
    let _ = fs::remove_dir_all(scratch);
    for name in DIRECTORIES {
        let path = scratch.join(name);
        fs::create_dir_all(&path).map_err(|error| LabError::io("create", &path, error))?;
    }
    let mut files: BTreeSet<PathBuf> = PROGRAMS.iter().map(PathBuf::from).collect();
    for program in PROGRAMS {
        files.extend(libraries(&text_of(Command::new("ldd").arg(program))?));
    }
    let mut bytes = 0;
    for file in &files {
        let place = scratch.join(file.strip_prefix("/").unwrap_or(file));
        let directory = place.parent().unwrap_or(scratch);
        fs::create_dir_all(directory).map_err(|error| LabError::io("create", directory, error))?;
        bytes += fs::copy(file, &place).map_err(|error| LabError::io("copy", file, error))?;
    }
    // Room for what describes the files.
    let partial = target.with_extension("partial");
    let sized = fs::File::create(&partial)
        .and_then(|file| file.set_len((bytes + bytes / 8).next_multiple_of(1 << 20)));
    sized.map_err(|error| LabError::io("write", &partial, error))?;
    output_of(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal", "-d"])
            .arg(scratch)
            .arg(&partial),
    )?;
    let _ = fs::remove_dir_all(scratch);
    fs::rename(&partial, target).map_err(|error| LabError::io("rename", &partial, error))
}

/// The files that `ldd` names.
fn libraries(ldd: &str) -> impl Iterator<Item = PathBuf> + '_ {
    ldd.lines().filter_map(|line| {
        let line = line.split_once("=>").map_or(line, |(_, after)| after);
        line.split_whitespace().next().filter(|word| word.starts_with('/')).map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)\n\tlost => not found\n";
        let found: Vec<PathBuf> = libraries(text).collect();
        assert_eq!(found, [PathBuf::from("/lib/libc.so.6"), PathBuf::from("/lib64/ld.so")]);
    }
}
