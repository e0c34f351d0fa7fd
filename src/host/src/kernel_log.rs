//! What the kernel's log tells of DMA that an IOMMU stopped. Nothing else tells it: there is no counter and no event for a device
//! that VFIO has. The kernel writes a few such lines in some seconds and leaves the others out, so what is counted is the least.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

use casemate_spec::PciAddress;

/// The longest record that the kernel gives (`PRINTKRB_RECORD_MAX`, `kernel/printk/printk.c`).
const RECORD_BYTES: usize = 8192;
/// Priorities of the kernel's own lines: above are those that programs wrote into the log, which can say anything.
const PRIORITIES: u32 = 8;

/// The kernel's log, from a moment on.
#[derive(Debug)]
pub(crate) struct KernelLog(File);

impl KernelLog {
    /// From now on.
    pub(crate) fn from_now() -> io::Result<Self> {
        let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        Ok(Self(log))
    }

    /// Reads on to the next line that tells of a fault, but not past `most` others: the device, as [`fault`] reads it.
    pub(crate) fn next(&self, most: usize) -> Option<(Option<u32>, u8, u8)> {
        let mut record = [0; RECORD_BYTES];
        for _ in 0..most {
            match (&self.0).read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(record.get(..length)?);
                    if let Some(device) = fault(&text) {
                        return Some(device);
                    }
                }
                // Lines were overwritten before they were read; the next is there.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        None
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether a device is the one of a fault: Intel's lines don't tell its domain.
pub(crate) fn is_of(device: PciAddress, (domain, bus, slot): (Option<u32>, u8, u8)) -> bool {
    let devfn = device.device() << 3 | device.function();
    domain.is_none_or(|domain| domain == device.domain()) && (device.bus(), devfn) == (bus, slot)
}

/// The device of a record of `/dev/kmsg` that tells of DMA which was stopped: its domain, where told, bus, and device and function
/// as one byte. By Intel's driver (`drivers/iommu/intel/dmar.c`) and AMD's (`drivers/iommu/amd/iommu.c`).
fn fault(record: &str) -> Option<(Option<u32>, u8, u8)> {
    let (head, rest) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    if priority >= PRIORITIES {
        return None;
    }
    let line = rest.lines().next()?;
    if let Some(rest) = line.strip_prefix("DMAR: [DMA ") {
        let (_, device) = rest.split_once("Request device [")?;
        return address(device.split_once(']')?.0);
    }
    let (before, event) = line.split_once("AMD-Vi: Event logged [IO_PAGE_FAULT")?;
    match event.strip_prefix(" device=") {
        Some(device) => address(device.split(' ').next()?),
        // "vfio-pci 0000:03:00.0: AMD-Vi: …", of a device that has a driver.
        None => address(before.trim_end().trim_end_matches(':').rsplit(' ').next()?),
    }
}

/// `0000:03:00.0` or `03:00.0`, in hexadecimal.
fn address(text: &str) -> Option<(Option<u32>, u8, u8)> {
    let (text, function) = text.rsplit_once('.')?;
    let (text, device) = text.rsplit_once(':')?;
    let (domain, bus) = match text.rsplit_once(':') {
        Some((domain, bus)) => (Some(u32::from_str_radix(domain, 16).ok()?), bus),
        None => (None, text),
    };
    let byte = |text: &str| u8::from_str_radix(text, 16).ok();
    let (device, function) = (byte(device)?, byte(function)?);
    (device < 32 && function < 8).then_some((domain, byte(bus)?, device << 3 | function))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::at;
    use proptest::prelude::*;

    #[test]
    fn reads_the_lines_of_both_makers() {
        let of = |line: &str| fault(&format!("3,1841,61093042,-;{line}\n SUBSYSTEM=pci\n"));
        let (named, unnamed) = (Some((Some(0), 6, 0)), Some((None, 6, 0)));
        assert_eq!(
            of(
                "DMAR: [DMA Write NO_PASID] Request device [06:00.0] fault addr 0xc1000000 [fault reason 0x05] PTE Write access is not set"
            ),
            unnamed
        );
        assert_eq!(
            of(
                "DMAR: [DMA Read] Request device [06:00.0] PASID ffffffff fault addr ffff000 [fault reason 06]"
            ),
            unnamed
        );
        assert_eq!(
            of(
                "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:06:00.0 domain=0x000a address=0xc1000000 flags=0x0020]"
            ),
            named
        );
        assert_eq!(
            of(
                "vfio-pci 0000:06:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000a address=0xc1000000 flags=0x0020]"
            ),
            named
        );
        for other in [
            "DMAR: DRHD: handling fault status reg 3",
            "DMAR: [INTR-REMAP] Request device [06:00.0] fault index 0x8000",
            "DMAR: [DMA Write] Request device [06:00.9] fault addr 0",
            "DMAR: [DMA Write] Request device [106:00.0] fault addr 0",
            "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:06:00 domain=0x000a]",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
        // What a program wrote into the log.
        let forged = "11,1,2,-;DMAR: [DMA Write NO_PASID] Request device [06:00.0] fault addr 0x1";
        assert_eq!(fault(forged), None);
    }

    #[test]
    fn a_line_without_a_domain_is_of_any() {
        assert!(is_of(at("0000:06:00.1"), (None, 6, 1)));
        assert!(is_of(at("0000:06:01.0"), (Some(0), 6, 8)));
        assert!(!is_of(at("0000:06:00.1"), (Some(1), 6, 1)));
        assert!(!is_of(at("0000:06:00.1"), (None, 6, 0)));
    }

    proptest! {
        #[test]
        fn any_record_is_read_or_not(text in ".{0,80}", line in prop_oneof![
            Just("3,1,1,-;DMAR: [DMA Write] Request device ["),
            Just("3,1,1,-;AMD-Vi: Event logged [IO_PAGE_FAULT"),
            Just(""),
        ]) {
            let _ = fault(&format!("{line}{text}"));
        }
    }
}
