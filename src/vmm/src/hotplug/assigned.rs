//! Functions of the host's that come while the guest runs, and go.
//!
//! They come in a container of their own, into which all of the guest's memory is mapped before the guest sees them; while one
//! is there, nothing of that memory is given back. What was taken is given up in the order in which nothing reaches
//! what has gone: registers, interrupts, memory, and the descriptors last.

use std::{os::fd::OwnedFd, sync::Arc};

use casemate_passthrough::{Container, Seat, VfioDevice};
use casemate_pci::Function;
use casemate_virtio::BalloonControl;
use vm_memory::GuestMemoryMmap;

use super::{Refusal, add_vectors, told};
use crate::{
    assigned::{self, KvmVfio, Registers},
    control::{Change, Requests},
    error::Error,
    maps::Attachments,
    root::Place,
};

/// Functions of a card (PCIe 6.2, 2.2.4.2, without ARI).
const FUNCTIONS_MOST: usize = 8;

/// What the keep sent.
pub(crate) struct AssignedCard {
    /// The VFIO container; nothing is mapped in it.
    pub(crate) container: OwnedFd,
    /// Its groups.
    pub(crate) groups: Vec<OwnedFd>,
    /// Each function's device, and its address on the host.
    pub(crate) functions: Vec<(OwnedFd, String)>,
}

/// What devices of the host's need of the machine.
pub(crate) struct Assigning {
    /// Hears of the groups.
    kvm_vfio: Arc<KvmVfio>,
    /// What the devices reach.
    memory: Arc<GuestMemoryMmap>,
    /// What gives memory back, when it may.
    balloon: Option<Arc<BalloonControl>>,
    /// Cards of the host's that are there.
    cards: usize,
}

/// What was taken for a card, as far as it got.
pub(crate) struct Taken {
    /// Where each function that is connected sits.
    places: Vec<Place>,
    /// First GSI, and how many.
    vectors: Vec<(u32, u32)>,
    /// Numbers of the devices at control.
    devices: Vec<usize>,
    /// The registers go after control has let go of them, on this thread.
    registers: Vec<Arc<Registers>>,
    /// Those of which KVM knows.
    groups: Vec<OwnedFd>,
    /// With whether the guest's memory is mapped in it.
    container: Option<(Container, bool)>,
}

impl Assigning {
    /// None is there yet.
    pub(crate) fn new(
        kvm_vfio: Arc<KvmVfio>,
        memory: Arc<GuestMemoryMmap>,
        balloon: Option<Arc<BalloonControl>>,
    ) -> Self {
        Self { kvm_vfio, memory, balloon, cards: 0 }
    }

    /// Connects a card's functions, whose first is to sit at `place`; all or none.
    pub(super) fn take(
        &mut self,
        requests: &Arc<Requests>,
        place: Place,
        card: AssignedCard,
    ) -> Result<(Taken, Vec<Box<dyn Function>>), Refusal> {
        if !(1..=FUNCTIONS_MOST).contains(&card.functions.len()) {
            let cause = format!("{} functions cannot be those of one card", card.functions.len());
            return Err(Refusal("hotplug-failed", cause));
        }
        let mut taken = Taken {
            places: Vec::new(),
            vectors: Vec::new(),
            devices: Vec::new(),
            registers: Vec::new(),
            groups: Vec::new(),
            container: None,
        };
        self.count(self.cards.saturating_add(1));
        match self.connect(requests, place, card, &mut taken) {
            Ok(functions) => Ok((taken, functions)),
            Err(refusal) => {
                self.give_up(requests, taken);
                Err(refusal)
            }
        }
    }

    fn connect(
        &self,
        requests: &Arc<Requests>,
        first: Place,
        card: AssignedCard,
        taken: &mut Taken,
    ) -> Result<Vec<Box<dyn Function>>, Refusal> {
        let AssignedCard { container, groups, functions } = card;
        let container = Container::from_fd(container).map_err(Refusal::device)?;
        let (container, is_mapped) = taken.container.insert((container, false));
        for group in groups {
            self.kvm_vfio.add(&group)?;
            taken.groups.push(group);
        }
        // Before the guest sees the functions. Of two pieces of memory the second may fail; then both are tried to be unmapped.
        *is_mapped = true;
        assigned::map_memory(container, &self.memory)?;
        let mut connected = Vec::new();
        for ((device, address), function) in functions.into_iter().zip(0..) {
            let place = Place { function, ..first };
            connected.push(one(requests, place, device, &address, taken)?);
        }
        Ok(connected)
    }

    /// Gives up what was taken; the guest reaches none of it when this returns, and its descriptors are closed.
    pub(super) fn give_up(&mut self, requests: &Arc<Requests>, taken: Taken) {
        let Taken { places, vectors, devices, registers, groups, container } = taken;
        places.into_iter().for_each(|place| told(requests.change(Change::Detach(place))));
        for (first_gsi, count) in vectors {
            told(requests.change(Change::ForgetVectors { first_gsi, count }));
        }
        devices.into_iter().for_each(|device| told(requests.change(Change::ForgetDevice { device })));
        drop(registers);
        if let Some((container, true)) = &container {
            told(assigned::unmap_memory(container, &self.memory));
        }
        groups.iter().for_each(|group| told(self.kvm_vfio.remove(group)));
        drop((groups, container));
        self.count(self.cards.saturating_sub(1));
    }

    /// While devices reach the memory, nothing of it is given back.
    fn count(&mut self, cards: usize) {
        self.cards = cards;
        self.balloon.iter().for_each(|balloon| balloon.hold(cards > 0));
    }
}

/// Connects one function.
fn one(
    requests: &Arc<Requests>,
    place: Place,
    device: OwnedFd,
    address: &str,
    taken: &mut Taken,
) -> Result<Box<dyn Function>, Refusal> {
    let device = Arc::new(VfioDevice::from_fd(device).map_err(|error| Error::device(address, error))?);
    let number = requests.add_device(Arc::clone(&device)).map_err(Refusal::device)?;
    taken.devices.push(number);
    let found = assigned::find(&device, number, address, Seat::Slot, requests)?;
    if found.probe.intx() {
        let cause = format!(
            "{address} has neither MSI nor MSI-X, and a slot has no line for INTx: give it to the guest when it starts"
        );
        return Err(Refusal("hotplug-intx", cause));
    }
    let sink = add_vectors(requests, found.probe.vectors())?;
    taken.vectors.push((sink.first_gsi, found.probe.vectors().into()));
    let (function, regions) = found.connect(sink, address)?;
    taken.registers.extend(regions.iter().map(|region| Arc::clone(&region.registers)));
    taken.places.push(place);
    requests
        .change(Change::Attach(place, Attachments { doorbells: Vec::new(), regions }))
        .map_err(Refusal::device)?;
    Ok(function)
}
