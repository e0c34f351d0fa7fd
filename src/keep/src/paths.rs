//! Where Casemate keeps its things on a host.

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use casemate_spec::{HostFile, Refusal, parse_host};

/// Where the host file is by default.
const HOST_FILE: &str = "/etc/casemate/host.toml";
/// For [`parse_host`] to refuse what is longer.
const HOST_FILE_BYTES_MAX: u64 = 1 << 20;

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
    /// What the operator says of this host: pools of devices. Without the file there are none.
    pub host_file: PathBuf,
    /// The program that runs in a cell.
    pub vmm: PathBuf,
    /// The program that compiles policies.
    pub policy_compiler: PathBuf,
    /// The program that runs them.
    pub policy_engine: PathBuf,
    /// A public key of minisign. Where the file exists, bundles have to be signed by it.
    pub policy_key: PathBuf,
    /// A folder of public keys of minisign: those who sign kernels, initrds and disks, each by its file's name.
    pub image_keys: PathBuf,
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
            host_file: HOST_FILE.into(),
            vmm: beside.join("casemate-vmm"),
            policy_compiler: beside.join("casemate-policy-compiler"),
            policy_engine: beside.join("casemate-policy-engine"),
            policy_key: "/etc/casemate/policy.pub".into(),
            image_keys: "/etc/casemate/image-keys".into(),
        })
    }

    /// Reads the host file. Where none is at the usual place, there are no pools.
    ///
    /// # Errors
    /// `file-unreadable`, and all of [`parse_host`].
    pub fn read_host_file(&self) -> Result<HostFile, Refusal> {
        let mut text = String::new();
        let read = File::open(&self.host_file)
            .and_then(|file| file.take(HOST_FILE_BYTES_MAX).read_to_string(&mut text));
        match read {
            Ok(_) => parse_host(&self.host_file, &text),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && self.host_file == Path::new(HOST_FILE) =>
            {
                Ok(HostFile::default())
            }
            Err(error) => {
                let remedy = "name a host file that can be read; docs/host-file.md shows every key";
                Err(Refusal::new("file-unreadable", self.host_file.display(), error, remedy))
            }
        }
    }

    /// The key by which bundles have to be signed, where the host has one.
    pub fn required_key(&self) -> Option<&Path> {
        // What can't be looked at may be there: then reading it fails, and refuses.
        self.policy_key.try_exists().unwrap_or(true).then_some(self.policy_key.as_path())
    }

    /// Makes the folder for sockets and locks, for this user alone.
    pub(crate) fn make_runtime(&self) -> Result<(), Refusal> {
        let private = fs::Permissions::from_mode(0o700);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.runtime);
        made.and_then(|()| fs::set_permissions(&self.runtime, private)).map_err(|error| {
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
