//! What comes and goes while a guest runs: opened, judged and locked as if the guest were about to start with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use casemate_host::{Host, Image, Tap, TapRequest, open_image};
use casemate_spec::{CellPart, Disk, DiskFormat, LIMITS, Located, Net, Refusal};
use casemate_wire::{Answer, Ask, Card, Slot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Paths,
    admission::{self, Images, Inventory, Question},
    cell::mac,
    operator::Operator,
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

/// A guest as it is now, and what it takes to judge what comes.
pub(crate) struct Attaching {
    paths: Paths,
    bundle: PathBuf,
    /// What its cell does without.
    weakened: Vec<CellPart>,
    state: Mutex<State>,
}

struct State {
    located: Located,
    images: Images,
    /// By the number of the slot, from 1.
    taken: BTreeMap<u8, Attachment>,
}

impl Attaching {
    /// A guest that starts, with descriptors of its images, in a cell without the `weakened` parts.
    pub(crate) fn new(
        paths: &Paths,
        bundle: &Path,
        located: &Located,
        images: Images,
        weakened: &BTreeSet<CellPart>,
    ) -> Self {
        let state = State { located: located.clone(), images, taken: BTreeMap::new() };
        let (paths, bundle) = (paths.clone(), bundle.to_owned());
        Self { paths, bundle, weakened: weakened.iter().copied().collect(), state: Mutex::new(state) }
    }

    /// Opens and judges `attachment`, and puts it into a free slot.
    ///
    /// # Errors
    /// What a guest that starts with it would be refused for; `hotplug-no-slot`; what the cell refuses.
    pub(crate) fn attach(&self, operator: &Operator, attachment: &Attachment) -> Result<Value, Refusal> {
        // One after the other: each is judged with what came before it.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = state.free_slot(operator.guest())?;
        let fd = match attachment {
            Attachment::Disk { path, read_only } => self.open_disk(&mut state, path, *read_only)?,
            Attachment::Net { tap, host_address } => self.open_net(&mut state, tap, *host_address)?,
        };
        let card = match (attachment, &fd) {
            (Attachment::Disk { read_only, .. }, Opened::Disk(image)) => Card::Disk(casemate_wire::Disk {
                image: Slot(0),
                size_bytes: image.size_bytes,
                read_only: *read_only,
                serial: format!("slot{slot}"),
                queues: 1,
                format: casemate_wire::Format::Raw,
            }),
            _ => Card::Net(casemate_wire::Net {
                tap: Slot(0),
                mac: mac(operator.guest(), LIMITS.nets + usize::from(slot)),
                vhost: None,
            }),
        };
        let (fd, size_bytes) = match fd {
            Opened::Disk(image) => (image.fd, Some(image.size_bytes)),
            Opened::Net(fd) => (fd, None),
        };
        record::give(&self.paths, operator.guest(), fd.as_fd(), size_bytes)?;
        let ask = Ask::Add { slot: slot - 1, card };
        match operator.ask_for(ask, vec![fd], ADD_PATIENCE) {
            // Whoever gave no answer may have done it: a later detach tells.
            Err(refusal) if refusal.code != "guest-no-answer" => {
                state.forget(attachment);
                Err(refusal)
            }
            answer => {
                state.taken.insert(slot, attachment.clone());
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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gone) = state.taken.remove(&slot) {
            state.forget(&gone);
        }
        Ok(json!({ "guest": operator.guest(), "slot": slot, "forced": forced }))
    }

    fn open_disk(&self, state: &mut State, path: &Path, read_only: bool) -> Result<Opened, Refusal> {
        if !path.is_absolute() {
            let cause = "this is no absolute path";
            return Err(Refusal::new("bad-path", path.display(), cause, "name the disk from / on"));
        }
        let image = open_image(path, read_only)?;
        let copy = Image {
            fd: image.fd.try_clone().map_err(|error| {
                Refusal::new(
                    "keep-failed",
                    path.display(),
                    format_args!("its descriptor: {error}"),
                    "try again",
                )
            })?,
            size_bytes: image.size_bytes,
            file_bytes: image.file_bytes,
            path: image.path.clone(),
        };
        let disk =
            Disk { path: path.to_owned(), format: DiskFormat::Raw, backing: None, read_only, queues: None };
        state.located.guest.disks.push(disk);
        state.images.backings.push(None);
        // With it the lock stays until the disk was detached, whatever the cell does.
        state.images.disks.push(copy);
        let allowed = self.judge(state);
        if allowed.is_err() {
            state.images.disks.pop();
            state.images.backings.pop();
            state.located.guest.disks.pop();
        }
        allowed.map(|()| Opened::Disk(image))
    }

    fn open_net(
        &self,
        state: &mut State,
        tap: &str,
        host_address: Option<(Ipv4Addr, u8)>,
    ) -> Result<Opened, Refusal> {
        state.located.guest.nets.push(Net { tap: tap.to_owned(), host_address, mac: None, vhost: false });
        let made = self.judge(state).and_then(|()| {
            let host_address = host_address.map(|(address, length)| (address.into(), length));
            Tap::create(&TapRequest { name: tap.to_owned(), host_address, bridge: None })
        });
        if made.is_err() {
            state.located.guest.nets.pop();
        }
        made.map(|tap| Opened::Net(tap.fd))
    }

    /// Asks the policies whether the guest may be as it is to become.
    fn judge(&self, state: &mut State) -> Result<(), Refusal> {
        let mut located = state.located.clone();
        let functions =
            if located.guest.devices.is_empty() { Vec::new() } else { Host::live().functions()? };
        let (report, _) = admission::ask(Question {
            paths: &self.paths,
            bundle: &self.bundle,
            override_why: None,
            located: &mut located,
            images: &mut state.images,
            inventory: Inventory { functions: &functions, pools: None, ledger: None },
            weakened: &self.weakened,
        })
        .map_err(|refusals| first(refusals.0))?;
        if report.changes.is_empty() {
            return Ok(());
        }
        let cause = format!("policies allow it with changes alone: {}", report.changes.join(", "));
        let remedy = "a guest that runs is not changed so: start it anew with what is to be added";
        Err(Refusal::new("hotplug-changed", &state.located.guest.name, cause, remedy))
    }
}

/// Of several refusals, one stands for all.
fn first(refusals: Vec<Refusal>) -> Refusal {
    let none = || Refusal::new("keep-failed", "", "it was refused without a reason", "report it");
    refusals.into_iter().next().unwrap_or_else(none)
}

enum Opened {
    Disk(Image),
    Net(OwnedFd),
}

impl State {
    fn free_slot(&self, guest: &str) -> Result<u8, Refusal> {
        let slots = self.located.guest.hotplug.slots;
        (1..=slots).find(|slot| !self.taken.contains_key(slot)).ok_or_else(|| {
            let (cause, remedy) = match slots {
                0 => ("this guest has no slots".to_owned(), "start it with `slots` in its table [hotplug]"),
                _ => (format!("its {slots} slots are taken"), "detach something first"),
            };
            Refusal::new("hotplug-no-slot", guest, cause, remedy)
        })
    }

    /// The guest no longer has it.
    fn forget(&mut self, attachment: &Attachment) {
        let guest = &mut self.located.guest;
        match attachment {
            Attachment::Disk { path, .. } => {
                if let Some(place) = guest.disks.iter().rposition(|disk| disk.path == *path) {
                    guest.disks.remove(place);
                    if place < self.images.disks.len() {
                        self.images.disks.remove(place);
                    }
                    if place < self.images.backings.len() {
                        self.images.backings.remove(place);
                    }
                }
            }
            Attachment::Net { tap, .. } => {
                if let Some(place) = guest.nets.iter().rposition(|net| net.tap == *tap) {
                    guest.nets.remove(place);
                }
            }
        }
    }
}
