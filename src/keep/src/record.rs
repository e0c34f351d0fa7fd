//! What a keep writes down of a guest that runs, for `casemate ps` and `casemate audit`: what it was given, not what is.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use casemate_broker::{ClaimedDevice, Kept, Limit, Seen, broker, hands};
use casemate_host::{Host, Owner, Process};
use casemate_jail::Landlock;
use casemate_spec::{Located, Name, PciAddress, Refusal};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Paths, PolicyReport,
    cell::{Resources, Started},
};

/// Counts up when the form changes.
const VERSION: u32 = 1;
/// Descriptors of an assigned function: an event for each vector, up to 2048, here and at control.
pub(crate) const DEVICE_DESCRIPTORS: u64 = 4096;

/// A guest that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRecord {
    version: u32,
    /// Its name.
    pub guest: String,
    /// Whose it is.
    pub tenant: String,
    /// Its VMM's process.
    pub cell: Process,
    /// The process that watches over it.
    pub keep: Process,
    /// The uid and gid of its cell.
    pub uid: u32,
    /// When its cell was closed, in seconds since 1970.
    pub started_seconds: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// Network cards.
    pub nets: u32,
    /// SHA-256 of its file, in hexadecimal.
    pub spec_sha256: String,
    /// The plugins that allowed it: name and digest.
    pub policy: Vec<(String, String)>,
    /// Kernel, initrd and disks, as /proc names their descriptors.
    pub files: Vec<PathBuf>,
    /// Its PCI functions.
    pub devices: Vec<GivenDevice>,
    /// Its slots for what comes while it runs.
    #[serde(default)]
    pub slots: u8,
    /// The limits that it was given.
    pub limits: GivenLimits,
    /// Its Landlock ruleset.
    pub landlock: GivenLandlock,
    /// The parts of a cell that it is without, by the host file's leave.
    #[serde(default)]
    pub weakened: Vec<String>,
}

/// A PCI function as it was given to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenDevice {
    /// Where it sits.
    pub address: PciAddress,
    /// Its IOMMU group.
    pub group: u32,
    /// How it was reset before; without result 0 it is not given.
    pub reset_method: String,
    /// The driver that it goes back to.
    pub former_driver: Option<String>,
    /// The slot that it came into while the guest ran, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

impl GivenDevice {
    /// A device of a claim's.
    pub(crate) fn of(device: &ClaimedDevice, slot: Option<u8>) -> Self {
        Self {
            address: device.address,
            group: device.group,
            reset_method: device.reset_method.clone(),
            former_driver: device.former_driver.clone(),
            slot,
        }
    }
}

/// Limits as they were asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are those of CgroupPlan and Rlimits in casemate-jail")]
pub struct GivenLimits {
    pub cgroup: PathBuf,
    pub memory_bytes_max: u64,
    pub pids_max: u64,
    pub cpus_max: u32,
    pub memlock_bytes: u64,
    pub descriptors_max: u64,
    pub threads_max: u64,
    pub file_size_bytes_max: u64,
    #[serde(default)]
    pub io_weight: Option<u16>,
    #[serde(default)]
    pub io_max: Vec<String>,
}

/// The Landlock ruleset as it was enforced: the kernel tells it to nobody afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are those of Landlock in casemate-jail")]
pub struct GivenLandlock {
    pub abi: u32,
    pub filesystem: u64,
    pub network: u64,
    pub scopes: u64,
}

/// A record on disk; removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Recorded {
    runtime: PathBuf,
    guest: Name,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // One that stays names a process that is gone, and is passed over.
        hands::remove(&self.runtime, &self.guest, Kept::Record);
    }
}

/// What a record is made of.
pub(crate) struct Facts<'a> {
    pub(crate) located: &'a Located,
    pub(crate) spec_sha256: &'a str,
    pub(crate) uid: u32,
    pub(crate) policy: &'a PolicyReport,
    pub(crate) resources: &'a Resources<'a>,
    pub(crate) started: &'a Started,
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes the record of a guest whose cell was closed. `None` for a cell that has ended already: whoever watches it tells why.
pub(crate) fn write(paths: &Paths, facts: &Facts<'_>) -> Result<Option<Recorded>, Refusal> {
    let Some(cell) = Process::with_pid(&Host::live(), facts.started.cell.pid()) else { return Ok(None) };
    let record = GuestRecord::new(facts, cell)?;
    put(paths, &record).map_err(|error| {
        let cause = format_args!("the guest cannot be written down: {error}");
        Refusal::new("host-folder", paths.runtime.display(), cause, "see that /run has room")
    })?;
    Ok(Some(Recorded { runtime: paths.runtime.clone(), guest: facts.located.guest.name.clone() }))
}

/// Lets a running guest's cell write files of this size, if it may not yet, and notes it: an auditor compares.
///
/// # Errors
/// As [`give`].
pub(crate) fn allow_file_size(paths: &Paths, guest: &str, size_bytes: u64) -> Result<(), Refusal> {
    change(paths, guest, |record| allow(record, size_bytes))
}

fn allow(record: &mut GuestRecord, size_bytes: u64) -> Result<(), Refusal> {
    if size_bytes > record.limits.file_size_bytes_max {
        limit(record, Limit::FileSize, size_bytes)?;
        record.limits.file_size_bytes_max = size_bytes;
    }
    Ok(())
}

/// Puts a record in its place, whole. The name is this keep's: it holds the lock of the guest's name.
fn put(paths: &Paths, record: &GuestRecord) -> io::Result<()> {
    let guest = Name::new(&record.guest).ok_or(io::ErrorKind::InvalidInput)?;
    hands::put(&paths.runtime, &guest, Kept::Record, &serde_json::to_string(record)?)
}

impl GuestRecord {
    fn new(facts: &Facts<'_>, cell: Process) -> Result<Self, Refusal> {
        let Facts { located, spec_sha256, uid, policy, resources, started } = *facts;
        let guest = &located.guest;
        let images = resources.images;
        let backings = images.backings.iter().flatten();
        let files = [&images.kernel].into_iter().chain(&images.initrd).chain(&images.disks).chain(backings);
        let devices = resources.claim.iter().flat_map(|claim| &claim.devices);
        let Landlock { abi, filesystem, network, scopes } = started.cell.landlock();
        let (rlimits, cgroup) = (started.rlimits, &started.cgroup);
        Ok(Self {
            version: VERSION,
            guest: guest.name.to_string(),
            tenant: guest.tenant.to_string(),
            cell,
            keep: Owner::this_process(guest.name.as_str())?.keep,
            uid,
            started_seconds: now_seconds(),
            vcpus: u32::from(guest.vcpus),
            memory_bytes: guest.memory.bytes(),
            nets: guest.nets.iter().map(|net| u32::from(net.queues)).sum(),
            spec_sha256: spec_sha256.to_owned(),
            policy: policy.plugins.clone(),
            files: files.filter_map(|image| name_of(&image.fd)).collect(),
            devices: devices.map(|device| GivenDevice::of(device, None)).collect(),
            slots: guest.hotplug.slots,
            limits: GivenLimits {
                cgroup: cgroup.parent.join(guest.name.as_str()),
                memory_bytes_max: cgroup.memory_bytes_max,
                pids_max: cgroup.pids_max,
                cpus_max: cgroup.cpus_max,
                memlock_bytes: rlimits.memlock_bytes,
                descriptors_max: rlimits.descriptors_max,
                threads_max: rlimits.threads_max,
                file_size_bytes_max: rlimits.file_size_bytes_max,
                io_weight: cgroup.io.rules.weight,
                io_max: cgroup.io.lines(),
            },
            landlock: GivenLandlock { abi, filesystem, network, scopes },
            weakened: crate::run::names(started.cell.weakened()),
        })
    }
}

/// Notes that a running guest is given one more descriptor, and lets its cell write to as much of it as there is.
///
/// # Errors
/// `host-folder` when the record can't be changed; `keep-failed` when the cell's limit can't.
pub(crate) fn give(
    paths: &Paths,
    guest: &str,
    fd: BorrowedFd<'_>,
    size_bytes: Option<u64>,
) -> Result<(), Refusal> {
    change(paths, guest, |record| {
        size_bytes.map_or(Ok(()), |size_bytes| allow(record, size_bytes))?;
        match (size_bytes, name_of(&fd)) {
            (Some(_), Some(name)) if !record.files.contains(&name) => record.files.push(name),
            (Some(_), _) => {}
            (None, _) => record.nets = record.nets.saturating_add(1),
        }
        Ok(())
    })
}

/// Notes that devices come into a slot of a running guest, and lets its cell lock its memory once more: the kernel counts it
/// for each container.
///
/// # Errors
/// As [`give`].
pub(crate) fn give_devices(paths: &Paths, guest: &str, devices: Vec<GivenDevice>) -> Result<(), Refusal> {
    change(paths, guest, |record| {
        let count = devices.len() as u64;
        record.devices.extend(devices);
        let limits = &record.limits;
        let memlock_bytes = limits.memlock_bytes.saturating_add(record.memory_bytes);
        let descriptors_max = limits.descriptors_max.saturating_add(count.saturating_mul(DEVICE_DESCRIPTORS));
        relimit(record, memlock_bytes, descriptors_max)
    })
}

/// Notes that what came into this slot has gone.
///
/// # Errors
/// As [`give`].
pub(crate) fn take_devices(paths: &Paths, guest: &str, slot: u8) -> Result<(), Refusal> {
    change(paths, guest, |record| {
        let before = record.devices.len();
        record.devices.retain(|device| device.slot != Some(slot));
        let count = (before - record.devices.len()) as u64;
        if count == 0 {
            return Ok(());
        }
        let limits = &record.limits;
        let memlock_bytes = limits.memlock_bytes.saturating_sub(record.memory_bytes);
        let descriptors_max = limits.descriptors_max.saturating_sub(count.saturating_mul(DEVICE_DESCRIPTORS));
        relimit(record, memlock_bytes, descriptors_max)
    })
}

fn relimit(record: &mut GuestRecord, memlock_bytes: u64, descriptors_max: u64) -> Result<(), Refusal> {
    limit(record, Limit::LockedMemory, memlock_bytes)?;
    limit(record, Limit::Descriptors, descriptors_max)?;
    record.limits.memlock_bytes = memlock_bytes;
    record.limits.descriptors_max = descriptors_max;
    Ok(())
}

/// Sets a limit of a guest's cell.
fn limit(record: &GuestRecord, limit: Limit, most: u64) -> Result<(), Refusal> {
    let set = broker().map_or_else(|| Err("there is no broker".into()), |broker| broker.limit(limit, most));
    set.map_err(|error| {
        let cause = format_args!("its cell's limit {limit:?} cannot be set: {error}");
        Refusal::new("keep-failed", &record.guest, cause, "try again")
    })
}

/// Held while a record is changed: operators' requests come on several threads.
static CHANGING: Mutex<()> = Mutex::new(());

/// Changes a running guest's record; when `make` fails it stays as it is.
fn change(
    paths: &Paths,
    guest: &str,
    make: impl FnOnce(&mut GuestRecord) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        let cause = format_args!("the guest's record cannot be changed: {error}");
        Refusal::new("host-folder", guest, cause, "run as root, with space in /run")
    };
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut record = own(paths, guest).ok_or_else(|| failed(&"it cannot be read"))?;
    make(&mut record)?;
    put(paths, &record).map_err(|error| failed(&error))
}

pub(crate) fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// What /proc calls a descriptor of this process.
fn name_of(fd: &impl AsFd) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).ok()
}

/// The guests that run on this host, by name.
///
/// # Errors
/// `not-root`.
pub fn running(paths: &Paths) -> Result<Vec<GuestRecord>, Refusal> {
    crate::run::require_root()?;
    let host = Host::live();
    let seen = hands::read_all(&paths.runtime, Kept::Record);
    let mut records: Vec<_> =
        seen.iter().filter_map(read).filter(|record| record.cell.is_alive(&host)).collect();
    records.sort_by(|one, other| one.guest.cmp(&other.guest));
    Ok(records)
}

/// The record of this guest.
fn own(paths: &Paths, guest: &str) -> Option<GuestRecord> {
    let seen = hands::read_all(&paths.runtime, Kept::Record);
    seen.iter().find(|seen| seen.guest == guest).and_then(read)
}

/// `None` for what is no record of this form: one of a later Casemate, or one that was cut off.
fn read(seen: &Seen) -> Option<GuestRecord> {
    let record: GuestRecord = serde_json::from_str(&seen.text).ok()?;
    (record.version == VERSION && seen.guest == record.guest).then_some(record)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record of a guest whose cell is this very process.
    pub(crate) fn record(guest: &str) -> GuestRecord {
        let this = Owner::this_process(guest).unwrap().keep;
        GuestRecord {
            version: VERSION,
            guest: guest.into(),
            tenant: "t".into(),
            cell: this.clone(),
            keep: this,
            uid: 70_001,
            started_seconds: 1,
            vcpus: 1,
            memory_bytes: 64 << 20,
            nets: 0,
            spec_sha256: sha256(b""),
            policy: Vec::new(),
            files: vec!["/images/disk".into()],
            devices: Vec::new(),
            slots: 0,
            limits: GivenLimits {
                cgroup: "/sys/fs/cgroup/casemate/g".into(),
                memory_bytes_max: 1,
                pids_max: 1,
                cpus_max: 1,
                memlock_bytes: 1,
                descriptors_max: 1,
                threads_max: 1,
                file_size_bytes_max: 1,
                io_weight: None,
                io_max: Vec::new(),
            },
            landlock: GivenLandlock { abi: 2, filesystem: 0x3fff, network: 0, scopes: 0 },
            weakened: Vec::new(),
        }
    }

    #[test]
    fn only_whole_records_under_their_own_name_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard().unwrap();
        paths.runtime = folder.path().into();
        let path = folder.path().join("web.json");
        let text = serde_json::to_string(&record("web")).unwrap();
        fs::write(&path, &text).unwrap();
        let read = |guest: &str| own(&paths, guest);
        assert_eq!(read("web"), Some(record("web")));
        fs::write(&path, text.get(..text.len() / 2).unwrap()).unwrap();
        assert_eq!(read("web"), None);
        fs::write(&path, text.replace("\"version\":1", "\"version\":2")).unwrap();
        assert_eq!(read("web"), None);
        let other = folder.path().join("other.json");
        fs::write(&other, &text).unwrap();
        assert_eq!(read("other"), None);
    }

    #[test]
    fn a_file_that_is_no_larger_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard().unwrap();
        paths.runtime = folder.path().into();
        assert_eq!(allow_file_size(&paths, "web", 1).unwrap_err().code, "host-folder");
        put(&paths, &record("web")).unwrap();
        let most = record("web").limits.file_size_bytes_max;
        allow_file_size(&paths, "web", most).unwrap();
        assert_eq!(own(&paths, "web"), Some(record("web")));
    }

    #[test]
    fn the_digest_is_sha256() {
        assert!(sha256(b"abc").starts_with("ba7816bf8f01cfea414140de5dae2223"));
    }
}
