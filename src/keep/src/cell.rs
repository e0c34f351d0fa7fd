//! From descriptors to a closed cell with a running machine in it.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
};

use casemate_broker::{Broker, Cell, CellWanted, Claim, Kept, Node, hands};
use casemate_host::{DmaNeeds, Host, Image, Tap};
use casemate_jail::{CgroupPlan, IoPlan, Rlimits};
use casemate_spec::{
    CellPart, CellRules, ConsoleDevice, CpuList, CpuModel, DiskFormat, Guest, IoLimits, LIMITS,
    NET_QUEUES_MAX, Name, Pages, PciAddress, Ram, Refusal,
};
use casemate_wire::{
    self as wire, Assigned, Below, Channel, Cpu, CpuRange, DeviceKind, Disk, Format, FromCell, Hotplug,
    Limited, Machine, Model, Net, Port, RomFile, Slot, Terminal, ToCell, VERSION, Vsock,
};
use rustix::{
    fs::OFlags,
    pipe::{PipeFlags, pipe_with},
};

use crate::{Paths, beside, identity, images::Images, record};

/// What the VMM and the kernel need beside the guest's memory.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// What is locked beside a guest's memory.
const LOCKED_OVERHEAD_BYTES: u64 = 1 << 20;
/// Emulated functions that each guest has.
const OWN_FUNCTIONS: usize = 6;
/// Interrupt vectors of one emulated function at most: a queue each, and one for changes of configuration.
const VECTORS_MOST: u32 = 65;
/// The kernel's page tables for a guest's memory take at most this share of it (two levels of paging, 4 KiB pages).
const PAGE_TABLE_SHARE: u64 = 128;

/// A guest's name and user, reserved until this process's broker ends.
pub(crate) struct Identity {
    /// The uid and gid.
    pub(crate) uid: u32,
    runtime: PathBuf,
    guest: Name,
}

impl Identity {
    /// Reserves the guest's name, and a uid that no other cell has.
    pub(crate) fn reserve(paths: &Paths, broker: &Broker, guest: &Guest) -> Result<Self, Refusal> {
        let uid = broker.reserve(&guest.name)?;
        Ok(Self { uid, runtime: paths.runtime.clone(), guest: guest.name.clone() })
    }

    /// Tells others what the guest has now.
    pub(crate) fn tell(&self, guest: &Guest) -> Result<(), Refusal> {
        beside::write(&self.runtime, guest).map_err(|error| {
            let cause = format_args!("its account cannot be written: {error}");
            Refusal::new("host-folder", &guest.name, cause, "run as root, with space in /run")
        })
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // One that stays is nobody's once this process is gone.
        hands::remove(&self.runtime, &self.guest, Kept::Account);
    }
}

/// A cell whose machine was handed over.
pub(crate) struct Started {
    pub(crate) cell: Cell,
    pub(crate) channel: Channel,
    /// The guest's serial port.
    pub(crate) console: OwnedFd,
    /// What the guest's serial port reads.
    pub(crate) console_input: Option<OwnedFd>,
    /// The VMM's own words.
    pub(crate) log: OwnedFd,
    /// What it was given, for its record.
    pub(crate) rlimits: Rlimits,
    pub(crate) cgroup: CgroupPlan,
}

/// What a machine is made of, beside its spec.
pub(crate) struct Resources<'a> {
    pub(crate) images: &'a Images,
    pub(crate) taps: &'a [Tap],
    /// The cell's end of the way on which streams for the guest's sockets come.
    pub(crate) streams: Option<BorrowedFd<'a>>,
    pub(crate) claim: Option<&'a Claim>,
    /// The cell's ends of the streams of the guest's ports, in the order of its file.
    pub(crate) ports: &'a [OwnedFd],
    /// Whether the guest's console has input.
    pub(crate) input: bool,
    /// What the host file says of cells.
    pub(crate) rules: &'a CellRules,
}

/// What the cell of this guest will be without, by the host file's leave.
///
/// # Errors
/// The refusal of what is lacking without it.
pub(crate) fn weakened(
    paths: &Paths,
    guest: &Guest,
    images: &Images,
    rules: &CellRules,
) -> Result<Vec<CellPart>, Refusal> {
    let lacks = casemate_jail::lacking(&cgroup(paths, guest, images, rules));
    match lacks.iter().find(|lack| !rules.may_lack.contains(&lack.part)) {
        Some(lack) => Err(lack.refusal()),
        None => Ok(lacks.into_iter().map(|lack| lack.part).collect()),
    }
}

fn cgroup(paths: &Paths, guest: &Guest, images: &Images, rules: &CellRules) -> CgroupPlan {
    CgroupPlan {
        parent: paths.cgroup.clone(),
        memory_bytes_max: memory_bytes_max(guest),
        pids_max: threads(guest),
        // One for each virtual processor, and one for all that the VMM does beside.
        cpus_max: u32::from(guest.vcpus) + 1,
        io: io(&images.disks, rules),
    }
}

/// The limits of the host's disks that the guest's lie on.
fn io(images: &[Image], rules: &CellRules) -> IoPlan {
    let host = Host::live();
    let (mut disks, mut without_device) = (Vec::new(), Vec::new());
    for image in images {
        match host.disk_under(&image.fd) {
            Some(disk) => disks.push(disk),
            None => without_device.push(image.path.display().to_string()),
        }
    }
    disks.sort_unstable();
    disks.dedup();
    IoPlan { rules: rules.io, disks, without_device }
}

/// Starts the VMM in a closed cell and hands it the machine.
pub(crate) fn start(
    paths: &Paths,
    broker: &'static Broker,
    guest: &Guest,
    resources: &Resources<'_>,
) -> Result<Started, Refusal> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Refusal::new(
            "cell-start",
            &guest.name,
            format_args!("{what}: {error}"),
            "see the message of the kernel above",
        )
    };
    let nodes = Nodes::open(broker, guest)?;
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed("a pipe", &error));
    let (log, log_write) = pipe()?;
    let (console, console_write) = pipe()?;
    let rlimits = rlimits(guest, resources);
    let cgroup = cgroup(paths, guest, resources.images, resources.rules);
    let (input_read, console_input) = resources.input.then(pipe).transpose()?.unzip();
    let terminal = match guest.console {
        ConsoleDevice::Serial => None,
        ConsoleDevice::Virtio => {
            let output = without_blocking(&console_write, true).map_err(|error| failed("a pipe", &error))?;
            let input = input_read.as_ref().map(|input| without_blocking(input, false)).transpose();
            Some((output, input.map_err(|error| failed("a pipe", &error))?))
        }
    };
    let wanted = CellWanted {
        rlimits: [
            rlimits.memlock_bytes,
            rlimits.descriptors_max,
            rlimits.threads_max,
            rlimits.file_size_bytes_max,
        ],
        memory_bytes_max: cgroup.memory_bytes_max,
        pids_max: cgroup.pids_max,
        cpus_max: cgroup.cpus_max,
        io: cgroup.io.rules,
        disks: cgroup.io.disks.clone(),
        without_device: cgroup.io.without_device.clone(),
        guest_memory_bytes: guest.memory.bytes(),
    };
    let (cell, peer) = broker.close_cell(wanted, log_write.as_fd())?;
    let channel = Channel::new(peer);
    let ends = ConsoleEnds {
        output: console_write.as_fd(),
        // What is typed goes to one of the two.
        input: input_read.as_ref().filter(|_| terminal.is_none()).map(AsFd::as_fd),
        terminal: terminal.as_ref().map(|(output, input)| (output.as_fd(), input.as_ref().map(AsFd::as_fd))),
    };
    send_machine(&channel, guest, resources, &nodes, ends)?;
    Ok(Started { cell, channel, console, console_input, log, rlimits, cgroup })
}

/// The device nodes that the guest's VMM uses.
struct Nodes {
    kvm: OwnedFd,
    /// The kernel's side of each card, where it is to serve the card's queues: one a pair.
    vhosts: Vec<Vec<OwnedFd>>,
}

impl Nodes {
    fn open(broker: &Broker, guest: &Guest) -> Result<Self, Refusal> {
        let of = |net: &casemate_spec::Net| {
            let count = if net.vhost { net.queues } else { 0 };
            (0..count).map(|_| broker.open_node(Node::VhostNet)).collect::<Result<Vec<_>, _>>()
        };
        let vhosts = guest.nets.iter().map(of).collect::<Result<_, _>>()?;
        Ok(Self { kvm: broker.open_node(Node::Kvm)?, vhosts })
    }
}

/// The same pipe once more, with a state of its own: nobody waits who uses it by this descriptor.
fn without_blocking(pipe: &OwnedFd, writes: bool) -> std::io::Result<OwnedFd> {
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits().cast_signed();
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    File::options().read(!writes).write(writes).custom_flags(flags).open(path).map(OwnedFd::from)
}

/// Queues of a disk: as its file says, or one a virtual processor, up to 4.
fn queues(guest: &Guest, disk: &casemate_spec::Disk) -> u8 {
    disk.queues.unwrap_or_else(|| guest.vcpus.min(4))
}

/// Threads that the kernel makes for a disk's io_uring at most, for what would block.
const RING_THREADS: usize = 5;

/// Threads of the VMM, and the kernel's own on its behalf (KVM's page recovery, VFIO's,
/// those of rings, vhost's).
fn threads(guest: &Guest) -> u64 {
    let slots = usize::from(guest.hotplug.slots) * (1 + RING_THREADS);
    let disks = guest.disks.len() * (1 + RING_THREADS);
    // A thread for each slot, and the one that puts devices into them.
    // The card's own, and one of vhost's for each pair of queues.
    let nets = guest.nets.iter().map(|net| 1 + usize::from(net.queues)).sum::<usize>();
    let consoles = usize::from(guest.console == ConsoleDevice::Virtio) + guest.ports.len().min(1);
    let peers = usize::from(guest.dma.peer_to_peer) + consoles;
    let devices = disks + nets + guest.devices.len() + 5 + slots + usize::from(slots > 0) + peers;
    u64::from(guest.vcpus) * 2 + devices as u64 + 8
}

/// What a guest's devices ask of the host.
pub(crate) fn dma_needs(guest: &Guest) -> DmaNeeds {
    let emulated = guest.disks.len() + guest.nets.len() + OWN_FUNCTIONS;
    DmaNeeds {
        ram: casemate_wire::ram(guest.memory.bytes()),
        emulated_vectors: u32::try_from(emulated).unwrap_or(u32::MAX).saturating_mul(VECTORS_MOST),
        overhead_bytes: LOCKED_OVERHEAD_BYTES,
        set_aside_bytes: guest.ram.pages.set_aside_bytes().map_or(0, |_| guest.memory.bytes()),
    }
}

/// What the cell's cgroup may hold. Pages that the host has set aside are not counted there.
fn memory_bytes_max(guest: &Guest) -> u64 {
    let counted = if guest.ram.pages.set_aside_bytes().is_some() { 0 } else { guest.memory.bytes() };
    counted + guest.memory.bytes() / PAGE_TABLE_SHARE + OVERHEAD_BYTES
}

fn rlimits(guest: &Guest, resources: &Resources<'_>) -> Rlimits {
    // VFIO pins the guest's memory, and counts it here.
    let pinned = if resources.claim.is_some() { guest.memory.bytes() } else { 0 };
    Rlimits {
        memlock_bytes: pinned + LOCKED_OVERHEAD_BYTES,
        // An event for each vector (up to 2048 a function, twice: here and at the device), and what each device has: for
        // a queue two of its interrupt's and two of its doorbell's, for a pair of a card's also its tap's and vhost's.
        descriptors_max: 512
            + 32 * guest.disks.len() as u64
            + 16 * guest.nets.iter().map(|net| u64::from(net.queues)).sum::<u64>()
            + record::DEVICE_DESCRIPTORS * guest.devices.len() as u64,
        threads_max: threads(guest),
        file_size_bytes_max: file_size_bytes_max(guest, resources.images),
    }
}

/// The longest that a file of the guest's may become.
fn file_size_bytes_max(guest: &Guest, images: &Images) -> u64 {
    let of = |(disk, image): (&casemate_spec::Disk, &Image)| match disk.format {
        DiskFormat::Raw => image.size_bytes,
        DiskFormat::Qcow2 => qcow2_bytes_max(image),
    };
    guest.disks.iter().zip(&images.disks).map(of).max().unwrap_or(0)
}

/// A qcow2 file of a disk: its bytes, what maps and counts them (with clusters of 4 KiB or more less than a part in 300),
/// and room for what a crash left.
fn qcow2_bytes_max(image: &Image) -> u64 {
    image.file_bytes.max(image.size_bytes + image.size_bytes / 64 + (64 << 20))
}

/// Descriptors to be sent, each named by its slot.
#[derive(Default)]
struct Descriptors<'a>(Vec<BorrowedFd<'a>>);

/// What a guest has at most: kvm, kernel, initrd, console, its input, a terminal's two ends, the sockets and the container; a port; for a disk an image and that
/// under it; for each pair of a card's queues a tap's and vhost's; a function, its group and its ROM.
const _: () = assert!(
    9 + LIMITS.ports + 2 * LIMITS.disks + 2 * LIMITS.nets * NET_QUEUES_MAX as usize + 3 * LIMITS.devices
        <= wire::DESCRIPTORS
);

impl<'a> Descriptors<'a> {
    fn add(&mut self, fd: BorrowedFd<'a>) -> Slot {
        self.0.push(fd);
        // The spec's limits keep this below 255; the channel refuses more than it can carry.
        Slot(u8::try_from(self.0.len() - 1).unwrap_or(u8::MAX))
    }
}

/// The cell's ends of the console's pipes.
struct ConsoleEnds<'a> {
    output: BorrowedFd<'a>,
    input: Option<BorrowedFd<'a>>,
    /// Of a virtio console: its output, and its input.
    terminal: Option<(BorrowedFd<'a>, Option<BorrowedFd<'a>>)>,
}

fn send_machine(
    channel: &Channel,
    guest: &Guest,
    resources: &Resources<'_>,
    nodes: &Nodes,
    console: ConsoleEnds<'_>,
) -> Result<(), Refusal> {
    let mut fds = Descriptors::default();
    let claim = resources.claim;
    let addresses: Vec<_> =
        claim.iter().flat_map(|claim| &claim.devices).map(|device| device.address).collect();
    let machine = Machine {
        platform: identity::platform(guest),
        vcpus: guest.vcpus,
        cpu: cpu(guest),
        memory_bytes: guest.memory.bytes(),
        ram: ram(guest),
        command_line: guest.boot.command_line.clone(),
        kvm: fds.add(nodes.kvm.as_fd()),
        kernel: fds.add(resources.images.kernel.fd.as_fd()),
        initrd: resources.images.initrd.as_ref().map(|image| fds.add(image.fd.as_fd())),
        console: fds.add(console.output),
        console_input: console.input.map(|input| fds.add(input)),
        disks: disks(guest, resources.images, &mut fds),
        nets: (guest.nets.iter().zip(resources.taps).enumerate())
            .map(|(number, (net, tap))| Net {
                taps: tap.queues.iter().map(|queue| fds.add(queue.as_fd())).collect(),
                vhosts: nodes
                    .vhosts
                    .get(number)
                    .into_iter()
                    .flatten()
                    .map(|node| fds.add(node.as_fd()))
                    .collect(),
                mac: net.mac.unwrap_or_else(|| mac(guest.name.as_str(), number)),
            })
            .collect(),
        vsock: guest
            .vsock
            .as_ref()
            .zip(resources.streams)
            .map(|(vsock, streams)| Vsock { cid: vsock.cid, socket: fds.add(streams) }),
        terminal: console.terminal.map(|(output, input)| Terminal {
            output: fds.add(output),
            input: input.map(|input| fds.add(input)),
        }),
        ports: (guest.ports.iter().zip(resources.ports))
            .map(|(port, stream)| Port { name: port.name.clone(), stream: fds.add(stream.as_fd()) })
            .collect(),
        container: claim.map(|claim| fds.add(claim.container.as_fd())),
        groups: claim.iter().flat_map(|claim| &claim.groups).map(|group| fds.add(group.as_fd())).collect(),
        devices: (claim.iter().flat_map(|claim| &claim.devices).zip(seats(&addresses)))
            .map(|(device, (card, function))| Assigned {
                device: fds.add(device.fd.as_fd()),
                address: device.address.to_string(),
                card,
                function,
                rom: rom(device.address, resources.images, &mut fds),
            })
            .collect(),
        peer_to_peer: claim.is_some() && guest.dma.peer_to_peer,
        dma_end: claim.and_then(|claim| claim.limits.end()),
        hotplug: Hotplug {
            slots: guest.hotplug.slots,
            memory_bytes: guest.hotplug.memory.bytes(),
            prefetchable_bytes: guest.hotplug.prefetchable_memory.bytes(),
        },
        limits: limits(guest),
    };
    let message = ToCell::Start { version: VERSION, machine: Box::new(machine) };
    channel.send(&message, &fds.0).map_err(|error| {
        Refusal::new(
            "cell-start",
            &guest.name,
            format_args!("the machine cannot be handed over: {error}"),
            "try again",
        )
    })
}

/// Where functions sit in the guest: the number of their card, and the function's on it. Functions that share a device of the
/// host's share one of the guest's, in the same order.
fn seats(functions: &[PciAddress]) -> Vec<(u8, u8)> {
    let card = |address: PciAddress| (address.domain(), address.bus(), address.device());
    let mut cards = Vec::new();
    let mut seat = |function: PciAddress| {
        let of = card(function);
        let number = cards.iter().position(|known| *known == of).unwrap_or_else(|| {
            cards.push(of);
            cards.len() - 1
        });
        let mates = functions.iter().filter(|other| card(**other) == of);
        let before = mates.filter(|other| other.function() < function.function()).count();
        // The spec's limits keep both far below 255.
        (u8::try_from(number).unwrap_or(u8::MAX), u8::try_from(before).unwrap_or(u8::MAX))
    };
    functions.iter().map(|function| seat(*function)).collect()
}

/// A device's option ROM.
fn rom<'a>(device: PciAddress, images: &'a Images, fds: &mut Descriptors<'a>) -> Option<RomFile> {
    let (_, image) = images.roms.iter().find(|(of, _)| *of == device)?;
    // It was opened as one, which has 16 MiB at most.
    let size_bytes = u32::try_from(image.size_bytes).ok()?;
    Some(RomFile { file: fds.add(image.fd.as_fd()), size_bytes })
}

/// What is limited of the guest's disks and network cards.
fn limits(guest: &Guest) -> Vec<Limited> {
    let disks = guest.disks.iter().map(|disk| disk.limits).zip(0..).map(|all| (DeviceKind::Disk, all));
    let nets = guest.nets.iter().map(|net| net.limits).zip(0..).map(|all| (DeviceKind::Net, all));
    let rate = |rate: casemate_spec::Rate| wire::Rate { per_second: rate.per_second, burst: rate.burst };
    disks
        .chain(nets)
        .filter(|(_, (limits, _))| *limits != IoLimits::default())
        .map(|(kind, (limits, number))| Limited {
            kind,
            number,
            limits: wire::Limits { bytes: limits.bytes.map(rate), operations: limits.operations.map(rate) },
        })
        .collect()
}

/// The processors, as the cell is told of them.
fn cpu(guest: &Guest) -> Cpu {
    let Guest { vcpus, cpu, .. } = guest;
    let ranges = |list: &CpuList| {
        list.ranges().iter().map(|range| CpuRange { first: *range.start(), last: *range.end() }).collect()
    };
    Cpu {
        model: match cpu.model {
            CpuModel::Host => Model::Host,
            CpuModel::BaselineV2 => Model::BaselineV2,
        },
        sockets: cpu.sockets,
        threads_per_core: cpu.threads_per_core,
        nested: cpu.nested,
        pins: cpu.pins.iter().take(usize::from(*vcpus)).map(ranges).collect(),
    }
}

/// The memory, as the cell is told of it.
fn ram(guest: &Guest) -> wire::Ram {
    let Ram { pages, prefault, numa_node } = guest.ram;
    let pages = match pages {
        Pages::Transparent => wire::Pages::Transparent,
        Pages::Small => wire::Pages::Small,
        Pages::Huge2Mib => wire::Pages::Huge2Mib,
        Pages::Huge1Gib => wire::Pages::Huge1Gib,
    };
    wire::Ram { pages, prefault, numa_node }
}

fn disks<'a>(guest: &Guest, images: &'a Images, fds: &mut Descriptors<'a>) -> Vec<Disk> {
    let disks = guest.disks.iter().zip(&images.disks).zip(&images.backings).enumerate();
    disks
        .map(|(number, ((disk, image), backing))| Disk {
            image: fds.add(image.fd.as_fd()),
            size_bytes: image.size_bytes,
            read_only: disk.read_only,
            serial: format!("disk{number}"),
            queues: queues(guest, disk),
            format: match disk.format {
                DiskFormat::Raw => Format::Raw,
                DiskFormat::Qcow2 => Format::Qcow2 {
                    file_bytes_max: qcow2_bytes_max(image),
                    below: disk.backing.as_ref().zip(backing.as_ref()).map(|(spec, image)| Below {
                        image: fds.add(image.fd.as_fd()),
                        size_bytes: image.size_bytes,
                        is_qcow2: spec.format == DiskFormat::Qcow2,
                    }),
                },
            },
        })
        .collect()
}

/// A MAC address that stays the same for a guest's card: locally administered, made from name and slot (FNV-1a).
pub(crate) fn mac(guest: &str, card: usize) -> [u8; 6] {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in guest.bytes().chain([b'/', card as u8]) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// The same for a function in a slot, from 1, of a guest that runs: apart from all that it could start with.
pub(crate) fn mac_in_slot(guest: &str, slot: u8, function: usize) -> [u8; 6] {
    mac(guest, 64 + 8 * usize::from(slot) + function)
}

/// The first word of a cell: it runs, or why it does not.
pub(crate) fn first_word(message: FromCell) -> Result<(), Refusal> {
    match message {
        FromCell::Running => Ok(()),
        FromCell::Refused { code, message } => {
            let remedy = "see `casemate doctor` for what this host has";
            Err(Refusal::new("cell-refused", printable(&code), printable(&message), remedy))
        }
        FromCell::Ended { .. } => {
            Err(Refusal::new("cell-refused", "", "the cell ended before it began", "try again"))
        }
        FromCell::Answer { .. } | FromCell::Event(_) => {
            Err(Refusal::new("cell-refused", "", "the cell spoke out of turn", "see its log above"))
        }
    }
}

/// A cell's words, made fit for a terminal and bounded.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(casemate_wire::TEXT_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_one_card_sit_together() {
        let at = |text: &str| text.parse().unwrap();
        let sound_first = ["0000:0b:00.1", "0000:03:00.0", "0000:0b:00.0"].map(at);
        assert_eq!(seats(&sound_first), [(0, 1), (1, 0), (0, 0)]);
        assert_eq!(seats(&["0001:0b:00.3", "0000:0b:00.5"].map(at)), [(0, 0), (1, 0)]);
        assert_eq!(seats(&[]), []);
    }

    #[test]
    fn macs_are_local_unicast_stable_and_apart() {
        let first = mac("web", 0);
        assert_eq!(first, mac("web", 0));
        assert_eq!(first[0], 2);
        assert_ne!(first, mac("web", 1));
        assert_ne!(first, mac("db", 0));
    }

    #[test]
    fn a_cell_cannot_paint_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a[2Jbc");
        assert_eq!(printable(&"x".repeat(9999)).len(), casemate_wire::TEXT_BYTES);
    }
}
