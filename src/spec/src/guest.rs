//! The guest file: what one guest is made of.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::{
    ByteSize, Cpu, DevicePin, Dma, Hotplug, Location, PciAddress, Ram, Refusal,
    console::{ConsoleDevice, Port, RawConsole, RawPort},
    cpu::RawCpu,
    device::{RawDevice, Wanted},
    disk::{Disk, RawDisk},
    hotplug::RawHotplug,
    locate::locate,
    net::{Net, RawNet},
    platform::{Platform, RawPlatform},
    ram::RawRam,
    resources::{RawResources, ResourceBounds},
    vsock::{RawVsock, Vsock},
};

/// What a guest file may ask for at most. The host may have less: that is for admission to say.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the file itself.
    pub file_bytes: usize,
    /// vCPUs.
    pub vcpus: u8,
    /// Least memory with which Linux boots.
    pub memory_least_bytes: u64,
    /// Most memory.
    pub memory_most_bytes: u64,
    /// Memory comes in whole pieces of this size.
    pub memory_step_bytes: u64,
    /// Kernel command line, as Linux's COMMAND_LINE_SIZE on x86.
    pub command_line_bytes: usize,
    /// Emulated disks.
    pub disks: usize,
    /// Emulated network cards.
    pub nets: usize,
    /// Assigned PCI functions.
    pub devices: usize,
    /// Ports with names.
    pub ports: usize,
    /// Slots for hot-plug.
    pub hotplug_slots: u8,
}

/// The limits in force.
pub const LIMITS: Limits = Limits {
    file_bytes: 64 << 10,
    vcpus: 64,
    memory_least_bytes: 64 << 20,
    memory_most_bytes: 1 << 40,
    memory_step_bytes: 2 << 20,
    command_line_bytes: 2047,
    disks: 8,
    nets: 8,
    devices: 8,
    ports: 8,
    hotplug_slots: 8,
};

// All of them, the host bridge, the entropy source, the sockets, the terminal, the ports with names, the balloon and the root ports
// (functions of one device) sit on one bus of 32 devices.
const _: () = assert!(LIMITS.disks + LIMITS.nets + LIMITS.devices + 7 <= 32 && LIMITS.hotplug_slots <= 8);

/// A name of a guest or a tenant: 1 to 32 of `a-z`, `0-9` and `-`, beginning with a letter.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name, if the text is one.
    pub fn new(text: &str) -> Option<Self> {
        let good = (1..=32).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        good.then(|| Self(text.to_owned()))
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl TryFrom<String> for Name {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(&text).ok_or("this is no name")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A guest as its file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its name, unique on a host.
    pub name: Name,
    /// Whose it is.
    pub tenant: Name,
    /// What its machine tells of itself.
    pub platform: Platform,
    /// Processors, 1 to [`Limits::vcpus`].
    pub vcpus: u8,
    /// What its processors are.
    pub cpu: Cpu,
    /// Memory.
    pub memory: ByteSize,
    /// What it is made of.
    pub ram: Ram,
    /// What it boots.
    pub boot: Boot,
    /// Emulated disks, in the order of their slots.
    pub disks: Vec<Disk>,
    /// Emulated network cards, in the order of their slots.
    pub nets: Vec<Net>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// What a person types at.
    pub console: ConsoleDevice,
    /// Ports with names.
    pub ports: Vec<Port>,
    /// Assigned PCI functions, in the order of their slots.
    pub devices: Vec<Assigned>,
    /// Functions that are still to be chosen from pools; each becomes one of `devices`.
    pub pooled: Vec<Pooled>,
    /// What those reach beside memory.
    pub dma: Dma,
    /// Slots for what comes while it runs.
    pub hotplug: Hotplug,
    /// How far governors may go while it runs.
    pub resources: ResourceBounds,
}

impl Guest {
    /// Whether its processors and its memory can be what they are asked to be; to be asked again after a change.
    ///
    /// # Errors
    /// Those of [`Cpu::fits`] and [`Ram::fits`].
    pub fn fits(&self) -> Result<(), Refusal> {
        self.cpu.fits(self.vcpus)?;
        self.ram.fits(self.memory)
    }
}

/// What a guest boots. Paths are as written; relative ones count from the guest file's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// A bzImage, or an ELF `vmlinux` with a PVH entry.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line: printable ASCII.
    pub command_line: String,
}

/// A physical PCI function to be assigned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assigned {
    /// Its address on the host.
    pub address: PciAddress,
    /// What must be found there.
    pub pin: DevicePin,
    /// Which table `[[device]]` asked for it, counted from 0.
    pub table: usize,
    /// The option ROM that the guest sees of it; the device's own it never does.
    pub rom: Option<Rom>,
}

/// An option ROM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rom {
    /// Its file.
    pub path: PathBuf,
    /// What the file must be: SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// A PCI function to be chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pooled {
    /// The pool of the host's that it comes from.
    pub pool: Name,
    /// Which table `[[device]]` asks for it, counted from 0.
    pub table: usize,
}

/// A guest with the places where its values were written.
#[derive(Clone, Debug)]
pub struct Located {
    /// The guest.
    pub guest: Guest,
    file: PathBuf,
    lines: BTreeMap<String, Location>,
}

impl Located {
    /// Where the value of `key` (`boot.kernel`, `device[0].address`) was written; its file alone when it was not.
    pub fn location(&self, key: &str) -> Option<Location> {
        self.lines.get(key).cloned()
    }
    /// Where a device was asked for: its address or its pool.
    pub fn device_location(&self, table: usize) -> Option<Location> {
        let key = |name: &str| self.location(&format!("device[{table}].{name}"));
        key("address").or_else(|| key("pool"))
    }
    /// Puts chosen functions among the devices, where the file asked for them. Nothing is left to be chosen then.
    pub fn choose(&mut self, chosen: impl IntoIterator<Item = (Pooled, PciAddress)>) {
        let chosen = chosen.into_iter();
        self.guest.devices.extend(chosen.map(|(pooled, address)| Assigned {
            address,
            pin: DevicePin::default(),
            table: pooled.table,
            rom: None,
        }));
        self.guest.devices.sort_by_key(|device| device.table);
        self.guest.pooled.clear();
    }
    /// The guest file.
    pub fn file(&self) -> &Path {
        &self.file
    }
    /// A path written in the file, counted from the file's folder.
    pub fn resolve(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("")).join(path)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGuest {
    name: Spanned<String>,
    tenant: Spanned<String>,
    vcpus: Spanned<i64>,
    memory: Spanned<String>,
    boot: RawBoot,
    #[serde(default)]
    platform: RawPlatform,
    #[serde(default)]
    cpu: RawCpu,
    #[serde(default)]
    ram: RawRam,
    #[serde(default)]
    disk: Vec<RawDisk>,
    #[serde(default)]
    net: Vec<RawNet>,
    vsock: Option<RawVsock>,
    #[serde(default)]
    console: RawConsole,
    #[serde(default)]
    port: Vec<RawPort>,
    #[serde(default)]
    device: Vec<RawDevice>,
    #[serde(default)]
    dma: Dma,
    #[serde(default)]
    hotplug: RawHotplug,
    resources: Option<RawResources>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBoot {
    kernel: Spanned<String>,
    initrd: Option<Spanned<String>>,
    command_line: Option<Spanned<String>>,
}

/// Reads a guest file's text.
///
/// # Errors
/// A [`Refusal`] that names file, line and key.
pub fn parse_guest(file: &Path, source: &str) -> Result<Located, Refusal> {
    if source.len() > LIMITS.file_bytes {
        return Err(Refusal::new(
            "file-too-large",
            file.display(),
            format_args!("a guest file has at most {} bytes", LIMITS.file_bytes),
            "check that this is the file you meant",
        ));
    }
    let raw: RawGuest = toml::from_str(source).map_err(|error| malformed(file, source, &error))?;
    let mut reader = Reader { file, source, lines: BTreeMap::new() };
    let guest = reader.guest(raw)?;
    Ok(Located { guest, file: file.to_owned(), lines: reader.lines })
}

pub(crate) fn malformed(file: &Path, source: &str, error: &toml::de::Error) -> Refusal {
    let location = error.span().map(|span| locate(file, source, span.start));
    let text = error.message().replace('\n', " ");
    let (code, remedy) = if text.starts_with("unknown field") {
        ("unknown-key", "remove it or correct its spelling")
    } else if text.starts_with("missing field") {
        ("missing-key", "add it; docs/guest-file.md shows every key")
    } else {
        ("bad-toml", "correct the line; docs/guest-file.md shows every key")
    };
    let subject = if location.is_none() { file.display().to_string() } else { String::new() };
    Refusal::new(code, subject, text, remedy).at(location)
}

pub(crate) struct Reader<'a> {
    file: &'a Path,
    source: &'a str,
    lines: BTreeMap<String, Location>,
}

impl Reader<'_> {
    /// Notes where a value stands and gives its location.
    pub(crate) fn note<T>(&mut self, value: &Spanned<T>) -> Location {
        let location = locate(self.file, self.source, value.span().start);
        self.lines.insert(location.key.clone(), location.clone());
        location
    }

    fn guest(&mut self, raw: RawGuest) -> Result<Guest, Refusal> {
        let name = self.name(raw.name)?;
        let tenant = self.name(raw.tenant)?;
        let platform = self.platform(raw.platform)?;
        let vcpus = self.vcpus(&raw.vcpus)?;
        let cpu = self.cpu(raw.cpu, vcpus)?;
        let memory = self.memory(&raw.memory)?;
        let ram = self.ram(raw.ram, memory)?;
        let boot = self.boot(raw.boot)?;
        self.count("disk", raw.disk.len(), LIMITS.disks)?;
        self.count("net", raw.net.len(), LIMITS.nets)?;
        self.count("device", raw.device.len(), LIMITS.devices)?;
        let disks = raw.disk.into_iter().map(|disk| self.disk(disk)).collect::<Result<_, _>>()?;
        let nets = raw.net.into_iter().map(|net| self.net(net)).collect::<Result<_, _>>()?;
        let vsock = raw.vsock.map(|vsock| self.vsock(vsock)).transpose()?;
        let ports = self.ports(raw.port)?;
        let mut devices: Vec<Assigned> = Vec::new();
        let mut pooled = Vec::new();
        for (table, raw) in raw.device.into_iter().enumerate() {
            let (location, device) = match self.device(raw, table)? {
                Wanted::Pooled(device) => {
                    pooled.push(device);
                    continue;
                }
                Wanted::Assigned(location, device) => (location, device),
            };
            if devices.iter().any(|other| other.address == device.address) {
                let refusal = Refusal::new(
                    "device-twice",
                    device.address,
                    "the device is asked for twice",
                    "remove one",
                );
                return Err(refusal.at(Some(location)));
            }
            devices.push(device);
        }
        let hotplug = self.hotplug(raw.hotplug)?;
        let resources = self.resources(raw.resources, vcpus, memory)?;
        Ok(Guest {
            name,
            tenant,
            platform,
            vcpus,
            cpu,
            memory,
            ram,
            boot,
            disks,
            nets,
            vsock,
            console: raw.console.device,
            ports,
            devices,
            pooled,
            dma: raw.dma,
            hotplug,
            resources,
        })
    }

    pub(crate) fn name(&mut self, raw: Spanned<String>) -> Result<Name, Refusal> {
        let location = self.note(&raw);
        Name::new(raw.get_ref()).ok_or_else(|| {
            let remedy = "use 1 to 32 of a-z, 0-9 and -, beginning with a letter";
            Refusal::new("bad-name", "", format_args!("{:?} is not a name", short(raw.get_ref())), remedy)
                .at(Some(location))
        })
    }

    fn vcpus(&mut self, raw: &Spanned<i64>) -> Result<u8, Refusal> {
        let location = self.note(raw);
        let count = u8::try_from(*raw.get_ref()).ok().filter(|count| (1..=LIMITS.vcpus).contains(count));
        count.ok_or_else(|| {
            let cause = format!("a guest cannot have {} vCPUs", raw.get_ref());
            Refusal::new("bad-vcpus", "", cause, format_args!("use 1 to {}", LIMITS.vcpus)).at(Some(location))
        })
    }

    fn memory(&mut self, raw: &Spanned<String>) -> Result<ByteSize, Refusal> {
        let location = self.note(raw);
        let refuse = |cause: String, remedy: String| {
            Refusal::new("bad-memory", "", cause, remedy).at(Some(location.clone()))
        };
        let size: ByteSize = raw.get_ref().parse().map_err(|_| {
            refuse(format!("{:?} is not a size", short(raw.get_ref())), "write it as \"512 MiB\"".into())
        })?;
        let (least, most) = (LIMITS.memory_least_bytes, LIMITS.memory_most_bytes);
        if !(least..=most).contains(&size.bytes()) {
            let cause = format!("a guest cannot have {size} of memory");
            let range = (ByteSize::from_bytes(least), ByteSize::from_bytes(most));
            return Err(refuse(cause, format!("use {} to {}", range.0, range.1)));
        }
        if !size.bytes().is_multiple_of(LIMITS.memory_step_bytes) {
            let step = ByteSize::from_bytes(LIMITS.memory_step_bytes);
            return Err(refuse(format!("{size} is not a multiple of {step}"), "round it".into()));
        }
        Ok(size)
    }

    pub(crate) fn path(&mut self, raw: &Spanned<String>) -> Result<PathBuf, Refusal> {
        let location = self.note(raw);
        let text = raw.get_ref();
        if text.is_empty() || text.len() > 4095 || text.contains('\0') {
            let refusal = Refusal::new(
                "bad-path",
                "",
                "this is not a path",
                "name a file, relative to this one or absolute",
            );
            return Err(refusal.at(Some(location)));
        }
        Ok(PathBuf::from(text))
    }

    fn boot(&mut self, raw: RawBoot) -> Result<Boot, Refusal> {
        let kernel = self.path(&raw.kernel)?;
        let initrd = raw.initrd.map(|initrd| self.path(&initrd)).transpose()?;
        let Some(raw) = raw.command_line else {
            return Ok(Boot { kernel, initrd, command_line: String::new() });
        };
        let location = self.note(&raw);
        let command_line = raw.into_inner();
        let cause = if command_line.len() > LIMITS.command_line_bytes {
            format!("the command line has {} bytes", command_line.len())
        } else if !command_line.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            "the command line has characters that are not printable ASCII".to_owned()
        } else {
            return Ok(Boot { kernel, initrd, command_line });
        };
        let remedy = format!("use at most {} printable ASCII characters", LIMITS.command_line_bytes);
        Err(Refusal::new("bad-command-line", "", cause, remedy).at(Some(location)))
    }

    fn count(&self, table: &str, count: usize, most: usize) -> Result<(), Refusal> {
        if count <= most {
            return Ok(());
        }
        let cause = format!("{count} tables [[{table}]]");
        Err(Refusal::new("too-many", self.file.display(), cause, format_args!("a guest has at most {most}")))
    }
}

/// What of a refused value is repeated to the reader: outside text, so bounded.
pub(crate) fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{IoLimits, Rate};
    use proptest::prelude::*;

    pub(crate) const GOOD: &str = r#"name = "web"
tenant = "acme"
vcpus = 2
memory = "512 MiB"

[boot]
kernel = "vmlinux"
initrd = "initrd.img"
command_line = "console=ttyS0 quiet"

[[disk]]
path = "web.img"

[[net]]
tap = "web0"
host_address = "192.0.2.1/24"
mac = "02:00:00:00:00:01"

[[device]]
address = "0000:03:00.0"
"#;

    pub(crate) fn parse(text: &str) -> Result<Located, Refusal> {
        parse_guest(Path::new("guests/web.toml"), text)
    }

    fn refused(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn reads_a_guest() {
        let located = parse(GOOD).unwrap();
        let guest = &located.guest;
        assert_eq!((guest.name.as_str(), guest.vcpus, guest.memory.bytes()), ("web", 2, 512 << 20));
        assert_eq!(guest.nets[0].host_address, Some((std::net::Ipv4Addr::new(192, 0, 2, 1), 24)));
        assert_eq!(located.location("device[0].address").unwrap().line, 20);
        assert_eq!(located.resolve(&guest.boot.kernel), Path::new("guests/vmlinux"));
    }

    #[test]
    fn refusals_name_file_line_and_key() {
        assert!(refused("vcpus = 2", "vcpus = 0").starts_with("[bad-vcpus] guests/web.toml:3: vcpus: "));
        assert!(refused("512 MiB", "0").starts_with("[bad-memory] guests/web.toml:4: memory: "));
        assert!(refused("512 MiB", "65 TiB").contains("use 64 MiB to 1 TiB"));
    }

    #[test]
    fn refuses_by_code() {
        for (from, to, code) in [
            ("path = \"web.img\"", "path = \"web.img\"\nsize = 0", "unknown-key"),
            ("path = \"web.img\"", "path = \"web.img\"\nqueues = 9", "bad-queues"),
            ("path = \"web.img\"", "path = \"web.img\"\nformat = \"vmdk\"", "bad-disk-format"),
            ("path = \"web.img\"", "path = \"web.img\"\nbacking = \"base.img\"", "bad-backing"),
            ("path = \"web.img\"", "path = \"web.img\"\nbacking_format = \"raw\"", "bad-backing"),
            ("path = \"web.img\"", "path = \"web.img\"\nqueues = 0", "bad-queues"),
            ("path = \"web.img\"", "path = \"web.img\"\nlimit = { burst_operations = 1 }", "bad-limit"),
            ("path = \"web.img\"", "path = \"web.img\"\nlimit = { bytes_per_second = \"x\" }", "bad-limit"),
            ("tap = \"web0\"", "tap = \"web0\"\nlimit = { operations_per_second = 0 }", "bad-limit"),
            (
                "tap = \"web0\"",
                "tap = \"web0\"\nvhost = true\nlimit = { operations_per_second = 9 }",
                "bad-limit",
            ),
            ("tenant = \"acme\"\n", "", "missing-key"),
            ("name = \"web\"", "name = \"Web Server\"", "bad-name"),
            ("memory = \"512 MiB\"", "memory = \"513 KiB\"", "bad-memory"),
            ("memory = \"512 MiB\"", "memory = \"65 MiB\"", "bad-memory"),
            ("memory = \"512 MiB\"", "memory = 512", "bad-toml"),
            ("kernel = \"vmlinux\"", "kernel = \"\"", "bad-path"),
            ("quiet\"", "qu\\u0007iet\"", "bad-command-line"),
            ("tap = \"web0\"", "tap = \"web0\"\nqueues = 9", "bad-queues"),
            ("tap = \"web0\"", "tap = \"web0\"\nqueues = 0", "bad-queues"),
            ("tap = \"web0\"", "tap = \"../web0\"", "bad-tap"),
            ("192.0.2.1/24", "192.0.2.1", "bad-address"),
            ("02:00", "01:00", "bad-mac"),
            ("0000:03:00.0", "nvme0", "bad-pci-address"),
            ("[boot]", "[vsock]\nsocket = \"web.vsock\"\ncid = 2\n[boot]", "bad-cid"),
            ("[boot]", "[boot", "bad-toml"),
        ] {
            let text = refused(from, to);
            assert!(text.starts_with(&format!("[{code}] guests/web.toml:")), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn limits_are_read() {
        let limit = "limit = { bytes_per_second = \"10 MiB\", burst_bytes = \"20 MiB\", operations_per_second = 500 }";
        let text = GOOD.replace("path = \"web.img\"", &format!("path = \"web.img\"\n{limit}"));
        let guest = parse(&text).unwrap().guest;
        let [disk] = &guest.disks[..] else { panic!("{:?}", guest.disks) };
        assert_eq!(disk.limits.bytes, Some(Rate { per_second: 10 << 20, burst: 20 << 20 }));
        assert_eq!(disk.limits.operations, Some(Rate { per_second: 500, burst: 500 }));
        assert_eq!(guest.nets[0].limits, IoLimits::default());
    }

    #[test]
    fn refuses_a_device_twice_and_too_many() {
        let device = "\n[[device]]\naddress = \"03:00.0\"\n";
        assert_eq!(parse(&format!("{GOOD}{device}")).unwrap_err().code, "device-twice");
        let many: String = (0..9).map(|n| format!("[[disk]]\npath = \"{n}\"\n")).collect();
        assert_eq!(parse(&format!("{GOOD}{many}")).unwrap_err().code, "too-many");
    }

    proptest! {
        #[test]
        fn never_panics(cut in 0usize..GOOD.len(), put in ".{0,12}") {
            let mut text = GOOD.to_owned();
            text.insert_str(cut, &put);
            let _ = parse(&text);
        }
    }
}
