//! What a physical function is, read and judged before a guest sees it.

use casemate_pci::{
    BAR_COUNT, BarKind, BarOffset, BarRequest, Capability, CapabilityError, Config, ConfigError,
    FoundCapability, Identity, Msi, MsiLayout, Msix, MsixLayout, capabilities, regs,
};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

use crate::{
    filter,
    mapping::{Mapping, exposed},
    seam::{Region, Vfio, VfioError},
};

/// What is read of configuration space: nothing past it is let through.
const HEADER_BYTES: usize = 256;
/// Interrupt pin, 8 bits: 0 is none, 1 to 4 are INTA to INTD.
const INTERRUPT_PIN: u16 = regs::INTERRUPT_LINE + 1;
const INTA: u8 = 1;
/// Bytes of the capabilities that are built here, with ID and link.
const PM_BYTES: u16 = 8;
const MSIX_BYTES: u16 = 12;
const MSI_BYTES_LEAST: u16 = 10;
/// Id, link and length.
const VENDOR_BYTES_LEAST: u8 = 3;
const EXPRESS_V1_BYTES: u16 = 0x14;
/// A version 2 capability of a root complex integrated endpoint ends with the second device registers.
const EXPRESS_V2_BYTES: u16 = 0x2c;

/// Why a physical function can't be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// VFIO failed.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// Configuration space reads as all ones.
    #[error("the device does not answer: its configuration space reads as all ones")]
    Absent,
    /// A bridge, or nonsense.
    #[error("header type {0:#04x} is not an endpoint's")]
    HeaderType(u8),
    /// The capability list is broken.
    #[error(transparent)]
    Capabilities(#[from] CapabilityError),
    /// A capability is longer than the space up to the next one.
    #[error("capability {id:#04x} at {offset:#04x} runs into the next one")]
    CapabilityOverlap {
        /// Capability ID.
        id: u8,
        /// Where it stands.
        offset: u8,
    },
    /// A BAR's type is reserved or obsolete.
    #[error("BAR {index} is of unknown type ({register:#010x})")]
    BarType {
        /// Register number.
        index: u8,
        /// What the register reads.
        register: u32,
    },
    /// A BAR or capability contradicts another, or can't be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// MSI with a number of vectors that is reserved.
    #[error("the device's MSI capability is broken (message control {0:#06x})")]
    MsiControl(u16),
    /// The kernel and the device don't agree on the vectors.
    #[error("the device has {device} vectors, and the kernel says {kernel}")]
    Vectors {
        /// By its capability.
        device: u16,
        /// By VFIO.
        kernel: u32,
    },
}

/// Where the guest meets a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// On the root bus.
    RootBus,
    /// In the slot of a root port.
    Slot,
}

/// I/O BARs: number and size in bytes.
type IoBars = Vec<(u8, u64)>;

/// A physical function that was found sound: the guest's view of it, with all that an [`AssignedFunction`] is made
/// of.
///
/// [`AssignedFunction`]: crate::AssignedFunction
#[derive(Debug)]
pub struct Probe {
    pub(crate) config: Config,
    pub(crate) msix: Option<Msix>,
    pub(crate) msi: Option<Msi>,
    /// Vectors of MSI-X can be made one by one.
    pub(crate) dynamic: bool,
    pub(crate) intx: bool,
    hidden_io: IoBars,
    pub(crate) regions: [Region; BAR_COUNT],
    pub(crate) mappings: Vec<Mapping>,
}

impl Probe {
    /// Reads configuration space and regions, and builds the guest's view by [`FILTER`](crate::FILTER).
    ///
    /// # Errors
    /// When VFIO fails, or the device is broken or of a kind that can't be assigned.
    pub fn read(vfio: &mut dyn Vfio, seat: Seat) -> Result<Self, ProbeError> {
        let mut space = [0; HEADER_BYTES];
        vfio.region_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut space)?;
        let space = Space(space);
        if space.u16(regs::VENDOR_ID) == 0xffff {
            return Err(ProbeError::Absent);
        }
        // Which functions are beside it is not the guest's to know: the bit for "more than one" is left out.
        let header = space.u8(regs::HEADER_TYPE) & 0x7f;
        if header != 0 {
            return Err(ProbeError::HeaderType(header));
        }

        let mut config = Config::new(Identity::default());
        for (offset, size) in filter::snapshots() {
            config.set(offset, space.slice(offset, size));
        }
        let (regions, hidden_io) = add_bars(vfio, &space, seat, &mut config)?;
        let (msix, msi) = add_capabilities(vfio, &space, seat, &mut config)?;
        let dynamic = msix.is_some() && vfio.irq_info(VFIO_PCI_MSIX_IRQ_INDEX)?.is_dynamic();
        let intx = msix.is_none()
            && msi.is_none()
            && space.u8(INTERRUPT_PIN) != 0
            && vfio.irq_info(VFIO_PCI_INTX_IRQ_INDEX)?.count != 0;
        if intx {
            config.set_interrupt(INTA, 0);
        }
        let mappings = mappings(&regions, msix.as_ref());
        Ok(Self { config, msix, msi, dynamic, intx, hidden_io, regions, mappings })
    }

    /// The same with an option ROM of this size, a power of two: whoever assigns the function has its bytes, and answers for
    /// [`ROM_INDEX`](casemate_pci::ROM_INDEX). The device's own is never shown.
    ///
    /// # Errors
    /// When a ROM can't have this size.
    pub fn with_rom(mut self, size_bytes: u64) -> Result<Self, ConfigError> {
        self.config.add_rom(size_bytes)?;
        Ok(self)
    }

    /// Whether the guest is told that the function has INTx. Who assigns it is to listen to it then
    /// ([`VfioDevice::set_intx`](crate::VfioDevice::set_intx)).
    pub fn intx(&self) -> bool {
        self.intx
    }

    /// How many vectors of MSI-X or MSI the function has, and so how many eventfds it wants; 0 without either.
    pub fn vectors(&self) -> u16 {
        let msix = self.msix.as_ref().map(|msix| msix.layout().vectors);
        msix.or(self.msi.as_ref().map(|msi| msi.layout().vectors)).unwrap_or(0)
    }

    /// The I/O BARs that the guest doesn't see: number and size in bytes.
    pub fn hidden_io_bars(&self) -> &[(u8, u64)] {
        &self.hidden_io
    }
}

/// The first 256 bytes as the device says them; what lies past the end reads as 0.
struct Space([u8; HEADER_BYTES]);

impl Space {
    fn u8(&self, offset: u16) -> u8 {
        self.0.get(usize::from(offset)).copied().unwrap_or(0)
    }
    fn u16(&self, offset: u16) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset.saturating_add(1))])
    }
    fn u32(&self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset.saturating_add(2))) << 16
    }
    fn slice(&self, offset: u16, size: u16) -> &[u8] {
        let start = usize::from(offset);
        self.0.get(start..start + usize::from(size)).unwrap_or_default()
    }
}

/// Adds each BAR: its type from the device, its size from the kernel. Ports that have no place there, or are more than a BAR
/// may have, are told beside.
fn add_bars(
    vfio: &mut dyn Vfio,
    space: &Space,
    seat: Seat,
    config: &mut Config,
) -> Result<([Region; BAR_COUNT], IoBars), ProbeError> {
    let mut regions: [Region; BAR_COUNT] = Default::default();
    let mut hidden_io = Vec::new();
    let mut upper_half = false;
    for (index, slot) in (0u8..).zip(&mut regions) {
        if std::mem::take(&mut upper_half) {
            continue;
        }
        let region = vfio.region_info(u32::from(index))?;
        let register = space.u32(regs::BASE_ADDRESS_0 + 4 * u16::from(index));
        if region.size == 0 {
            continue;
        }
        let kind = match (register & 1, register >> 1 & 3) {
            (1, _) => BarKind::Io,
            (_, 0) => BarKind::Memory32,
            (_, 2) => BarKind::Memory64,
            _ => return Err(ProbeError::BarType { index, register }),
        };
        let prefetchable = kind != BarKind::Io && register & 8 != 0;
        let bar = BarRequest { index, size: region.size, kind, prefetchable };
        if kind == BarKind::Io {
            if seat == Seat::Slot || config.add_bar(bar).is_err() {
                hidden_io.push((index, region.size));
                continue;
            }
            *slot = Region { mappable: Vec::new(), ..region };
            continue;
        }
        config.add_bar(bar)?;
        upper_half = kind == BarKind::Memory64;
        *slot = region;
    }
    Ok((regions, hidden_io))
}

/// Adds each capability that the filter names, where the device has it.
fn add_capabilities(
    vfio: &mut dyn Vfio,
    space: &Space,
    seat: Seat,
    config: &mut Config,
) -> Result<(Option<Msix>, Option<Msi>), ProbeError> {
    let (mut msix, mut msi) = (None, None);
    let all = capabilities(&space.0)?;
    let has_msix = all.iter().any(|found| found.id == regs::CAP_ID_MSIX);
    for found in all {
        let at = u16::from(found.offset);
        match filter::capability_rule(found.id).map(|_| found.id) {
            Some(regs::CAP_ID_PM) => {
                require(found, PM_BYTES)?;
                let body = power_management(space.u16(at + 2));
                add(config, found, &body, &[0, 0, 0x03])?;
            }
            Some(regs::CAP_ID_EXP) => {
                if let Some(body) = express(space, found, seat)? {
                    add(config, found, &body, &[])?;
                }
            }
            Some(regs::CAP_ID_MSI) if !has_msix && msi.is_none() => {
                require(found, MSI_BYTES_LEAST)?;
                let control = space.u16(at + 2);
                let layout = MsiLayout::from_control(control, Some(found.offset));
                let layout = layout.ok_or(ProbeError::MsiControl(control))?;
                require(found, layout.size())?;
                let kernel = vfio.irq_info(VFIO_PCI_MSI_IRQ_INDEX)?.count;
                if kernel != u32::from(layout.vectors) {
                    return Err(ProbeError::Vectors { device: layout.vectors, kernel });
                }
                msi = Some(Msi::add(config, layout)?);
            }
            Some(regs::CAP_ID_MSIX) if msix.is_none() => {
                require(found, MSIX_BYTES)?;
                let layout = msix_layout(space, found.offset);
                let kernel = vfio.irq_info(VFIO_PCI_MSIX_IRQ_INDEX)?.count;
                if kernel != u32::from(layout.vectors) {
                    return Err(ProbeError::Vectors { device: layout.vectors, kernel });
                }
                msix = Some(Msix::add(config, layout)?);
            }
            Some(regs::CAP_ID_VNDR) => {
                if let Some(body) = vendor_specific(space, found) {
                    add(config, found, &body, &[])?;
                }
            }
            _ => {}
        }
    }
    Ok((msix, msi))
}

/// What follows id and link of a vendor-specific capability (PCI 3.0, appendix H): its own length, and what the vendor put
/// there. One that is shorter than its header or reaches into another is left out.
fn vendor_specific(space: &Space, found: FoundCapability) -> Option<Vec<u8>> {
    let at = usize::from(found.offset);
    let length = *space.0.get(at + 2)?;
    if length < VENDOR_BYTES_LEAST || u16::from(length) > found.room {
        return None;
    }
    Some(space.0.get(at + 2..at + usize::from(length))?.to_vec())
}

fn require(found: FoundCapability, bytes: u16) -> Result<(), ProbeError> {
    if found.room < bytes {
        return Err(ProbeError::CapabilityOverlap { id: found.id, offset: found.offset });
    }
    Ok(())
}

fn add(config: &mut Config, found: FoundCapability, body: &[u8], writable: &[u8]) -> Result<(), ProbeError> {
    config.add_capability(Capability { id: found.id, at: Some(found.offset), body, writable, clear: &[] })?;
    Ok(())
}

/// Power Management without PME, D1 and D2, in D0. Body: capabilities, then control and status (PCI Bus Power
/// Management Interface Specification 1.2, section 3.2).
fn power_management(capabilities: u16) -> [u8; 6] {
    let [low, high] = (capabilities & 0x0007).to_le_bytes();
    let no_soft_reset = 1 << 3;
    [low, high, no_soft_reset, 0, 0, 0]
}

/// PCI Express (PCI Express Base Specification 5.0, section 7.5.3): as much of the device registers as does no harm. On the root
/// bus it is a root complex integrated endpoint, which has no link; behind a port an endpoint, whose link is as wide and fast as
/// the device's. `None` for what can be neither.
fn express(space: &Space, found: FoundCapability, seat: Seat) -> Result<Option<Vec<u8>>, ProbeError> {
    const ENDPOINT: u16 = 0;
    const INTEGRATED_ENDPOINT: u16 = 9;
    const ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// Payload size, read request size, relaxed ordering, no snoop.
    const CONTROL_SHOWN: u16 = 0x78f0;
    /// Speed and width, of what the link can do and of what it does.
    const LINK_SHOWN: u16 = 0x03ff;

    require(found, 4)?;
    let at = u16::from(found.offset);
    let flags = space.u16(at + 2);
    let version = flags & 0xf;
    let kind = flags >> 4 & 0xf;
    if !matches!(kind, ENDPOINT | INTEGRATED_ENDPOINT) || version == 0 {
        return Ok(None);
    }
    let size = if version == 1 { EXPRESS_V1_BYTES } else { EXPRESS_V2_BYTES };
    require(found, size)?;

    let control = space.u16(at + 8) & CONTROL_SHOWN;
    // It supports the payload that it is set to, so that the guest has no reason to change it.
    let payload = u32::from(control >> 5 & 7);
    let device = space.u32(at + 4) & ROLE_BASED_ERRORS | payload;
    let seen_as = if seat == Seat::Slot { ENDPOINT } else { INTEGRATED_ENDPOINT };
    let mut body = Vec::with_capacity(usize::from(size));
    body.extend((version.min(2) | seen_as << 4).to_le_bytes());
    body.extend(device.to_le_bytes());
    body.extend(control.to_le_bytes());
    body.extend([0; 2]);
    if seat == Seat::Slot && kind == ENDPOINT {
        body.extend(u32::from(space.u16(at + 0xc) & LINK_SHOWN).to_le_bytes());
        body.extend([0; 2]);
        body.extend((space.u16(at + 0x12) & LINK_SHOWN).to_le_bytes());
    }
    body.resize(usize::from(size - 2), 0);
    Ok(Some(body))
}

/// MSI-X as the capability at `offset` says it.
fn msix_layout(space: &Space, offset: u8) -> MsixLayout {
    let at = u16::from(offset);
    let place = |register: u32| BarOffset { bar: (register & 7) as u8, offset: register & !7 };
    MsixLayout {
        vectors: (space.u16(at + 2) & 0x7ff) + 1,
        table: place(space.u32(at + 4)),
        pba: place(space.u32(at + 8)),
        capability_at: Some(offset),
    }
}

fn mappings(regions: &[Region; BAR_COUNT], msix: Option<&Msix>) -> Vec<Mapping> {
    let mut all = Vec::new();
    for (bar, region) in (0u8..).zip(regions) {
        let mut trapped = Vec::new();
        if let Some(layout) = msix.map(Msix::layout) {
            trapped.extend((layout.table.bar == bar).then(|| layout.table_range()));
            trapped.extend((layout.pba.bar == bar).then(|| layout.pba_range()));
        }
        let clipped: Vec<_> =
            region.mappable.iter().map(|area| area.start..area.end.min(region.size)).collect();
        all.extend(exposed(&clipped, &trapped).into_iter().filter_map(|pages| {
            Some(Mapping {
                bar,
                offset_in_bar: pages.start,
                size: pages.end - pages.start,
                file_offset: region.offset.checked_add(pages.start)?,
            })
        }));
    }
    all
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
