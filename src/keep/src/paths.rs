//! Where Casemate keeps its things on a host.

use std::{
    env, io,
    path::{Path, PathBuf},
};

use casemate_spec::Refusal;

/// The folders and programs that the keep uses.
#[derive(Clone, Debug)]
pub struct Paths {
    /// What must survive a crash: the ledger of claimed devices.
    pub state: PathBuf,
    /// What may be lost: compiled policies.
    pub cache: PathBuf,
    /// What lives as long as the boot: control sockets, locks.
    pub runtime: PathBuf,
    /// The cgroup under which cells get theirs.
    pub cgroup: PathBuf,
    /// The program that runs in a cell.
    pub vmm: PathBuf,
    /// The program that compiles policies.
    pub policy_compiler: PathBuf,
}

/// Why the programs cannot be found.
#[derive(Debug, thiserror::Error)]
#[error("this program cannot tell where it is: {0}")]
pub struct PathsError(#[from] io::Error);

impl Paths {
    /// The usual folders; programs beside the running one.
    ///
    /// # Errors
    /// When the running program's own path is not known.
    pub fn standard() -> Result<Self, PathsError> {
        let own = env::current_exe()?;
        let beside = own.parent().unwrap_or(Path::new("/"));
        Ok(Self {
            state: "/var/lib/casemate".into(),
            cache: "/var/cache/casemate/policies".into(),
            runtime: "/run/casemate".into(),
            cgroup: "/sys/fs/cgroup/casemate".into(),
            vmm: beside.join("casemate-vmm"),
            policy_compiler: beside.join("casemate-policy-compiler"),
        })
    }

    /// Makes the folder for sockets and locks.
    pub(crate) fn make_runtime(&self) -> Result<(), Refusal> {
        std::fs::create_dir_all(&self.runtime).map_err(|error| {
            let remedy = "run as root on a host with /run";
            Refusal::new(
                "host-folder",
                self.runtime.display(),
                format_args!("it cannot be made: {error}"),
                remedy,
            )
        })
    }
}
