//! Cells for the probe.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::File,
    io::{IoSlice, Read},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use casemate_jail::{Cell, CellPlan, CgroupPlan, End, IoPlan, Program, Rlimits, start};
use casemate_spec::Refusal;
use casemate_victims::{ABSTRACT_NAME, Attempt, Beneath};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, bind, connect, listen, sendmsg, socket_with,
};

/// The uid and gid of the probe's cells.
pub(crate) const ID: u32 = 70_001;

/// What all cells of a probe share.
pub(crate) struct Probe {
    pub(crate) program: Program,
    pub(crate) parent: PathBuf,
}

/// How a victim ended and what it said.
pub(crate) struct Told {
    pub(crate) end: End,
    pub(crate) said: String,
}

/// A running victim.
pub(crate) struct Victim {
    pub(crate) cell: Cell,
    log: File,
    peer: SocketAddrUnix,
}

impl Probe {
    pub(crate) fn attempt(&self, attempt: &Attempt, role: &str) -> Result<Told, String> {
        let less = |plan: &mut CellPlan| {
            if attempt.beneath == Beneath::MemoryLimit {
                plan.cgroup.memory_bytes_max = 32 << 20;
            }
        };
        let victim = self.start_with(&[attempt.name, role], less).map_err(|refusal| refusal.to_string())?;
        if attempt.needs_kvm {
            victim.send(
                &File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/kvm")
                    .map_err(|error| error.to_string())?,
            )?;
        }
        victim.wait()
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Result<Victim, Refusal> {
        self.start_with(arguments, |_| ())
    }

    /// As `start`, with a plan that was changed.
    pub(crate) fn start_with(
        &self,
        arguments: &[&str],
        change: impl FnOnce(&mut CellPlan),
    ) -> Result<Victim, Refusal> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let failed = |error: rustix::io::Errno| Refusal::new("probe", "the probe", error, "run it as root");
        let guest = format!("probe-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let peer = SocketAddrUnix::new_abstract_name(guest.as_bytes()).map_err(failed)?;
        let control = listen_at(&peer).map_err(failed)?;
        let (log, log_end) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
        let arguments = arguments.iter().filter_map(|argument| CString::new(*argument).ok()).collect();
        let mut plan = CellPlan {
            guest,
            uid: ID,
            gid: ID,
            program: self.program.clone(),
            arguments,
            input: None,
            output: None,
            control: Some(control),
            log: log_end,
            rlimits: Rlimits {
                memlock_bytes: 1 << 20,
                descriptors_max: 64,
                threads_max: 16,
                file_size_bytes_max: 1 << 20,
            },
            cgroup: CgroupPlan {
                parent: self.parent.clone(),
                memory_bytes_max: 512 << 20,
                pids_max: 16,
                cpus_max: 2,
                io: IoPlan::default(),
            },
            may_lack: BTreeSet::new(),
            tied_to_parent: false,
        };
        change(&mut plan);
        Ok(Victim { cell: start(plan)?, log: log.into(), peer })
    }
}

impl Victim {
    /// Waits until the victim said its first word.
    pub(crate) fn wait_for_word(&mut self) -> Result<(), String> {
        self.log.read_exact(&mut [0]).map_err(|error| error.to_string())
    }

    pub(crate) fn wait(mut self) -> Result<Told, String> {
        let mut said = String::new();
        self.log.read_to_string(&mut said).map_err(|error| error.to_string())?;
        let end = self.cell.wait().map_err(|error| error.to_string())?;
        self.cell.close().map_err(|refusal| refusal.to_string())?;
        Ok(Told { end, said })
    }

    /// Sends a descriptor over the control socket.
    fn send(&self, descriptor: &impl AsFd) -> Result<(), String> {
        let connected = socket().and_then(|socket| connect(&socket, &self.peer).map(|()| socket));
        let socket = connected.map_err(|error| error.to_string())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&socket, &[IoSlice::new(b"kvm")], &mut ancillary, SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(|error| error.to_string())
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

fn listen_at(address: &SocketAddrUnix) -> rustix::io::Result<OwnedFd> {
    let socket = socket()?;
    bind(&socket, address)?;
    listen(&socket, 1)?;
    Ok(socket)
}

/// The socket that attempts connect to.
pub(crate) fn listen_abstract() -> Result<OwnedFd, String> {
    let address = SocketAddrUnix::new_abstract_name(ABSTRACT_NAME);
    address.and_then(|address| listen_at(&address)).map_err(|error| format!("the abstract socket: {error}"))
}
