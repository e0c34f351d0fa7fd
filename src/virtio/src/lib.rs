//! Virtio 1.x: queues, devices, and the PCI transport that shows them to a guest.
//!
//! Principles:
//! - A device is [`Inactive` or active](active::Active): only the driver's DRIVER_OK hands it memory and queues, and a
//!   reset takes them back before the guest sees it done. An inactive device has no way to guest memory at all.
//! - Each device has one thread, its [`Worker`], which exists before the guest runs (the VMM starts it, inside the
//!   filter it chooses) and ends with the device. What the guest's processors touch, the [`PciTransport`], holds
//!   registers only and hands over by messages.
//! - What the guest puts into memory is read once, checked, and bounded: a chain has at most as many descriptors as
//!   its queue, a turn of a worker handles a fixed number of requests, and nothing is allocated by a guest's sizes.
//!   A driver that breaks the rules of the ring gets DEVICE_NEEDS_RESET (virtio 1.3, 2.1.1) and the device forgets its
//!   memory; a request that merely can't be done gets its error status.
//! - Nothing is known of KVM: a doorbell in and an interrupt out are eventfds, which the VMM ties to ioeventfd and
//!   irqfd.
//!
//! Unsafe code stands in `vectored`, `uring` and `vhost`: system calls that reach guest memory directly, for which the safe
//! wrappers would need references to memory that the guest changes; and in `event_fd`, which lends a descriptor.

mod active;
mod balloon;
mod bits;
mod blk;
mod common;
mod console;
mod counters;
mod device;
mod device_config;
mod event_fd;
mod gather;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
mod interrupt;
mod limit;
mod net;
pub mod qcow2;
mod request;
mod ring;
mod rng;
mod transport;
mod uring;
mod vectored;
mod vhost;
mod vsock;
mod worker;

#[cfg(test)]
mod testing;

pub use active::{Active, Handled, Memory};
pub use balloon::{BALLOON_PAGE_BYTES, Balloon, BalloonControl, GuestMemoryTold};
pub use blk::{Below as BlkBelow, Blk, BlkBackend, Format as BlkFormat, QUEUES_MAX as DISK_QUEUES_MAX};
pub use console::{Console, ConsoleControl, PORTS_MAX as CONSOLE_PORTS_MAX, PortBackend};
pub use counters::{Counted, Counters};
pub use device::{Device, DeviceError, Fault, Kind, Progress};
pub use device_config::DeviceConfig;
pub use interrupt::Interrupt;
pub use limit::{Limiter, Limits, Rate};
pub use net::{KernelNet, Net, PAIRS_MAX as NET_PAIRS_MAX};
pub use request::{Buffers, Request};
pub use rng::Rng;
pub use transport::{Doorbell, PciParts, PciTransport, SetupError, vector_count};
pub use uring::SpareRing;
pub use vsock::{Arrival, Vsock, VsockHost};
pub use worker::{Finisher, Worker, WorkerControl};
