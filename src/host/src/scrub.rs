//! Scrubbing: what a device stores is erased before it goes to anybody else, where its pool asks for that by name.
//!
//! It's done from VFIO's side, after the guest's process is gone and the device was reset, so that a dirty device meets no driver of
//! the host's. What the device says is a stranger's word: each number is bounded, each wait has an end, and whatever goes wrong is
//! why the device goes into quarantine. The device reaches 20 KiB of this process's memory meanwhile, and nothing else.

mod nvme;

use std::{io, os::fd::OwnedFd};

use casemate_spec::ScrubStep;

use crate::{
    config::{COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY},
    dma::IommuLimits,
    sys::{
        dma::{DmaArea, unmap_all},
        vfio,
    },
};

/// Where a device's memory lies, as the device says it: what no IOMMU keeps for itself, and below 4 GiB. It's looked at all the same.
const WANTED_ADDRESS: u64 = 0x10_0000;

/// Does the steps in order; in words what was done. The device was reset, and is to be reset again.
pub(crate) fn scrub(device: &OwnedFd, container: &OwnedFd, steps: &[ScrubStep]) -> Result<String, String> {
    let failed = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    // The guest's memory is mapped as long as its container lives.
    unmap_all(container).map_err(failed("its guest's memory can't be unmapped from it"))?;
    let limits = vfio::iommu_info(container).map(|answer| IommuLimits::parse(&answer)).unwrap_or_default();
    let address = limits
        .room_for(WANTED_ADDRESS, nvme::MEMORY_BYTES as u64)
        .ok_or("its IOMMU has no address for 20 KiB of memory")?;
    let memory = DmaArea::map(container, address, nvme::MEMORY_BYTES)
        .map_err(failed("memory can't be mapped for it"))?;
    vfio::set_config_bits(device, COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER)
        .map_err(failed("it can't be turned on"))?;
    let registers = vfio::Registers::of(device, 0).map_err(failed("its registers can't be found"))?;
    let mut drive = Drive { registers, memory };
    let done = steps.iter().map(|step| match step {
        ScrubStep::NvmeFormat => nvme::format_all(&mut drive),
    });
    let done = done.collect::<Result<Vec<_>, _>>();
    // Nothing of it reaches memory that is about to go.
    vfio::clear_config_bits(device, COMMAND, COMMAND_BUS_MASTER)
        .map_err(failed("bus mastering cannot be turned off"))?;
    Ok(done?.join("; "))
}

/// A device's first BAR, and memory that it reaches.
struct Drive<'a> {
    registers: vfio::Registers<'a>,
    memory: DmaArea<'a>,
}

impl nvme::Controller for Drive<'_> {
    fn read(&mut self, register: u64) -> io::Result<u32> {
        self.registers.read(register)
    }

    fn write(&mut self, register: u64, value: u32) -> io::Result<()> {
        self.registers.write(register, value)
    }

    fn load(&mut self, at: usize, bytes: &mut [u8]) {
        self.memory.load(at, bytes);
    }

    fn store(&mut self, at: usize, bytes: &[u8]) {
        self.memory.store(at, bytes);
    }

    fn address(&self) -> u64 {
        self.memory.address()
    }
}
