//! The host file: what an operator says about this host once, for all guests.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::{
    CellRules, Location, Name, PciAddress, PciId, Refusal,
    cell_rules::RawCell,
    device::{hex16, is_serial},
    guest::{malformed, short},
    locate::locate,
    resources::{HostResources, RawHostResources, host_resources},
};

/// Size of the file.
const FILE_BYTES_MAX: usize = 256 << 10;
/// Virtual functions of one physical function.
const VFS_MAX: u16 = 256;
/// The last VLAN.
const VLAN_MAX: u16 = 4094;
/// Pools.
const POOLS_MAX: usize = 64;
/// Addresses, and serial numbers, of one pool.
const LIST_MAX: usize = 256;

/// A host as its file describes it. Without a file a host has no pools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFile {
    /// Its pools of devices; no two have one name.
    pub pools: Vec<Pool>,
    /// What cells may lack here, and what their guests may do to disks.
    pub cell: CellRules,
    /// What it says of guests that run.
    pub resources: HostResources,
}

/// Devices that are as good as each other, under a name that guests ask by.
///
/// A device belongs to it when it is all that the pool says; a list that is empty, and a value that is absent, says
/// nothing. At least one of them says something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// Its name.
    pub name: Name,
    /// Where the name was written.
    pub location: Location,
    /// The vendor.
    pub vendor: Option<u16>,
    /// Vendor and device.
    pub id: Option<PciId>,
    /// Subsystem vendor and subsystem.
    pub subsystem: Option<PciId>,
    /// The class.
    pub class: Option<ClassPrefix>,
    /// Where it may sit.
    pub addresses: Vec<PciAddress>,
    /// Serial numbers.
    pub serials: Vec<String>,
    /// Guests that get these devices are trusted as the operator is.
    pub trusted: bool,
    /// How near to each other a guest's devices must be.
    pub numa: NumaPolicy,
    /// What is known of the firmware after a guest had the device.
    pub firmware: Firmware,
    /// What is done to what a device stores before anybody else gets it, in this order.
    pub scrub: Vec<ScrubStep>,
    /// The pool's devices are virtual functions, which Casemate makes of the physical functions that the pool describes.
    pub virtual_functions: Option<VirtualFunctions>,
}

/// Virtual functions as an operator wants them made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtualFunctions {
    /// How many of each physical function, 1 to 256.
    pub count: u16,
    /// Of network cards: the VLAN that they are on, without seeing it; 0 for none.
    pub vlan: u16,
    /// Of network cards: how much each may send, in Mbit/s; 0 for no limit.
    pub rate_mbps: u32,
    /// Of NVMe drives: the namespace of each, in their order.
    pub namespaces: Vec<u32>,
}

/// The front of a class code: class, subclass, programming interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassPrefix {
    /// The code, 24 bits; digits that were not written are 0.
    pub value: u32,
    /// The bits that were written.
    pub mask: u32,
}

impl ClassPrefix {
    /// From 2, 4 or 6 hexadecimal digits.
    fn new(text: &str) -> Option<Self> {
        let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bits = match text.len() {
            2 => 8,
            4 => 16,
            6 => 24,
            _ => return None,
        };
        let value = u32::from_str_radix(text, 16).ok().filter(|_| digits)?;
        Some(Self { value: value << (24 - bits), mask: ((1 << bits) - 1) << (24 - bits) })
    }

    /// Whether a class code begins so.
    pub fn holds(self, class: u32) -> bool {
        class & self.mask == self.value
    }
}

/// How a device is chosen by the NUMA node that it is near to. What counts is that all devices of a guest are near to one
/// node, whichever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NumaPolicy {
    /// One near to the guest's other devices comes first; another is better than none.
    #[default]
    Preferred,
    /// Only one near to the guest's other devices will do.
    Required,
    /// It plays no role.
    Ignored,
}

/// What is known of a device's firmware when it comes back from a guest. A reset proves nothing about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Firmware {
    /// The operator vouches that a guest can't change it.
    Locked,
    /// What of it can be read, the option ROM, is hashed before and after each guest. A device whose ROM can't be read is
    /// given to nobody.
    Digest,
    /// Nothing: the device never goes from one tenant to another.
    #[default]
    Unchecked,
}

/// A way to erase what a device stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubStep {
    /// Of an NVMe drive: every namespace is formatted with its data erased, and marks that were written before are looked for.
    NvmeFormat,
}

impl ScrubStep {
    fn named(name: &str) -> Option<Self> {
        (name == "nvme-format").then_some(Self::NvmeFormat)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    #[serde(default)]
    pool: Vec<RawPool>,
    #[serde(default)]
    cell: RawCell,
    #[serde(default)]
    resources: RawHostResources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPool {
    name: Spanned<String>,
    vendor: Option<Spanned<String>>,
    id: Option<Spanned<String>>,
    subsystem: Option<Spanned<String>>,
    class: Option<Spanned<String>>,
    #[serde(default)]
    addresses: Vec<Spanned<String>>,
    #[serde(default)]
    serials: Vec<Spanned<String>>,
    #[serde(default)]
    trusted: bool,
    numa: Option<Spanned<String>>,
    firmware: Option<Spanned<String>>,
    #[serde(default)]
    scrub: Vec<Spanned<String>>,
    vfs: Option<Spanned<u16>>,
    vf_vlan: Option<Spanned<u16>>,
    vf_rate_mbps: Option<Spanned<u32>>,
    vf_namespaces: Option<Spanned<Vec<u32>>>,
}

/// Reads a host file's text.
///
/// # Errors
/// A [`Refusal`] that names file, line and key: `file-too-large`, `bad-toml`, `unknown-key`, `missing-key`, `bad-name`,
/// `pool-twice`, `bad-pool`, `bad-cell`, `too-many`, `bad-resources`.
pub fn parse_host(file: &Path, source: &str) -> Result<HostFile, Refusal> {
    if source.len() > FILE_BYTES_MAX {
        let cause = format_args!("a host file has at most {FILE_BYTES_MAX} bytes");
        return Err(Refusal::new(
            "file-too-large",
            file.display(),
            cause,
            "check that this is the file you meant",
        ));
    }
    let raw: RawHost = toml::from_str(source).map_err(|error| malformed(file, source, &error))?;
    if raw.pool.len() > POOLS_MAX {
        let cause = format!("{} tables [[pool]]", raw.pool.len());
        let remedy = format!("a host has at most {POOLS_MAX}");
        return Err(Refusal::new("too-many", file.display(), cause, remedy));
    }
    let reader = Reader { file, source };
    let mut names: BTreeMap<Name, Location> = BTreeMap::new();
    let mut pools = Vec::new();
    for raw in raw.pool {
        let pool = reader.pool(raw)?;
        if let Some(first) = names.insert(pool.name.clone(), pool.location.clone()) {
            let cause = format!("there is a pool of this name in line {}", first.line);
            let refusal = Refusal::new("pool-twice", &pool.name, cause, "give one another name");
            return Err(refusal.at(Some(pool.location)));
        }
        pools.push(pool);
    }
    let resources = host_resources(file, source, raw.resources)?;
    Ok(HostFile { pools, cell: raw.cell.check(file, source)?, resources })
}

struct Reader<'a> {
    file: &'a Path,
    source: &'a str,
}

impl Reader<'_> {
    fn pool(&self, raw: RawPool) -> Result<Pool, Refusal> {
        let location = locate(self.file, self.source, raw.name.span().start);
        let name = Name::new(raw.name.get_ref()).ok_or_else(|| {
            let cause = format!("{:?} is not a name", short(raw.name.get_ref()));
            let remedy = "use 1 to 32 of a-z, 0-9 and -, beginning with a letter";
            Refusal::new("bad-name", "", cause, remedy).at(Some(location.clone()))
        })?;
        let is_pin = |text: &str| text.parse::<PciId>().ok();
        let virtual_functions = self.virtual_functions(&raw)?;
        let pool = Pool {
            vendor: self.value(raw.vendor, hex16, "four hexadecimal digits, as in \"1b36\"")?,
            id: self.value(raw.id, is_pin, "vendor and device, as in \"1b36:0010\"")?,
            subsystem: self.value(raw.subsystem, is_pin, "vendor and subsystem, as in \"1af4:1100\"")?,
            class: self.value(raw.class, ClassPrefix::new, "2, 4 or 6 hexadecimal digits, as in \"0108\"")?,
            addresses: self.list(
                raw.addresses,
                |text| text.parse().ok(),
                "an address, as in \"0000:03:00.0\"",
            )?,
            serials: self.list(
                raw.serials,
                |text| is_serial(text).then(|| text.to_owned()),
                "a serial number, as casemate devices --json shows it",
            )?,
            trusted: raw.trusted,
            numa: self
                .value(raw.numa, numa, "\"preferred\", \"required\" or \"ignored\"")?
                .unwrap_or_default(),
            firmware: self
                .value(raw.firmware, firmware, "\"locked\", \"digest\" or \"unchecked\"")?
                .unwrap_or_default(),
            scrub: self.list(raw.scrub, ScrubStep::named, "\"nvme-format\"")?,
            virtual_functions,
            name,
            location,
        };
        let says_something = pool.vendor.is_some()
            || pool.id.is_some()
            || pool.subsystem.is_some()
            || pool.class.is_some()
            || !pool.addresses.is_empty()
            || !pool.serials.is_empty();
        if !says_something {
            let cause = "the pool does not say which devices are in it";
            let remedy = "add id, vendor, subsystem, class, addresses or serials";
            return Err(Refusal::new("bad-pool", &pool.name, cause, remedy).at(Some(pool.location)));
        }
        Ok(pool)
    }

    fn virtual_functions(&self, raw: &RawPool) -> Result<Option<VirtualFunctions>, Refusal> {
        let refuse = |start: usize, cause: &str, remedy: &str| {
            let location = locate(self.file, self.source, start);
            Err(Refusal::new("bad-pool", raw.name.get_ref(), cause, remedy).at(Some(location)))
        };
        let settings = [
            raw.vf_vlan.as_ref().map(|value| value.span().start),
            raw.vf_rate_mbps.as_ref().map(|value| value.span().start),
            raw.vf_namespaces.as_ref().map(|value| value.span().start),
        ];
        let Some(count) = &raw.vfs else {
            return match settings.into_iter().flatten().next() {
                Some(start) => {
                    refuse(start, "this is about virtual functions", "say how many there are to be: vfs = 4")
                }
                None => Ok(None),
            };
        };
        if !(1..=VFS_MAX).contains(count.get_ref()) {
            return refuse(count.span().start, "no physical function can make so many", "write 1 to 256");
        }
        if let Some(vlan) = raw.vf_vlan.as_ref().filter(|vlan| !(1..=VLAN_MAX).contains(vlan.get_ref())) {
            return refuse(vlan.span().start, "this is no VLAN", "write 1 to 4094");
        }
        let namespaces = raw.vf_namespaces.as_ref().map_or(&[][..], |list| list.get_ref().as_slice());
        let is_wrong = |list: &&Spanned<Vec<u32>>| {
            let list = list.get_ref();
            let twice = (1..).zip(list).any(|(next, one)| list.iter().skip(next).any(|other| other == one));
            twice
                || list.len() > usize::from(*count.get_ref())
                || list.iter().any(|id| *id == 0 || *id == u32::MAX)
        };
        if let Some(list) = raw.vf_namespaces.as_ref().filter(is_wrong) {
            let remedy = "write the number of a namespace for each virtual function, each another";
            return refuse(list.span().start, "these can't be the functions' namespaces", remedy);
        }
        Ok(Some(VirtualFunctions {
            count: *count.get_ref(),
            vlan: raw.vf_vlan.as_ref().map_or(0, |vlan| *vlan.get_ref()),
            rate_mbps: raw.vf_rate_mbps.as_ref().map_or(0, |rate| *rate.get_ref()),
            namespaces: namespaces.to_vec(),
        }))
    }

    fn value<T>(
        &self,
        raw: Option<Spanned<String>>,
        read: impl Fn(&str) -> Option<T>,
        wanted: &str,
    ) -> Result<Option<T>, Refusal> {
        raw.map(|raw| {
            read(raw.get_ref()).ok_or_else(|| {
                let location = locate(self.file, self.source, raw.span().start);
                let cause = format!("{:?} is not what stands here", short(raw.get_ref()));
                Refusal::new("bad-pool", "", cause, format!("write {wanted}")).at(Some(location))
            })
        })
        .transpose()
    }

    fn list<T>(
        &self,
        raw: Vec<Spanned<String>>,
        read: impl Fn(&str) -> Option<T>,
        wanted: &str,
    ) -> Result<Vec<T>, Refusal> {
        if raw.len() > LIST_MAX {
            let cause = format!("a list of {} values", raw.len());
            let remedy = format!("a pool has at most {LIST_MAX}");
            return Err(Refusal::new("too-many", self.file.display(), cause, remedy));
        }
        let each = raw.into_iter().map(|raw| self.value(Some(raw), &read, wanted));
        each.filter_map(Result::transpose).collect()
    }
}

fn numa(text: &str) -> Option<NumaPolicy> {
    match text {
        "preferred" => Some(NumaPolicy::Preferred),
        "required" => Some(NumaPolicy::Required),
        "ignored" => Some(NumaPolicy::Ignored),
        _ => None,
    }
}

fn firmware(text: &str) -> Option<Firmware> {
    match text {
        "locked" => Some(Firmware::Locked),
        "digest" => Some(Firmware::Digest),
        "unchecked" => Some(Firmware::Unchecked),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"[[pool]]
name = "fast-nvme"
class = "0108"
id = "1b36:0010"
addresses = ["0000:03:00.0", "0000:04:00.0"]
numa = "required"
firmware = "locked"
scrub = ["nvme-format"]

[[pool]]
name = "nics"
vendor = "8086"
trusted = true
vfs = 4
vf_vlan = 100
vf_namespaces = [2, 3]
"#;

    fn refused(from: &str, to: &str) -> String {
        assert!(GOOD.contains(from), "{from}");
        parse_host(Path::new("host.toml"), &GOOD.replacen(from, to, 1)).unwrap_err().to_string()
    }

    #[test]
    fn reads_pools() {
        let host = parse_host(Path::new("host.toml"), GOOD).unwrap();
        let [nvme, nics] = host.pools.as_slice() else { panic!("{host:?}") };
        assert_eq!(
            (nvme.addresses.len(), nvme.numa, nvme.firmware),
            (2, NumaPolicy::Required, Firmware::Locked)
        );
        assert_eq!((nvme.scrub.as_slice(), nics.scrub.as_slice()), (&[ScrubStep::NvmeFormat][..], &[][..]));
        assert!(nvme.class.unwrap().holds(0x01_0802) && !nvme.class.unwrap().holds(0x01_0700));
        assert_eq!((nics.vendor, nics.trusted, nics.firmware), (Some(0x8086), true, Firmware::Unchecked));
        let virtual_functions =
            VirtualFunctions { count: 4, vlan: 100, rate_mbps: 0, namespaces: vec![2, 3] };
        assert_eq!((&nvme.virtual_functions, &nics.virtual_functions), (&None, &Some(virtual_functions)));
        assert_eq!((nics.location.line, nics.location.key.as_str()), (11, "pool[1].name"));
        assert_eq!(parse_host(Path::new("host.toml"), "").unwrap(), HostFile::default());
    }

    #[test]
    fn refuses_by_code_and_place() {
        for (from, to, start) in [
            ("name = \"nics\"", "name = \"fast-nvme\"", "[pool-twice] host.toml:11: pool[1].name"),
            ("name = \"nics\"", "name = \"NICs\"", "[bad-name] host.toml:11: pool[1].name"),
            ("\"0108\"", "\"108\"", "[bad-pool] host.toml:3: pool[0].class"),
            ("\"0108\"", "\"+108\"", "[bad-pool] host.toml:3: pool[0].class"),
            ("1b36:0010", "1b36", "[bad-pool] host.toml:4: pool[0].id"),
            ("0000:04:00.0", "nvme", "[bad-pool] host.toml:5: pool[0].addresses"),
            ("\"required\"", "\"near\"", "[bad-pool] host.toml:6: pool[0].numa"),
            ("\"nvme-format\"", "\"shred\"", "[bad-pool] host.toml:8: pool[0].scrub"),
            ("\"locked\"", "\"hash\"", "[bad-pool] host.toml:7: pool[0].firmware"),
            ("vendor = \"8086\"", "", "[bad-pool] host.toml:11: pool[1].name"),
            ("vfs = 4", "vfs = 0", "[bad-pool] host.toml:14: pool[1].vfs"),
            ("vfs = 4", "", "[bad-pool] host.toml:15: pool[1].vf_vlan"),
            ("= 100", "= 4095", "[bad-pool] host.toml:15: pool[1].vf_vlan"),
            ("[2, 3]", "[2, 2]", "[bad-pool] host.toml:16: pool[1].vf_namespaces"),
            ("[2, 3]", "[1, 2, 3, 4, 5]", "[bad-pool] host.toml:16: pool[1].vf_namespaces"),
            ("trusted = true", "trusted = 1", "[bad-toml] host.toml:13: pool[1].trusted"),
            ("trusted = true", "price = 1", "[unknown-key] host.toml:13: pool[1].price"),
        ] {
            let text = refused(from, to);
            assert!(text.starts_with(start), "{text}");
        }
        let many = "[[pool]]\nname = 'a'\n".repeat(POOLS_MAX + 1);
        assert_eq!(parse_host(Path::new("x"), &many).unwrap_err().code, "too-many");
    }

    proptest! {
        #[test]
        fn never_panics(cut in 0usize..GOOD.len(), put in ".{0,12}") {
            let mut text = GOOD.to_owned();
            text.insert_str(cut, &put);
            let _ = parse_host(Path::new("host.toml"), &text);
        }

        #[test]
        fn a_prefix_holds_what_begins_with_it(class in 0u32..1 << 24, digits in prop_oneof![Just(2usize), Just(4), Just(6)]) {
            let text = format!("{class:06x}");
            let prefix = ClassPrefix::new(&text[..digits]).unwrap();
            prop_assert!(prefix.holds(class));
            prop_assert!(!prefix.holds(class ^ 1 << 23));
        }
    }
}
