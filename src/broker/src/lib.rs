//! The broker: the one part of a keep that is root, a program of its own (`casemate-broker`).
//!
//! It opens files, claims and resets devices, makes taps and sockets, and closes cells, by the [typed requests](protocol) of one
//! keep, each of which it checks itself. It parses no TOML, asks no policy, and knows no words of a guest's VMM.
//!
//! Principles:
//! - **Before and after.** Until a guest's cell is closed, its keep has met its operator's files and policies, and nobody else; then it
//!   may have files opened and devices claimed. After that it has to do with a stranger, and is given nothing more, but for what an
//!   operator wants attached: the broker reads operators' requests before the keep does ([`grants`]).
//! - **What it did it undoes.** When its keep has gone, in order or not, it ends the cell and gives back what was claimed.
//! - **One keep, one broker.** Names and numbers in requests are those of this keep's guest; there are none for others'.
//!
//! The keep starts it before it reads a byte, and then gives up being root ([`begin`]).

mod cells;
mod claim;
mod client;
mod console_log;
mod devices;
mod door;
mod envelope;
mod files;
mod grants;
pub mod hands;
mod in_cells;
mod journal;
mod protocol;
mod running;
mod server;
mod sockets;

pub use claim::{Claim, ClaimedDevice, Failed, Notices};
pub use client::{Broker, ByBroker, Cell, Choosing, Operators, begin, broker};
pub use console_log::ConsoleLog;
pub use in_cells::InCells;
pub use journal::{Bounds, Journal, Log};
pub use protocol::{Attachment, CellWanted, Claiming, Kept, Knob, Limit, Node, Places, Rules, Seen, What};

use std::os::fd::OwnedFd;

use casemate_spec::Refusal;
use casemate_wire::Channel;

use crate::{
    client::Hello,
    protocol::{Answer, Refused, gone},
};

/// Serves the keep at the other end of this socket, until it has gone.
///
/// # Errors
/// `broker-gone` when nobody is there who speaks as a keep does.
pub fn serve(socket: OwnedFd) -> Result<(), Refusal> {
    let keep = Channel::new(socket);
    let (Hello { places }, _) = envelope::receive(&keep).map_err(gone)?;
    let reserved = cells::make_runtime(&places.runtime)
        .and_then(|()| cells::reserve_uid(&places.runtime, "the keep", cells::UIDS_OF_KEEPS));
    let (_uid_lock, answer) = match reserved {
        Ok((uid, lock)) => (Some(lock), Answer::Done(uid.into())),
        Err(refusal) => (None, Answer::Refused(Refused::from(refusal))),
    };
    envelope::send(&keep, &answer, &[]).map_err(gone)?;
    server::serve(places, &keep);
    Ok(())
}
