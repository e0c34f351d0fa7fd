//! The virtual machine monitor that runs inside a cell: one process, one guest.
//!
//! Principles:
//! - It opens no path. Everything it uses was handed to it, by descriptor, over one socket.
//! - One control thread changes the machine (slots, routes, irqfds, VFIO); vCPU and device threads exist before the
//!   guest starts and ask it. So each thread's filter is short.
//! - There is no firmware: this crate places the kernel, the tables and every BAR.
//! - A guest's fault ends this guest. Nothing a guest writes can make this program panic; if it did, the process would
//!   end, and the guest with it.
//!
//! Unsafe is allowed here for four things, each in its place: the start (descriptors taken over, `entry`, `kvm`), the
//! guest's memory and memory slots, whose mappings must outlive them (`memory`, `maps`), mapped device registers
//! (`assigned`), and the signal that calls processors out of the guest (`gate`).
#![allow(unsafe_code)]

mod affinity;
mod asks;
mod assigned;
mod boot;
mod control;
mod cpu;
mod entry;
mod error;
mod gate;
mod hotplug;
mod intx;
mod kvm;
mod layout;
mod machine;
mod maps;
mod memory;
mod peers;
mod platform;
mod root;
mod tables;
mod vsock;

pub use entry::enter;
