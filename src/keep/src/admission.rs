//! The question to the policy, and its answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use casemate_broker::hands;
use casemate_host::{Image, PciFunction, Pools};
use casemate_policy::{
    Attrs, Change, Device, Disk, Field, File, GuestSpec, HostState, Needs, Neighbour, Net, Operation,
    Outcome, Record, Request, Signers, Tenant, Value, Verdict,
};
use casemate_spec::{ByteSize, CellPart, DiskFormat, Guest, HostFile, Located, Location, Refusal};

use crate::{
    Decisions, Paths, PolicyReport, Refusals,
    admitted::Admitted,
    beside, digest,
    digest::Known,
    facts,
    images::Images,
    policies::{Opened, Policies},
};

/// Who asks, and what for.
pub(crate) struct Question<'a> {
    pub(crate) paths: &'a Paths,
    pub(crate) bundle: &'a Path,
    /// Who is asked.
    pub(crate) opened: Opened,
    pub(crate) override_why: Option<&'a str>,
    /// The guest. What policies change is changed here.
    pub(crate) located: &'a mut Located,
    /// What it boots from. Where a policy wants a digest, a sealed copy takes the file's place.
    pub(crate) images: &'a mut Images,
    pub(crate) inventory: Inventory<'a>,
    /// What its cell will be without.
    pub(crate) weakened: &'a [CellPart],
    /// What the operator says of this host.
    pub(crate) host_file: &'a HostFile,
}

/// What the host has of devices.
#[derive(Clone, Copy)]
pub(crate) struct Inventory<'a> {
    pub(crate) host: &'a hands::Inventory<'a>,
    pub(crate) pools: &'a Pools<'a>,
}

impl Inventory<'_> {
    /// The pools and the lives of all devices, for the host's attrs.
    pub(crate) fn tell(&self, attrs: &mut Attrs) -> Result<(), Refusal> {
        let Some(taken) = self.host.taken()? else { return Ok(()) };
        let mut pools: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
        for function in self.host.functions.iter().filter(|function| !function.is_bridge) {
            if let Some(pool) = self.pools.pool_of(function) {
                let (free, all) = pools.entry(pool.name.as_str()).or_default();
                *free += u32::from(!taken.contains_key(&function.address));
                *all += 1;
            }
        }
        let pools: Vec<_> = pools.iter().map(|(name, (free, all))| format!("{name}={free}/{all}")).collect();
        let functions = self.host.at(taken.keys().copied().collect())?;
        let devices = functions.iter().filter(|function| !function.is_bridge).filter_map(|function| {
            taken.get(&function.address).map(|life| format!("{}={}", function.address, life.state))
        });
        let devices: Vec<_> = devices.collect();
        for (name, list) in [("pools", pools), ("devices", devices)] {
            if !list.is_empty() {
                attrs.insert(name.to_owned(), list.join(" "));
            }
        }
        Ok(())
    }

    /// The IOMMU groups of what other guests have, and the pools.
    pub(crate) fn tell_devices(&self, beside: &mut [Neighbour]) -> Result<(), Refusal> {
        let devices = beside.iter().flat_map(|guest| &guest.devices).copied().collect();
        let all = self.host.at(devices)?;
        for guest in beside {
            let functions: Vec<_> = all.iter().filter(|f| guest.devices.contains(&f.address)).collect();
            let groups: BTreeSet<u32> =
                functions.iter().filter_map(|function| function.iommu_group).collect();
            let mut pools = BTreeMap::<_, usize>::new();
            for pool in functions.iter().filter_map(|function| self.pools.pool_of(function)) {
                *pools.entry(pool.name.to_string()).or_default() += 1;
            }
            let groups: Vec<_> = groups.iter().map(ToString::to_string).collect();
            let pools: Vec<_> = pools.iter().map(|(pool, devices)| format!("{pool}={devices}")).collect();
            for (name, list) in [("iommu-groups", groups), ("pools", pools)] {
                if !list.is_empty() {
                    guest.attrs.insert(name.into(), list.join(" "));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn describe(&self, function: &PciFunction) -> Device {
        let mut attrs = facts::device(function);
        if let Some(pool) = self.pools.pool_of(function) {
            attrs.insert("pool".into(), pool.name.to_string());
            attrs.insert("trusted".into(), pool.trusted.to_string());
        }
        if let Ok(Some(lives)) = self.host.lives(vec![function.address])
            && let Some(life) = lives.first()
        {
            attrs.insert("life".into(), life.state.to_string());
        }
        Device {
            address: function.address,
            vendor: function.vendor,
            device: function.device,
            subsystem_vendor: function.subsystem_vendor,
            subsystem_device: function.subsystem_device,
            class: function.class,
            group: function.iommu_group,
            driver: function.driver.clone(),
            attrs,
        }
    }
}

/// Asks the bundle whether this guest may run, and keeps what was asked and answered. A denial names the keys of the
/// guest's file.
/// What decided is given back with the report: it goes on deciding while the guest runs.
pub(crate) fn ask(question: Question<'_>) -> Result<(PolicyReport, Admitted), Refusals> {
    let decisions = Decisions::below(&question.paths.state);
    decide(question, &mut |record| decisions.append(record))
}

/// The same, without keeping it.
pub(crate) fn rehearse(question: Question<'_>) -> Result<PolicyReport, Refusals> {
    let hidden = beside::is_hidden(&question.paths.runtime);
    let (mut report, _) = decide(question, &mut |_| Ok(()))?;
    if hidden {
        report.caveats.push(
            "only root sees the host's other guests: quotas and neighbours were judged as if there were none"
                .into(),
        );
    }
    Ok(report)
}

fn decide(
    question: Question<'_>,
    keep: &mut dyn FnMut(&Record) -> Result<(), Refusal>,
) -> Result<(PolicyReport, Admitted), Refusals> {
    let Question { paths, bundle, opened, override_why, located, images, inventory, weakened, host_file } =
        question;
    let override_why = override_why.map(checked_reason).transpose()?;
    let (policies, load) = opened;
    let engine = policies.as_ref().map(Policies::current).map_err(Clone::clone);
    let digests = match &engine {
        Ok(engine) => Digests::of(paths, engine.needs(), located, images)?,
        Err(_) => Digests::default(),
    };
    let mut beside = beside::read(&paths.runtime, located.guest.name.as_str());
    inventory.tell_devices(&mut beside)?;
    let mut request = request(located, images, &inventory, digests, beside)?;
    if !weakened.is_empty() {
        request.host.attrs.insert("weakened".into(), crate::run::names(weakened).join(" "));
    }
    let now = request.now_seconds;
    let answer =
        engine.as_ref().map_err(Clone::clone).and_then(|engine| engine.admit(&request, override_why));
    let record = Record {
        id: new_id(now)?,
        time_seconds: now,
        uid: hands::operator_uid(),
        bundle: text(std::path::absolute(bundle).unwrap_or(bundle.to_owned())),
        bundle_sha256: engine.as_ref().ok().map(|engine| engine.bundle_digest().to_owned()),
        override_why: override_why.map(str::to_owned),
        request,
        outcome: Outcome::from(&answer),
    };
    keep(&record)?;
    let decision = answer.map_err(Refusal::from)?;
    let policies = policies.map_err(Refusal::from)?;
    match &decision.verdict {
        Verdict::Allow { warnings } => {
            make(&mut located.guest, &decision.changes)?;
            let report = PolicyReport {
                decision: record.id.clone(),
                plugins: decision.plugins.iter().map(|run| (run.name.clone(), run.digest.clone())).collect(),
                changes: decision.changes.iter().map(ToString::to_string).collect(),
                warnings: warnings.iter().map(ToString::to_string).collect(),
                caveats: Vec::new(),
                overridden: decision
                    .overridden
                    .iter()
                    .flat_map(|overridden| &overridden.reasons)
                    .map(|reason| format!("{}/{}", reason.plugin, reason.code))
                    .collect(),
                load,
                ask: decision.elapsed,
            };
            let mut question = record.request;
            question.guest.vcpus = located.guest.vcpus.into();
            question.guest.memory_bytes = located.guest.memory.bytes();
            question.guest.command_line.clone_from(&located.guest.boot.command_line);
            Ok((report, Admitted::new(paths, bundle, Arc::new(policies), host_file, question)))
        }
        Verdict::Deny { reasons } => {
            let locations = reasons.iter().map(|reason| location(located, reason.field.as_deref()?));
            Err(Refusals(
                decision.refusals().into_iter().zip(locations).map(|(refusal, at)| refusal.at(at)).collect(),
            ))
        }
    }
}

/// A name for a decision of now.
pub(crate) fn new_id(now_seconds: u64) -> Result<String, Refusal> {
    Record::new_id(now_seconds)
        .map_err(|error| Refusal::new("keep-failed", "a decision's name", error, "try again"))
}

/// Where a field that a policy names stands in the guest's file. Its devices are counted as the guest gets them, those that
/// came from pools among them.
fn location(located: &Located, field: &str) -> Option<Location> {
    let of_device = || {
        let (index, _) = field.strip_prefix("device[")?.split_once(']')?;
        let device = located.guest.devices.get(index.parse::<usize>().ok()?)?;
        located.device_location(device.table)
    };
    of_device().or_else(|| located.location(field))
}

/// An operator's reason: it's what an auditor will read.
fn checked_reason(why: &str) -> Result<&str, Refusal> {
    let why = why.trim();
    if (1..=500).contains(&why.len()) && !why.contains(char::is_control) {
        return Ok(why);
    }
    let cause = "this is not a reason of 1 to 500 characters in one line";
    Err(Refusal::new("bad-override", "--override", cause, "say why in a sentence, and who allowed it"))
}

/// Makes the guest what the policies have made of it. The values are within a guest file's limits already.
fn make(guest: &mut Guest, changes: &[Change]) -> Result<(), Refusal> {
    for change in changes {
        let made = match (change.field, &change.to) {
            (Field::Vcpus, Value::Number(vcpus)) => {
                u8::try_from(*vcpus).ok().map(|vcpus| guest.vcpus = vcpus)
            }
            (Field::Memory, Value::Number(bytes)) => {
                guest.memory = ByteSize::from_bytes(*bytes);
                Some(())
            }
            (Field::CommandLine, Value::Text(line)) => {
                guest.boot.command_line.clone_from(line);
                Some(())
            }
            _ => None,
        };
        made.ok_or_else(|| {
            Refusal::new("policy-change", change, "the change cannot be made", "report it with this message")
        })?;
    }
    guest.fits()
}

/// Digests that some policy wants.
#[derive(Default)]
struct Digests {
    kernel: Option<Known>,
    initrd: Option<Known>,
    /// In the order of the disks.
    disks: Vec<Option<Known>>,
}

impl Digests {
    fn of(paths: &Paths, needs: Needs, located: &Located, images: &mut Images) -> Result<Self, Refusal> {
        let mut digests = Self::default();
        if needs == Needs::default() {
            return Ok(digests);
        }
        let signers = Signers::read(&paths.image_keys)?;
        if needs.kernel_sha256 {
            let seal = digest::seal("the kernel", &mut images.kernel, &signers);
            digests.kernel = Some(seal.map_err(|refusal| refusal.at(located.location("boot.kernel")))?);
        }
        if needs.initrd_sha256
            && let Some(initrd) = &mut images.initrd
        {
            let seal = digest::seal("the initrd", initrd, &signers);
            digests.initrd = Some(seal.map_err(|refusal| refusal.at(located.location("boot.initrd")))?);
        }
        if needs.disk_sha256 {
            let disks = located.guest.disks.iter().zip(&images.disks);
            let digest = |(disk, image): (&casemate_spec::Disk, &Image)| {
                if disk.read_only { digest::disk(image, &signers) } else { Ok(None) }
            };
            digests.disks = disks.map(digest).collect::<Result<_, _>>()?;
        }
        Ok(digests)
    }
}

/// The format of a disk that is not raw, and the file under it, which the guest reads too.
fn disk_attrs(disk: &casemate_spec::Disk, backing: Option<&Image>) -> Attrs {
    let format =
        (disk.format != DiskFormat::Raw).then(|| ("format".to_owned(), disk.format.name().to_owned()));
    let backing = backing.map(|image| ("backing".to_owned(), text(image.path.clone())));
    format.into_iter().chain(backing).collect()
}

fn request(
    located: &Located,
    images: &Images,
    inventory: &Inventory<'_>,
    digests: Digests,
    beside: Vec<Neighbour>,
) -> Result<Request, Refusal> {
    let guest = &located.guest;
    // The file that was opened, which the guest gets: a policy judges folders by it.
    let file = |image: &Image, known: Option<Known>| File {
        path: text(image.path.clone()),
        size_bytes: image.size_bytes,
        attrs: Known::attrs(known.as_ref()),
        sha256: known.map(|known| known.sha256),
    };
    let mut disk_digests = digests.disks.into_iter();
    let disks = guest.disks.iter().zip(&images.disks).zip(&images.backings);
    let disks = disks.map(|((disk, image), backing)| {
        let known = disk_digests.next().flatten();
        let mut attrs = disk_attrs(disk, backing.as_ref());
        attrs.extend(Known::attrs(known.as_ref()));
        Disk {
            path: text(image.path.clone()),
            size_bytes: image.size_bytes,
            read_only: disk.read_only,
            sha256: known.map(|known| known.sha256),
            attrs,
        }
    });
    let nets = guest.nets.iter().map(|net| Net {
        tap: net.tap.clone(),
        mac: net.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
        attrs: [
            ("vhost", net.vhost.then(|| "true".to_owned())),
            ("queues", (net.queues > 1).then(|| net.queues.to_string())),
            ("host-address", net.host_address.map(|(address, length)| format!("{address}/{length}"))),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect(),
    });
    let devices = guest.devices.iter().filter_map(|device| {
        let function = inventory.host.functions.iter().find(|function| function.address == device.address);
        let rom = device.rom.as_ref().map(|rom| ("rom-sha256".to_owned(), rom.sha256.clone()));
        function.map(|function| {
            let mut described = inventory.describe(function);
            described.attrs.extend(rom);
            described
        })
    });
    let mut host = host_state(facts::host());
    inventory.tell(&mut host.attrs)?;
    Ok(Request {
        operation: Operation::Create,
        guest: GuestSpec {
            name: guest.name.to_string(),
            vcpus: u32::from(guest.vcpus),
            memory_bytes: guest.memory.bytes(),
            kernel: file(&images.kernel, digests.kernel),
            initrd: images.initrd.as_ref().map(|image| file(image, digests.initrd)),
            command_line: guest.boot.command_line.clone(),
            devices: devices.collect(),
            disks: disks.collect(),
            nets: nets.collect(),
            attrs: facts::guest(guest),
        },
        old: None,
        tenant: Tenant {
            name: guest.tenant.to_string(),
            quota: None,
            usage: Some(beside::usage(&beside, guest.tenant.as_str())),
            attrs: Attrs::new(),
        },
        host,
        beside,
        now_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        attrs: Attrs::new(),
    })
}

/// The host as it is now, with what is told of it besides.
pub(crate) fn host_state(attrs: Attrs) -> HostState {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    HostState {
        name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        cpus: std::thread::available_parallelism()
            .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
        memory_bytes: field("MemTotal:").unwrap_or(0),
        memory_free_bytes: field("MemAvailable:").unwrap_or(0),
        attrs,
    }
}

fn text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}
