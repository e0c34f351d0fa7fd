//! What has been taken from the host, on disk, so that it can be undone by whoever comes after a crash.
//!
//! One file, `ledger.json`, replaced as a whole: written beside, fsync, rename, fsync of the directory. A lock file is
//! held (flock) for the moments of a change, never while a guest runs or a driver is waited for: an entry in the file
//! is what keeps others away from its devices.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use casemate_spec::{PciAddress, Refusal, ScrubStep};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    DeviceState, Host, config::ConfigSnapshot, host::read_bytes, life::Move, process::Process,
    sriov::Physical,
};

const VERSION: u32 = 1;
/// An entry is some 10 KB a device; a host has hundreds of functions at most.
const BYTES_MAX: u64 = 16 << 20;
/// A change takes milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// A claim may wait for drivers that do not let go, one device after the other.
const CHOOSING_WAIT: Duration = Duration::from_secs(120);

/// Whose a claim is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Name of the guest. A guest has one claim from its start, and one for each slot that devices came into while it ran.
    pub guest: String,
    /// The process that watches over it and gives the devices back.
    pub keep: Process,
    /// The slot, from 1; `None` is what it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
}

impl Owner {
    /// This process, for a guest of this name.
    ///
    /// # Errors
    /// `host-unreadable` when /proc does not tell about this process.
    pub fn this_process(guest: &str) -> Result<Self, Refusal> {
        Ok(Self { guest: guest.to_owned(), keep: this_process(&Host::live())?, slot: None })
    }

    /// The same guest's slot of this number.
    pub fn in_slot(self, slot: u8) -> Self {
        Self { slot: Some(slot), ..self }
    }

    /// Whether both could not have claims at a time: one guest's, by two processes or for one slot.
    fn excludes(&self, other: &Self) -> bool {
        self.guest == other.guest && (self.keep != other.keep || self.slot == other.slot)
    }
}

/// This process, as the ledger knows it.
pub(crate) fn this_process(host: &Host) -> Result<Process, Refusal> {
    Process::with_pid(host, std::process::id())
        .ok_or_else(|| crate::function::unreadable("proc/self/stat", "this process is not found in it"))
}

/// A device that failed to prove itself clean. It stays away from guests and host until an operator frees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// Where it sits.
    pub address: PciAddress,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// The guest that had it last.
    pub guest: String,
    /// What it failed.
    pub why: String,
}

/// Which tenant had a device last. It outlives the claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastTenant {
    pub(crate) address: PciAddress,
    /// With the IDs: another card at the address has had no tenant.
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) tenant: String,
    /// SHA-256 of its option ROM when it was first hashed, where its pool wants that.
    #[serde(default)]
    pub(crate) firmware: Option<String>,
}

impl LastTenant {
    /// Whether both are of one device.
    fn is_of(&self, other: &Self) -> bool {
        (self.address, self.vendor, self.device) == (other.address, other.vendor, other.device)
    }

    /// That nobody but this tenant gets the device.
    pub(crate) fn refusal(&self) -> Refusal {
        let cause = format!("tenant {} had it last, and nobody checks its firmware", self.tenant);
        let remedy = format!(
            "check or rewrite its firmware, then say so with casemate devices free {}; or say firmware = \"locked\" of its \
             pool if no guest can change it",
            self.address
        );
        Refusal::new("device-of-another-tenant", self.address, cause, remedy)
    }
}

/// That a device's firmware is not what it was.
pub(crate) fn firmware_changed(address: PciAddress, since: &str) -> Refusal {
    let remedy = format!(
        "look at its firmware, write the right one, then say so with casemate devices free {address}"
    );
    let cause = format!("its option ROM has changed {since}");
    Refusal::new("device-firmware-changed", address, cause, remedy)
}

/// One taken device: what it was before anything was touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceRecord {
    pub(crate) address: PciAddress,
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) group: u32,
    pub(crate) former_driver: Option<String>,
    /// What stood in `driver_override`.
    pub(crate) driver_override: Option<String>,
    /// The method that the kernel tries first.
    pub(crate) reset_method: String,
    #[serde(default)]
    pub(crate) state: DeviceState,
    /// SHA-256 of its option ROM, where its pool wants that compared.
    #[serde(default)]
    pub(crate) firmware: Option<String>,
    /// Somebody judges it when it comes back.
    #[serde(default)]
    pub(crate) judged: bool,
    /// How it's scrubbed when a guest has had it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) scrub: Vec<ScrubStep>,
    /// Config space as first seen; a host driver may have had bus mastering and messages on.
    pub(crate) config: ConfigSnapshot,
}

/// All of one guest's devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) owner: Owner,
    /// The guest's process, once it was started.
    pub(crate) cell: Option<Process>,
    /// The guest is gone: what is left here has to be given back, by the owner or whoever comes after it.
    pub(crate) recovering: bool,
    pub(crate) devices: Vec<DeviceRecord>,
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Book {
    version: u32,
    pub(crate) entries: Vec<Entry>,
    pub(crate) quarantined: Vec<Quarantined>,
    #[serde(default)]
    pub(crate) tenants: Vec<LastTenant>,
    /// Those that make virtual functions for guests.
    #[serde(default)]
    pub(crate) physical: Vec<Physical>,
}

impl Book {
    /// Whether somebody has a claim beside which this owner can't have one.
    pub(crate) fn excludes(&self, owner: &Owner) -> bool {
        self.entries.iter().any(|entry| entry.owner.excludes(owner))
    }

    pub(crate) fn entry(&mut self, owner: &Owner) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.owner == *owner)
    }

    /// Lets go of the owner's devices but for those at `kept`, which [`recover`](crate::recover) tries again, in the same
    /// process too; no entry stays when there are none.
    pub(crate) fn let_go(&mut self, owner: &Owner, kept: &[PciAddress]) -> Result<(), Refusal> {
        let Some(entry) = self.entry(owner) else { return Ok(()) };
        let going = entry.devices.iter().filter(|device| !kept.contains(&device.address));
        let going: Vec<_> = going.map(|device| (device.address, device.state)).collect();
        for (address, state) in going {
            let made = match state {
                DeviceState::Quarantined => continue,
                DeviceState::Claimed => Move::Undo,
                DeviceState::Verified => Move::GiveBack,
                _ => Move::Restart,
            };
            self.advance(owner, address, made)?;
        }
        if let Some(entry) = self.entry(owner) {
            entry.devices.retain(|device| kept.contains(&device.address));
            entry.recovering = true;
        }
        self.entries.retain(|entry| entry.owner != *owner || !entry.devices.is_empty());
        Ok(())
    }
}

/// While it lives, no other guest of this host chooses devices.
#[derive(Debug)]
#[must_use = "dropped, it lets others choose"]
pub struct Choosing {
    _lock: File,
}

/// The ledger in one directory. Holds nothing open.
#[derive(Clone, Debug)]
pub struct Ledger {
    directory: PathBuf,
}

impl Ledger {
    /// The ledger in `directory`, which is made (for its owner only) when it is missing.
    ///
    /// # Errors
    /// `ledger-unusable` when it cannot be made or read, `ledger-damaged` when it is not of our format.
    pub fn open(directory: &Path) -> Result<Self, Refusal> {
        let ledger = Self { directory: directory.to_owned() };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|error| ledger.unusable(&error))?;
        ledger.read()?;
        Ok(ledger)
    }

    /// Records the guest's process, so that it can be ended should its owner die. To be called as soon as it was started.
    ///
    /// # Errors
    /// `ledger-no-entry` when `owner` has no claim, `ledger-no-process` when there is no such process, `ledger-*`.
    pub fn note_cell(&self, owner: &Owner, cell_pid: u32) -> Result<(), Refusal> {
        let missing = |code, cause| Refusal::new(code, &owner.guest, cause, "start the guest again");
        let cell = Process::with_pid(&Host::live(), cell_pid).ok_or_else(|| {
            missing("ledger-no-process", format!("its process {cell_pid} has ended already"))
        })?;
        self.change(|book| {
            let entry =
                book.entry(owner).ok_or_else(|| missing("ledger-no-entry", "it has no claim".to_owned()))?;
            entry.cell = Some(cell);
            Ok(())
        })
    }

    /// Writes down that the guest gets the owner's devices, before it does, and whose guest it is: a pool may keep a device
    /// from other tenants afterwards. `unchecked` are those of which nobody checks the firmware: they stay with the tenant
    /// who had them last, also when that was after they were chosen.
    ///
    /// # Errors
    /// `device-of-another-tenant`, `device-firmware-changed`, `ledger-no-entry` when `owner` has no claim, `device-state` when it has it no longer or
    /// already, `ledger-*`.
    pub fn attach(&self, owner: &Owner, tenant: &str, unchecked: &[PciAddress]) -> Result<(), Refusal> {
        self.change(|book| {
            let entry = book.entry(owner).ok_or_else(|| {
                Refusal::new("ledger-no-entry", &owner.guest, "it has no claim", "start the guest again")
            })?;
            let had = |device: &DeviceRecord| LastTenant {
                address: device.address,
                vendor: device.vendor,
                device: device.device,
                tenant: tenant.to_owned(),
                firmware: device.firmware.clone(),
            };
            let new: Vec<LastTenant> = entry.devices.iter().map(had).collect();
            let another = |last: &&LastTenant| {
                last.tenant != tenant
                    && unchecked.contains(&last.address)
                    && new.iter().any(|new| new.is_of(last))
            };
            if let Some(last) = book.tenants.iter().find(another) {
                return Err(last.refusal());
            }
            let changed = |new: &&LastTenant| {
                let known =
                    book.tenants.iter().find(|last| new.is_of(last)).and_then(|last| last.firmware.as_ref());
                known.is_some() && new.firmware.is_some() && known != new.firmware.as_ref()
            };
            if let Some(device) = new.iter().find(changed) {
                return Err(firmware_changed(device.address, "since another guest got it first"));
            }
            for device in &new {
                book.advance(owner, device.address, Move::Attach)?;
            }
            book.tenants.retain(|old| new.iter().all(|new| new.address != old.address));
            book.tenants.extend(new);
            Ok(())
        })
    }

    /// Devices in quarantine.
    ///
    /// # Errors
    /// `ledger-unusable`, `ledger-damaged`.
    pub fn quarantined(&self) -> Result<Vec<Quarantined>, Refusal> {
        Ok(self.read()?.quarantined)
    }

    /// The content now. No lock is needed: the file is replaced as a whole.
    pub(crate) fn read(&self) -> Result<Book, Refusal> {
        let bytes = match read_bytes(&self.file(), BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Book { version: VERSION, ..Book::default() });
            }
            read => read.map_err(|error| self.unusable(&error))?,
        };
        let book: Book = serde_json::from_slice(&bytes).map_err(|error| self.damaged(&error))?;
        if book.version != VERSION {
            return Err(
                self.damaged(&format!("it is of version {}, and this program knows {VERSION}", book.version))
            );
        }
        Ok(book)
    }

    /// Changes the content under the lock. When this returns, the change is on disk; when `change` fails nothing is.
    pub(crate) fn change<T>(
        &self,
        change: impl FnOnce(&mut Book) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let _lock = self.lock()?;
        let before = self.read()?;
        let mut book = before.clone();
        let result = change(&mut book)?;
        if book != before {
            self.write(&book).map_err(|error| self.unusable(&error))?;
        }
        Ok(result)
    }

    /// A change that cannot fail by itself.
    #[cfg(test)]
    pub(crate) fn update(&self, change: impl FnOnce(&mut Book)) -> Result<(), Refusal> {
        self.change(|book| {
            change(book);
            Ok(())
        })
    }

    fn lock(&self) -> Result<File, Refusal> {
        self.lock_of("lock", LOCK_WAIT, "another process is changing the ledger")
    }

    /// Waits until no other guest of this host is between choosing its devices and claiming them: of two that start at
    /// once, the second chooses from what the first has left.
    ///
    /// # Errors
    /// `ledger-busy` when that takes longer than drivers may take to let go of devices; `ledger-unusable`.
    pub fn choosing(&self) -> Result<Choosing, Refusal> {
        let lock = self.lock_of("choosing", CHOOSING_WAIT, "another guest is taking its devices")?;
        Ok(Choosing { _lock: lock })
    }

    fn lock_of(&self, name: &str, wait: Duration, cause: &str) -> Result<File, Refusal> {
        let path = self.directory.join(name);
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
        let file = file.map_err(|error| self.unusable(&error))?;
        let until = Instant::now() + wait;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < until => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let remedy = "try again; if it persists, look for a hanging casemate process";
                    return Err(Refusal::new("ledger-busy", self.directory.display(), cause, remedy));
                }
                Err(error) => return Err(self.unusable(&error)),
            }
        }
    }

    fn write(&self, book: &Book) -> io::Result<()> {
        let beside = self.directory.join("ledger.json.new");
        let mut file =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
        serde_json::to_writer_pretty(&mut file, book)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&beside, self.file())?;
        File::open(&self.directory)?.sync_all()
    }

    fn file(&self) -> PathBuf {
        self.directory.join("ledger.json")
    }

    fn unusable(&self, cause: &dyn std::fmt::Display) -> Refusal {
        let remedy = "run as root, with a state directory on a disk that can be written";
        Refusal::new(
            "ledger-unusable",
            self.directory.display(),
            format!("the ledger of claimed devices cannot be used: {cause}"),
            remedy,
        )
    }

    fn damaged(&self, cause: &dyn std::fmt::Display) -> Refusal {
        let remedy = "stop all guests, give the devices bound to vfio-pci back by hand (or restart the host), then remove this file";
        Refusal::new(
            "ledger-damaged",
            self.file().display(),
            format!("the ledger of claimed devices is not understood: {cause}"),
            remedy,
        )
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fixture::at;

    pub(crate) fn record(address: &str, group: u32) -> DeviceRecord {
        let config = ConfigSnapshot::new(crate::config::tests::some()).unwrap();
        DeviceRecord {
            address: at(address),
            vendor: 0x8086,
            device: 0x10d3,
            group,
            former_driver: Some("e1000e".into()),
            driver_override: None,
            reset_method: "pm".into(),
            state: DeviceState::Attached,
            firmware: None,
            judged: false,
            scrub: Vec::new(),
            config,
        }
    }

    pub(crate) fn entry(guest: &str, devices: Vec<DeviceRecord>) -> Entry {
        Entry { owner: Owner::this_process(guest).unwrap(), cell: None, recovering: false, devices }
    }

    #[test]
    fn what_is_written_is_read_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("a/b");
        let ledger = Ledger::open(&state).unwrap();
        let written = entry("web", vec![record("0000:01:00.0", 8)]);
        ledger.update(|book| book.entries.push(written.clone())).unwrap();
        assert_eq!(Ledger::open(&state).unwrap().read().unwrap().entries, std::slice::from_ref(&written));

        ledger.note_cell(&written.owner, std::process::id()).unwrap();
        assert_eq!(ledger.read().unwrap().entries[0].cell.as_ref(), Some(&written.owner.keep));
        let another = Owner { guest: "db".into(), ..written.owner };
        assert_eq!(ledger.note_cell(&another, std::process::id()).unwrap_err().code, "ledger-no-entry");
        assert_eq!(ledger.note_cell(&another, u32::MAX).unwrap_err().code, "ledger-no-process");
    }

    #[test]
    fn a_guest_has_a_claim_for_its_start_and_one_for_each_slot() {
        let mut book = Book::default();
        let web = entry("web", vec![]).owner;
        book.entries.push(entry("web", vec![]));
        assert!(book.excludes(&web) && !book.excludes(&web.clone().in_slot(1)));
        book.entries.push(Entry { owner: web.clone().in_slot(1), ..entry("web", vec![]) });
        assert!(book.excludes(&web.clone().in_slot(1)) && !book.excludes(&web.clone().in_slot(2)));
        let mut another_keep = web.clone().in_slot(2);
        another_keep.keep.start_ticks += 1;
        assert!(book.excludes(&another_keep), "of two processes one is not the guest's keep");
        // What was written before slots were is of a guest's start.
        let text = serde_json::to_string(&web).unwrap();
        assert!(!text.contains("slot"));
        assert_eq!(serde_json::from_str::<Owner>(&text).unwrap(), web);
    }

    #[test]
    fn a_change_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        let failed: Result<(), _> = ledger.change(|book| {
            book.entries.push(entry("web", vec![]));
            Err(Refusal::new("no", "", "", ""))
        });
        assert_eq!(failed.unwrap_err().code, "no");
        assert_eq!(ledger.read().unwrap().entries, []);
    }

    #[test]
    fn a_half_written_file_is_not_seen_and_a_damaged_one_is_told() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ledger.json.new"), "{").unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        ledger.update(|book| book.entries.push(entry("web", vec![]))).unwrap();
        assert_eq!(ledger.read().unwrap().entries.len(), 1);
        for text in ["{", "[]", r#"{"version":2,"entries":[],"quarantined":[]}"#] {
            fs::write(directory.path().join("ledger.json"), text).unwrap();
            assert_eq!(Ledger::open(directory.path()).unwrap_err().code, "ledger-damaged");
        }
    }

    #[test]
    fn changes_from_many_threads_are_all_kept() {
        let directory = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(directory.path()).unwrap();
        thread::scope(|scope| {
            for thread in 0..8 {
                let ledger = &ledger;
                scope.spawn(move || {
                    ledger.update(|book| book.entries.push(entry(&format!("guest{thread}"), vec![]))).unwrap()
                });
            }
        });
        assert_eq!(ledger.read().unwrap().entries.len(), 8);
    }
}
