//! The physical machine: what it has, what of it can be given to a guest, and how it is taken and given back.
//!
//! Principles:
//!
//! - **Nothing is touched before it is written down.** A claim enters the ledger, on disk, before the first write to
//!   sysfs; whoever comes after a crash finds there what to undo ([`recover`]).
//! - **All of a group or none of it.** A claim that fails half-way is undone; functions of one IOMMU group never serve
//!   two guests, nor a guest and the host. Bridges stay with their port driver.
//! - **In doubt the answer is no.** A function that is in use, that backs the root filesystem, that is the host's last
//!   network card, that cannot be reset, or whose state cannot be read is refused, with a [`Refusal`] that says what to do.
//! - **A device proves itself clean.** The reset's result is read, bus mastering is seen to be off, config space is
//!   compared with what was first seen, and what it stores is erased where its pool says how. What fails is quarantined and
//!   goes to nobody.
//! - **Every wait ends.** Reads are bounded in size. A write to sysfs runs in a child process that can be abandoned, for
//!   a driver that never lets go sleeps in the kernel, beyond the reach of any signal. The one wait the kernel bounds
//!   instead is its own wait for a device after a reset (60 s).
//! - **Fixtures serve the tests.** What is read comes from `{root}/sys` and `{root}/proc`, so that a directory tree can
//!   stand in for a machine, without root's rights.
//!
//! It knows nothing of policies, of tenants only whose guest had a device last, and maps no guest's memory for DMA: that binds to a process, and is the
//! VMM's. A device that is scrubbed reaches 20 KiB of this one's.
//!
//! [`Refusal`]: casemate_spec::Refusal

// Opening VFIO, tap and KVM descriptors is ioctls, and a write that can be abandoned is a fork; both are in `sys`, the
// only module with unsafe blocks.
#![allow(unsafe_code)]

mod backing;
mod block;
mod claim;
mod config;
mod dma;
mod doctor;
mod driver;
mod function;
mod give_back;
mod hand_over;
mod host;
mod identity;
mod image;
mod judge;
mod kernel_log;
mod ledger;
mod life;
mod mountinfo;
mod network;
mod notices;
mod pci_ids;
mod placement;
mod pools;
mod process;
mod recover;
mod reset;
mod scrub;
mod sriov;
mod sys;
mod tap;
mod topology;
mod uses;
mod variant;

#[cfg(test)]
mod fixture;

pub use claim::{Claim, ClaimRequest, ClaimedDevice, ClaimedGroup, claim};
pub use config::ConfigSnapshot;
pub use dma::{DmaNeeds, IommuLimits, judge_dma};
pub use doctor::{Check, CheckState, doctor};
pub use function::{Bar, BarKind, PciFunction};
pub use give_back::Returned;
pub use hand_over::{give_to_host, keep_for_guests, scrub as scrub_device};
pub use host::{Deadlines, Host};
pub use image::{Image, ROM_BYTES_MAX, open_image, open_initrd, open_kernel, open_qcow2, open_rom};
pub use judge::assignable;
pub use ledger::{Choosing, Ledger, Owner, Quarantined};
pub use life::{DeviceState, Life, MOVES, Move};
pub use notices::{Notice, Notices};
pub use placement::placeable;
pub use pools::{Choice, Pools};
pub use process::Process;
pub use recover::{Recovered, recover};
pub use sriov::{VfNetwork, leave_virtual_functions, make_virtual_functions, set_vf_network};
pub use tap::{Tap, TapRequest};
pub use topology::{Details, Step};
pub use uses::Use;
pub use variant::is_vfio_driver;
