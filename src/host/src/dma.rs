//! What devices' DMA asks of this host: worked out before anything is taken where sysfs tells it, and before the guest
//! starts where only an open container does.

use std::{
    fmt,
    mem::{offset_of, size_of},
    ops::{Range, RangeInclusive},
};

use casemate_spec::{PciAddress, Refusal};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    vfio_info_cap_header, vfio_iommu_type1_info, vfio_iommu_type1_info_cap_iova_range,
    vfio_iommu_type1_info_dma_avail, vfio_iova_range,
};

use crate::{
    PciFunction,
    host::{Host, attribute},
};

/// Interrupt routes that KVM takes for one machine (`KVM_MAX_IRQ_ROUTES`).
const ROUTES_MOST: u32 = 4096;
/// Those of the IOAPIC's pins.
const PINS: u32 = 24;
/// `CAP_SYS_RESOURCE` lets a process raise its own limits (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;
/// What IOMMUs map at least.
const PAGE_BYTES: u64 = 4096;
/// More reserved regions than any IOMMU has.
const REGIONS_MAX: usize = 256;

/// What a guest with devices asks of the host's IOMMU and kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaNeeds {
    /// Where its memory lies, as its devices say it; a mapping each.
    pub ram: Vec<Range<u64>>,
    /// Interrupt vectors that its emulated devices have at most.
    pub emulated_vectors: u32,
    /// What its process locks beside its memory, in bytes.
    pub overhead_bytes: u64,
    /// How much of its memory the host doesn't count as available, and needs not be: pages that were set aside for guests, or what a
    /// guest that runs has already.
    pub set_aside_bytes: u64,
}

impl DmaNeeds {
    /// Memory that is locked.
    fn locked_bytes(&self) -> u64 {
        let memory = self.ram.iter().map(|piece| piece.end.saturating_sub(piece.start));
        memory.fold(self.overhead_bytes, u64::saturating_add)
    }
}

/// A piece of address space that the kernel keeps from devices' maps (`Documentation/ABI/testing/sysfs-kernel-iommu_groups`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReservedRegion {
    pub(crate) addresses: RangeInclusive<u64>,
    /// `direct`, `direct-relaxable`, `reserved`, `msi`.
    pub(crate) kind: String,
}

impl ReservedRegion {
    /// Whether the firmware says that the device itself uses this memory of the host's (an RMRR of Intel's, a unity map of
    /// AMD's). VFIO gives such a device to nobody. Of USB controllers and graphics the kernel knows that it can be given up.
    pub(crate) fn is_firmwares(&self) -> bool {
        self.kind == "direct"
    }

    /// Whether VFIO leaves it out of what can be mapped.
    fn is_barred(&self) -> bool {
        self.kind != "direct-relaxable"
    }
}

impl Host {
    /// The reserved regions of a function's group; what is not of their form is left out.
    pub(crate) fn reserved_regions(&self, address: PciAddress) -> Vec<ReservedRegion> {
        let text = attribute(self.pci(address).join("iommu_group/reserved_regions")).unwrap_or_default();
        let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let of = |line: &str| {
            let mut words = line.split_whitespace();
            let (start, end) = (number(words.next()?)?, number(words.next()?)?);
            (start <= end)
                .then_some(ReservedRegion { addresses: start..=end, kind: words.next()?.to_owned() })
        };
        text.lines().filter_map(of).take(REGIONS_MAX).collect()
    }
}

/// Judges what can be told before anything is taken: reserved addresses, locked memory, interrupt vectors.
///
/// # Errors
/// `dma-addresses`, `dma-memlock`, `dma-memory`, `too-many-vectors`, each with the numbers.
pub fn judge_dma(
    host: &Host,
    functions: &[PciFunction],
    addresses: &[PciAddress],
    needs: &DmaNeeds,
) -> Result<(), Refusal> {
    for address in addresses {
        let regions = host.reserved_regions(*address);
        for region in regions.iter().filter(|region| region.is_barred()) {
            if let Some(piece) = needs.ram.iter().find(|piece| meets(piece, &region.addresses)) {
                let cause = format!(
                    "its IOMMU keeps {} for itself ({}), and the guest's memory from {:#x} to {:#x} goes across it",
                    Shown(&region.addresses),
                    region.kind,
                    piece.start,
                    piece.end.saturating_sub(1)
                );
                return Err(addresses_refused(*address, cause, *region.addresses.start(), needs));
            }
        }
    }
    may_lock(host, needs)?;
    let of = |address: &PciAddress| functions.iter().find(|function| function.address == *address);
    let vectors = addresses.iter().filter_map(of).map(|function| u32::from(function.details.vectors()));
    let wanted = vectors.fold(0u32, u32::saturating_add);
    let left = ROUTES_MOST.saturating_sub(PINS).saturating_sub(needs.emulated_vectors);
    if wanted > left {
        let cause = format!(
            "its devices have {wanted} interrupt vectors, and {left} of KVM's {ROUTES_MOST} are left for them"
        );
        return Err(Refusal::new("too-many-vectors", "the guest's devices", cause, "give it fewer devices"));
    }
    Ok(())
}

/// That the guest's memory can be locked: by the limit that the keep can set, and by what there is.
fn may_lock(host: &Host, needs: &DmaNeeds) -> Result<(), Refusal> {
    let wanted = needs.locked_bytes();
    let refuse = |code, cause: String, remedy: &str| Err(Refusal::new(code, "memory", cause, remedy));
    let hard = getrlimit(Resource::Memlock).maximum;
    if let Some(limit) = hard.filter(|limit| *limit < wanted && !may_raise_limits(host)) {
        let cause = format!(
            "devices need all {} MiB of it locked, and at most {} MiB can be (RLIMIT_MEMLOCK)",
            wanted >> 20,
            limit >> 20
        );
        return refuse(
            "dma-memlock",
            cause,
            "run as root with CAP_SYS_RESOURCE, or raise the hard limit (LimitMEMLOCK=)",
        );
    }
    let available = host.table("proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    });
    let wanted = wanted.saturating_sub(needs.set_aside_bytes);
    if let Some(available) = available.filter(|available| *available < wanted) {
        let cause = format!(
            "devices need all {} MiB of it locked at the start, and the host has {} MiB available",
            wanted >> 20,
            available >> 20
        );
        return refuse("dma-memory", cause, "give it less memory, or end another guest");
    }
    Ok(())
}

fn may_raise_limits(host: &Host) -> bool {
    let status = host.table("proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|set| set >> CAP_SYS_RESOURCE & 1 != 0)
}

fn meets(piece: &Range<u64>, addresses: &RangeInclusive<u64>) -> bool {
    piece.start <= *addresses.end() && *addresses.start() < piece.end
}

/// A refusal that tells how much memory there is room for below `limit`.
fn addresses_refused(address: PciAddress, cause: String, limit: u64, needs: &DmaNeeds) -> Refusal {
    let fits = needs
        .ram
        .iter()
        .map(|piece| piece.end.min(limit).saturating_sub(piece.start))
        .fold(0, u64::saturating_add);
    let remedy = match fits >> 21 {
        0 => "name another device".to_owned(),
        _ => format!("give the guest at most {} MiB, or name another device", fits >> 21 << 1),
    };
    Refusal::new("dma-addresses", address, cause, remedy)
}

struct Shown<'a>(&'a RangeInclusive<u64>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} to {:#x}", self.0.start(), self.0.end())
    }
}

/// What the container of a claim can map, as the kernel says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IommuLimits {
    /// The addresses that devices can use, ascending. Empty when the kernel doesn't say (before 5.4).
    pub ranges: Vec<RangeInclusive<u64>>,
    /// How many mappings it allows; `None` when the kernel doesn't say (before 5.10).
    pub mappings: Option<u32>,
}

impl IommuLimits {
    /// The address behind the last that devices can use, where the kernel tells it and there is one.
    pub fn end(&self) -> Option<u64> {
        self.ranges.iter().map(|range| *range.end()).max()?.checked_add(1)
    }

    /// An address for `bytes` of memory: `wanted`, or the beginning of the first range that has room, in whole pages.
    pub(crate) fn room_for(&self, wanted: u64, bytes: u64) -> Option<u64> {
        let fits = |start: u64| {
            let last = start.checked_add(bytes)?.checked_sub(1)?;
            let inside = |range: &RangeInclusive<u64>| range.contains(&start) && range.contains(&last);
            (self.ranges.is_empty() || self.ranges.iter().any(inside)).then_some(start)
        };
        let begin = |range: &RangeInclusive<u64>| {
            fits(range.start().max(&PAGE_BYTES).checked_next_multiple_of(PAGE_BYTES)?)
        };
        fits(wanted).or_else(|| self.ranges.iter().find_map(begin))
    }

    /// Judges what only an open container tells: the IOMMU's address width, and how many mappings are left.
    ///
    /// # Errors
    /// `dma-addresses`, `dma-mappings`, with the numbers.
    pub fn judge(&self, address: PciAddress, needs: &DmaNeeds) -> Result<(), Refusal> {
        let holds = |piece: &Range<u64>| {
            let inside = |range: &RangeInclusive<u64>| {
                range.contains(&piece.start) && range.contains(&piece.end.saturating_sub(1))
            };
            piece.is_empty() || self.ranges.iter().any(inside)
        };
        if let Some(piece) = needs.ram.iter().find(|piece| !self.ranges.is_empty() && !holds(piece)) {
            let last = self.ranges.iter().map(|range| *range.end()).max().unwrap_or(0);
            let ranges: Vec<_> = self.ranges.iter().take(8).map(|range| Shown(range).to_string()).collect();
            let cause = format!(
                "its IOMMU reaches {} ({} bits), and the guest's memory from {:#x} to {:#x} is not in one of these",
                ranges.join(" and "),
                u64::BITS - last.leading_zeros(),
                piece.start,
                piece.end.saturating_sub(1)
            );
            let limit = self
                .ranges
                .iter()
                .find(|range| range.contains(&piece.start))
                .map_or(0, |range| range.end().saturating_add(1));
            return Err(addresses_refused(address, cause, limit, needs));
        }
        let wanted = u32::try_from(needs.ram.len()).unwrap_or(u32::MAX);
        if let Some(left) = self.mappings.filter(|left| *left < wanted) {
            let cause = format!(
                "the guest's memory takes {wanted} mappings of its IOMMU, and the kernel allows {left} more"
            );
            let remedy = "raise dma_entry_limit of the module vfio_iommu_type1";
            return Err(Refusal::new("dma-mappings", address, cause, remedy));
        }
        Ok(())
    }

    /// Reads the kernel's answer to `VFIO_IOMMU_GET_INFO`; what is cut off is not told.
    pub(crate) fn parse(answer: &[u8]) -> Self {
        let u32_at = |at: usize| answer.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes);
        let u64_at = |at: usize| answer.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_ne_bytes);
        let mut limits = Self::default();
        let has_capabilities = u32_at(offset_of!(vfio_iommu_type1_info, flags))
            .is_some_and(|flags| flags & VFIO_IOMMU_INFO_CAPS != 0);
        let mut next = u32_at(offset_of!(vfio_iommu_type1_info, cap_offset)).filter(|_| has_capabilities);
        let mut last = 0;
        // A chain that doesn't go forward ends here.
        while let Some(at) = next.and_then(|at| usize::try_from(at).ok()).filter(|at| *at > last) {
            last = at;
            match u32_at(at).map(|head| head & 0xffff) {
                Some(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) => {
                    let count =
                        u32_at(at + offset_of!(vfio_iommu_type1_info_cap_iova_range, nr_iovas)).unwrap_or(0);
                    let first = at + offset_of!(vfio_iommu_type1_info_cap_iova_range, iova_ranges);
                    let places = (first..)
                        .step_by(size_of::<vfio_iova_range>())
                        .take(usize::try_from(count).unwrap_or(0));
                    let range = |at| {
                        Some(
                            u64_at(at + offset_of!(vfio_iova_range, start))?
                                ..=u64_at(at + offset_of!(vfio_iova_range, end))?,
                        )
                    };
                    limits.ranges = places.map_while(range).collect();
                }
                Some(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL) => {
                    limits.mappings = u32_at(at + offset_of!(vfio_iommu_type1_info_dma_avail, avail));
                }
                _ => {}
            }
            next = u32_at(at + offset_of!(vfio_info_cap_header, next));
        }
        limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_for_a_device_lies_where_its_iommu_reaches() {
        let room = |ranges: &[RangeInclusive<u64>]| {
            IommuLimits { ranges: ranges.to_vec(), mappings: None }.room_for(0x10_0000, 0x5000)
        };
        assert_eq!(room(&[]), Some(0x10_0000), "the kernel doesn't say");
        assert_eq!(room(&[0..=0xfedf_ffff, 0xfef0_0000..=u64::MAX]), Some(0x10_0000));
        assert_eq!(room(&[0..=0x10_0fff, 0x20_0001..=0x30_0000]), Some(0x1000), "the first with room");
        assert_eq!(room(&[0..=0x4fff, 0x20_0001..=0x30_0000]), Some(0x20_1000));
        assert_eq!(room(&[0..=0x4fff, u64::MAX..=u64::MAX]), None);
    }
    use crate::fixture::{Fixture, at};
    use proptest::prelude::*;

    const NVME: &str = "0000:03:00.0";

    fn needs(memory_bytes: u64) -> DmaNeeds {
        let low = memory_bytes.min(0xc000_0000);
        let high = (1 << 32)..(1 << 32) + (memory_bytes - low);
        let ram = std::iter::once(0..low).chain((!high.is_empty()).then_some(high));
        DmaNeeds { ram: ram.collect(), emulated_vectors: 64, overhead_bytes: 1 << 20, set_aside_bytes: 0 }
    }

    fn judged(machine: &Fixture, memory_bytes: u64) -> Result<(), Refusal> {
        let host = machine.host();
        judge_dma(&host, &host.functions().unwrap(), &[at(NVME)], &needs(memory_bytes))
    }

    #[test]
    fn reserved_addresses_are_told_with_what_fits() {
        let machine = Fixture::typical();
        machine.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
        machine.write(
            "sys/kernel/iommu_groups/10/reserved_regions",
            "0x0000000000000000 0x0000000000ffffff direct-relaxable\n0x00000000fee00000 0x00000000feefffff msi\n\
             0x000000fd00000000 0x000000ffffffffff reserved\nnonsense\n",
        );
        assert_eq!(judged(&machine, 8 << 30), Ok(()));
        let refusal = judged(&machine, 1 << 40).unwrap_err();
        assert_eq!((refusal.code, refusal.subject.as_str()), ("dma-addresses", NVME));
        assert!(refusal.cause.contains("0xfd00000000 to 0xffffffffff"), "{refusal}");
        // 1012 GiB less the hole below 4 GiB.
        assert!(refusal.remedy.contains(&format!("at most {} MiB", 1011 * 1024)), "{refusal}");
    }

    #[test]
    fn what_cannot_be_locked_is_told_in_numbers() {
        let machine = Fixture::typical();
        machine.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
        machine.write("proc/meminfo", "MemTotal: 4194304 kB\nMemAvailable: 1048576 kB\n");
        assert_eq!(judged(&machine, 512 << 20), Ok(()));
        let refusal = judged(&machine, 1 << 30).unwrap_err();
        assert_eq!(refusal.code, "dma-memory");
        assert!(refusal.cause.contains("1025 MiB") && refusal.cause.contains("1024 MiB"), "{refusal}");
    }

    #[test]
    fn more_vectors_than_kvm_routes_are_refused() {
        let machine = Fixture::typical();
        machine.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
        let host = machine.host();
        let mut functions = host.functions().unwrap();
        let drive = functions.iter_mut().find(|function| function.address == at(NVME)).unwrap();
        drive.details.msix_vectors = 2048;
        let few = judge_dma(&host, &functions, &[at(NVME)], &needs(1 << 28));
        assert_eq!(few, Ok(()));
        let many = DmaNeeds { emulated_vectors: 2048, ..needs(1 << 28) };
        let refusal = judge_dma(&host, &functions, &[at(NVME)], &many).unwrap_err();
        assert_eq!(refusal.code, "too-many-vectors");
        assert!(refusal.cause.contains("2048") && refusal.cause.contains("2024"), "{refusal}");
    }

    #[test]
    fn a_containers_limits_are_read_and_kept() {
        let words = [
            100u32,
            3,
            0x1000,
            0,
            24,
            0, // flags: page sizes and capabilities, the first at 24
            1 << 16 | 3,
            36,
            65535, // mappings
            1 << 16 | 1,
            0,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            u32::MAX,
            0x7f,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let limits = IommuLimits::parse(&bytes);
        assert_eq!(limits.ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
        assert_eq!(limits.mappings, Some(65535));
        assert_eq!(limits.judge(at(NVME), &needs(500 << 30)), Ok(()));
        let refusal = limits.judge(at(NVME), &needs(512 << 30)).unwrap_err();
        assert_eq!(refusal.code, "dma-addresses");
        assert!(
            refusal.cause.contains("39 bits") && refusal.remedy.contains(&format!("{} MiB", 511 << 10)),
            "{refusal}"
        );
        let full = IommuLimits { mappings: Some(1), ..limits };
        assert_eq!(full.judge(at(NVME), &needs(1 << 30)), Ok(()));
        assert_eq!(full.judge(at(NVME), &needs(8 << 30)).unwrap_err().code, "dma-mappings");
        assert_eq!(
            IommuLimits::default().judge(at(NVME), &needs(1 << 40)),
            Ok(()),
            "what is not told is not judged"
        );
    }

    proptest! {
        #[test]
        fn any_answer_is_read(bytes in proptest::collection::vec(prop_oneof![0u8..64, any::<u8>()], 0..128)) {
            let _ = IommuLimits::parse(&bytes);
        }
    }
}
