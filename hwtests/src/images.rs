//! The two initramfs images: the lab's own, and the one from which the tests' guests start.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use crate::{
    Archive, LabError,
    command::{decompressed, output_of},
    kernel::Kernel,
};

/// What makes an image, apart from the kernel.
pub(crate) struct Recipe {
    /// The script that runs as the first process.
    pub(crate) init: &'static str,
    /// Directories that the script expects.
    pub(crate) directories: &'static [&'static str],
    /// Modules (and with each, what it needs). One that is built into the kernel is fine too.
    pub(crate) modules: &'static [&'static str],
    /// Modules that not every kernel has: cloud kernels lack drivers of real devices.
    pub(crate) if_there: &'static [&'static str],
}

/// The lab: what it takes to mount this machine's root, KVM and VFIO, host networking, and the drivers of its devices.
pub(crate) const HOST: Recipe = Recipe {
    init: include_str!("../machine/host-init"),
    directories: &["bin", "dev", "proc", "sys", "mnt", "mnt/host", "mnt/over", "newroot"],
    modules: &[
        "virtio_pci",
        "9pnet_virtio",
        "9p",
        "overlay",
        "virtio_blk",
        "virtio_net",
        "kvm-amd",
        "vfio-pci",
        "vfio_iommu_type1",
        "crc32c_generic",
        "ext4",
        "brd",
        "tun",
        "vhost_net",
        "bridge",
        "veth",
        "nf_tables",
        "nft_chain_nat",
        "nft_ct",
        "br_netfilter",
        "e1000e",
        "igb",
        "igbvf",
        "nvme",
        "8139cp",
    ],
    if_there: &[],
};

/// A guest: drivers of emulated and of assigned devices, loaded by modalias when such a device is there.
pub(crate) const GUEST: Recipe = Recipe {
    init: include_str!("../machine/guest-init"),
    directories: &["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "mnt", "root"],
    modules: &[
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio-rng",
        "virtio_console",
        "virtio_balloon",
        "virtio_mem",
        "vmw_vsock_virtio_transport",
        "e1000e",
        "igb",
        "igbvf",
        "nvme",
        "8139cp",
        "ahci",
        "sd_mod",
        "crc32c_generic",
        "ext4",
        "button",
        "evdev",
        "pvpanic-mmio",
        "wdat_wdt",
    ],
    if_there: &[],
};

/// A guest with another of Debian's kernels: what the emulated devices need, and more where it is.
pub(crate) const OTHER_GUEST: Recipe = Recipe {
    modules: &[
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "virtio-rng",
        "virtio_console",
        "virtio_balloon",
        "vmw_vsock_virtio_transport",
        "ext4",
        "button",
        "pvpanic-mmio",
        "wdat_wdt",
    ],
    if_there: &["crc32c_generic", "evdev", "e1000e", "igb", "igbvf", "nvme", "8139cp", "virtio_mem"],
    ..GUEST
};

/// Builds an image. It isn't compressed: unpacking costs more in an emulated processor than reading.
pub(crate) fn build(recipe: &Recipe, kernel: &Kernel, scratch: &Path) -> Result<Vec<u8>, LabError> {
    let busybox = Path::new("/bin/busybox");
    let mut archive = Archive::new();
    for directory in recipe.directories {
        archive.directory(directory);
    }
    archive.file("init", 0o755, recipe.init.as_bytes());
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    if recipe.directories.contains(&"sbin") {
        // Where the kernel looks for it when it wants a module itself.
        archive.link("sbin/modprobe", "/bin/busybox");
    }
    add_modules(&mut archive, recipe, kernel, scratch)?;
    Ok(archive.finish())
}

/// Adds the modules, uncompressed and flat in one directory, with the tables by which modprobe finds them.
fn add_modules(
    archive: &mut Archive,
    recipe: &Recipe,
    kernel: &Kernel,
    scratch: &Path,
) -> Result<(), LabError> {
    let relative = format!("lib/modules/{}", kernel.release);
    let _ = fs::remove_dir_all(scratch);
    let directory = scratch.join(&relative);
    fs::create_dir_all(&directory).map_err(|error| LabError::io("create", &directory, error))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.join(name);
        fs::write(&path, bytes).map_err(|error| LabError::io("write", &path, error))
    };
    for path in files_of(recipe, kernel)? {
        let file = kernel.modules().join(&path);
        let name = Path::new(&path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.strip_suffix(".xz") {
            Some(plain) => write(plain, &decompressed("xz", &file)?)?,
            None => write(&name, &read(&file)?)?,
        }
    }
    for table in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        write(table, &read(&kernel.modules().join(table))?)?;
    }
    output_of(Command::new("depmod").arg("-b").arg(scratch).arg(&kernel.release))?;
    archive.directory("lib").directory("lib/modules").directory(&relative);
    let entries = fs::read_dir(&directory).map_err(|error| LabError::io("read", &directory, error))?;
    let names: BTreeSet<_> = entries.filter_map(Result::ok).map(|entry| entry.file_name()).collect();
    for name in names {
        let contents = read(&directory.join(&name))?;
        archive.file(&format!("{relative}/{}", name.to_string_lossy()), 0o644, &contents);
    }
    let _ = fs::remove_dir_all(scratch);
    Ok(())
}

/// The files of a recipe's modules and of all they need, relative to `lib/modules/RELEASE`.
fn files_of(recipe: &Recipe, kernel: &Kernel) -> Result<BTreeSet<String>, LabError> {
    let text = |table: &str| -> Result<String, LabError> {
        let path = kernel.modules().join(table);
        fs::read_to_string(&path).map_err(|error| LabError::io("read", &path, error))
    };
    let (dependencies, builtin) = (text("modules.dep")?, text("modules.builtin")?);
    let table = Dependencies::parse(&dependencies, &builtin);
    let mut files = BTreeSet::new();
    for found in recipe.if_there.iter().filter_map(|name| table.closure(name)) {
        files.extend(found.into_iter().map(str::to_owned));
    }
    for name in recipe.modules {
        let found = table.closure(name).ok_or_else(|| {
            LabError::new(
                format_args!("Debian's kernel {} has no module {name}", kernel.release),
                "report this",
            )
        })?;
        files.extend(found.into_iter().map(str::to_owned));
    }
    Ok(files)
}

/// `modules.dep` and `modules.builtin`, by module name.
struct Dependencies<'a> {
    files: BTreeMap<String, (&'a str, Vec<&'a str>)>,
    builtin: BTreeSet<String>,
}

impl<'a> Dependencies<'a> {
    fn parse(dependencies: &'a str, builtin: &str) -> Self {
        let files = dependencies.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            Some((module_name(file), (file, needs.split_whitespace().collect())))
        });
        Self { files: files.collect(), builtin: builtin.lines().map(module_name).collect() }
    }

    /// The files to take for a module: none when it is built in. `None` when there is no such module.
    fn closure(&self, name: &str) -> Option<Vec<&'a str>> {
        let name = module_name(name);
        match self.files.get(&name) {
            // modules.dep lists indirect needs too.
            Some((file, needs)) => Some(std::iter::once(*file).chain(needs.iter().copied()).collect()),
            None => self.builtin.contains(&name).then(Vec::new),
        }
    }
}

/// The name by which the kernel knows a module file: `kernel/x/kvm-amd.ko.xz` is `kvm_amd`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split('.').next().unwrap_or(name).replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>, LabError> {
    fs::read(path).map_err(|error| LabError::io("read", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closure_takes_needs_and_knows_builtin() {
        let table = Dependencies::parse(
            "kernel/a/kvm-amd.ko.xz: kernel/a/kvm.ko.xz kernel/b/irqbypass.ko.xz\nkernel/a/kvm.ko.xz:\n",
            "kernel/drivers/virtio/virtio_pci.ko\n",
        );
        let expected = vec!["kernel/a/kvm-amd.ko.xz", "kernel/a/kvm.ko.xz", "kernel/b/irqbypass.ko.xz"];
        assert_eq!(table.closure("kvm_amd"), Some(expected.clone()));
        assert_eq!(table.closure("kvm-amd"), Some(expected));
        assert_eq!(table.closure("virtio_pci"), Some(vec![]));
        assert_eq!(table.closure("absent"), None);
    }
}
