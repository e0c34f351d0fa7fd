//! From the keep's message to a running machine.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, Barrier},
    thread,
};

use casemate_chipset::intx_gsi;
use casemate_filters::Role;
use casemate_passthrough::{Container, Seat, VfioDevice};
use casemate_pci::{Function, HostBridge, RootPort};
use casemate_virtio::{
    Balloon, BalloonControl, Blk, BlkBackend, BlkBelow, BlkFormat, Console, ConsoleControl, Counters, Device,
    Finisher, Interrupt, KernelNet, Kind, Net, PciParts, PciTransport, PortBackend, Rng, SpareRing, Vsock,
    Worker, WorkerControl, vector_count,
};
use casemate_wire::{CpuRange, Descriptors, End, Format, Limited, Machine, Pages};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    affinity::Placement,
    asks,
    assigned::{self, KvmVfio, Rom},
    boot::{self, Entry, Images},
    control::{Control, Requests, Vectors},
    cpu::{self, Halt, Processors},
    entry::file,
    error::{During, Error},
    hotplug::{Assigning, Hotplug, HotplugParts, Orders, Spare},
    intx::{self, Intx, IntxSource},
    kvm, layout,
    maps::{Attachments, DirectRegion, Doorbell},
    memory,
    peers::{Peers, PeersThread},
    platform::{Platform, PlatformParts, Processor},
    root::{Body, BusParts, FUNCTIONS_PER_BUS, Place, PortWindows, RootBus},
    tables::{self, Told},
    vsock::KeepStreams,
};

/// A machine whose parts are all there, before the first instruction.
pub(crate) struct Built {
    vcpus: Vec<VcpuFd>,
    pins: Vec<Vec<CpuRange>>,
    workers: Vec<Worker>,
    intx: Vec<IntxSource>,
    devices: Vec<Emulated>,
    control: Control,
    platform: Arc<Platform>,
    console_input: Option<File>,
    peers: Option<PeersThread>,
    hotplug: Option<Slots>,
    held: Held,
}

/// The slots of a machine that has some: who puts cards into them, on which threads, and the way there.
struct Slots {
    hotplug: Hotplug,
    spares: Vec<Spare>,
    orders: Orders,
}

/// What must live as long as the machine, though nobody calls it any more.
pub(crate) struct Held {
    /// KVM's memory slots and the IOMMU's maps point into it.
    memory: Arc<GuestMemoryMmap>,
    _passthrough: Option<Passthrough>,
}

struct Passthrough {
    /// Unless the thread for peers has it.
    _container: Option<Container>,
    _groups: Vec<OwnedFd>,
    _kvm_vfio: Arc<KvmVfio>,
}

/// A machine that runs.
pub(crate) struct Running {
    /// What changes it.
    pub(crate) control: Control,
    /// How much memory the guest has.
    pub(crate) memory_bytes: u64,
    /// Its emulated devices, in the order in which they sit on the bus.
    pub(crate) devices: Vec<Emulated>,
    /// What its processors reach.
    pub(crate) platform: Arc<Platform>,
    /// Who puts cards into its slots.
    pub(crate) hotplug: Option<Orders>,
    /// Of the devices that hold something back, which is to be written before the process ends.
    pub(crate) finishers: Vec<Finisher>,
    /// What it stands on.
    pub(crate) _held: Held,
}

/// An emulated device, as far as control has to do with it: never by its locks.
pub(crate) struct Emulated {
    /// What it is.
    pub(crate) kind: Kind,
    /// What it has done.
    pub(crate) counters: Arc<Counters>,
    /// How its driver is told that something is another way now.
    pub(crate) interrupt: Interrupt,
    /// What can be asked of its thread.
    pub(crate) worker: WorkerControl,
    /// What else can be changed of it while it runs.
    pub(crate) own: Own,
}

/// What can be changed of a device while it runs.
pub(crate) enum Own {
    /// Nothing else.
    Nothing,
    /// Not even limits: the host's kernel serves it, and heeds none.
    NoLimits,
    /// How much memory the guest gives up.
    Balloon(Arc<BalloonControl>),
    /// How large the terminal is.
    Terminal(ConsoleControl),
}

impl Emulated {
    /// Its balloon, if it is one.
    pub(crate) fn balloon(&self) -> Option<&BalloonControl> {
        match &self.own {
            Own::Balloon(balloon) => Some(balloon),
            Own::Nothing | Own::NoLimits | Own::Terminal(_) => None,
        }
    }
}

impl Built {
    /// Builds the machine out of the descriptors that came with it.
    pub(crate) fn new(machine: Machine, mut descriptors: Descriptors) -> Result<Self, Error> {
        let (kvm, vm) = kvm::open(descriptors.take(machine.kvm)?)?;
        let processors = Processors::new(&cpu::supported_cpuid(&kvm)?, &machine.cpu, machine.vcpus)?;
        let window64 = layout::window64(machine.memory_bytes, processors.physical_bits(), machine.dma_end)
            .ok_or_else(|| Error::Layout("the memory leaves no room for devices' registers".into()))?;
        let memory = memory::allocate(machine.memory_bytes, machine.ram)?;
        let first_slot = memory::give_to_kvm(&vm, &memory)?;
        let mirrors_slot = first_slot;
        let first_slot = mirrors_slot.saturating_add(FUNCTIONS_PER_BUS);
        let (control, requests) = Control::new(Arc::clone(&vm), first_slot)?;
        let mut parts = Parts {
            control,
            requests: Arc::clone(&requests),
            memory: Arc::clone(&memory),
            functions: Vec::new(),
            next_device: 0,
            workers: Vec::new(),
            intx: Vec::new(),
            devices: Vec::new(),
            peer_to_peer: machine.peer_to_peer,
            cards: BTreeMap::new(),
        };
        parts.add(Box::new(HostBridge::new()), Attachments::default());
        parts.add_virtio(Box::new(Rng::new()), Own::Nothing)?;
        for disk in machine.disks {
            let file = descriptors.take(disk.image)?;
            let format = format(disk.format, &mut descriptors)?;
            let backend = BlkBackend {
                file,
                format,
                size_bytes: disk.size_bytes,
                read_only: disk.read_only,
                serial: disk.serial,
                queues: disk.queues.into(),
            };
            let name = backend.serial.clone();
            let disk = Blk::new(backend).map_err(|error| Error::device(&name, error))?;
            if let Some(error) = disk.without_ring() {
                eprintln!(
                    "casemate-vmm: {name} does one request at a time, since io_uring cannot be used: {error}"
                );
            }
            parts.add_virtio(Box::new(disk), Own::Nothing)?;
        }
        for net in machine.nets {
            let mut take_all = |slots: Vec<casemate_wire::Slot>| -> Result<Vec<OwnedFd>, Error> {
                slots.into_iter().map(|slot| Ok(descriptors.take(slot)?)).collect()
            };
            let (taps, vhosts) = (take_all(net.taps)?, take_all(net.vhosts)?);
            let made = if vhosts.is_empty() {
                Net::new(taps, net.mac).map(|card| (Box::new(card) as Box<dyn Device>, Own::Nothing))
            } else {
                KernelNet::new(taps, vhosts, net.mac)
                    .map(|card| (Box::new(card) as Box<dyn Device>, Own::NoLimits))
            };
            let (card, own) = made.map_err(|error| Error::device("virtio-net", error))?;
            parts.add_virtio(card, own)?;
        }
        if let Some(vsock) = machine.vsock {
            let streams = KeepStreams::new(descriptors.take(vsock.socket)?);
            let device = Vsock::new(vsock.cid, Box::new(streams)).during("making an epoll set")?;
            parts.add_virtio(Box::new(device), Own::Nothing)?;
        }
        if let Some(terminal) = machine.terminal {
            let input = terminal.input.map(|slot| descriptors.take(slot)).transpose()?;
            let output = descriptors.take(terminal.output)?;
            let terminal = Console::terminal(PortBackend { name: String::new(), input, output });
            let control = terminal.control();
            parts.add_virtio(Box::new(terminal), Own::Terminal(control))?;
        }
        if !machine.ports.is_empty() {
            let mut port = |port: casemate_wire::Port| -> Result<PortBackend, Error> {
                let output = descriptors.take(port.stream)?;
                let input = output.try_clone().during("duplicating a port's stream")?;
                Ok(PortBackend { name: port.name, input: Some(input), output })
            };
            let ports = machine.ports.into_iter().map(&mut port).collect::<Result<_, _>>()?;
            parts.add_virtio(Box::new(Console::named(ports)), Own::Nothing)?;
        }
        for limited in machine.limits {
            let Limited { kind, number, limits } = limited;
            asks::limit(&parts.devices, kind, number, limits)
                .map_err(|refused| Error::device("a limited device", refused.message))?;
        }
        // What an assigned device reaches by DMA is pinned, and must not be given back. Pages that were set aside for this
        // guest would go to another.
        let set_aside = matches!(machine.ram.pages, Pages::Huge2Mib | Pages::Huge1Gib);
        let mut balloon_control = None;
        if machine.container.is_none() && !set_aside {
            let balloon = Balloon::new().during("making an eventfd")?;
            let control = balloon.control();
            balloon_control = Some(Arc::clone(&control));
            parts.add_virtio(Box::new(balloon), Own::Balloon(control))?;
        }
        let may_have_devices = machine.container.is_some() || machine.hotplug.slots > 0;
        let kvm_vfio = may_have_devices.then(|| KvmVfio::new(&vm).map(Arc::new)).transpose()?;
        let mut peers = None;
        let passthrough = match machine.container.zip(kvm_vfio.as_ref()) {
            Some((container, kvm_vfio)) => {
                let container = Container::from_fd(descriptors.take(container)?)
                    .map_err(|error| Error::device("the VFIO container", error))?;
                let groups = machine.groups.into_iter().map(|slot| descriptors.take(slot));
                let groups = groups.collect::<Result<Vec<OwnedFd>, _>>()?;
                groups.iter().try_for_each(|group| kvm_vfio.add(group))?;
                for device in machine.devices {
                    let rom = device.rom.map(|rom| {
                        Ok::<_, Error>(Rom { file: descriptors.take(rom.file)?, size_bytes: rom.size_bytes })
                    });
                    let rom = rom.transpose()?;
                    let place = parts.place_on(device.card, device.function);
                    let file = descriptors.take(device.device)?;
                    parts.add_assigned(file, &device.address, place, rom.as_ref())?;
                }
                assigned::map_memory(&container, &memory)?;
                let kvm_vfio = Arc::clone(kvm_vfio);
                let mut container = Some(container);
                if let Some(container) = container.take_if(|_| machine.peer_to_peer) {
                    let (way, thread) = Peers::new(container);
                    parts.control.have_peers(way);
                    peers = Some(thread);
                }
                Some(Passthrough { _container: container, _groups: groups, _kvm_vfio: kvm_vfio })
            }
            None => None,
        };
        let images = Images {
            kernel: descriptors.take(machine.kernel)?,
            initrd: machine.initrd.map(|slot| descriptors.take(slot)).transpose()?,
            command_line: machine.command_line,
        };
        let console = file(descriptors.take(machine.console)?);
        let console_input = machine.console_input.map(|slot| descriptors.take(slot)).transpose()?.map(file);
        descriptors.finish()?;
        parts.add_ports(machine.hotplug.slots)?;
        let has_rtc = machine.platform.rtc;
        let slots = machine.hotplug.slots;
        let told = Told { processors: &processors, slots, window64, platform: machine.platform };
        let rsdp = tables::write(&memory, told)?;
        let entry = boot::load(&memory, images, rsdp)?;
        let segments: Vec<u8> = cpu::SEGMENTS.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        boot::put(&memory, layout::SEGMENTS, &segments)?;
        let vcpus = make_vcpus(&vm, &processors, entry)?;
        let (orders, incoming) = Orders::new(machine.hotplug.slots);
        let hears = orders.clone();
        let mut root = RootBus::new(BusParts {
            functions: parts.functions,
            port_windows: PortWindows {
                memory_bytes: machine.hotplug.memory_bytes,
                prefetchable_bytes: machine.hotplug.prefetchable_bytes,
            },
            windows: [layout::WINDOW32, window64],
            requests: Arc::clone(&requests),
            let_go: Box::new(move |slot| hears.let_go(slot)),
        })?;
        // Without it, each read is an exit.
        if vm.check_extension(Cap::ReadonlyMem) {
            for slot in root.mirror(mirrors_slot)? {
                // SAFETY: the bus has the memory, and the platform that every processor runs with has the bus.
                unsafe { memory::set_slot(&vm, slot) }.during("mapping configuration space")?;
            }
        }
        let (lines, sources) = parts.intx.into_iter().unzip();
        let hotplug_requests = Arc::clone(&requests);
        let parts_of_platform =
            PlatformParts { vm, root, console, intx: lines, requests, vcpus: machine.vcpus, has_rtc };
        let platform = Arc::new(Platform::new(parts_of_platform));
        let hotplug = kvm_vfio.filter(|_| machine.hotplug.slots > 0).map(|kvm_vfio| {
            let (spares, handles) = (0..machine.hotplug.slots).map(|_| Spare::new(spare_ring())).unzip();
            let (platform, memory) = (Arc::clone(&platform), Arc::clone(&memory));
            let assigning = Assigning::new(kvm_vfio, Arc::clone(&memory), balloon_control);
            let hotplug = Hotplug::new(HotplugParts {
                platform,
                requests: hotplug_requests,
                memory,
                assigning,
                incoming,
                spares: handles,
            });
            Slots { hotplug, spares, orders }
        });
        Ok(Self {
            vcpus,
            pins: machine.cpu.pins,
            workers: parts.workers,
            intx: sources,
            devices: parts.devices,
            control: parts.control,
            platform,
            console_input,
            peers,
            hotplug,
            held: Held { memory, _passthrough: passthrough },
        })
    }

    /// Makes the threads, narrows every filter, and lets the processors go.
    pub(crate) fn start(self) -> Result<Running, Error> {
        let Self {
            vcpus,
            pins,
            workers,
            intx,
            devices,
            control,
            platform,
            console_input,
            peers,
            hotplug,
            held,
        } = self;
        let finishers = workers.iter().filter_map(Worker::finisher).collect();
        // Every thread passes here with its narrow filter on before the first guest instruction.
        let slots: usize = hotplug.iter().map(|slots| slots.spares.len() + 1).sum();
        let threads = vcpus.len() + workers.len() + intx.len() + console_input.iter().count() + slots;
        let threads = threads + peers.iter().count();
        let ready = Arc::new(Barrier::new(threads + 1));
        let placement = Placement::of_this_thread()?;
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            if let Some(pin) = pins.get(id) {
                placement.pin(pin)?;
            }
            let (platform, ready) = (Arc::clone(&platform), Arc::clone(&ready));
            spawn(format!("vcpu{id}"), move || {
                platform.gate().enter(&mut vcpu);
                narrow(Role::Vcpu);
                ready.wait();
                run_vcpu(vcpu, platform, id);
            })?;
        }
        placement.restore()?;
        for (number, worker) in workers.into_iter().enumerate() {
            let ready = Arc::clone(&ready);
            spawn(format!("{}{number}", worker.name()), move || {
                narrow(role_of(worker.kind()));
                ready.wait();
                worker.run();
            })?;
        }
        for (number, source) in intx.into_iter().enumerate() {
            let (ioapic, ready) = (platform.ioapic(), Arc::clone(&ready));
            spawn(format!("intx{number}"), move || {
                narrow(Role::Intx);
                ready.wait();
                source.run(&ioapic);
            })?;
        }
        if let Some(input) = console_input {
            let (platform, ready) = (Arc::clone(&platform), Arc::clone(&ready));
            spawn("console".into(), move || {
                narrow(Role::Console);
                ready.wait();
                platform.feed_serial(input);
            })?;
        }
        if let Some(peers) = peers {
            let ready = Arc::clone(&ready);
            spawn("peers".into(), move || {
                narrow(Role::Peers);
                ready.wait();
                peers.run();
            })?;
        }
        let hotplug = hotplug.map(|slots| start_slots(slots, &ready)).transpose()?;
        narrow(Role::Control);
        ready.wait();
        let memory_bytes = held.memory.iter().map(vm_memory::GuestMemoryRegion::len).sum();
        Ok(Running { control, memory_bytes, devices, platform, hotplug, finishers, _held: held })
    }
}

/// Makes the threads of hot-plug. Returns the way to them.
fn start_slots(slots: Slots, ready: &Arc<Barrier>) -> Result<Orders, Error> {
    let Slots { hotplug, spares, orders } = slots;
    for (number, spare) in (1..).zip(spares) {
        let ready = Arc::clone(ready);
        spawn(format!("slot{number}"), move || {
            narrow(Role::Spare);
            ready.wait();
            spare.run();
        })?;
    }
    let ready = Arc::clone(ready);
    spawn("hotplug".into(), move || {
        narrow(Role::Hotplug);
        ready.wait();
        hotplug.run();
    })?;
    Ok(orders)
}

/// The functions of the root bus as they are made.
struct Parts {
    control: Control,
    requests: Arc<Requests>,
    memory: Arc<GuestMemoryMmap>,
    functions: Vec<(Place, Body)>,
    /// Device numbers of the root bus that are taken.
    next_device: u8,
    workers: Vec<Worker>,
    intx: Vec<(Intx, IntxSource)>,
    devices: Vec<Emulated>,
    /// Assigned functions reach each other.
    peer_to_peer: bool,
    /// Where the host's cards sit, those that have been seen.
    cards: BTreeMap<u8, Place>,
}

impl Parts {
    /// Adds a device of one function.
    fn add(&mut self, function: Box<dyn Function>, attachments: Attachments) {
        let place = self.next_device();
        self.put(place, Body::Function(function), attachments);
    }

    /// The next free device of the root bus; there being no more is seen when the bus is made.
    fn next_device(&mut self) -> Place {
        let place = Place { bus: 0, device: self.next_device, function: 0 };
        self.next_device = self.next_device.saturating_add(1);
        place
    }

    fn put(&mut self, place: Place, body: Body, attachments: Attachments) {
        self.functions.push((place, body));
        self.control.add_function(place, attachments);
    }

    /// Adds root ports, all functions of one device. Their slots are numbered from 1.
    fn add_ports(&mut self, slots: u8) -> Result<(), Error> {
        if slots == 0 {
            return Ok(());
        }
        let device = self.next_device();
        for function in 0..slots {
            let vectors = self.vectors(1)?;
            let events = Arc::clone(&vectors.events);
            let interrupt = Box::new(move || {
                // It fails only when the counter is full, and then the interrupt is pending already.
                let _ = events.iter().try_for_each(|event| event.write(1));
            });
            let port = RootPort::new(u16::from(function) + 1, Box::new(vectors), interrupt);
            let port = port.map_err(|error| Error::Layout(error.to_string()))?;
            self.put(Place { function, ..device }, Body::Port(Box::new(port)), Attachments::default());
        }
        Ok(())
    }

    /// Vectors with an event each, which the control thread connects when the guest routes them.
    fn vectors(&mut self, count: u16) -> Result<Vectors, Error> {
        let make = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).during("making an eventfd");
        let events: Arc<[EventFd]> = (0..count).map(make).collect::<Result<_, _>>()?;
        let duplicate = |event: &EventFd| event.try_clone().during("duplicating an eventfd");
        let first_gsi = self.control.add_vectors(events.iter().map(duplicate).collect::<Result<_, _>>()?)?;
        Ok(Vectors { first_gsi, events, requests: Arc::clone(&self.requests) })
    }

    /// The place of a function of the host's, on the device that its card has.
    fn place_on(&mut self, card: u8, function: u8) -> Place {
        let device = match self.cards.get(&card) {
            Some(device) => *device,
            None => self.next_device(),
        };
        self.cards.insert(card, device);
        Place { function, ..device }
    }

    fn add_assigned(
        &mut self,
        device: OwnedFd,
        address: &str,
        place: Place,
        rom: Option<&Rom>,
    ) -> Result<(), Error> {
        let device = VfioDevice::from_fd(device).map_err(|error| Error::device(address, error))?;
        let device = Arc::new(device);
        let number = self.control.add_device(Arc::clone(&device));
        let mut found = assigned::find(&device, number, address, Seat::RootBus, &self.requests)?;
        let mut regions = Vec::new();
        if let Some(rom) = rom {
            found = found.add_rom(rom, address, &mut regions)?;
        }
        let has_intx = found.probe.intx();
        let sink = self.vectors(found.probe.vectors())?;
        let (function, registers) = found.connect(sink, address)?;
        let reachable = self.peer_to_peer;
        regions.extend(registers.into_iter().map(|region| DirectRegion { reachable, ..region }));
        if has_intx {
            self.intx.push(intx::connect(&device, address, intx_gsi(place.device, 0))?);
        }
        self.put(place, Body::Function(function), Attachments { doorbells: Vec::new(), regions });
        Ok(())
    }

    fn add_virtio(&mut self, device: Box<dyn Device>, own: Own) -> Result<(), Error> {
        let kind = device.kind();
        let vectors = self.vectors(vector_count(device.as_ref()))?;
        let duplicate = |event: &EventFd| event.try_clone().during("duplicating an eventfd");
        let events = vectors.events.iter().map(duplicate).collect::<Result<_, _>>()?;
        let parts = PciParts { device, memory: Arc::clone(&self.memory), events, vectors: Box::new(vectors) };
        let (transport, worker) =
            PciTransport::new(parts).map_err(|error| Error::device("a virtio device", error))?;
        let ring = |bell: casemate_virtio::Doorbell<'_>| {
            Ok(Doorbell { bar: bell.bar, offset: bell.offset, event: duplicate(bell.event)? })
        };
        let doorbells = transport.doorbells().map(ring).collect::<Result<_, Error>>()?;
        let counters = Arc::clone(transport.counters());
        let (interrupt, control) = (transport.interrupt(), transport.worker_control());
        self.devices.push(Emulated { kind, counters, interrupt, worker: control, own });
        self.workers.push(worker);
        self.add(Box::new(transport), Attachments { doorbells, regions: Vec::new() });
        Ok(())
    }
}

/// A disk's format, with the descriptors that it names.
fn format(format: Format, descriptors: &mut Descriptors) -> Result<BlkFormat, Error> {
    let (file_bytes_max, below) = match format {
        Format::Raw => return Ok(BlkFormat::Raw),
        Format::Qcow2 { file_bytes_max, below } => (file_bytes_max, below),
    };
    let below = below.map(|below| {
        // Only read, so it gets no longer.
        let qcow2 = BlkFormat::Qcow2 { file_bytes_max: 0, below: None };
        let format = if below.is_qcow2 { qcow2 } else { BlkFormat::Raw };
        Ok::<_, Error>(BlkBelow {
            file: descriptors.take(below.image)?,
            size_bytes: below.size_bytes,
            format,
        })
    });
    Ok(BlkFormat::Qcow2 { file_bytes_max, below: below.transpose()?.map(Box::new) })
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new().name(name).spawn(body).map(drop).during("making a thread")
}

/// Puts a narrow filter on this thread. Without it nothing may run: the process ends.
fn narrow(role: Role) {
    if let Err(error) = casemate_filters::install(role) {
        eprintln!("casemate-vmm: the {role:?} filter cannot be installed: {error}");
        std::process::exit(2);
    }
}

/// The filter of a device's thread.
fn role_of(kind: Kind) -> Role {
    match kind {
        Kind::Block => Role::Blk,
        Kind::Net => Role::Net,
        Kind::Vsock => Role::Vsock,
        Kind::Console => Role::Port,
        Kind::Entropy | Kind::Balloon => Role::Device,
    }
}

fn run_vcpu(mut vcpu: VcpuFd, platform: Arc<Platform>, number: usize) {
    let mut processor = Processor::new(Arc::clone(&platform), number);
    match cpu::run(&mut vcpu, &mut processor) {
        Halt::TripleFault => platform.end(End::TripleFault),
        Halt::Fault(what) => platform.end(End::Fault(what)),
    }
    loop {
        // The control thread ends the process.
        thread::park();
    }
}

fn make_vcpus(vm: &VmFd, processors: &Processors, entry: Entry) -> Result<Vec<VcpuFd>, Error> {
    (0..)
        .zip(processors.topology().apic_ids())
        .map(|(id, apic_id)| {
            // KVM takes a processor's id for its APIC id.
            let vcpu = vm.create_vcpu(u64::from(apic_id)).during("making a processor")?;
            cpu::prepare(&vcpu, processors, id, entry)?;
            Ok(vcpu)
        })
        .collect()
}

/// A ring for the disks of a slot; without one they do one request at a time.
fn spare_ring() -> Option<SpareRing> {
    SpareRing::new()
        .inspect_err(|error| {
            eprintln!("casemate-vmm: disks in slots do one request at a time, since io_uring cannot be used: {error}");
        })
        .ok()
}
