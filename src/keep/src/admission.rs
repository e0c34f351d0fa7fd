//! The question to the policy, and its answer.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use casemate_host::{Image, PciFunction};
use casemate_policy::{
    Amounts, Attrs, Config, Device, Disk, Engine, File, GuestSpec, HostState, Net, Operation, Request,
    Tenant, Verdict,
};
use casemate_spec::{Located, Refusal};

use crate::{Paths, PolicyReport, Refusals, compiler};

/// The images that a guest uses, opened.
pub(crate) struct Images {
    pub(crate) kernel: Image,
    pub(crate) initrd: Option<Image>,
    pub(crate) disks: Vec<Image>,
}

/// Asks the bundle whether this guest may run. A denial names the keys of the guest's file.
pub(crate) fn ask(
    paths: &Paths,
    bundle: &Path,
    located: &Located,
    images: &Images,
    functions: &[PciFunction],
) -> Result<PolicyReport, Refusals> {
    let started = Instant::now();
    let config = Config { bundle, cache: &paths.cache, compiler: &paths.policy_compiler };
    let engine = Engine::open_with(config, &*compiler::launcher(paths))
        .map_err(|error| Refusals::from(Refusal::from(error)))?;
    let load = started.elapsed();
    let request = request(located, images, functions);
    let decision = engine.admit(&request).map_err(|error| Refusals::from(Refusal::from(error)))?;
    match &decision.verdict {
        Verdict::Allow { warnings } => Ok(PolicyReport {
            plugins: decision.plugins.iter().map(|run| (run.name.clone(), run.digest.clone())).collect(),
            warnings: warnings.iter().map(ToString::to_string).collect(),
            load,
            ask: decision.elapsed,
        }),
        Verdict::Deny { reasons } => {
            let locations =
                reasons.iter().map(|reason| reason.field.as_deref().and_then(|key| located.location(key)));
            Err(Refusals(
                decision.refusals().into_iter().zip(locations).map(|(refusal, at)| refusal.at(at)).collect(),
            ))
        }
    }
}

fn request(located: &Located, images: &Images, functions: &[PciFunction]) -> Request {
    let guest = &located.guest;
    let absolute = |path: &Path| {
        let path = located.resolve(path);
        std::path::absolute(&path).unwrap_or(path)
    };
    let file = |path: &Path, image: &Image| File {
        path: text(absolute(path)),
        size_bytes: image.size_bytes,
        sha256: None,
        attrs: Attrs::new(),
    };
    let disks = guest.disks.iter().zip(&images.disks).map(|(disk, image)| Disk {
        path: text(absolute(&disk.path)),
        size_bytes: image.size_bytes,
        read_only: disk.read_only,
        sha256: None,
        attrs: Attrs::new(),
    });
    let nets = guest.nets.iter().map(|net| Net {
        tap: net.tap.clone(),
        mac: net.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
        attrs: Attrs::new(),
    });
    let devices = guest.devices.iter().filter_map(|device| {
        functions.iter().find(|function| function.address == device.address).map(describe)
    });
    Request {
        operation: Operation::Create,
        guest: GuestSpec {
            name: guest.name.to_string(),
            vcpus: u32::from(guest.vcpus),
            memory_bytes: guest.memory.bytes(),
            kernel: file(&guest.boot.kernel, &images.kernel),
            initrd: guest
                .boot
                .initrd
                .as_deref()
                .zip(images.initrd.as_ref())
                .map(|(path, image)| file(path, image)),
            command_line: guest.boot.command_line.clone(),
            devices: devices.collect(),
            disks: disks.collect(),
            nets: nets.collect(),
            attrs: Attrs::new(),
        },
        old: None,
        tenant: Tenant {
            name: guest.tenant.to_string(),
            quota: None,
            usage: None::<Amounts>,
            attrs: Attrs::new(),
        },
        host: host(),
        beside: Vec::new(),
        now_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        attrs: Attrs::new(),
    }
}

fn describe(function: &PciFunction) -> Device {
    Device {
        address: function.address,
        vendor: function.vendor,
        device: function.device,
        subsystem_vendor: function.subsystem_vendor,
        subsystem_device: function.subsystem_device,
        class: function.class,
        group: function.iommu_group,
        driver: function.driver.clone(),
        attrs: Attrs::new(),
    }
}

fn host() -> HostState {
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
        attrs: Attrs::new(),
    }
}

fn text(path: PathBuf) -> String {
    path.to_string_lossy().into_owned()
}
