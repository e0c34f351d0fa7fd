//! Taking functions from the host for one guest: written down, then taken, all or none.

use std::{io, os::fd::OwnedFd, sync::Arc};

use casemate_spec::{PciAddress, Refusal, ScrubStep};
use sha2::{Digest, Sha256};

use crate::{
    DeviceState, IommuLimits, Notice, Notices, Returned,
    config::{COMMAND, COMMAND_BUS_MASTER, CONFIG_BYTES_MAX, ConfigSnapshot},
    driver, give_back,
    host::{Host, read_bytes},
    image::ROM_BYTES_MAX,
    judge,
    ledger::{DeviceRecord, Entry, Ledger, Owner},
    process, reset,
    sys::vfio,
};

/// What one guest wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimRequest {
    /// For whom.
    pub owner: Owner,
    /// Which functions. Mates of their groups that the host does not use need not be named.
    pub addresses: Vec<PciAddress>,
    /// Those of which the option ROM is to be hashed, before the guest and after it.
    pub digests: Vec<PciAddress>,
    /// Those that are scrubbed after it, and how.
    pub scrub: Vec<(PciAddress, Vec<ScrubStep>)>,
    /// Whether somebody judges what comes back. When nobody can be asked any more, it goes into quarantine.
    pub judged: bool,
}

/// Functions taken for one guest. The container is of type1 v2, has the groups, and maps nothing yet: the guest's own
/// process maps its memory.
///
/// The guest's process gets duplicates of the descriptors. This is kept until that process is gone, and then released.
/// Dropped instead, the ledger still holds what to undo, for [`recover`](crate::recover) in a later process.
#[derive(Debug)]
pub struct Claim {
    /// The IOMMU container.
    pub container: OwnedFd,
    /// Its groups, each once.
    pub groups: Vec<ClaimedGroup>,
    /// The functions, in the order of the request.
    pub devices: Vec<ClaimedDevice>,
    /// What the container can map.
    pub limits: IommuLimits,
    /// What the kernel tells of the functions.
    pub notices: Arc<Notices>,
    owner: Owner,
}

/// One IOMMU group of a claim.
#[derive(Debug)]
pub struct ClaimedGroup {
    /// Its number.
    pub id: u32,
    /// VFIO's descriptor of it.
    pub fd: OwnedFd,
}

/// One function of a claim: reset, with bus mastering off.
#[derive(Debug)]
pub struct ClaimedDevice {
    /// Where it sits.
    pub address: PciAddress,
    /// VFIO's descriptor of it.
    pub fd: OwnedFd,
    /// Its IOMMU group.
    pub group: u32,
    /// How it was reset.
    pub reset_method: String,
    /// The driver that it goes back to.
    pub former_driver: Option<String>,
    pub(crate) record: DeviceRecord,
}

/// Takes functions for a guest.
///
/// The ledger is written before the host is touched. What fails is undone; only a driver that does not let go in time
/// leaves an entry behind, for [`recover`](crate::recover).
///
/// # Errors
/// All of [`assignable`](crate::assignable), and `claim-empty`, `guest-has-claim`, `device-unreadable`,
/// `device-unbind-timeout`, `device-bind-failed`, `device-reset-failed`, `device-firmware-unreadable`, `group-busy`, `group-not-viable`,
/// `vfio-missing`, `vfio-failed`, `ledger-*`.
pub fn claim(host: &Host, ledger: &Ledger, request: ClaimRequest) -> Result<Claim, Refusal> {
    let mut records = write_down(host, ledger, &request)?;
    let ClaimRequest { owner, digests, .. } = request;
    let taken = take(host, &records).and_then(|opened| {
        digest_firmware(ledger, &owner, &mut records, &opened, &digests)?;
        let notices = Notices::of(host, &records, &opened.fds)?;
        Ok((opened, notices))
    });
    match taken {
        Ok((Opened { container, groups, fds }, notices)) => {
            let devices =
                records.into_iter().zip(fds).map(|(record, fd)| ClaimedDevice::new(record, fd)).collect();
            let limits =
                vfio::iommu_info(&container).map(|answer| IommuLimits::parse(&answer)).unwrap_or_default();
            Ok(Claim { container, groups, devices, limits, notices: Arc::new(notices), owner })
        }
        Err(mut refusal) => {
            if let Err(why) = undo(host, ledger, &owner, records) {
                refusal.cause = format!("{}; and it could not all be undone: {why}", refusal.cause);
            }
            Err(refusal)
        }
    }
}

impl ClaimedDevice {
    pub(crate) fn new(record: DeviceRecord, fd: OwnedFd) -> Self {
        Self {
            address: record.address,
            fd,
            group: record.group,
            reset_method: record.reset_method.clone(),
            former_driver: record.former_driver.clone(),
            record,
        }
    }
}

impl Claim {
    /// Whose it is.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Those that are scrubbed when they come back from the guest.
    pub fn to_be_scrubbed(&self) -> Vec<PciAddress> {
        let scrubbed = self.devices.iter().filter(|device| !device.record.scrub.is_empty());
        scrubbed.map(|device| device.address).collect()
    }

    /// Resets, scrubs and verifies each function, and gives it back to the driver it came from, or puts it in quarantine. The
    /// guest's process must be gone, with its copies of the descriptors: a driver that is still used does not let go.
    ///
    /// `judge` hears of each function what was found, and can say why it goes into quarantine all the same; what was not found
    /// clean goes there whatever it says.
    ///
    /// What no guest has reached isn't scrubbed.
    ///
    /// Nothing here fails as a whole: what went wrong with a function stands in its [`Returned`].
    pub fn release(
        self,
        host: &Host,
        ledger: &Ledger,
        judge: &mut dyn FnMut(&Returned) -> Option<String>,
    ) -> Vec<Returned> {
        let lives = ledger.lives(self.devices.iter().map(|device| device.address));
        let was_reached =
            lives.map_or(true, |lives| lives.iter().any(|life| life.state != DeviceState::Claimed));
        self.give_back(host, ledger, Return { was_reached, runs_on: false }, judge)
    }

    /// The same while the guest's process runs on. It has to have let go of all: the descriptors are closed here and the groups
    /// opened anew, which the kernel allows when nobody has one any more. What it holds on to goes into quarantine.
    pub fn release_from_running(
        self,
        host: &Host,
        ledger: &Ledger,
        judge: &mut dyn FnMut(&Returned) -> Option<String>,
    ) -> Vec<Returned> {
        self.give_back(host, ledger, Return { was_reached: true, runs_on: true }, judge)
    }

    /// The same with what no guest has reached, which is scrubbed all the same: somebody wants it so.
    pub(crate) fn scrub(self, host: &Host, ledger: &Ledger) -> Vec<Returned> {
        self.give_back(host, ledger, Return { was_reached: true, runs_on: false }, &mut |_| None)
    }

    fn give_back(
        mut self,
        host: &Host,
        ledger: &Ledger,
        how: Return,
        judge: &mut dyn FnMut(&Returned) -> Option<String>,
    ) -> Vec<Returned> {
        if !how.was_reached {
            self.devices.iter_mut().for_each(|device| device.record.scrub.clear());
        }
        let scrubbed = self.to_be_scrubbed();
        let Self { container, groups, devices, notices, owner, .. } = self;
        let addresses: Vec<PciAddress> = devices.iter().map(|device| device.address).collect();
        let taken_back = give_back::take_back(ledger, &owner, &addresses)
            .and_then(|()| give_back::begin_scrub(ledger, &owner, &scrubbed));
        let (records, fds): (Vec<_>, Vec<_>) =
            devices.into_iter().map(|device| (device.record, device.fd)).unzip();
        // Devices are closed first; the container goes last, and its DMA maps with it.
        let opened = (fds, groups, container);
        let is_wanted = addresses.iter().any(|address| notices.was_told(Notice::Wanted(*address)));
        let (mut proofs, opened) = if is_wanted || how.runs_on {
            drop(opened);
            let who = if how.runs_on {
                "its guest's process has not let it go"
            } else {
                "the host took it from its guest"
            };
            (give_back::prove_closed(host, records, who), None)
        } else {
            (give_back::prove(host, records, &opened.2, &opened.1, &opened.0), Some(opened))
        };
        for proof in &mut proofs {
            proof.heed(&notices);
            proof.judge(judge);
        }
        drop(opened);
        let mut returned = give_back::settle(host, ledger, &owner, proofs);
        if let Err(refusal) = taken_back {
            returned.iter_mut().for_each(|device| give_back::add_error(device, &refusal));
        }
        returned
    }
}

/// How functions come back.
#[derive(Clone, Copy)]
struct Return {
    /// A guest may have stored something on them.
    was_reached: bool,
    /// Its process runs on, and could have a descriptor yet.
    runs_on: bool,
}

/// Judges the request and enters it in the ledger, in one change: of two commands for one device one is refused.
fn write_down(host: &Host, ledger: &Ledger, request: &ClaimRequest) -> Result<Vec<DeviceRecord>, Refusal> {
    let ClaimRequest { owner, addresses, scrub, judged, .. } = request;
    if addresses.is_empty() {
        return Err(Refusal::new(
            "claim-empty",
            &owner.guest,
            "no device is named",
            "name one, or claim none",
        ));
    }
    let functions = host.survey()?;
    ledger.change(|book| {
        if book.excludes(owner) {
            let cause = "a guest of this name has devices, or has not been cleaned up after";
            return Err(Refusal::new(
                "guest-has-claim",
                &owner.guest,
                cause,
                "stop it first, or give this one another name",
            ));
        }
        judge::judge(host, &functions, book, addresses)?;
        let find = |address: &PciAddress| functions.iter().find(|function| function.address == *address);
        let record = |address| {
            let function = find(address).ok_or_else(|| unreadable(*address, "it is gone"))?;
            let scrub = scrub.iter().find(|(of, _)| of == address).map(|(_, steps)| steps.clone());
            let (scrub, judged) = (scrub.unwrap_or_default(), *judged);
            DeviceRecord::of(host, function).map(|record| DeviceRecord { judged, scrub, ..record })
        };
        let devices: Vec<DeviceRecord> = addresses.iter().map(record).collect::<Result<_, _>>()?;
        book.entries.push(Entry {
            owner: owner.clone(),
            cell: None,
            recovering: false,
            devices: devices.clone(),
        });
        Ok(devices)
    })
}

impl DeviceRecord {
    fn of(host: &Host, function: &crate::PciFunction) -> Result<Self, Refusal> {
        let address = function.address;
        let config = read_config(host, address).map_err(|error| unreadable(address, error))?;
        if config.ids() != (function.vendor, function.device) && !is_virtual(host, address) {
            return Err(unreadable(address, "its config space names another device"));
        }
        Ok(Self {
            address,
            vendor: function.vendor,
            device: function.device,
            group: function.iommu_group.unwrap_or_default(),
            former_driver: function.driver.clone(),
            driver_override: driver::driver_override(host, address),
            reset_method: reset::method_of(function),
            // It was judged to be free.
            state: DeviceState::Claimed,
            firmware: None,
            judged: false,
            scrub: Vec::new(),
            config,
        })
    }
}

/// A virtual function has no IDs of its own in config space (SR-IOV 1.1, 3.4.1.1).
fn is_virtual(host: &Host, address: PciAddress) -> bool {
    host.pci(address).join("physfn").exists()
}

/// Config space now, as the hardware has it.
pub(crate) fn read_config(host: &Host, address: PciAddress) -> io::Result<ConfigSnapshot> {
    let bytes_max = u64::try_from(CONFIG_BYTES_MAX).unwrap_or(u64::MAX);
    let bytes = read_bytes(&host.pci(address).join("config"), bytes_max)?;
    ConfigSnapshot::new(bytes).ok_or_else(|| io::Error::other("the device does not answer"))
}

fn unreadable(address: PciAddress, cause: impl std::fmt::Display) -> Refusal {
    let remedy = "see the kernel's log (dmesg); a device that fell off its bus needs a power cycle";
    Refusal::new("device-unreadable", address, format!("its config space cannot be read: {cause}"), remedy)
}

/// VFIO's descriptors of a claim; `fds` in the order of the records.
pub(crate) struct Opened {
    pub(crate) container: OwnedFd,
    pub(crate) groups: Vec<ClaimedGroup>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// From the host's drivers into VFIO's, opened, reset, quiet.
fn take(host: &Host, records: &[DeviceRecord]) -> Result<Opened, Refusal> {
    driver::load_vfio(host)?;
    for record in records {
        driver::bind_vfio(host, record.address)?;
    }
    let opened = open(host, records)?;
    let resets = reset::all_opened(records, &opened.groups, &opened.fds);
    for ((record, fd), reset) in records.iter().zip(&opened.fds).zip(resets) {
        let refuse = |cause: String| {
            let remedy = "see the kernel's log (dmesg); the device may need a power cycle";
            Refusal::new("device-reset-failed", record.address, cause, remedy)
        };
        reset.map_err(|error| refuse(format!("its reset ({}) failed: {error}", record.reset_method)))?;
        vfio::clear_config_bits(fd, COMMAND, COMMAND_BUS_MASTER)
            .map_err(|error| refuse(format!("bus mastering cannot be turned off: {error}")))?;
        let config = read_config(host, record.address).map_err(|error| unreadable(record.address, error))?;
        if config.bus_master() {
            return Err(refuse("bus mastering stays on".into()));
        }
    }
    Ok(opened)
}

/// Opens container, groups and functions, all bound to VFIO already.
pub(crate) fn open(host: &Host, records: &[DeviceRecord]) -> Result<Opened, Refusal> {
    let container = vfio::open_container(&host.path("dev/vfio/vfio")).map_err(|error| {
        Refusal::new(
            "vfio-missing",
            "/dev/vfio/vfio",
            error,
            "load the modules: modprobe -a vfio-pci vfio_iommu_type1",
        )
    })?;
    let mut groups: Vec<ClaimedGroup> = Vec::new();
    for record in records.iter() {
        if groups.iter().all(|group| group.id != record.group) {
            groups.push(open_group(host, record, &container, groups.is_empty())?);
        }
    }
    let mut fds = Vec::new();
    for record in records {
        let group = groups.iter().find(|group| group.id == record.group);
        let fd = group.map(|group| vfio::device_fd(&group.fd, &record.address.to_string()));
        fds.push(
            fd.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
                .map_err(|error| failed(record, "opening it", &error))?,
        );
    }
    Ok(Opened { container, groups, fds })
}

fn open_group(
    host: &Host,
    record: &DeviceRecord,
    container: &OwnedFd,
    first: bool,
) -> Result<ClaimedGroup, Refusal> {
    let id = record.group;
    let fd = open_when_free(host, record)?;
    if !vfio::group_is_viable(&fd).map_err(|error| failed(record, "asking for its group's state", &error))? {
        return Err(Refusal::new(
            "group-not-viable",
            record.address,
            format!("IOMMU group {id} is not VFIO's alone: {}", judge::group_drivers(host, record.address)),
            "name all functions of the group, or unbind the others from their drivers",
        ));
    }
    vfio::set_container(&fd, container)
        .map_err(|error| failed(record, "putting its group into the container", &error))?;
    if first {
        vfio::set_iommu(container).map_err(|error| match error.raw_os_error() {
            // What the kernel answers without interrupt remapping.
            Some(libc::EPERM) => Refusal::new(
                "host-no-interrupt-remapping",
                record.address,
                "the kernel refuses its group: interrupts are not remapped",
                "turn on interrupt remapping in the firmware",
            ),
            _ => failed(record, "setting the IOMMU's type", &error),
        })?;
    }
    Ok(ClaimedGroup { id, fd })
}

/// A group can be open once. When the process that had it was killed, the kernel closes it a little later.
fn open_when_free(host: &Host, record: &DeviceRecord) -> Result<OwnedFd, Refusal> {
    let node = format!("dev/vfio/{}", record.group);
    let mut result = Err(io::Error::from(io::ErrorKind::TimedOut));
    driver::wait(host.deadlines.group_free, || {
        result = vfio::open_group(&host.path(&node));
        let later = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT));
        !result.as_ref().is_err_and(later)
    });
    let error = match result {
        Ok(fd) => return Ok(fd),
        Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
            return Err(failed(record, "opening its group", &error));
        }
        Err(error) => error,
    };
    let nodes = process::open_device_nodes(host);
    // A process that was handed only a device's descriptor holds the group too.
    let holder = nodes.get(&format!("/{node}")).or_else(|| nodes.get(process::VFIO_DEVICE));
    let by = holder.map_or("something", String::as_str);
    let cause =
        format!("{by} has its IOMMU group {} open, and it did not become free ({error})", record.group);
    Err(Refusal::new("group-busy", record.address, cause, "end what uses the device, then try again"))
}

fn failed(record: &DeviceRecord, what: &str, error: &io::Error) -> Refusal {
    Refusal::new(
        "vfio-failed",
        record.address,
        format!("{what} failed: {error}"),
        "see the kernel's log: dmesg",
    )
}

/// Hashes the option ROMs that are to be compared after the guest, and writes the digests down.
fn digest_firmware(
    ledger: &Ledger,
    owner: &Owner,
    records: &mut [DeviceRecord],
    opened: &Opened,
    wanted: &[PciAddress],
) -> Result<(), Refusal> {
    for (record, fd) in records.iter_mut().zip(&opened.fds) {
        if wanted.contains(&record.address) {
            record.firmware = Some(firmware_digest(record.address, fd)?);
        }
    }
    if records.iter().all(|record| record.firmware.is_none()) {
        return Ok(());
    }
    ledger.change(|book| {
        let devices = book.entry(owner).map(|entry| entry.devices.iter_mut()).into_iter().flatten();
        for device in devices {
            let record = records.iter().find(|record| record.address == device.address);
            device.firmware = record.and_then(|record| record.firmware.clone());
        }
        Ok(())
    })
}

/// SHA-256 of a device's option ROM: all of its firmware that can be read without knowing the device.
pub(crate) fn firmware_digest(address: PciAddress, fd: &OwnedFd) -> Result<String, Refusal> {
    let refuse = |cause: String| {
        let remedy = "say firmware = \"locked\" of its pool if no guest can change it, else \"unchecked\"";
        Refusal::new("device-firmware-unreadable", address, cause, remedy)
    };
    let rom = vfio::option_rom(fd, ROM_BYTES_MAX)
        .map_err(|error| refuse(format!("its option ROM cannot be read: {error}")))?;
    // What is all ones or zeros is nothing that was read.
    if rom.iter().all(|byte| *byte == 0xff) || rom.iter().all(|byte| *byte == 0) {
        return Err(refuse("its pool compares firmware, and it has no option ROM that can be read".into()));
    }
    Ok(Sha256::digest(&rom).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Gives everything back unproven: no guest has seen it. What a driver still holds stays in the ledger.
fn undo(host: &Host, ledger: &Ledger, owner: &Owner, records: Vec<DeviceRecord>) -> Result<(), String> {
    let mut whys = Vec::new();
    let mut kept = Vec::new();
    for record in records.into_iter().rev() {
        if let Err(not_returned) = driver::give_back(host, &record) {
            whys.push(format!("{}: {}", record.address, not_returned.why));
            kept.extend(not_returned.still_ours.then_some(record.address));
        }
    }
    if let Err(refusal) = ledger.change(|book| book.let_go(owner, &kept)) {
        whys.push(refusal.to_string());
    }
    if whys.is_empty() { Ok(()) } else { Err(whys.join("; ")) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        Deadlines,
        fixture::{Fixture, at},
    };

    const NVME: &str = "0000:03:00.0";

    fn request(address: &str) -> ClaimRequest {
        ClaimRequest {
            owner: Owner::this_process("web").unwrap(),
            addresses: vec![at(address)],
            digests: vec![],
            scrub: vec![],
            judged: false,
        }
    }

    fn hasty(machine: &Fixture) -> Host {
        let each = Duration::from_secs(1);
        machine.host().with_deadlines(Deadlines { unbind: each, bind: each, group_free: each })
    }

    #[test]
    fn a_driver_that_does_not_let_go_is_told_and_undone() {
        let machine = Fixture::typical();
        machine.write("sys/bus/pci/devices/0000:03:00.0/driver_override", "(null)\n");
        let ledger = machine.ledger();
        // Nothing answers in a fixture: the driver's link stays.
        let refusal = claim(&hasty(&machine), &ledger, request(NVME)).unwrap_err();
        assert_eq!(refusal.code, "device-unbind-timeout");
        assert!(refusal.cause.contains("driver nvme did not let go"), "{refusal}");
        assert_eq!(machine.read("sys/bus/pci/drivers/nvme/unbind"), NVME);
        assert_eq!(machine.read("sys/bus/pci/devices/0000:03:00.0/driver_override"), "\n");
        assert_eq!(ledger.read().unwrap().entries, []);
    }

    #[test]
    fn the_ledger_comes_first() {
        let machine = Fixture::typical();
        let ledger = machine.ledger();
        machine.write("state/ledger.json", "damaged");
        assert_eq!(claim(&hasty(&machine), &ledger, request(NVME)).unwrap_err().code, "ledger-damaged");
        assert_eq!(machine.read("sys/bus/pci/drivers/nvme/unbind"), "");
    }

    #[test]
    fn refusals_before_anything_is_touched() {
        let machine = Fixture::typical();
        let (host, ledger) = (hasty(&machine), machine.ledger());
        let none = ClaimRequest { addresses: vec![], ..request(NVME) };
        assert_eq!(claim(&host, &ledger, none).unwrap_err().code, "claim-empty");
        assert_eq!(claim(&host, &ledger, request("0000:00:1d.0")).unwrap_err().code, "device-missing");
        machine.write("sys/bus/pci/devices/0000:03:00.0/config", &"\0".repeat(63));
        assert_eq!(claim(&host, &ledger, request(NVME)).unwrap_err().code, "device-unreadable");
        let no_driver = Fixture::typical();
        no_driver.remove_driver("vfio-pci");
        let refusal = claim(&no_driver.host(), &no_driver.ledger(), request(NVME)).unwrap_err();
        assert_eq!(refusal.code, "vfio-missing");
        assert_eq!(no_driver.ledger().read().unwrap().entries, []);
        let entry = crate::ledger::tests::entry("web", vec![]);
        ledger.update(|book| book.entries.push(entry)).unwrap();
        assert_eq!(claim(&host, &ledger, request(NVME)).unwrap_err().code, "guest-has-claim");
        assert_eq!(machine.read("sys/bus/pci/drivers/nvme/unbind"), "");
    }
}
