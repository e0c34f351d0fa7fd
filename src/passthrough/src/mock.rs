//! A device file that is none, for the unit tests.

use std::{
    io,
    sync::{Arc, Mutex},
};

use casemate_pci::regs;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};
use vmm_sys_util::eventfd::EventFd;

use crate::seam::{IrqInfo, Region, VectorKind, Vfio, VfioError};

/// What the device was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Write { index: u32, offset: u64, data: Vec<u8> },
    Vectors(VectorKind, u16),
    Vector(u16),
    Reset,
}

/// A device with a configuration space and BARs that read as 0x5a.
#[derive(Clone)]
pub(crate) struct Mock {
    pub(crate) space: Vec<u8>,
    pub(crate) bars: [Region; 6],
    pub(crate) vectors: u32,
    pub(crate) msi_vectors: u32,
    pub(crate) irq_flags: u32,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
    pub(crate) failing: bool,
}

impl Mock {
    /// An NVMe drive as QEMU makes one: BAR 0 of 64 bits with MSI-X table and pending bits in it; beside it an I/O BAR
    /// and one smaller than a page. Capabilities: MSI-X, PCI Express, vendor specific, MSI, Power Management.
    pub(crate) fn nvme() -> Self {
        let mut space = vec![0; 4096];
        let mut put =
            |at: u16, bytes: &[u8]| space[at.into()..usize::from(at) + bytes.len()].copy_from_slice(bytes);
        put(regs::VENDOR_ID, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x04, 0x10, 0x00, 0x02, 0x02, 0x08, 0x01]);
        put(regs::HEADER_TYPE, &[0x80]);
        put(0x10, &0xfe00_0004u32.to_le_bytes());
        put(0x18, &0xc001u32.to_le_bytes());
        put(0x1c, &0xfe10_0008u32.to_le_bytes());
        put(0x2c, &[0xf4, 0x1a, 0x00, 0x11]);
        put(0x30, &0xfe20_0001u32.to_le_bytes());
        put(regs::CAPABILITY_LIST, &[0x40]);
        put(regs::INTERRUPT_LINE, &[0x0b, 0x01]);
        // 65 vectors, disabled; table at 0x2000, pending bits at 0x3000 of BAR 0.
        put(0x40, &[0x11, 0x80, 64, 0x00, 0x00, 0x20, 0x00, 0x00, 0x00, 0x30, 0x00, 0x00]);
        // Endpoint, version 2; FLR, role-based errors; payload of 256, read request of 512, error reports on; a link.
        put(
            0x80,
            &[0x10, 0xc0, 0x02, 0x00, 0xc2, 0x8f, 0x00, 0x10, 0x3f, 0x29, 0x01, 0x00, 0x11, 0x0c, 0x40, 0x00],
        );
        put(0x90, &[0x40, 0x00, 0x11, 0x10]);
        put(0xc0, &[0x09, 0xd0, 0x08, 0xde, 0xad, 0xbe, 0xef, 0x55]);
        put(0xd0, &[0x05, 0xf0, 0x80, 0x00]);
        put(0xf0, &[0x01, 0x00, 0xff, 0xff, 0x00, 0x01, 0x00, 0x00]);
        put(0x100, &[0x01, 0x00, 0x02, 0x00]);

        let region = |size, offset| Region {
            size,
            offset,
            readable: true,
            writable: true,
            mappable: vec![std::ops::Range { start: 0, end: size }],
        };
        let bars = [
            region(0x4000, 0),
            Region::default(),
            region(0x20, 2 << 40),
            region(0x100, 3 << 40),
            Region::default(),
            Region::default(),
        ];
        Self {
            space,
            bars,
            vectors: 65,
            msi_vectors: 1,
            irq_flags: VFIO_IRQ_INFO_NORESIZE,
            events: Arc::default(),
            failing: false,
        }
    }

    pub(crate) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    fn answer(&mut self, event: Event) -> Result<(), VfioError> {
        self.events.lock().unwrap().push(event);
        if self.failing {
            return Err(VfioError::Ioctl { request: "mock", source: io::Error::from_raw_os_error(5) });
        }
        Ok(())
    }
}

impl Vfio for Mock {
    fn region_info(&mut self, index: u32) -> Result<Region, VfioError> {
        self.bars.get(index as usize).cloned().ok_or(VfioError::OutOfRange { index, offset: 0 })
    }

    fn region_read(&mut self, index: u32, offset: u64, data: &mut [u8]) -> Result<(), VfioError> {
        if self.failing {
            return Err(VfioError::OutOfRange { index, offset });
        }
        if index == VFIO_PCI_CONFIG_REGION_INDEX {
            let start = offset as usize;
            data.copy_from_slice(&self.space[start..start + data.len()]);
        } else {
            assert!(offset + data.len() as u64 <= self.bars[index as usize].size);
            data.fill(0x5a);
        }
        Ok(())
    }

    fn region_write(&mut self, index: u32, offset: u64, data: &[u8]) -> Result<(), VfioError> {
        if index == VFIO_PCI_CONFIG_REGION_INDEX && !self.failing {
            let start = offset as usize;
            self.space[start..start + data.len()].copy_from_slice(data);
        }
        self.answer(Event::Write { index, offset, data: data.to_vec() })
    }

    fn irq_info(&mut self, index: u32) -> Result<IrqInfo, VfioError> {
        let count = match index {
            VFIO_PCI_MSIX_IRQ_INDEX => self.vectors,
            VFIO_PCI_MSI_IRQ_INDEX => self.msi_vectors,
            _ => 1,
        };
        Ok(IrqInfo { count, flags: self.irq_flags })
    }

    fn set_vectors(
        &mut self,
        kind: VectorKind,
        triggers: &Arc<[EventFd]>,
        count: u16,
    ) -> Result<(), VfioError> {
        assert!(usize::from(count) <= triggers.len());
        self.answer(Event::Vectors(kind, count))
    }

    fn add_vector(&mut self, vector: u16, triggers: &Arc<[EventFd]>) -> Result<(), VfioError> {
        assert!(usize::from(vector) < triggers.len());
        self.answer(Event::Vector(vector))
    }

    fn reset(&mut self) -> Result<(), VfioError> {
        self.answer(Event::Reset)
    }
}
