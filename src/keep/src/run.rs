//! One guest without a daemon: read, judge, authorise, act, watch, give back.

use std::{
    fmt,
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use casemate_broker::{Broker, Claim, Claiming, ConsoleLog, Failed, Rules, hands};
use casemate_filters::{Role, calls_of};
use casemate_host::{Host, Ledger, Tap, TapRequest, placeable};
use casemate_policy::Kind;
use casemate_spec::{
    CellPart, CellRules, ConsoleDevice, Guest, HostFile, LIMITS, Located, PciAddress, Port, Refusal,
    ResourceBounds, Vsock, parse_guest,
};
use signal_hook::consts::SIGUSR1;

use crate::{
    CellReport, DeviceReport, Events, Input, MachineReport, Paths, PolicyReport, Report, Step,
    admission::{self, Inventory, Question},
    admitted::Admitted,
    attach::Attaching,
    cell::{self, Identity, Resources, Started},
    disks::Disks,
    govern::{Charge, Governing},
    images::Images,
    input, operator,
    operator_socket::{OperatorSocket, Reach},
    policies::{Opening, Policies},
    ports,
    record::{self, Facts},
    releasing::Releasing,
    vsock::GuestSocket,
    watch::{self, StopSignals, Watching},
};

/// Why a guest was not run: at least one refusal, each a line.
#[derive(Debug)]
pub struct Refusals(pub Vec<Refusal>);

impl From<Refusal> for Refusals {
    fn from(refusal: Refusal) -> Self {
        Self(vec![refusal])
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, refusal) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{refusal}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusals {}

/// What to run, and how.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// The guest's file.
    pub file: &'a Path,
    /// The bundle of policies that is asked.
    pub policy: &'a Path,
    /// Why refusals that may be overridden are.
    pub override_why: Option<&'a str>,
    /// A text on the console whose time is reported.
    pub line: Option<&'a str>,
    /// Where the guest's console is kept besides.
    pub console_log: Option<ConsoleLog<'a>>,
    /// What the guest's console reads.
    pub input: Input,
    /// How long a guest that was asked to power off may take before it is stopped.
    pub grace: Duration,
}

/// Runs a guest until its end. Its console goes to `console`; `tell` hears of each step.
///
/// # Errors
/// When the guest was refused; the host is as it was before.
pub fn run(
    paths: &Paths,
    options: RunOptions<'_>,
    console: Box<dyn Write + Send>,
    tell: &mut dyn FnMut(Step),
) -> Result<Report, Refusals> {
    require_root()?;
    // From here on this process is not root.
    let broker = casemate_broker::begin(&paths.broker, paths.places())?;
    let outcome = run_with(broker, paths, options, console, tell);
    // What it says at its end is told, and what it keeps is on the disk, before this process ends.
    broker.end();
    outcome
}

fn run_with(
    broker: &'static Broker,
    paths: &Paths,
    options: RunOptions<'_>,
    console: Box<dyn Write + Send>,
    tell: &mut dyn FnMut(Step),
) -> Result<Report, Refusals> {
    // Read.
    let text = read_guest_file(options.file)?;
    let mut located = parse_guest(options.file, &text)?;
    let failed = |error: std::io::Error| {
        Refusal::new("keep-failed", &located.guest.name, format_args!("no thread: {error}"), "try again")
    };
    let host_file = paths.read_host_file()?;
    broker.set_rules(Rules::of(&host_file))?;
    let opening = Opening::begin(paths, options.policy).map_err(failed)?;
    let console: Box<dyn Write + Send> = match options.console_log {
        Some(log) => Box::new(Tee { out: console, log: Some(broker.keep_console(log)?) }),
        None => console,
    };
    for recovered in broker.recover()? {
        tell(recovered.into());
    }
    let mut images = Images::open(&located)?;
    let whole = looks_at_devices(&located.guest, &host_file);
    let mut host = hands::Inventory::new(whole, None, &host_file.pools)?;
    // The name is reserved before, so that of two guests that start at once one sees the other.
    let identity = Identity::reserve(paths, broker, &located.guest)
        .map_err(|refusal| refusal.at(located.location("name")))?;
    // Virtual functions are made before they can be judged, and removed when nobody has them.
    host.pools()?;
    let virtual_functions = make_virtual(broker, &located)?;
    if virtual_functions.is_some() {
        host = hands::Inventory::new(whole, None, &host_file.pools)?;
    }

    // Judge.
    judge_placement(paths, &located)?;
    judge_devices(&located, &host)?;
    let pools = host.pools()?;
    let choosing = (!located.guest.pooled.is_empty()).then(|| broker.begin_choosing()).transpose()?;
    choose_devices(&mut located, &host)?;
    let addresses = judge_devices(&located, &host)?;
    let weakened = cell::weakened(paths, &located.guest, &images, &host_file.cell)?;

    // Authorise.
    identity.tell(&located.guest)?;
    let (policy, admitted) = admission::ask(Question {
        paths,
        bundle: options.policy,
        opened: opening.end(),
        override_why: options.override_why,
        located: &mut located,
        images: &mut images,
        inventory: Inventory { host: &host, pools: &pools },
        weakened: &weakened,
        host_file: &host_file,
    })?;
    // Of the guest as the policies have made it: they may change its memory.
    judge_needs(&located, &host, &addresses)?;
    identity.tell(&located.guest)?;
    tell(Step::Admitted { policy: policy.clone() });
    // All that only its operator may read was read.
    broker.close_the_door()?;

    // Act.
    // From here on no signal ends this process before all that it took is given back.
    let signals = StopSignals::take(&located.guest)?;
    // Not SIGHUP, which a keep gets whose terminal has gone.
    signal_hook::flag::register(SIGUSR1, admitted.policies().asked()).map_err(|error| {
        let cause = format_args!("signals cannot be watched: {error}");
        Refusal::new("keep-failed", &located.guest.name, cause, "try again")
    })?;
    let policies = admitted.policies();
    let judged = policies.current().has(Kind::Device);
    let given = host.functions.iter().filter(|function| addresses.contains(&function.address));
    let given: Vec<_> = given
        .map(|function| (function.clone(), pools.pool_of(function).map(|pool| pool.name.to_string())))
        .collect();
    let claim = take_devices(broker, &located, addresses, judged, tell)?;
    drop(choosing);
    let admitted = Arc::new(admitted);
    let attaching = (located.guest.hotplug.slots > 0)
        .then(|| Arc::new(Attaching::new(paths, broker, &located.guest, Arc::clone(&admitted))));
    let prepared = Prepared {
        paths,
        broker,
        options,
        located: &located,
        text: &text,
        identity: &identity,
        signals,
        images: &images,
        policy,
        rules: &host_file.cell,
        admitted,
        attaching: attaching.clone(),
        resources: host_file.resources.bounds(
            located.guest.tenant.as_str(),
            located.guest.resources,
            located.guest.memory.bytes(),
        ),
        interval_ms: host_file.resources.interval_ms,
    };
    let outcome = prepared.run(claim.as_ref(), console, tell);

    // Give back, whatever happened. By the bundle as it is now: it may have been read anew.
    let releasing = Releasing {
        engine: &policies.current(),
        guest: &located.guest,
        functions: given,
        events: Events::below(&paths.state),
    };
    let scrubbed = claim.as_ref().map(|claim| claim.scrubbed.clone()).filter(|devices| !devices.is_empty());
    if let Some(devices) = scrubbed {
        tell(Step::Scrubbing { devices });
    }
    let from_slots = attaching.map(|attaching| attaching.end()).unwrap_or_default();
    let devices = claim
        .map(|claim| claim.release(&mut |returned| releasing.judge(returned)))
        .map(|returned| returned.into_iter().map(DeviceReport::from).collect::<Vec<_>>())
        .unwrap_or_default();
    let devices: Vec<DeviceReport> = devices.into_iter().chain(from_slots).collect();
    if !devices.is_empty() {
        tell(Step::Returned { devices: devices.clone() });
    }
    outcome.map(|report| Report { devices, ..report }).map_err(Refusals::from)
}

/// Writes to the first, and to the second as long as that goes.
struct Tee {
    out: Box<dyn Write + Send>,
    log: Option<File>,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.log.as_mut().is_some_and(|log| log.write_all(bytes).is_err()) {
            self.log = None;
        }
        // A reader that went away is none that the log waits for.
        let _ = self.out.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let _ = self.out.flush();
        Ok(())
    }
}

/// What would happen to this guest now, up to the policies' verdict. Nothing is changed or recorded.
///
/// # Errors
/// Why it would be refused.
pub fn try_guest(paths: &Paths, file: &Path, policy: &Path) -> Result<PolicyReport, Refusals> {
    let stepped_down = step_down(paths)?;
    let host_file = host_file(stepped_down.as_ref(), paths)?;
    let mut located = parse_guest(file, &read_guest_file(file)?)?;
    let mut images = Images::open(&located)?;
    judge_placement(paths, &located)?;
    let weakened = cell::weakened(paths, &located.guest, &images, &host_file.cell)?;
    let has_devices = !(located.guest.devices.is_empty() && located.guest.pooled.is_empty());
    // Only root can read the ledger; a guest without devices can be tried by anybody, and nothing is made for it.
    let ledger = match has_devices {
        // The broker reads its own.
        _ if stepped_down.is_some() => None,
        true => Some(Ledger::open(&paths.state)?),
        false => paths.state.is_dir().then(|| Ledger::open(&paths.state).ok()).flatten(),
    };
    let whole = looks_at_devices(&located.guest, &host_file);
    let host = hands::Inventory::new(whole, ledger, &host_file.pools)?;
    let pools = host.pools()?;
    let mut addresses = Vec::new();
    if has_devices {
        judge_devices(&located, &host)?;
        choose_devices(&mut located, &host)?;
        addresses = judge_devices(&located, &host)?;
    }
    let report = admission::rehearse(Question {
        paths,
        bundle: policy,
        opened: Policies::open_and_time(paths, policy),
        override_why: None,
        located: &mut located,
        images: &mut images,
        inventory: Inventory { host: &host, pools: &pools },
        weakened: &weakened,
        host_file: &host_file,
    })?;
    judge_needs(&located, &host, &addresses)?;
    Ok(report)
}

/// That this process, which was root's, is root no longer: what it needs of root its broker does, which ends when this is dropped.
#[must_use = "dropped, it ends the broker"]
pub struct SteppedDown {
    broker: &'static Broker,
    host_file: HostFile,
}

impl Drop for SteppedDown {
    fn drop(&mut self) {
        self.broker.end();
    }
}

/// For root: starts a broker, and goes on as a user of its own, who can read what root can. For others nothing is done. To be called
/// while the process has one thread.
///
/// # Errors
/// `broker-gone`; what the host file is refused for.
pub fn step_down(paths: &Paths) -> Result<Option<SteppedDown>, Refusal> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let broker = casemate_broker::begin(&paths.broker, paths.places())?;
    let host_file = paths.read_host_file().and_then(|file| broker.set_rules(Rules::of(&file)).map(|()| file));
    match host_file {
        Ok(host_file) => Ok(Some(SteppedDown { broker, host_file })),
        Err(refusal) => {
            broker.end();
            Err(refusal)
        }
    }
}

/// The host file as it was read then, or, where nobody has stepped down, as it is.
pub(crate) fn host_file(stepped_down: Option<&SteppedDown>, paths: &Paths) -> Result<HostFile, Refusal> {
    stepped_down.map_or_else(|| paths.read_host_file(), |stepped_down| Ok(stepped_down.host_file.clone()))
}

/// Gives back what a keep that was killed left behind.
///
/// # Errors
/// When the ledger cannot be read.
pub fn recover(paths: &Paths) -> Result<Vec<Step>, Refusal> {
    require_root()?;
    let broker = casemate_broker::begin(&paths.broker, paths.places())?;
    let recovered = broker.recover();
    broker.end();
    Ok(recovered?.into_iter().map(Step::from).collect())
}

/// A guest that may run, with all it needs.
struct Prepared<'a> {
    paths: &'a Paths,
    broker: &'static Broker,
    options: RunOptions<'a>,
    located: &'a Located,
    text: &'a str,
    identity: &'a Identity,
    signals: StopSignals,
    images: &'a Images,
    policy: PolicyReport,
    rules: &'a CellRules,
    admitted: Arc<Admitted>,
    /// Without it nothing comes while the guest runs.
    attaching: Option<Arc<Attaching>>,
    /// How far governors may go, and how often they look.
    resources: ResourceBounds,
    interval_ms: u32,
}

impl Prepared<'_> {
    fn run(
        self,
        claim: Option<&Claim>,
        console: Box<dyn Write + Send>,
        tell: &mut dyn FnMut(Step),
    ) -> Result<Report, Refusal> {
        let guest = &self.located.guest;
        let taps = make_taps(self.located)?;
        let (socket, streams) = self.open_socket()?.unzip();
        let (port_sockets, ports): (Vec<_>, Vec<_>) = self.open_ports()?.into_iter().unzip();
        let resources = Resources {
            images: self.images,
            taps: &taps,
            streams: streams.as_ref().map(AsFd::as_fd),
            ports: &ports,
            claim,
            input: self.options.input != Input::None,
            rules: self.rules,
        };
        let started = cell::start(self.paths, self.broker, guest, &resources)?;
        tell(Step::CellClosed {
            pid: started.cell.pid(),
            uid: self.identity.uid,
            landlock_abi: started.cell.landlock().abi,
            weakened: names(started.cell.weakened()),
        });
        let facts = Facts {
            located: self.located,
            spec_sha256: &record::sha256(self.text.as_bytes()),
            uid: self.identity.uid,
            policy: &self.policy,
            resources: &resources,
            started: &started,
        };
        // Gone with this function, as the guest is.
        let _recorded = record::write(self.paths, &facts)?;
        let (operator, orders) = operator::pair(guest.name.as_str()).map_err(|error| {
            let cause = format_args!("nothing can be asked of it: {error}");
            Refusal::new("keep-failed", &guest.name, cause, "try again")
        })?;
        let disks = Disks::of(guest, self.images)?;
        let _governing = Governing::start(self.charge(&started), self.admitted.policies(), operator.clone())?;
        let attaching = self.attaching.clone();
        let reach = Reach { disks, attaching, admitted: Some(Arc::clone(&self.admitted)) };
        let _socket = OperatorSocket::open(self.paths, operator.clone(), reach)?;
        // The cell has its own; a tap is gone with its last descriptor.
        drop((taps, streams, ports));
        let _sockets = (socket, port_sockets);
        if self.options.input == Input::Terminal && guest.console == ConsoleDevice::Virtio {
            input::follow_size(operator.clone());
        }
        let seen = {
            let watching = Watching {
                guest,
                options: &self.options,
                signals: &self.signals,
                orders,
                notices: claim.map(|claim| claim.notices.as_ref()),
                events: Events::below(&self.paths.state),
            };
            watch::until_end(started, watching, console, tell)?
        };
        tell(Step::Ended { ending: seen.ending.clone() });
        Ok(Report {
            guest: guest.name.to_string(),
            ending: seen.ending,
            policy: self.policy,
            cell: CellReport {
                memory_bytes: seen.memory_bytes,
                cpu: seen.cpu,
                calls: Role::NARROW.map(|role| (role.name(), calls_of(role))).into(),
            },
            machine: MachineReport {
                line: seen.line,
                pio_exits: seen.counters.pio_exits,
                mmio_exits: seen.counters.mmio_exits,
                other_exits: seen.counters.other_exits,
                bus_locks: seen.counters.bus_locks,
            },
            devices: Vec::new(),
        })
    }

    /// The sockets of the guest's ports, and the cell's streams for them.
    fn open_ports(&self) -> Result<Vec<(GuestSocket, OwnedFd)>, Refusal> {
        let open = |(number, port): (usize, &Port)| {
            let opened = ports::open(&self.located.resolve(&port.socket));
            opened.map_err(|refusal| refusal.at(self.located.location(&format!("port.{number}.socket"))))
        };
        self.located.guest.ports.iter().enumerate().map(open).collect()
    }

    /// The guest's socket on the host, and the cell's way to it.
    fn open_socket(&self) -> Result<Option<(GuestSocket, OwnedFd)>, Refusal> {
        let open = |vsock: &Vsock| GuestSocket::open(&self.located.resolve(&vsock.socket));
        let opened = self.located.guest.vsock.as_ref().map(open).transpose();
        opened.map_err(|refusal| refusal.at(self.located.location("vsock.socket")))
    }
}

/// As the host file and records name them.
pub(crate) fn names<'a>(parts: impl IntoIterator<Item = &'a CellPart>) -> Vec<String> {
    parts.into_iter().map(ToString::to_string).collect()
}

impl Prepared<'_> {
    /// What governors look after.
    fn charge(&self, started: &Started) -> Charge {
        let guest = &self.located.guest;
        Charge {
            guest: guest.name.to_string(),
            tenant: guest.tenant.to_string(),
            vcpus: guest.vcpus,
            memory_bytes: guest.memory.bytes(),
            devices: guest.devices.iter().map(|device| device.address.to_string()).collect(),
            disks: guest.disks.len(),
            nets: guest.nets.len(),
            bounds: self.resources,
            cgroup: started.cgroup.parent.join(guest.name.as_str()),
            cpus_most: started.cgroup.cpus_max,
            pid: started.cell.pid(),
            interval_ms: self.interval_ms,
            runtime: self.paths.runtime.clone(),
            events: Events::below(&self.paths.state),
        }
    }
}

fn read_guest_file(path: &Path) -> Result<String, Refusal> {
    let refuse = |cause: &dyn fmt::Display| {
        Refusal::new("file-unreadable", path.display(), cause, "name a guest file; examples/ has some")
    };
    let mut text = String::new();
    let file = File::open(path).map_err(|error| refuse(&error))?;
    if !file.metadata().map_err(|error| refuse(&error))?.is_file() {
        return Err(refuse(&"it is not a regular file"));
    }
    // One byte past the limit, for parse_guest to refuse.
    file.take(LIMITS.file_bytes as u64 + 1).read_to_string(&mut text).map_err(|error| refuse(&error))?;
    Ok(text)
}

pub(crate) fn require_root() -> Result<(), Refusal> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let cause = "cells, taps and devices can only be made by root";
    Err(Refusal::new("not-root", "casemate", cause, "run it with sudo"))
}

fn judge_placement(paths: &Paths, located: &Located) -> Result<(), Refusal> {
    placeable(&Host::live(), &paths.cgroup, &located.guest).map_err(|refusal| {
        let key = match refusal.code {
            "node-missing" => "ram.numa_node",
            "huge-pages-missing" => "ram.huge_pages",
            "placement-outside" if refusal.subject.starts_with("node") => "ram.numa_node",
            _ => "cpu.pin",
        };
        refusal.at(located.location(key))
    })
}

/// Whether this guest makes anybody look at the host's PCI functions: what a whole survey costs on a large host is for those who want
/// devices, or where policies are told what pools have left.
fn looks_at_devices(guest: &Guest, host_file: &HostFile) -> bool {
    !(guest.devices.is_empty() && guest.pooled.is_empty() && host_file.pools.is_empty())
}

fn judge_devices(located: &Located, host: &hands::Inventory<'_>) -> Result<Vec<PciAddress>, Refusal> {
    let devices = &located.guest.devices;
    let addresses: Vec<PciAddress> = devices.iter().map(|device| device.address).collect();
    if addresses.is_empty() {
        return Ok(addresses);
    }
    host.assignable(&addresses).map_err(|refusal| at_device(located, refusal))?;
    for device in devices {
        if let Some(function) = host.functions.iter().find(|function| function.address == device.address) {
            function
                .is_the_one(&device.pin)
                .map_err(|refusal| refusal.at(located.device_location(device.table)))?;
        }
    }
    Ok(addresses)
}

/// What the guest's devices ask of this host's memory, IOMMU and interrupts, as far as it can be told before they are taken.
fn judge_needs(
    located: &Located,
    host: &hands::Inventory<'_>,
    addresses: &[PciAddress],
) -> Result<(), Refusal> {
    if addresses.is_empty() {
        return Ok(());
    }
    host.judge_dma(addresses, &cell::dma_needs(&located.guest)).map_err(|refusal| match refusal.code {
        "dma-memlock" | "dma-memory" => refusal.at(located.location("memory")),
        _ => at_device(located, refusal),
    })
}

/// Takes the place of each pool that the guest names by a device of it.
fn choose_devices(located: &mut Located, host: &hands::Inventory<'_>) -> Result<(), Refusal> {
    let guest = &located.guest;
    let named: Vec<PciAddress> = guest.devices.iter().map(|device| device.address).collect();
    if named.is_empty() && guest.pooled.is_empty() {
        return Ok(());
    }
    let chosen = host.choose(&guest.tenant, &named, &guest.pooled).map_err(|refusal| {
        let pool = guest.pooled.iter().find(|pooled| pooled.pool.as_str() == refusal.subject);
        match pool {
            Some(pooled) => refusal.at(located.device_location(pooled.table)),
            None => at_device(located, refusal),
        }
    })?;
    located.choose(chosen);
    Ok(())
}

/// A device's refusal, told where the device stands in the guest's file.
pub(crate) fn at_device(located: &Located, refusal: Refusal) -> Refusal {
    let devices = &located.guest.devices;
    let named = devices.iter().find(|device| refusal.subject.contains(&device.address.to_string()));
    // A refusal that names none of them, as one of the whole host's, stands at the first.
    let table = named.or(devices.first()).map_or(0, |device| device.table);
    refusal.at(located.device_location(table))
}

fn take_devices(
    broker: &'static Broker,
    located: &Located,
    addresses: Vec<PciAddress>,
    judged: bool,
    tell: &mut dyn FnMut(Step),
) -> Result<Option<Claim>, Refusal> {
    if addresses.is_empty() {
        return Ok(None);
    }
    tell(Step::Claiming { devices: addresses.clone() });
    let guest = &located.guest;
    // Numbered behind its emulated cards.
    let macs = (0..addresses.len()).map(|number| cell::mac(guest.name.as_str(), guest.nets.len() + number));
    let claiming = Claiming {
        slot: None,
        tenant: guest.tenant.clone(),
        addresses,
        judged,
        needs: cell::dma_needs(guest),
        macs: macs.collect(),
    };
    let claim = broker.claim(claiming).map_err(|Failed { refusal, returned }| {
        let devices: Vec<_> = returned.into_iter().map(DeviceReport::from).collect();
        if !devices.is_empty() {
            tell(Step::Returned { devices });
        }
        at_device(located, refusal)
    })?;
    let devices = claim.devices.iter();
    tell(Step::Claimed {
        devices: devices
            .map(|device| (device.address, device.former_driver.clone(), device.reset_method.clone()))
            .collect(),
    });
    Ok(Some(claim))
}

/// Virtual functions that a guest uses. Dropped, after its devices were given back, they go when nobody else uses them.
struct Virtual(&'static Broker);

impl Drop for Virtual {
    fn drop(&mut self) {
        self.0.leave_virtual(None);
    }
}

/// Has the virtual functions made that the guest's pools are of.
fn make_virtual(broker: &'static Broker, located: &Located) -> Result<Option<Virtual>, Refusal> {
    let first = located.guest.pooled.first().map_or(0, |pooled| pooled.table);
    let made = broker.make_virtual(None, &located.guest.pooled);
    let made = made.map_err(|refusal| refusal.at(located.device_location(first)))?;
    Ok(made.then_some(Virtual(broker)))
}

fn make_taps(located: &Located) -> Result<Vec<Tap>, Refusal> {
    let nets = located.guest.nets.iter().enumerate();
    nets.map(|(index, net)| {
        let host_address = net.host_address.map(|(address, length)| (address.into(), length));
        let request = TapRequest { name: net.tap.clone(), host_address, bridge: None, queues: net.queues };
        hands::tap(&request).map_err(|refusal| refusal.at(located.location(&format!("net[{index}].tap"))))
    })
    .collect()
}
