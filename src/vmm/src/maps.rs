//! What of KVM's follows functions' BARs around: doorbells and mapped registers, and the books of them.
//!
//! A change is told as what a function answers to from now on, not as a difference. So what the kernel refused once is
//! put right by the next change, and the books say what KVM has, not what was hoped.

use std::{collections::BTreeMap, sync::Arc};

use casemate_pci::DecodedBar;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    error::{During, Error},
    memory::{self, MemorySlot},
    peers::Peers,
    root::Place,
};

/// A place in a BAR that rings an eventfd when the guest writes to it.
pub(crate) struct Doorbell {
    /// Which BAR.
    pub(crate) bar: u8,
    /// Where in it.
    pub(crate) offset: u64,
    /// What rings.
    pub(crate) event: EventFd,
}

/// A piece of an assigned function's BAR that the guest reaches without an exit.
pub(crate) struct DirectRegion {
    /// Which BAR.
    pub(crate) bar: u8,
    /// Where in it.
    pub(crate) offset: u64,
    /// The mapping of the device's registers in this process.
    pub(crate) registers: Arc<crate::assigned::Registers>,
    /// The guest's writes go to the function, which takes none.
    pub(crate) read_only: bool,
    /// The guest's other devices reach it by DMA.
    pub(crate) reachable: bool,
}

/// What of a function follows its BARs around.
#[derive(Default)]
pub(crate) struct Attachments {
    /// Doorbells.
    pub(crate) doorbells: Vec<Doorbell>,
    /// Mapped registers.
    pub(crate) regions: Vec<DirectRegion>,
}

/// What a function answers to from now on, and nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answers {
    /// Which function.
    pub(crate) place: Place,
    /// Its BARs that answer.
    pub(crate) bars: Vec<DecodedBar>,
}

/// What [`Maps`] asks of KVM; tests stand in for it.
pub(crate) trait Vm {
    /// Makes a memory slot, or with size 0 deletes it.
    fn set_slot(&self, slot: MemorySlot) -> Result<(), Error>;
    /// The guest's other devices reach what is mapped there from now on, or no longer.
    fn reach(&self, slot: MemorySlot, on: bool) -> Result<(), Error>;
    /// Writes at this address ring the event from now on, or no longer.
    fn ring(&self, event: &EventFd, address: u64, on: bool) -> Result<(), Error>;
}

/// The kernel's side: KVM, and the IOMMU where devices reach each other.
pub(crate) struct Kernel<'a> {
    /// The machine.
    pub(crate) vm: &'a VmFd,
    /// The way to the IOMMU.
    pub(crate) peers: Option<&'a Peers>,
}

impl Vm for Kernel<'_> {
    fn set_slot(&self, slot: MemorySlot) -> Result<(), Error> {
        // SAFETY: only `Maps` calls this, for registers that it holds until their slot is deleted.
        unsafe { memory::set_slot(self.vm, slot) }.during("mapping a device's registers")
    }

    fn reach(&self, slot: MemorySlot, on: bool) -> Result<(), Error> {
        // SAFETY: only `Maps` calls this, for registers that it holds until they are reached no longer.
        self.peers.map_or(Ok(()), |peers| unsafe { peers.reach(slot, on) })
    }

    fn ring(&self, event: &EventFd, address: u64, on: bool) -> Result<(), Error> {
        let address = IoEventAddress::Mmio(address);
        if on {
            self.vm.register_ioevent(event, &address, NoDatamatch).during("placing a doorbell")
        } else {
            self.vm.unregister_ioevent(event, &address, NoDatamatch).during("taking a doorbell away")
        }
    }
}

/// The books: what each function has, and what of it KVM has now.
pub(crate) struct Maps {
    next_slot: u32,
    free_slots: Vec<u32>,
    functions: BTreeMap<Place, Attached>,
}

#[derive(Default)]
struct Attached {
    attachments: Attachments,
    /// Doorbells that KVM rings: which, and where.
    rung: Vec<(usize, u64)>,
    /// Regions that KVM has mapped.
    mapped: Vec<Mapped>,
}

/// A region that KVM has mapped.
struct Mapped {
    /// Which.
    index: usize,
    /// How.
    slot: MemorySlot,
    /// The guest's other devices reach it.
    reached: bool,
}

impl Attached {
    /// Where its doorbells belong when the function answers to `bars`.
    fn bells(&self, bars: &[DecodedBar]) -> Vec<(usize, u64)> {
        let bells = self.attachments.doorbells.iter().enumerate();
        let at = |(index, bell): (usize, &Doorbell)| {
            let bar = bars.iter().find(|bar| bar.index == bell.bar)?;
            Some((index, bar.base.checked_add(bell.offset)?))
        };
        bells.filter_map(at).collect()
    }

    /// Where its regions belong when the function answers to `bars`.
    fn places(&self, bars: &[DecodedBar]) -> Vec<(usize, u64)> {
        let regions = self.attachments.regions.iter().enumerate();
        let at = |(index, region): (usize, &DirectRegion)| {
            let bar = bars.iter().find(|bar| bar.index == region.bar)?;
            Some((index, bar.base.checked_add(region.offset)?))
        };
        regions.filter_map(at).collect()
    }
}

impl Maps {
    /// Empty books. Memory slots below `first_slot` are RAM.
    pub(crate) fn new(first_slot: u32) -> Self {
        Self { next_slot: first_slot, free_slots: Vec::new(), functions: BTreeMap::new() }
    }

    /// Takes over what follows a function's BARs. It answers to nothing yet.
    pub(crate) fn attach(&mut self, place: Place, attachments: Attachments) {
        self.functions.insert(place, Attached { attachments, ..Attached::default() });
    }

    /// Gives up what followed a function's BARs: the guest reaches none of it any more.
    ///
    /// # Errors
    /// When KVM keeps something. Its mapping then stays as long as this process.
    pub(crate) fn detach(&mut self, vm: &impl Vm, place: Place) -> Result<(), Error> {
        let gone = self.answer(vm, &[Answers { place, bars: Vec::new() }]);
        if let Some(attached) = self.functions.remove(&place)
            && !attached.mapped.is_empty()
        {
            // A slot that could not be deleted still points at it.
            std::mem::forget(attached.attachments);
        }
        gone
    }

    /// Moves everything to where it belongs. First all that goes, then all that comes, so that one function can take
    /// another's place. A step that fails does not keep the others from being made.
    ///
    /// # Errors
    /// The first that the kernel said.
    pub(crate) fn answer(&mut self, vm: &impl Vm, answers: &[Answers]) -> Result<(), Error> {
        let mut first = Ok(());
        let mut note = |result: Result<(), Error>| {
            let done = result.is_ok();
            if first.is_ok() {
                first = result;
            }
            done
        };
        for Answers { place, bars } in answers {
            let Some(attached) = self.functions.get_mut(place) else { continue };
            let (bells, places) = (attached.bells(bars), attached.places(bars));
            let doorbells = &attached.attachments.doorbells;
            attached.rung.retain(|(index, address)| {
                let Some(bell) = doorbells.get(*index) else { return false };
                bells.contains(&(*index, *address)) || !note(vm.ring(&bell.event, *address, false))
            });
            let free_slots = &mut self.free_slots;
            attached.mapped.retain_mut(|Mapped { index, slot, reached }| {
                if places.contains(&(*index, slot.guest_address)) {
                    return true;
                }
                // It stays mapped here for as long as a device reaches it.
                *reached = *reached && !note(vm.reach(*slot, false));
                let stays = *reached || !note(vm.set_slot(MemorySlot { size_bytes: 0, ..*slot }));
                if !stays {
                    free_slots.push(slot.slot);
                }
                stays
            });
        }
        for Answers { place, bars } in answers {
            let Some(attached) = self.functions.get_mut(place) else { continue };
            for (index, address) in attached.bells(bars) {
                let Some(bell) = attached.attachments.doorbells.get(index) else { continue };
                if !attached.rung.contains(&(index, address)) && note(vm.ring(&bell.event, address, true)) {
                    attached.rung.push((index, address));
                }
            }
            for (index, address) in attached.places(bars) {
                let Some(region) = attached.attachments.regions.get(index) else { continue };
                let mut there = attached.mapped.iter_mut();
                let there = there.find(|there| there.index == index && there.slot.guest_address == address);
                if let Some(there) = there {
                    if region.reachable && !there.reached {
                        there.reached = note(vm.reach(there.slot, true));
                    }
                    continue;
                }
                let number = self.free_slots.pop().unwrap_or_else(|| {
                    self.next_slot += 1;
                    self.next_slot - 1
                });
                let slot = MemorySlot {
                    slot: number,
                    guest_address: address,
                    size_bytes: region.registers.size_bytes(),
                    host_address: region.registers.host_address(),
                    read_only: region.read_only,
                };
                if note(vm.set_slot(slot)) {
                    let reached = region.reachable && note(vm.reach(slot, true));
                    attached.mapped.push(Mapped { index, slot, reached });
                } else {
                    self.free_slots.push(number);
                }
            }
        }
        first
    }
}

#[cfg(test)]
#[path = "maps_tests.rs"]
mod tests;
