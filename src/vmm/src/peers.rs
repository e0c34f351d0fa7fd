//! Devices of one guest that reach each other's registers by DMA.
//!
//! A device asks for guest physical addresses, and its IOMMU translates them. What stands in the IOMMU's tables is memory of
//! this process; a device's registers are such memory while they are mapped here (`vfio_iommu_type1` takes them, as it takes
//! RAM). So a peer's BAR is mapped where the guest sees it, and moves with it.
//!
//! A thread of its own does that, and nothing else: once the guest runs, no other thread of a guest without slots may make
//! or take a mapping for DMA.

use std::{
    sync::mpsc::{self, Receiver, SyncSender},
    thread,
};

use casemate_passthrough::Container;

use crate::{assigned::mapping_of, error::Error, memory::MemorySlot};

struct Ask {
    piece: MemorySlot,
    on: bool,
    answer: SyncSender<Result<(), String>>,
}

/// The way to the thread.
pub(crate) struct Peers(SyncSender<Ask>);

/// What the thread holds.
pub(crate) struct PeersThread {
    asks: Receiver<Ask>,
    container: Container,
}

impl Peers {
    /// The way, and what is to be run on a thread.
    pub(crate) fn new(container: Container) -> (Self, PeersThread) {
        let (sender, asks) = mpsc::sync_channel(1);
        (Self(sender), PeersThread { asks, container })
    }

    /// Lets the devices reach registers that are mapped in this process, or takes them away.
    ///
    /// # Errors
    /// What the kernel says; it is as it was then.
    ///
    /// # Safety
    /// As for [`Container::map_dma`]: the registers stay mapped here until they are taken away.
    pub(crate) unsafe fn reach(&self, piece: MemorySlot, on: bool) -> Result<(), Error> {
        let (answer, answered) = mpsc::sync_channel(1);
        let gone = || Error::Lacks("the thread that lets devices reach each other");
        self.0.send(Ask { piece, on, answer }).map_err(|_| gone())?;
        let done = answered.recv().map_err(|_| gone())?;
        done.map_err(|error| Error::device("letting devices reach each other", error))
    }
}

impl PeersThread {
    /// Does what is asked, for as long as the process lives: the control thread ends it, and asks no more before.
    pub(crate) fn run(self) {
        while let Ok(Ask { piece, on, answer }) = self.asks.recv() {
            let done = if on {
                // SAFETY: who asked vouches for the registers (see `Peers::reach`), which no reference of Rust's covers.
                unsafe { self.container.map_dma(&mapping_of(piece)) }
            } else {
                self.container.unmap_dma(piece.guest_address, piece.size_bytes)
            };
            let _ = answer.send(done.map_err(|error| error.to_string()));
        }
        loop {
            thread::park();
        }
    }
}
