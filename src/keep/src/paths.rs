//! Where Casemate keeps its things on a host.

use std::{
    env,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use casemate_broker::{ByBroker, InCells, Places, Rules, broker};
use casemate_policy::{Launch, Plain, Programs};
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
    /// The program that is root for a keep.
    pub broker: PathBuf,
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
            broker: beside.join("casemate-broker"),
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

    /// What a broker has to know of them. It has a working directory of its own.
    pub(crate) fn places(&self) -> Places {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or(path.clone());
        Places {
            state: absolute(&self.state),
            cache: absolute(&self.cache),
            runtime: absolute(&self.runtime),
            cgroup: absolute(&self.cgroup),
            vmm: absolute(&self.vmm),
            policy_compiler: absolute(&self.policy_compiler),
            policy_engine: absolute(&self.policy_engine),
        }
    }

    /// The programs for policies as this process runs them: by its broker; as root in cells; anybody else as processes of their own,
    /// which still confine themselves.
    pub fn programs(&self) -> Programs {
        let launch: Arc<dyn Launch> = match broker() {
            Some(broker) => Arc::new(ByBroker(broker)),
            None if rustix::process::geteuid().is_root() => {
                // Where the host file can't be read, nothing may be lacking.
                let rules = self.read_host_file().map(|file| Rules::of(&file)).unwrap_or_default();
                Arc::new(InCells { places: self.places(), rules })
            }
            None => Arc::new(Plain::DEFAULT),
        };
        Programs { compiler: self.policy_compiler.clone(), engine: self.policy_engine.clone(), launch }
    }
}
