//! Guests of tests: an image that runs a script, and the file that describes the guest.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::Failure;
use crate::{Archive, Layout};

/// A script that makes Debian's programs on the guest's last disk usable: `tools PROGRAM ARGUMENT…`; and `verify DISK SEED`,
/// which has fio write to a disk and read it back.
pub const WITH_TOOLS: &str = "mount -o ro -t ext4 $(ls /dev/vd? | tail -n 1) /mnt
    for name in dev proc sys tmp run; do mount --bind /$name /mnt/$name; done
    tools() { program=$1; shift; LD_LIBRARY_PATH=/usr/lib/x86_64-linux-gnu/ceph chroot /mnt /usr/bin/$program \"$@\"; }
    verify() { tools fio --name=verify --thread --filename=$1 --direct=1 --ioengine=libaio --iodepth=16 \\
        --rw=randwrite --bsrange=512-32k --size=4m --numjobs=3 --offset_increment=6m --fsync=64 \\
        --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=$2 --minimal >/run/fio 2>&1 \\
        && echo \"verified $1\" || cat /run/fio; }
";

/// What a guest's image runs and holds, besides the base (busybox and drivers).
///
/// The guest prints `CASEMATE-INIT` as its first act, mounts proc, sys and dev, loads the drivers of the devices it
/// finds, runs the script, prints `CASEMATE-TEST-ENDED` with the script's exit code, and powers off.
#[derive(Debug)]
pub struct GuestImage {
    archive: Archive,
}

impl GuestImage {
    /// An image whose guest runs `script` with busybox's shell.
    pub fn new(script: &str) -> Self {
        let mut archive = Archive::new();
        archive.file("test.sh", 0o755, script.as_bytes());
        Self { archive }
    }

    /// Adds an executable file of the host's, such as a static program, in the guest's root.
    pub fn program(mut self, name: &str, host_path: &Path) -> Result<Self, Failure> {
        self.archive.file(name, 0o755, &fs::read(host_path)?);
        Ok(self)
    }

    /// Writes the image: the base and, after it, this archive.
    pub fn write(self, layout: &Layout, path: &Path) -> Result<(), Failure> {
        self.write_on(&layout.guest_initramfs(), path)
    }

    /// The same on another base, of another kernel.
    pub(super) fn write_on(self, base: &Path, path: &Path) -> Result<(), Failure> {
        let mut image = fs::read(base)?;
        image.extend_from_slice(&self.archive.finish());
        Ok(fs::write(path, image)?)
    }
}

/// A guest's TOML file, under construction.
#[derive(Clone, Debug, Serialize)]
pub struct GuestFile {
    name: String,
    tenant: String,
    vcpus: u32,
    memory: String,
    boot: Boot,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotplug: Option<Hotplug>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disk: Vec<Disk>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Net>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vsock: Option<Vsock>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    port: Vec<Port>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device: Vec<Device>,
    #[serde(flatten)]
    tables: toml::Table,
}

#[derive(Clone, Debug, Serialize)]
struct Boot {
    kernel: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<PathBuf>,
    command_line: String,
}

#[derive(Clone, Debug, Serialize)]
struct Hotplug {
    slots: u32,
}

/// A table `[[disk]]`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Queues, when not as many as Casemate chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u32>,
    /// `qcow2`, when it is not raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<&'static str>,
    /// What lies under a qcow2 image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize)]
struct Net {
    tap: String,
    host_address: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    vhost: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    queues: Option<u8>,
}

/// A port with a name.
#[derive(Clone, Debug, Serialize)]
struct Port {
    name: String,
    socket: PathBuf,
}

#[derive(Clone, Debug, Serialize)]
struct Vsock {
    socket: PathBuf,
}

#[derive(Clone, Debug, Serialize)]
struct Device {
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rom: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rom_sha256: Option<String>,
}

impl GuestFile {
    /// A guest of the tenant `demo` with 2 vCPUs and 256 MiB.
    /// Names are 1 to 32 letters, digits and dashes, so a long one is cut.
    pub fn new(name: &str, kernel: &Path, initrd: &Path) -> Self {
        Self {
            name: name.chars().take(32).collect(),
            tenant: "demo".to_owned(),
            vcpus: 1,
            memory: "256 MiB".to_owned(),
            boot: Boot {
                kernel: kernel.to_owned(),
                initrd: Some(initrd.to_owned()),
                command_line: "console=ttyS0 quiet".to_owned(),
            },
            hotplug: None,
            disk: Vec::new(),
            net: Vec::new(),
            vsock: None,
            port: Vec::new(),
            device: Vec::new(),
            tables: toml::Table::new(),
        }
    }

    /// Adds the table `name` with these keys, written as in the file: `table("cpu", "nested = true")`.
    pub fn table(mut self, name: &str, keys: &str) -> Result<Self, Failure> {
        self.tables.insert(name.to_owned(), toml::Value::Table(keys.parse()?));
        Ok(self)
    }

    /// Another number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, count: u32) -> Self {
        self.vcpus = count;
        self
    }

    /// Another size, as the file writes it: `512 MiB`.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        size.clone_into(&mut self.memory);
        self
    }

    /// Another kernel.
    #[must_use]
    pub fn kernel(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.boot.kernel);
        self
    }

    /// A kernel alone.
    #[must_use]
    pub fn without_initrd(mut self) -> Self {
        self.boot.initrd = None;
        self
    }

    /// Another command line.
    #[must_use]
    pub fn command_line(mut self, text: &str) -> Self {
        text.clone_into(&mut self.boot.command_line);
        self
    }

    /// Another name; the context gives a guest that of its test.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Adds an emulated disk over a file of the host's.
    #[must_use]
    pub fn disk(self, path: &Path, read_only: bool) -> Self {
        self.disk_of(Disk { path: path.to_owned(), read_only, ..Disk::default() })
    }

    /// Adds an emulated disk of any kind.
    #[must_use]
    pub fn disk_of(mut self, disk: Disk) -> Self {
        self.disk.push(disk);
        self
    }

    /// Adds an emulated network card on a tap whose host end has this address, as in `192.0.2.1/24`.
    #[must_use]
    pub fn net(mut self, tap: &str, host_address: &str) -> Self {
        self.net.push(Net {
            tap: tap.to_owned(),
            host_address: host_address.to_owned(),
            vhost: false,
            queues: None,
        });
        self
    }

    /// Has the host's kernel carry the frames of all cards so far.
    #[must_use]
    pub fn vhost(mut self, vhost: bool) -> Self {
        self.net.iter_mut().for_each(|net| net.vhost = vhost);
        self
    }

    /// Gives the last card so many pairs of queues.
    #[must_use]
    pub fn net_queues(mut self, queues: u8) -> Self {
        if let Some(net) = self.net.last_mut() {
            net.queues = Some(queues);
        }
        self
    }

    /// Adds a port of this name, whose socket is at a path of the host's.
    #[must_use]
    pub fn port(mut self, name: &str, socket: &Path) -> Self {
        self.port.push(Port { name: name.to_owned(), socket: socket.to_owned() });
        self
    }

    /// Adds the socket device, with this socket on the host.
    #[must_use]
    pub fn vsock(mut self, socket: &Path) -> Self {
        self.vsock = Some(Vsock { socket: socket.to_owned() });
        self
    }

    /// Slots for what comes while the guest runs.
    #[must_use]
    pub fn slots(mut self, slots: u32) -> Self {
        self.hotplug = Some(Hotplug { slots });
        self
    }

    /// Adds an assigned PCI function.
    #[must_use]
    pub fn device(mut self, address: &str) -> Self {
        self.device.push(Device { address: address.to_owned(), rom: None, rom_sha256: None });
        self
    }

    /// Gives the PCI function that was added last an option ROM.
    #[must_use]
    pub fn rom(mut self, path: &Path, sha256: &str) -> Self {
        if let Some(device) = self.device.last_mut() {
            (device.rom, device.rom_sha256) = (Some(path.to_owned()), Some(sha256.to_owned()));
        }
        self
    }

    /// The text of the file.
    pub fn to_toml(&self) -> Result<String, Failure> {
        Ok(toml::to_string(self)?)
    }

    /// Writes it as `NAME.toml` and returns the path.
    pub fn write_into(&self, directory: &Path) -> Result<PathBuf, Failure> {
        let path = directory.join(format!("{}.toml", self.name));
        let text = self.to_toml()?;
        println!("# {}:\n{text}", path.display());
        fs::write(&path, text)?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_devices_has_no_such_keys() {
        let guest = GuestFile::new("x", Path::new("/k"), Path::new("/i")).disk(Path::new("a \"b\""), true);
        let text = guest.to_toml().unwrap();
        assert!(text.contains("[[disk]]\npath = 'a \"b\"'\nread_only = true"), "{text}");
        assert!(!text.contains("net") && !text.contains("device"), "{text}");
        let guest = guest.table("cpu", "sockets = 2").unwrap();
        assert!(guest.to_toml().unwrap().ends_with("[cpu]\nsockets = 2\n"));
        let read: toml::Table = text.parse().unwrap();
        assert_eq!(read["disk"][0]["path"].as_str(), Some("a \"b\""));
    }
}
