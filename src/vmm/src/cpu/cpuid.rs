//! What CPUID answers: a model, and what tells one processor from another.

use casemate_wire::{Cpu, Model};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{baseline, topology::Topology};
use crate::error::Error;

/// Bits that CPUID answers are edited by.
mod bit {
    /// Leaf 1 ECX: VMX (Intel's nested virtualisation).
    pub(super) const VMX: u32 = 1 << 5;
    /// Leaf 1 ECX: what belongs to performance counters and their buffers (DTES64, DS-CPL, PDCM).
    pub(super) const COUNTERS: u32 = 1 << 2 | 1 << 4 | 1 << 15;
    /// Leaf 1 ECX: x2APIC.
    pub(super) const X2APIC: u32 = 1 << 21;
    /// Leaf 1 ECX: the local APIC's timer counts TSC ticks; KVM always has it, CPUID must tell.
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    /// Leaf 1 ECX: running under a hypervisor.
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// Leaf 1 EDX: the debug store, where counters write to.
    pub(super) const DEBUG_STORE: u32 = 1 << 21;
    /// Leaf 1 EDX: more than one logical processor in a package.
    pub(super) const HTT: u32 = 1 << 28;
    /// Leaf 7 EDX: records of branches.
    pub(super) const BRANCH_RECORDS: u32 = 1 << 19;
    /// Leaf 0x8000_0001 ECX: SVM (AMD's nested virtualisation).
    pub(super) const SVM: u32 = 1 << 2;
    /// Leaf 0x8000_0001 ECX: the performance counters of AMD's cores, north bridge and caches.
    pub(super) const AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
    /// Leaf 0x8000_0001 ECX: AMD's topology leaves.
    pub(super) const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
}

/// What Linux may use of KVM, of leaf 0x4000_0001 EAX (`Documentation/virt/kvm/x86/cpuid.rst`), where this KVM has it: two
/// clocks and that they are stable (0, 3, 24), no delay after port I/O (1), page faults that the guest can sleep over (4,
/// 14), time that others had (5), and cheaper ends of interrupts, spinlocks, TLB flushes, interrupts between processors,
/// yields, and polling while idle (6, 7, 9, 11, 13, 12).
const PARAVIRTUAL: u32 = 0b0111_1010_1111_1011 | 1 << 24;

/// Leaf, in which each level of a topology is an index: threads, cores, the end.
const TOPOLOGY_LEAF: u32 = 0xB;
/// Its later form, where the model has it.
const TOPOLOGY_LEAF_2: u32 = 0x1F;

/// Who made the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vendor {
    Intel,
    Amd,
}

impl Vendor {
    /// As leaf 0 tells it, in EBX, EDX and ECX.
    pub(super) fn name(self) -> [u32; 3] {
        let word = u32::from_le_bytes;
        match self {
            Self::Intel => [word(*b"Genu"), word(*b"ineI"), word(*b"ntel")],
            Self::Amd => [word(*b"Auth"), word(*b"enti"), word(*b"cAMD")],
        }
    }

    fn of(cpuid: &CpuId) -> Option<Self> {
        let entry = entry_of(cpuid, 0, 0)?;
        [Self::Intel, Self::Amd].into_iter().find(|vendor| vendor.name() == [entry.ebx, entry.edx, entry.ecx])
    }
}

/// An answer of `cpuid`.
pub(super) fn entry_of(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).copied()
}

/// Width of guest physical addresses: CPUID 0x8000_0008 EAX, bits 23:16 when set (KVM's own limit), else 7:0.
pub(super) fn host_physical_bits(cpuid: &CpuId) -> u32 {
    let eax = entry_of(cpuid, 0x8000_0008, 0).map_or(36, |entry| entry.eax);
    match eax >> 16 & 0xFF {
        0 => eax & 0xFF,
        guest => guest.min(eax & 0xFF),
    }
}

/// The processors of a machine.
#[derive(Debug)]
pub(crate) struct Processors {
    entries: Vec<kvm_cpuid_entry2>,
    vendor: Option<Vendor>,
    topology: Topology,
    physical_bits: u32,
}

impl Processors {
    /// `vcpus` processors as `cpu` asks, on a host whose KVM can give `supported`.
    pub(crate) fn new(supported: &CpuId, cpu: &Cpu, vcpus: u8) -> Result<Self, Error> {
        let topology = Topology::new(vcpus, cpu.sockets, cpu.threads_per_core).ok_or_else(|| {
            let Cpu { sockets, threads_per_core, .. } = cpu;
            Error::Message(format!("{vcpus} vCPUs, {sockets} sockets, {threads_per_core} threads a core"))
        })?;
        let vendor = Vendor::of(supported);
        let (entries, physical_bits) = match (cpu.model, vendor) {
            (Model::Host, _) => (of_host(supported, cpu.nested)?, host_physical_bits(supported)),
            (Model::BaselineV2, Some(vendor)) => {
                let entries = baseline::entries(supported, vendor).map_err(|missing| {
                    Error::Processor(format!("this host lacks what the model baseline-v2 has: {missing}"))
                })?;
                (entries, baseline::PHYSICAL_BITS)
            }
            (Model::BaselineV2, None) => {
                return Err(Error::Processor(
                    "the model baseline-v2 is for Intel's and AMD's processors".into(),
                ));
            }
        };
        Ok(Self { entries, vendor, topology, physical_bits })
    }

    /// How they are arranged.
    pub(crate) fn topology(&self) -> Topology {
        self.topology
    }

    /// Width of the guest's physical addresses.
    pub(crate) fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Whether they are Intel's.
    pub(crate) fn is_intel(&self) -> bool {
        self.vendor == Some(Vendor::Intel)
    }

    /// CPUID of processor `vcpu`.
    pub(crate) fn cpuid(&self, vcpu: u8) -> Result<CpuId, Error> {
        let topology = self.topology;
        let apic_id = topology.apic_id(vcpu);
        let mut entries: Vec<_> = self.entries.iter().map(|entry| self.at(*entry, apic_id)).collect();
        let leaf = |function| entries.iter().find(|entry| entry.function == function);
        let top = leaf(0).map_or(0, |entry| entry.eax);
        let amd = leaf(0x8000_0001).is_some_and(|entry| entry.ecx & bit::TOPOLOGY_EXTENSIONS != 0);
        for function in [TOPOLOGY_LEAF, TOPOLOGY_LEAF_2].into_iter().filter(|function| *function <= top) {
            let levels = [
                (topology.thread_bits(), topology.threads(), 1),
                (topology.package_shift(), topology.per_package(), 2),
                (0, 0, 0),
            ];
            entries.extend((0..).zip(levels).map(|(index, (eax, processors, kind))| kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx: processors.into(),
                ecx: kind << 8 | index,
                edx: apic_id.into(),
                ..Default::default()
            }));
        }
        if amd {
            entries.push(kvm_cpuid_entry2 {
                function: 0x8000_001E,
                eax: apic_id.into(),
                ebx: u32::from(topology.core_id(vcpu)) | u32::from(topology.threads() - 1) << 8,
                // One node a package.
                ecx: topology.socket(vcpu).into(),
                ..Default::default()
            });
        }
        CpuId::from_entries(&entries).map_err(|_| Error::Layout("more CPUID entries than KVM takes".into()))
    }

    /// An entry of the model, made that of the processor with this APIC id.
    fn at(&self, mut entry: kvm_cpuid_entry2, apic_id: u8) -> kvm_cpuid_entry2 {
        let topology = self.topology;
        let per_package = u32::from(topology.per_package());
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xFFFF | u32::from(apic_id) << 24 | per_package << 16;
                entry.edx &= !bit::HTT;
                if per_package > 1 {
                    entry.edx |= bit::HTT;
                }
            }
            // Caches (bits 4:0 tell a kind): the last level is shared by a package, the others by a core's threads.
            4 | 0x8000_001D if entry.eax & 0x1F != 0 => {
                let shared = match entry.eax >> 5 & 0b111 {
                    0..=2 => topology.thread_bits(),
                    _ => topology.package_shift(),
                };
                entry.eax = entry.eax & 0x3FFF | ((1 << shared) - 1) << 14;
                if entry.function == 4 {
                    entry.eax |= ((1 << topology.core_bits()) - 1) << 26;
                }
            }
            0x8000_0008 => entry.ecx = topology.package_shift() << 12 | (per_package - 1),
            _ => {}
        }
        entry
    }
}

/// The host's processor without its topology and performance counters, and without virtualisation unless it is asked for.
fn of_host(supported: &CpuId, nested: bool) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    let vendor = Vendor::of(supported);
    let amd = vendor == Some(Vendor::Amd);
    let ecx = |function| entry_of(supported, function, 0).map_or(0, |entry| entry.ecx);
    if nested && ecx(1) & bit::VMX == 0 && ecx(0x8000_0001) & bit::SVM == 0 {
        let module = if amd { "kvm_amd" } else { "kvm_intel" };
        return Err(Error::Processor(format!(
            "this host's KVM gives guests no virtualisation: load {module} with nested=1"
        )));
    }
    let hidden = if nested { 0 } else { u32::MAX };
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for mut entry in supported.as_slice().iter().copied() {
        match entry.function {
            0 => entry.eax = entry.eax.max(TOPOLOGY_LEAF),
            1 => {
                entry.ecx |= bit::TSC_DEADLINE | bit::HYPERVISOR | bit::X2APIC;
                entry.ecx &= !(bit::VMX & hidden | bit::COUNTERS);
                entry.edx &= !bit::DEBUG_STORE;
            }
            7 if entry.index == 0 => entry.edx &= !bit::BRANCH_RECORDS,
            0x4000_0001 => (entry.eax, entry.edx) = (entry.eax & PARAVIRTUAL, 0),
            // Performance counters and records of branches: none.
            0xA | 0x1C | 0x23 | 0x8000_0022 => continue,
            // The topology is our own.
            TOPOLOGY_LEAF | TOPOLOGY_LEAF_2 | 0x8000_001E | 0x8000_0026 => continue,
            // AMD's is told by leaves of its own, and by them alone where cores have threads.
            0x8000_0000 if amd => entry.eax = entry.eax.max(0x8000_001E),
            0x8000_0001 => {
                entry.ecx &= !(bit::SVM & hidden | bit::AMD_COUNTERS);
                match vendor {
                    Some(Vendor::Amd) => entry.ecx |= bit::TOPOLOGY_EXTENSIONS,
                    // A reserved bit.
                    Some(Vendor::Intel) => entry.ecx &= !bit::TOPOLOGY_EXTENSIONS,
                    None => {}
                }
            }
            0x8000_000A if !nested => continue,
            _ => {}
        }
        entries.push(entry);
    }
    if amd && entry_of(supported, 0x8000_001D, 0).is_none_or(|entry| entry.eax == 0) {
        entries.retain(|entry| entry.function != 0x8000_001D);
        entries.extend(baseline::caches(0x8000_001D));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 { function, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() }
    }

    fn host(vendor: Vendor) -> CpuId {
        let [ebx, edx, ecx] = vendor.name();
        let zero = kvm_cpuid_entry2 { eax: 0x1F, ebx, edx, ecx, ..Default::default() };
        let functions =
            [1, 4, 0xA, 0xB, 0x1F, 0x4000_0001, 0x8000_0001, 0x8000_0008, 0x8000_000A, 0x8000_001E];
        let entries: Vec<_> = [zero].into_iter().chain(functions.map(entry)).collect();
        CpuId::from_entries(&entries).unwrap()
    }

    fn cpu(sockets: u8, threads_per_core: u8) -> Cpu {
        Cpu { model: Model::Host, sockets, threads_per_core, nested: false, pins: Vec::new() }
    }

    #[test]
    fn cpuid_tells_the_guest_of_itself_and_not_of_the_host() {
        let processors = Processors::new(&host(Vendor::Intel), &cpu(1, 1), 3).unwrap();
        let guest = processors.cpuid(2).unwrap();
        let one = entry_of(&guest, 1, 0).unwrap();
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xFF), (2, 3));
        assert_eq!(one.ecx & bit::VMX, 0);
        assert_eq!(entry_of(&guest, 0x8000_0001, 0).unwrap().ecx & bit::SVM, 0);
        assert!([0xA, 0x8000_000A, 0x8000_0022].iter().all(|leaf| entry_of(&guest, *leaf, 0).is_none()));
        assert_eq!(entry_of(&guest, 0x4000_0001, 0).unwrap().eax, PARAVIRTUAL);
        for leaf in [TOPOLOGY_LEAF, TOPOLOGY_LEAF_2] {
            let core = entry_of(&guest, leaf, 1).unwrap();
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        }
        let cache = entry_of(&guest, 4, 0).unwrap();
        assert_eq!((cache.eax >> 14 & 0xFFF, cache.eax >> 26), (3, 3));
    }

    #[test]
    fn threads_cores_and_sockets_are_told_to_amd_and_intel() {
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let guest = Processors::new(&host(vendor), &cpu(2, 2), 12).unwrap().cpuid(9).unwrap();
            let level = |index| entry_of(&guest, TOPOLOGY_LEAF, index).map(|e| (e.eax, e.ebx, e.ecx, e.edx));
            // Package 1, core 1 of 3, thread 1 of 2.
            assert_eq!(level(0), Some((1, 2, 0x100, 0b1011)));
            assert_eq!(level(1), Some((3, 6, 0x201, 0b1011)));
            assert_eq!(level(2).map(|level| level.2), Some(2));
            let amd = entry_of(&guest, 0x8000_001E, 0).map(|e| (e.eax, e.ebx, e.ecx));
            assert_eq!(amd, (vendor == Vendor::Amd).then_some((0b1011, 1 << 8 | 1, 1)));
            assert_eq!(entry_of(&guest, 0x8000_0008, 0).unwrap().ecx, 3 << 12 | 5);
        }
    }

    #[test]
    fn virtualisation_is_there_when_asked_for() {
        let nested = Cpu { nested: true, ..cpu(1, 1) };
        let guest = Processors::new(&host(Vendor::Amd), &nested, 1).unwrap().cpuid(0).unwrap();
        assert_ne!(entry_of(&guest, 0x8000_0001, 0).unwrap().ecx & bit::SVM, 0);
        assert!(entry_of(&guest, 0x8000_000A, 0).is_some());
        let none = CpuId::from_entries(&[kvm_cpuid_entry2::default()]).unwrap();
        let refused = Processors::new(&none, &nested, 1).unwrap_err();
        assert_eq!(refused.code(), "vmm-processor");
    }

    #[test]
    fn physical_width_is_the_least_told() {
        let width = |eax| {
            let entry = kvm_cpuid_entry2 { function: 0x8000_0008, eax, ..Default::default() };
            host_physical_bits(&CpuId::from_entries(&[entry]).unwrap())
        };
        assert_eq!(width(0x0000_3028), 40);
        assert_eq!(width(0x0030_3034), 48);
        assert_eq!(width(0x0034_3030), 48);
    }
}
