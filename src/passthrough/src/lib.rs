//! One assigned PCI function as the guest sees it.
//!
//! Principles:
//! - **What is not in the table is absent.** [`FILTER`] names every register and capability that a guest sees, what
//!   happens to its writes, and why. The code is driven by that table: a write that reaches the device does so because
//!   a rule says so. Everything else reads as 0, is linked by nothing, and takes no writes. Extended capabilities
//!   (SR-IOV, resizable BARs, ATS, PRI, PASID and all others) are absent, and so is the option ROM.
//! - **The device is not trusted.** A configuration space that is all ones, capability lists that loop, sizes that are
//!   none: [`Probe::read`] refuses them before a guest starts. Later reads that fail give the guest all ones.
//! - **The guest is not trusted.** It can write anything anywhere without a panic; it moves its own BARs and masks its
//!   own vectors, and of the device's configuration space it reaches the bus master bit alone, and with INTx the bit
//!   that turns it off.
//! - **The hot path is not here.** Pages of BARs are mapped by the VMM ([`AssignedFunction::mappings`]), interrupts go
//!   from the device to KVM by eventfd. What is trapped: pages with the MSI-X table or pending bits, and BARs smaller
//!   than a page.
//! - **One seam to the kernel.** The trait [`Vfio`] stands between function and kernel, so that a mock drives the unit
//!   tests, and so that the VMM can do reads and writes on the vCPU's thread and send the rest to its control thread.
//!   [`VfioDevice`] and [`Container`] issue the ioctls, and read the result of each: a reset that failed is an error.
//!
//! Interrupts are MSI-X where a function has it, else MSI, else INTx: VFIO takes one kind at a time, so the others are
//! hidden. Vectors of MSI-X are made when the guest first unmasks them, where the kernel can; else all at once, so that
//! none is lost when more are wanted.
// The kernel's VFIO is reached by ioctls that take pointers: sys.rs holds them, container.rs maps memory for DMA.
#![allow(unsafe_code)]

mod container;
mod device;
mod filter;
mod function;
mod mapping;
#[cfg(test)]
mod mock;
mod probe;
mod seam;
mod sys;

pub use container::{Container, IommuInfo, MappingRequest};
pub use device::VfioDevice;
pub use filter::{Access, FILTER, Rule, What};
pub use function::{AssignedFunction, Parts};
pub use mapping::{Mapping, PAGE_BYTES};
pub use probe::{Probe, ProbeError, Seat};
pub use seam::{IrqInfo, Region, VectorKind, Vfio, VfioError};
