//! The keep: who decides whether a guest runs, gives it what it may have, and takes it back.
//!
//! Principles:
//! - Read, judge, authorise, act: [`run`] does them in this order, and nothing on the host changes before the last.
//! - What was done is undone, whatever happens: when the guest ends, when the cell dies, when a step fails, and, by the
//!   ledger, at the next command when this very process was killed.
//! - Decisions are the policy's; what was asked and answered is kept as data.
//! - A cell is not believed: what it says is bounded and told as its word.
//!
//! It knows nothing of device models or KVM; it hands descriptors to a cell and watches it.

mod admission;
mod admitted;
mod attach;
mod audit;
mod beside;
mod cell;
mod console;
mod decisions;
mod device_name;
mod digest;
mod disks;
mod events;
mod facts;
mod govern;
mod identity;
mod images;
mod input;
mod listing;
mod operator;
mod operator_socket;
mod paths;
mod policies;
mod ports;
mod record;
mod releasing;
mod report;
mod run;
mod vsock;
mod watch;

// What a cell tells, by its word.
pub use casemate_wire::{BalloonStatistics, Counters, DeviceKind, DeviceStatistics, Event, Statistics};
pub use device_name::{DeviceName, DeviceNameError};

pub use audit::{Audit, AuditLine, SignedAudit, Source, audit};
pub use casemate_broker::{Attachment, ConsoleLog};
pub use decisions::{Decisions, Reading};
pub use events::{Events, Happening, LoggedEvent};
pub use input::{ESCAPE, Input};
pub use listing::{ListedDevice, list_devices};
pub use operator::GuestState;
pub use operator_socket::{GuestStatistics, OperatorRequest, operate};
pub use paths::{Paths, PathsError};
pub use record::{GivenDevice, GivenLandlock, GivenLimits, GuestRecord, running};
pub use report::{CellReport, DeviceReport, Ending, MachineReport, PolicyReport, Report, Step};
pub use run::{Refusals, RunOptions, SteppedDown, recover, run, step_down, try_guest};
