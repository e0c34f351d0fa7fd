//! The guest's cell, and the engines that run for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
};

use casemate_jail::{Cell, CellPlan, CgroupPlan, End, IoPlan, Landlock, MemoryUse, Program, start};
use casemate_spec::{CellPart, Refusal};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, Resource, Rlimit, prlimit},
};

use crate::{
    Knob, Limit, Places,
    cells::{Closed, Reserved, control_socket},
    protocol::{CellThere, CellWanted},
};

/// The period over which cgroups count processor time, as the jail sets it.
const CPU_PERIOD_US: u64 = 100_000;

/// What runs for one guest.
#[derive(Default)]
pub(crate) struct Running {
    /// Once a cell was closed, for good.
    started: AtomicBool,
    cell: Mutex<Option<Cell>>,
    guest: Mutex<Option<Guest>>,
    engines: Mutex<BTreeMap<u32, Closed>>,
    /// The VMM's program, which is copied, or found, while the guest is judged.
    sealing: Mutex<Option<JoinHandle<Result<Program, Refusal>>>>,
}

/// Of the process in the cell.
#[derive(Clone, Copy)]
struct Guest {
    pid: u32,
    memory_bytes: u64,
    cpus_max: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    /// Begins to copy the VMM's program, where no other guest runs it.
    pub(crate) fn begin(&self, places: &Places) {
        let (vmm, cgroups) = (places.vmm.clone(), places.cgroup.clone());
        // Without a thread it's copied when it's wanted.
        *lock(&self.sealing) = Builder::new().name("seal".into()).spawn(move || seal(&vmm, &cgroups)).ok();
    }

    pub(crate) fn has_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Closes the cell around the installed VMM; gives what is told of it, its pidfd and the way to it.
    pub(crate) fn start(
        &self,
        places: &Places,
        reserved: &Reserved,
        wanted: CellWanted,
        may_lack: BTreeSet<CellPart>,
        log: OwnedFd,
    ) -> Result<(CellThere, Vec<OwnedFd>), Refusal> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            let cause = format_args!("{what}: {error}");
            Refusal::new("cell-start", &reserved.guest, cause, "see the message of the kernel above")
        };
        let sealed = lock(&self.sealing).take().and_then(|sealing| sealing.join().ok());
        let program = sealed.unwrap_or_else(|| seal(&places.vmm, &places.cgroup))?;
        let (control, peer) =
            control_socket(&reserved.control).map_err(|error| failed("the control socket", &error))?;
        // From here on the keep may have to do with strangers.
        self.started.store(true, Ordering::Release);
        let rlimits = wanted.rlimits();
        let cell = start(CellPlan {
            guest: reserved.guest.to_string(),
            uid: reserved.uid,
            gid: reserved.uid,
            program,
            arguments: Vec::new(),
            input: None,
            output: None,
            control: Some(control),
            log,
            rlimits,
            cgroup: CgroupPlan {
                parent: places.cgroup.clone(),
                memory_bytes_max: wanted.memory_bytes_max,
                pids_max: wanted.pids_max,
                cpus_max: wanted.cpus_max,
                io: IoPlan { rules: wanted.io, disks: wanted.disks, without_device: wanted.without_device },
            },
            may_lack,
            tied_to_parent: true,
        })?;
        let pidfd = cell.pidfd().try_clone_to_owned().map_err(|error| failed("its pidfd", &error))?;
        let Landlock { abi, filesystem, network, scopes } = cell.landlock();
        let (pid, weakened) = (cell.pid(), cell.weakened().clone());
        let guest = Guest { pid, memory_bytes: wanted.guest_memory_bytes, cpus_max: wanted.cpus_max };
        *lock(&self.guest) = Some(guest);
        *lock(&self.cell) = Some(cell);
        Ok((CellThere { pid, abi, filesystem, network, scopes, weakened }, vec![pidfd, peer]))
    }

    pub(crate) fn with_cell<T>(&self, act: impl FnOnce(&mut Cell) -> io::Result<T>) -> io::Result<T> {
        match lock(&self.cell).as_mut() {
            Some(cell) => act(cell),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// How the process ended, once it has. Nobody is kept from the cell meanwhile.
    pub(crate) fn wait(&self) -> io::Result<End> {
        loop {
            let pidfd = self.with_cell(|cell| cell.pidfd().try_clone_to_owned())?;
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            if let Some(end) = self.with_cell(Cell::try_wait)? {
                return Ok(end);
            }
        }
    }

    pub(crate) fn has_cell(&self) -> bool {
        lock(&self.guest).is_some()
    }

    pub(crate) fn engines(&self) -> usize {
        lock(&self.engines).len()
    }

    pub(crate) fn memory(&self) -> io::Result<MemoryUse> {
        let guest = *lock(&self.guest);
        let memory_bytes = guest.map_or(0, |guest| guest.memory_bytes);
        self.with_cell(|cell| cell.memory(memory_bytes))
    }

    /// Ends the cell, and removes what it has left.
    pub(crate) fn close(&self) -> Result<(), Refusal> {
        let cell = lock(&self.cell).take();
        let closed = cell.map_or(Ok(()), Cell::close);
        *lock(&self.guest) = None;
        closed
    }

    /// Sets a limit of the process.
    pub(crate) fn limit(&self, limit: Limit, most: u64) -> Result<(), String> {
        let resource = match limit {
            Limit::FileSize => Resource::Fsize,
            Limit::LockedMemory => Resource::Memlock,
            Limit::Descriptors => Resource::Nofile,
        };
        // While its cell is there, the number is nobody else's. Without one it would be this process's own limit.
        let _cell = lock(&self.cell);
        let guest = *lock(&self.guest);
        let pid = guest.and_then(|guest| Pid::from_raw(i32::try_from(guest.pid).ok()?));
        let pid = pid.ok_or_else(|| "its cell has ended".to_owned())?;
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        prlimit(Some(pid), resource, limit).map(drop).map_err(|error| error.to_string())
    }

    /// Turns a knob of the cell's cgroup, within what the cell was given.
    pub(crate) fn turn(&self, cgroup: &Path, knob: Knob) -> Result<(), String> {
        let cpus_max = lock(&self.guest).map_or(1, |guest| guest.cpus_max);
        write_knob(cgroup, knob, cpus_max)
    }

    /// Keeps an engine; gives its number, and its process's.
    pub(crate) fn keep_engine(&self, engine: Closed) -> (u32, u32) {
        let mut engines = lock(&self.engines);
        let number = engines.last_key_value().map_or(0, |(last, _)| last.wrapping_add(1));
        let pid = engine.pid();
        engines.insert(number, engine);
        (number, pid)
    }

    pub(crate) fn take_engine(&self, number: u32) -> Option<Closed> {
        lock(&self.engines).remove(&number)
    }

    /// Ends all engines.
    pub(crate) fn end_engines(&self) {
        lock(&self.engines).clear();
    }

    /// How an engine ended, in words.
    pub(crate) fn end_engine(&self, number: u32) -> String {
        self.take_engine(number).map_or_else(|| "it has ended already".into(), Closed::end)
    }
}

fn seal(vmm: &Path, cgroups: &Path) -> Result<Program, Refusal> {
    let program = File::open(vmm).map_err(|error| {
        let remedy = "put casemate-vmm beside casemate; `cargo build --release` builds both";
        let cause = format_args!("it cannot be opened: {error}");
        Refusal::new("vmm-missing", vmm.display(), cause, remedy)
    })?;
    Program::shared(c"casemate-vmm", program, cgroups)
}

/// Turns a knob of a cgroup whose cell may keep so many processors busy.
pub(crate) fn write_knob(cgroup: &Path, knob: Knob, cpus_max: u32) -> Result<(), String> {
    let (file, value) = match knob {
        Knob::CpuWeight(weight) => ("cpu.weight", weight.clamp(1, 10_000).to_string()),
        Knob::CpuQuota(quota_us) => {
            let most = u64::from(cpus_max).saturating_mul(CPU_PERIOD_US);
            ("cpu.max", format!("{} {CPU_PERIOD_US}", quota_us.clamp(1_000, most.max(1_000))))
        }
    };
    fs::write(cgroup.join(file), &value).map_err(|error| format!("{file} cannot be set to {value}: {error}"))
}
