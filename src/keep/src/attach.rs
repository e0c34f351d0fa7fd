//! What comes and goes while a guest runs: opened, judged and locked as if the guest were about to start with it.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use casemate_host::{Image, Tap, TapRequest, open_image};
use casemate_policy::{Disk, GuestSpec, Net, Operation, Signers};
use casemate_spec::{LIMITS, Refusal};
use casemate_wire::{Answer, Ask, Card, Slot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Paths, admitted::Admitted, cell::mac, digest, digest::Known, operator::Operator, operator_socket::first,
    record,
};

/// How long a cell may take to make a device.
pub(crate) const ADD_PATIENCE: Duration = Duration::from_secs(20);
/// How long policies may take, and what they want digests of.
pub(crate) const JUDGE_PATIENCE: Duration = Duration::from_secs(60);
/// How much longer than the guest may take the answer may.
pub(crate) const REMOVE_MARGIN: Duration = Duration::from_secs(15);
/// How long a guest may take at most to let a card go.
pub(crate) const WITHIN_MOST: Duration = Duration::from_secs(600);

/// Something to be put into a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Attachment {
    /// A disk.
    Disk {
        /// A raw image or block device: an absolute path.
        path: PathBuf,
        /// Whether the guest may only read it.
        #[serde(default)]
        read_only: bool,
    },
    /// A network card on a tap of its own.
    Net {
        /// Name of the tap.
        tap: String,
        /// The host's address on it and the length of its prefix.
        host_address: Option<(Ipv4Addr, u8)>,
    },
}

/// A guest's slots, and who is asked what may go into them.
pub(crate) struct Attaching {
    paths: Paths,
    slots: u8,
    admitted: Arc<Admitted>,
    /// By the number of the slot, from 1.
    taken: Mutex<BTreeMap<u8, Taken>>,
}

/// What is in a slot.
struct Taken {
    attachment: Attachment,
    /// A disk stays locked until it was detached, whatever the cell does.
    _lock: Option<Image>,
}

impl Attaching {
    /// A guest that starts, with so many slots.
    pub(crate) fn new(paths: &Paths, slots: u8, admitted: Arc<Admitted>) -> Self {
        Self { paths: paths.clone(), slots, admitted, taken: Mutex::default() }
    }

    /// Opens and judges `attachment`, and puts it into a free slot.
    ///
    /// # Errors
    /// What a guest that starts with it would be refused for; `hotplug-no-slot`; what the cell refuses.
    pub(crate) fn attach(&self, operator: &Operator, attachment: &Attachment) -> Result<Value, Refusal> {
        // One after the other: each is judged with what came before it.
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = self.free_slot(&taken, operator.guest())?;
        let (fd, size_bytes, lock) = match attachment {
            Attachment::Disk { path, read_only } => {
                let (image, lock) = self.open_disk(path, *read_only)?;
                (image.fd, Some(image.size_bytes), Some(lock))
            }
            Attachment::Net { tap, host_address } => (self.open_net(tap, *host_address)?, None, None),
        };
        let card = match (attachment, size_bytes) {
            (Attachment::Disk { read_only, .. }, Some(size_bytes)) => Card::Disk(casemate_wire::Disk {
                image: Slot(0),
                size_bytes,
                read_only: *read_only,
                serial: format!("slot{slot}"),
                queues: 1,
                format: casemate_wire::Format::Raw,
            }),
            _ => Card::Net(casemate_wire::Net {
                taps: vec![Slot(0)],
                mac: mac(operator.guest(), LIMITS.nets + usize::from(slot)),
                vhosts: Vec::new(),
            }),
        };
        let told = record::give(&self.paths, operator.guest(), fd.as_fd(), size_bytes);
        let ask = Ask::Add { slot: slot - 1, card };
        match told.and_then(|()| operator.ask_for(ask, vec![fd], ADD_PATIENCE)) {
            // Whoever gave no answer may have done it: a later detach tells.
            Err(refusal) if refusal.code != "guest-no-answer" => {
                self.forget(attachment);
                Err(refusal)
            }
            answer => {
                taken.insert(slot, Taken { attachment: attachment.clone(), _lock: lock });
                answer?;
                Ok(json!({ "guest": operator.guest(), "slot": slot }))
            }
        }
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
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gone) = taken.remove(&slot) {
            self.forget(&gone.attachment);
        }
        Ok(json!({ "guest": operator.guest(), "slot": slot, "forced": forced }))
    }

    fn free_slot(&self, taken: &BTreeMap<u8, Taken>, guest: &str) -> Result<u8, Refusal> {
        (1..=self.slots).find(|slot| !taken.contains_key(slot)).ok_or_else(|| {
            let (cause, remedy) = match self.slots {
                0 => ("this guest has no slots".to_owned(), "start it with `slots` in its table [hotplug]"),
                slots => (format!("its {slots} slots are taken"), "detach something first"),
            };
            Refusal::new("hotplug-no-slot", guest, cause, remedy)
        })
    }

    /// The image, and another descriptor of it that holds its lock.
    fn open_disk(&self, path: &Path, read_only: bool) -> Result<(Image, Image), Refusal> {
        if !path.is_absolute() {
            let cause = "this is no absolute path";
            return Err(Refusal::new("bad-path", path.display(), cause, "name the disk from / on"));
        }
        let image = open_image(path, read_only)?;
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
        match Tap::create(&TapRequest { name: tap.to_owned(), host_address, bridge: None, queues: 1 })
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
        });
    }
}
