//! What keep and cell say to each other.
//!
//! One `SOCK_SEQPACKET` socket a guest; one message a packet, encoded by postcard, at most [`MESSAGE_BYTES`] long;
//! descriptors ride along and are named in the message by their [`Slot`]. Both sides treat a packet as hostile: a
//! captured cell must not be able to confuse the keep, and the cell takes nothing it cannot check. What does not decode
//! to the last byte, or names a descriptor that did not come, is an error and ends the conversation.
//!
//! The crate knows the messages and how they cross a socket. Who owns the socket, and what a message means, it does not.

// One getsockopt, in credentials.rs.
#![allow(unsafe_code)]

mod ask;
mod channel;
mod credentials;
mod message;

pub use ask::{
    Answer, Ask, AssignedCard, BalloonStatistics, COUNTED_MOST, Card, DeviceKind, DeviceStatistics, Event,
    Limits, Rate, Refused, Statistics, Which,
};
pub use channel::{Channel, Descriptors, WireError};
pub use credentials::peer_is_listener;
pub use message::{
    Assigned, Below, Counters, Cpu, CpuRange, DESCRIPTORS, Disk, End, Format, FromCell, FromVsock, Hotplug,
    Limited, MESSAGE_BYTES, Machine, Model, Net, Pages, Platform, Port, RAM_LOW_MOST, Ram, RomFile, Slot,
    TEXT_BYTES, Terminal, ToCell, ToVsock, VERSION, Vsock, ram,
};
