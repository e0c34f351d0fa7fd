//! What comes and goes while a guest runs: opened, judged and locked as if the guest were about to start with it.

mod devices;
mod windows;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    thread,
    time::Duration,
};

use casemate_broker::{Attachment, Broker, Notices, What, hands};
use casemate_host::{Image, Notice, Tap, TapRequest};
use casemate_policy::{Disk, GuestSpec, Net, Operation, Signers};
use casemate_spec::{Guest, Refusal};
use casemate_wire::{Answer, Ask, Card, Slot};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use self::devices::{Devices, Plugged, Wanted};
use crate::{
    DeviceName, DeviceReport, Events, Happening, Paths, Step,
    admitted::Admitted,
    cell::mac_in_slot,
    digest,
    digest::Known,
    disks::{self, Resizable},
    operator::{self, Operator, Order},
    operator_socket::first,
    record,
    watch::faulted,
};

/// How long a cell may take to make a device.
pub(crate) const ADD_PATIENCE: Duration = Duration::from_secs(20);
/// How long the drivers of devices may take to let go of them, and the devices to be reset.
pub(crate) const CLAIM_PATIENCE: Duration = Duration::from_secs(300);
/// How long devices may take to be proven, what they store to be erased among it.
pub(crate) const RETURN_PATIENCE: Duration = Duration::from_secs(40 * 60);
/// What a guest is given to let a device go that the host wants back; then it is taken.
const WANTED_WITHIN: Duration = Duration::from_secs(30);
/// How long policies may take, and what they want digests of.
pub(crate) const JUDGE_PATIENCE: Duration = Duration::from_secs(60);
/// How much longer than the guest may take the answer may.
pub(crate) const REMOVE_MARGIN: Duration = Duration::from_secs(15);
/// How long a guest may take at most to let a card go.
pub(crate) const WITHIN_MOST: Duration = Duration::from_secs(600);

/// A guest's slots, and who is asked what may go into them.
pub(crate) struct Attaching {
    paths: Paths,
    guest: Guest,
    admitted: Arc<Admitted>,
    devices: Devices,
    slots: Mutex<Slots>,
    /// Read while devices that were taken out are proven: before it ends, the keep waits until nobody does. Whoever wants it has
    /// the slots' lock, or has seen to it that nothing is in them.
    returning: RwLock<()>,
}

#[derive(Default)]
struct Slots {
    /// The guest has come to its end; nothing comes any more.
    has_ended: bool,
    /// By the number of the slot, from 1.
    taken: BTreeMap<u8, Taken>,
}

/// What is in a slot.
enum Taken {
    /// An emulated card. A disk stays locked until it was detached, whatever the cell does.
    Emulated { attachment: Attachment, lock: Option<Image> },
    /// Devices of the host's.
    Devices(Box<Plugged>),
    /// Such were taken out, and are not back with the host yet.
    Returning,
}

/// An emulated card on its way.
struct Opened {
    card: Card,
    fd: OwnedFd,
    /// Of a disk.
    lock: Option<Image>,
}

impl Attaching {
    /// A guest that starts.
    pub(crate) fn new(
        paths: &Paths,
        broker: &'static Broker,
        guest: &Guest,
        admitted: Arc<Admitted>,
    ) -> Self {
        let devices = Devices::new(paths, broker, guest, Arc::clone(&admitted));
        Self {
            paths: paths.clone(),
            guest: guest.clone(),
            admitted,
            devices,
            slots: Mutex::default(),
            returning: RwLock::default(),
        }
    }

    /// Opens and judges `attachment`, and puts it into a free slot.
    ///
    /// # Errors
    /// What a guest that starts with it would be refused for; `hotplug-no-slot`; what the cell refuses.
    pub(crate) fn attach(
        self: &Arc<Self>,
        operator: &Operator,
        attachment: &Attachment,
    ) -> Result<Value, Refusal> {
        // One after the other: each is judged with what came before it.
        let mut slots = self.slots();
        let slot = self.free_slot(&slots, operator.guest())?;
        match attachment {
            Attachment::Devices { addresses, pool } => {
                let wanted = Wanted { addresses, pool: pool.as_deref() };
                self.attach_devices(operator, &mut slots, slot, wanted)
            }
            Attachment::Disk { path, read_only } => {
                let (image, lock) = self.open_disk(path, *read_only)?;
                let disk = casemate_wire::Disk {
                    image: Slot(0),
                    size_bytes: image.size_bytes,
                    read_only: *read_only,
                    serial: format!("slot{slot}"),
                    queues: 1,
                    format: casemate_wire::Format::Raw,
                };
                let opened = Opened { card: Card::Disk(disk), fd: image.fd, lock: Some(lock) };
                self.attach_emulated(operator, &mut slots, slot, attachment, opened)
            }
            Attachment::Net { tap, host_address } => {
                let fd = self.open_net(tap, *host_address)?;
                let mac = mac_in_slot(operator.guest(), slot, 0);
                let net = casemate_wire::Net { taps: vec![Slot(0)], mac, vhosts: Vec::new() };
                let opened = Opened { card: Card::Net(net), fd, lock: None };
                self.attach_emulated(operator, &mut slots, slot, attachment, opened)
            }
        }
    }

    fn attach_emulated(
        &self,
        operator: &Operator,
        slots: &mut Slots,
        slot: u8,
        attachment: &Attachment,
        opened: Opened,
    ) -> Result<Value, Refusal> {
        let (guest, Opened { card, fd, lock }) = (operator.guest(), opened);
        let size_bytes = lock.as_ref().map(|image| image.size_bytes);
        let told = record::give(&self.paths, guest, fd.as_fd(), size_bytes);
        let ask = Ask::Add { slot: slot - 1, card };
        match told.and_then(|()| operator.ask_for(ask, vec![fd], ADD_PATIENCE)) {
            // Whoever gave no answer may have done it: a later detach tells.
            Err(refusal) if refusal.code != "guest-no-answer" => {
                self.forget(attachment);
                Err(refusal)
            }
            answer => {
                let taken = Taken::Emulated { attachment: attachment.clone(), lock };
                slots.taken.insert(slot, taken);
                answer?;
                Ok(json!({ "guest": guest, "slot": slot }))
            }
        }
    }

    fn attach_devices(
        self: &Arc<Self>,
        operator: &Operator,
        slots: &mut Slots,
        slot: u8,
        wanted: Wanted<'_>,
    ) -> Result<Value, Refusal> {
        // What the guest has used already is not wanted of the host once more.
        let there_bytes = operator.memory_bytes().map_or(0, |(_, guest_bytes)| guest_bytes);
        let mut plugged = self.devices.take(slot, wanted, there_bytes)?;
        let (addresses, given) = (plugged.addresses(), plugged.given());
        let added = self.add_devices(operator, slot, &mut plugged, given.clone());
        match added {
            Err(refusal) if refusal.code != "guest-no-answer" => {
                let devices = self.return_devices(slot, plugged, true);
                self.tell(operator, Step::Returned { devices });
                Err(refusal)
            }
            answer => {
                slots.taken.insert(slot, Taken::Devices(Box::new(plugged)));
                self.tell(operator, Step::Attached { devices: addresses.clone(), slot });
                let devices = addresses.iter().map(ToString::to_string).collect();
                self.note(Happening::DevicesAttached { devices, slot });
                answer?;
                Ok(json!({ "guest": operator.guest(), "slot": slot, "devices": given }))
            }
        }
    }

    fn add_devices(
        self: &Arc<Self>,
        operator: &Operator,
        slot: u8,
        plugged: &mut Plugged,
        given: Vec<record::GivenDevice>,
    ) -> Result<Answer, Refusal> {
        let failed = |error: std::io::Error| {
            let cause = format_args!("its devices cannot be handed over: {error}");
            Refusal::new("keep-failed", operator.guest(), cause, "try again")
        };
        record::give_devices(&self.paths, operator.guest(), given)?;
        plugged.heard_by(self.listen(operator, slot, plugged.notices()).map_err(failed)?);
        let (card, fds) = plugged.card().map_err(failed)?;
        operator.ask_for(Ask::Add { slot: slot - 1, card }, fds, ADD_PATIENCE)
    }

    /// Takes out what is in a slot: the guest is asked to let it go, and with `force` it is taken if it has not in time.
    ///
    /// # Errors
    /// `hotplug-empty-slot`; `hotplug-not-let-go`.
    pub(crate) fn detach(
        &self,
        operator: &Operator,
        slot: u8,
        within: Duration,
        force: bool,
    ) -> Result<Value, Refusal> {
        let within = within.min(WITHIN_MOST);
        let index = slot.checked_sub(1).ok_or_else(|| {
            let cause = "slots are numbered from 1";
            Refusal::new(
                "hotplug-empty-slot",
                operator.guest(),
                cause,
                "name the slot that `casemate attach` told",
            )
        })?;
        let patience_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        // Without the lock: a guest that takes its time keeps nobody else waiting.
        let ask = Ask::Remove { slot: index, patience_ms, force };
        let forced = match operator.ask_for(ask, Vec::new(), within + REMOVE_MARGIN)? {
            Answer::Removed { forced } => forced,
            _ => false,
        };
        let (plugged, _returning) = {
            let mut slots = self.slots();
            match slots.taken.remove(&slot) {
                Some(Taken::Devices(plugged)) => {
                    slots.taken.insert(slot, Taken::Returning);
                    // Before whoever waits for the end can have it.
                    (Some(plugged), Some(self.returning.read().unwrap_or_else(PoisonError::into_inner)))
                }
                Some(Taken::Emulated { attachment, .. }) => {
                    self.forget(&attachment);
                    (None, None)
                }
                Some(Taken::Returning) => {
                    slots.taken.insert(slot, Taken::Returning);
                    (None, None)
                }
                None => (None, None),
            }
        };
        let mut done = json!({ "guest": operator.guest(), "slot": slot, "forced": forced });
        if let Some(plugged) = plugged {
            let devices = self.return_devices(slot, *plugged, true);
            self.slots().taken.remove(&slot);
            if let Value::Object(done) = &mut done {
                done.insert("devices".into(), serde_json::to_value(&devices).unwrap_or_default());
            }
            self.tell(operator, Step::Returned { devices });
        }
        Ok(done)
    }

    /// The guest's process has gone: gives back the devices that are in its slots yet. From now on nothing comes.
    pub(crate) fn end(&self) -> Vec<DeviceReport> {
        let taken = {
            let mut slots = self.slots();
            slots.has_ended = true;
            std::mem::take(&mut slots.taken)
        };
        let mut devices = Vec::new();
        for (slot, taken) in taken {
            if let Taken::Devices(plugged) = taken {
                devices.extend(self.return_devices(slot, *plugged, false));
            }
        }
        drop(self.returning.write());
        devices
    }

    fn return_devices(&self, slot: u8, plugged: Plugged, runs_on: bool) -> Vec<DeviceReport> {
        let devices = plugged.addresses().iter().map(ToString::to_string).collect();
        let reports = self.devices.give_back(plugged, runs_on);
        // With the guest its record goes.
        if let Some(Err(refusal)) =
            runs_on.then(|| record::take_devices(&self.paths, self.guest.name.as_str(), slot))
        {
            tracing::warn!("{refusal}");
        }
        let why = |report: &DeviceReport| {
            report.returned.quarantined.as_ref().map(|why| format!("{}, {why}", report.returned.address))
        };
        let quarantined = reports.iter().filter_map(why).collect();
        self.note(Happening::DevicesDetached { devices, slot, quarantined });
        reports
    }

    /// Listens to what the kernel tells of devices in a slot, until what is returned is closed.
    fn listen(
        self: &Arc<Self>,
        operator: &Operator,
        slot: u8,
        notices: Arc<Notices>,
    ) -> std::io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let (this, operator) = (Arc::clone(self), operator.clone());
        let listen = move || {
            let mut fds = [
                PollFd::from_borrowed_fd(notices.wake(), PollFlags::IN),
                PollFd::new(&theirs, PollFlags::IN),
            ];
            loop {
                let woken = poll(&mut fds, None);
                let [_, stopped] = &fds;
                if woken.is_err_and(|error| error != rustix::io::Errno::INTR) || !stopped.revents().is_empty()
                {
                    return;
                }
                match notices.next() {
                    Some(Notice::Wanted(device)) => {
                        this.note(Happening::DeviceWanted { device: device.to_string(), slot: Some(slot) });
                        this.let_go(&operator, slot, Step::DeviceWanted { device, slot: Some(slot) });
                    }
                    Some(Notice::ParentReset(device)) => {
                        this.note(Happening::ParentReset { device: device.to_string(), slot: Some(slot) });
                        this.let_go(&operator, slot, Step::ParentReset { device, slot: Some(slot) });
                    }
                    Some(Notice::Failed(device)) => {
                        this.note(Happening::DeviceFailed { device: device.to_string() });
                        let _ = operator.order(Order::DeviceFailed(device));
                    }
                    Some(Notice::Faulted { device, count }) => {
                        if let Some(happening) = faulted(device, count) {
                            this.note(happening);
                            this.tell(&operator, Step::DmaStopped { device, count });
                        }
                    }
                    None => {}
                }
            }
        };
        thread::Builder::new().name("notices".into()).spawn(listen)?;
        Ok(ours)
    }

    /// The host wants a device back, and whoever took it from its driver waits until nobody has it; or it is good for nothing any
    /// more.
    fn let_go(&self, operator: &Operator, slot: u8, why: Step) {
        self.tell(operator, why);
        if let Err(refusal) = self.detach(operator, slot, WANTED_WITHIN, true) {
            tracing::warn!("{refusal}");
        }
    }

    /// Tells whoever watches the run; nobody may be left who hears it.
    fn tell(&self, operator: &Operator, step: Step) {
        let _ = operator.order(Order::Tell(Box::new(step)));
    }

    fn note(&self, what: Happening) {
        let (guest, tenant) = (self.guest.name.as_str(), self.guest.tenant.as_str());
        Events::below(&self.paths.state).add(guest, tenant, what);
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free_slot(&self, slots: &Slots, guest: &str) -> Result<u8, Refusal> {
        if slots.has_ended {
            return Err(operator::ending(guest));
        }
        let most = self.guest.hotplug.slots;
        (1..=most).find(|slot| !slots.taken.contains_key(slot)).ok_or_else(|| {
            let (cause, remedy) = match most {
                0 => ("this guest has no slots".to_owned(), "start it with `slots` in its table [hotplug]"),
                slots => (format!("its {slots} slots are taken"), "detach something first"),
            };
            Refusal::new("hotplug-no-slot", guest, cause, remedy)
        })
    }

    /// The disk in a slot.
    ///
    /// # Errors
    /// `disk-resize` when there is none.
    pub(crate) fn disk_in(&self, guest: &str, slot: u8) -> Result<Resizable, Refusal> {
        let name = DeviceName::Slot(slot);
        let slots = self.slots();
        let Some(Taken::Emulated { lock: Some(image), .. }) = slots.taken.get(&slot) else {
            let cause = "no disk that was attached is in this slot";
            return Err(disks::refuse(guest, name, cause, "name the slot that `casemate attach` told"));
        };
        let file = image.fd.try_clone().map_err(|error| disks::refuse(guest, name, error, "try again"))?;
        Ok(Resizable { name, file: file.into(), path: Some(image.path.clone()) })
    }

    /// The image, and another descriptor of it that holds its lock.
    fn open_disk(&self, path: &Path, read_only: bool) -> Result<(Image, Image), Refusal> {
        if !path.is_absolute() {
            let cause = "this is no absolute path";
            return Err(Refusal::new("bad-path", path.display(), cause, "name the disk from / on"));
        }
        let image = hands::open(What::Raw { read_only }, path)?;
        let fd = image.fd.try_clone().map_err(|error| {
            Refusal::new("keep-failed", path.display(), format_args!("its descriptor: {error}"), "try again")
        })?;
        let lock = Image {
            fd,
            size_bytes: image.size_bytes,
            file_bytes: image.file_bytes,
            path: image.path.clone(),
        };
        let wanted = self.admitted.policies().current().needs().disk_sha256;
        let known = if wanted && read_only {
            digest::disk(&image, &Signers::read(&self.admitted.paths().image_keys)?)?
        } else {
            None
        };
        let disk = Disk {
            path: image.path.to_string_lossy().into_owned(),
            size_bytes: image.size_bytes,
            read_only,
            attrs: Known::attrs(known.as_ref()),
            sha256: known.map(|known| known.sha256),
        };
        let change = format!("add disk {}", disk.path);
        self.judge(&change, |spec| spec.disks.push(disk))?;
        Ok((image, lock))
    }

    fn open_net(&self, tap: &str, host_address: Option<(Ipv4Addr, u8)>) -> Result<OwnedFd, Refusal> {
        let address = host_address.map(|(address, length)| format!("{address}/{length}"));
        let attrs = address.map(|address| ("host-address".to_owned(), address)).into_iter().collect();
        let net = Net { tap: tap.to_owned(), mac: None, attrs };
        self.judge(&format!("add net {tap}"), |spec| spec.nets.push(net))?;
        let host_address = host_address.map(|(address, length)| (address.into(), length));
        match hands::tap(&TapRequest { name: tap.to_owned(), host_address, bridge: None, queues: 1 })
            .and_then(Tap::only)
        {
            Ok(queue) => Ok(queue),
            Err(refusal) => {
                self.forget(&Attachment::Net { tap: tap.to_owned(), host_address: None });
                Err(refusal)
            }
        }
    }

    /// Asks the policies whether the guest may be as it is to become.
    fn judge(&self, change: &str, make: impl FnOnce(&mut GuestSpec)) -> Result<(), Refusal> {
        let mut spec = self.admitted.spec();
        make(&mut spec);
        self.admitted.ask(Operation::HotPlug, spec, change).map(drop).map_err(first)
    }

    /// The guest no longer has it.
    fn forget(&self, attachment: &Attachment) {
        self.admitted.becomes(|spec| match attachment {
            Attachment::Disk { path, .. } => {
                // As it was opened, without links.
                let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                if let Some(place) = spec.disks.iter().rposition(|disk| Path::new(&disk.path) == path) {
                    spec.disks.remove(place);
                }
            }
            Attachment::Net { tap, .. } => {
                if let Some(place) = spec.nets.iter().rposition(|net| net.tap == *tap) {
                    spec.nets.remove(place);
                }
            }
            Attachment::Devices { addresses, .. } => {
                spec.devices.retain(|device| !addresses.contains(&device.address));
            }
        });
    }
}
