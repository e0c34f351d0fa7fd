//! The messages.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Answer, Ask, DeviceKind, Event, Limits, Refused};

/// Version of this protocol. Both programs come from one build; a mismatch is refused at the first message.
pub const VERSION: u32 = 7;
/// Most bytes of an encoded message.
pub const MESSAGE_BYTES: usize = 32 << 10;
/// Most descriptors with one message.
pub const DESCRIPTORS: usize = 192;
/// Most bytes of a text from a cell that the keep takes.
pub const TEXT_BYTES: usize = 1024;

/// The place of a descriptor among those that came with the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot(pub u8);

/// RAM below 4 GiB ends here at the latest.
pub const RAM_LOW_MOST: u64 = 0xC000_0000;

/// Where RAM of `memory_bytes` lies in a guest's physical address space, which is its devices' too: one piece, or two around
/// the hole below 4 GiB. The keep judges by it what an IOMMU must reach, and the cell lays its machine out so.
pub fn ram(memory_bytes: u64) -> Vec<Range<u64>> {
    let low = memory_bytes.min(RAM_LOW_MOST);
    let high = FOUR_GIB..FOUR_GIB.saturating_add(memory_bytes - low);
    std::iter::once(0..low).chain(Some(high).filter(|high| !high.is_empty())).collect()
}

const FOUR_GIB: u64 = 1 << 32;

/// From the keep to the cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCell {
    /// Build this machine and run it. Comes once, first.
    Start {
        /// [`VERSION`] of the sender.
        version: u32,
        /// The machine.
        machine: Box<Machine>,
    },
    /// Press the power button: the guest may shut down in order.
    PowerButton,
    /// Stop at once; the guest is not asked.
    Stop,
    /// Do or tell something while the guest runs. Descriptors that it needs come with it.
    Ask {
        /// The answer has the same.
        id: u32,
        /// What.
        ask: Ask,
    },
}

/// Everything a cell needs to know of its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// What it tells of itself.
    pub platform: Platform,
    /// Processors, from 1.
    pub vcpus: u8,
    /// What they are.
    pub cpu: Cpu,
    /// Memory, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// What it is made of.
    pub ram: Ram,
    /// The kernel's command line.
    pub command_line: String,
    /// `/dev/kvm`.
    pub kvm: Slot,
    /// A bzImage, or an ELF kernel with a PVH entry; a regular file.
    pub kernel: Slot,
    /// An initial RAM disk, a regular file.
    pub initrd: Option<Slot>,
    /// Where the serial port writes to.
    pub console: Slot,
    /// Where the serial port reads from; a pipe.
    pub console_input: Option<Slot>,
    /// Emulated disks.
    pub disks: Vec<Disk>,
    /// Emulated network cards.
    pub nets: Vec<Net>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// A virtio console.
    pub terminal: Option<Terminal>,
    /// Ports with names, at most 8.
    pub ports: Vec<Port>,
    /// The VFIO container with an IOMMU set, when devices are assigned.
    pub container: Option<Slot>,
    /// The VFIO groups in that container.
    pub groups: Vec<Slot>,
    /// Assigned functions of those groups.
    pub devices: Vec<Assigned>,
    /// Whether those reach each other's registers by DMA.
    pub peer_to_peer: bool,
    /// The address behind the last that their IOMMU translates, where the kernel tells it.
    pub dma_end: Option<u64>,
    /// Slots for cards that come while the guest runs.
    pub hotplug: Hotplug,
    /// What of its disks and network cards is limited from the start.
    pub limits: Vec<Limited>,
}

/// What a machine tells of itself beside its devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Its UUID, in the order in which it's written.
    pub uuid: [u8; 16],
    /// Its serial number: at most 64 bytes, none of them 0; empty when it has none.
    pub serial: String,
    /// At most 8, each of 1 to 1024 bytes, none of them 0.
    pub oem_strings: Vec<String>,
    /// Whether it has a clock chip.
    pub rtc: bool,
}

/// A virtio console whose size can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// What the guest reads; a pipe that does not block.
    pub input: Option<Slot>,
    /// Where it writes to; a pipe that does not block.
    pub output: Slot,
}

/// A port with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// A stream that does not block.
    pub stream: Slot,
}

/// A device that is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limited {
    /// [`DeviceKind::Disk`] or [`DeviceKind::Net`].
    pub kind: DeviceKind,
    /// Its number among those of its kind.
    pub number: u16,
    /// Its limits.
    pub limits: Limits,
}

/// Root ports with a slot each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hotplug {
    /// How many; 0 to 8.
    pub slots: u8,
    /// What each has for BARs that are not prefetchable, below 4 GiB; a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// What each has for prefetchable BARs; a multiple of 1 MiB.
    pub prefetchable_bytes: u64,
}

/// What the processors are, and where they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// What the guest sees.
    pub model: Model,
    /// Packages, from 1; the processors are shared out evenly.
    pub sockets: u8,
    /// Threads of a core, from 1.
    pub threads_per_core: u8,
    /// Whether the guest may run guests.
    pub nested: bool,
    /// For each processor the host's on which it may run, at least one; empty when it may run on any.
    pub pins: Vec<Vec<CpuRange>>,
}

/// A processor's model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Model {
    /// All that the host's KVM gives.
    Host,
    /// A list that is the same on every host.
    BaselineV2,
}

/// Processors of the host, first and last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuRange {
    /// The first.
    pub first: u16,
    /// The last, not below the first.
    pub last: u16,
}

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ram {
    /// Its pages.
    pub pages: Pages,
    /// Whether all of it is taken before the guest runs.
    pub prefault: bool,
    /// The node of the host's that it comes from, below 1024.
    pub numa_node: Option<u16>,
}

/// Pages of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pages {
    /// Small ones, and large ones where the kernel can make them.
    Transparent,
    /// Small ones alone.
    Small,
    /// Of 2 MiB, set aside by the host.
    Huge2Mib,
    /// Of 1 GiB, set aside by the host; the memory is a multiple.
    Huge1Gib,
}

/// An emulated disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// An image or a block device.
    pub image: Slot,
    /// Its size, a multiple of 512.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the guest reads as the disk's serial number; at most 20 bytes.
    pub serial: String,
    /// Queues, 1 to 8.
    pub queues: u8,
    /// The image's format.
    pub format: Format,
}

/// What an image is written in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// The disk's bytes, from the first to the last.
    Raw,
    /// qcow2.
    Qcow2 {
        /// The file may become so long.
        file_bytes_max: u64,
        /// The image under it, which is only read.
        below: Option<Below>,
    },
}

/// An image under another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Below {
    /// The image or block device.
    pub image: Slot,
    /// Size of the disk in it.
    pub size_bytes: u64,
    /// Whether it is qcow2, and not raw.
    pub is_qcow2: bool,
}

/// An emulated network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Net {
    /// The queues of a tap with 12-byte vnet headers, one for each pair of the card's.
    pub taps: Vec<Slot>,
    /// The card's MAC address.
    pub mac: [u8; 6],
    /// As many of `/dev/vhost-net`, when the kernel is to serve the card's queues; else none.
    pub vhosts: Vec<Slot>,
}

/// The socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// What the guest is known by.
    pub cid: u32,
    /// The cell's end of a `SOCK_SEQPACKET` pair, not blocking: [`FromVsock`] goes out, [`ToVsock`] comes in.
    pub socket: Slot,
}

/// From the keep to a cell's socket device. Streams do not block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToVsock {
    /// Somebody wants to speak with a port of the guest's.
    Stream {
        /// The port.
        port: u32,
        /// The way to who does.
        stream: Slot,
    },
    /// The answer to [`FromVsock::Connect`].
    Answer {
        /// As it was asked.
        number: u64,
        /// The way to who listens; `None` when nobody does.
        stream: Option<Slot>,
    },
}

/// From a cell's socket device to the keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromVsock {
    /// The guest wants to speak with a port of the host's.
    Connect {
        /// For the answer.
        number: u64,
        /// The port.
        port: u32,
    },
}

/// An assigned PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// The VFIO device.
    pub device: Slot,
    /// Its address on the host, for messages.
    pub address: String,
    /// Which of the guest's cards it is of, counted from 0: functions of one card sit on one device of the guest's.
    pub card: u8,
    /// Which function of that device it is: 0 to 7, and each card has a function 0.
    pub function: u8,
    /// The option ROM that the guest sees.
    pub rom: Option<RomFile>,
}

/// An option ROM in a file that nobody changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RomFile {
    /// The file.
    pub file: Slot,
    /// How large it is: a power of two from 4 KiB to 16 MiB.
    pub size_bytes: u32,
}

/// From the cell to the keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCell {
    /// The machine is built, the narrow filters are on, and the vCPUs run.
    Running,
    /// The machine could not be built: what was refused and why, each at most [`TEXT_BYTES`].
    Refused {
        /// Kebab-case code.
        code: String,
        /// For a person.
        message: String,
    },
    /// The guest has ended; the process exits next.
    Ended {
        /// How.
        end: End,
        /// What it cost.
        counters: Counters,
    },
    /// To [`ToCell::Ask`].
    Answer {
        /// Of what was asked.
        id: u32,
        /// What came of it.
        answer: Result<Answer, Refused>,
    },
    /// Something that nobody asked for.
    Event(Event),
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel told that it has panicked.
    Panic,
    /// A processor fell into a triple fault.
    TripleFault,
    /// The guest started its watchdog and did not keep it quiet.
    Watchdog,
    /// The keep said [`ToCell::Stop`].
    Stopped,
    /// Something the guest cannot go on from: what, for a person.
    Fault(String),
}

/// Exits to user space since the start, exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Port I/O.
    pub pio_exits: u64,
    /// Memory-mapped I/O.
    pub mmio_exits: u64,
    /// Everything else.
    pub other_exits: u64,
    /// Of these, how often a processor was held back since it had locked the host's memory bus.
    pub bus_locks: u64,
}
