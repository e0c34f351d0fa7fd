//! `baseline-v2`: a processor that is the same on every host, so that a guest could go on elsewhere.
//!
//! It is made from the lists below, never by taking things away from the host's: what a later processor or kernel adds
//! cannot leak in. It has the second level of the x86-64 psABI, and AES and carry-less multiplication, which every
//! processor with an IOMMU has. Family, model and stepping are those of a real processor that has all the known flaws of
//! its vendor's, so that a guest takes no precaution too few, wherever it runs.
//!
//! One thing is taken from the host: the controls of speculation. A guest without them cannot keep its own programs apart;
//! which they are depends on the vendor and on up-to-date microcode.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::cpuid::{Vendor, entry_of};

/// Width of a guest's physical addresses: 1 TiB. Every server has as much.
pub(super) const PHYSICAL_BITS: u32 = 40;
const VIRTUAL_BITS: u32 = 48;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// A bit of CPUID: leaf, register, position, and the name Linux shows it under.
type Bit = (u32, Register, u8, &'static str);

/// What the host must have; where one is missing, the guest is refused.
const REQUIRED: &[Bit] = &[
    (1, Ecx, 0, "sse3"),
    (1, Ecx, 1, "pclmulqdq"),
    (1, Ecx, 9, "ssse3"),
    (1, Ecx, 13, "cx16"),
    (1, Ecx, 19, "sse4_1"),
    (1, Ecx, 20, "sse4_2"),
    (1, Ecx, 21, "x2apic"),
    (1, Ecx, 23, "popcnt"),
    (1, Ecx, 25, "aes"),
    (1, Edx, 0, "fpu"),
    (1, Edx, 2, "de"),
    (1, Edx, 3, "pse"),
    (1, Edx, 4, "tsc"),
    (1, Edx, 5, "msr"),
    (1, Edx, 6, "pae"),
    (1, Edx, 7, "mce"),
    (1, Edx, 8, "cx8"),
    (1, Edx, 9, "apic"),
    (1, Edx, 11, "sep"),
    (1, Edx, 12, "mtrr"),
    (1, Edx, 13, "pge"),
    (1, Edx, 14, "mca"),
    (1, Edx, 15, "cmov"),
    (1, Edx, 16, "pat"),
    (1, Edx, 17, "pse36"),
    (1, Edx, 19, "clflush"),
    (1, Edx, 23, "mmx"),
    (1, Edx, 24, "fxsr"),
    (1, Edx, 25, "sse"),
    (1, Edx, 26, "sse2"),
    (0x8000_0001, Ecx, 0, "lahf_lm"),
    (0x8000_0001, Edx, 11, "syscall"),
    (0x8000_0001, Edx, 20, "nx"),
    (0x8000_0001, Edx, 27, "rdtscp"),
    (0x8000_0001, Edx, 29, "lm"),
    // KVM's own, in every kernel that Casemate runs on.
    (0x4000_0001, Eax, 1, "kvm nop_io_delay"),
    (0x4000_0001, Eax, 3, "kvm clock"),
    (0x4000_0001, Eax, 6, "kvm eoi"),
    (0x4000_0001, Eax, 7, "kvm unhalt"),
    (0x4000_0001, Eax, 11, "kvm send_ipi"),
    (0x4000_0001, Eax, 24, "kvm stable clock"),
];

/// What KVM does by itself, whatever the processor has: the local APIC's deadline timer, TSC_ADJUST, a timer that runs
/// while a processor sleeps; and that there is a hypervisor.
const GIVEN: &[Bit] = &[
    (1, Ecx, 24, "tsc_deadline_timer"),
    (1, Ecx, 31, "hypervisor"),
    (6, Eax, 2, "arat"),
    (7, Ebx, 1, "tsc_adjust"),
];

/// The controls of speculation, each where the host has it.
const SPECULATION: &[Bit] = &[
    (7, Edx, 10, "md_clear"),
    (7, Edx, 26, "ibrs"),
    (7, Edx, 27, "stibp"),
    (7, Edx, 28, "flush_l1d"),
    (7, Edx, 31, "ssbd"),
    (0x8000_0008, Ebx, 12, "amd_ibpb"),
    (0x8000_0008, Ebx, 14, "amd_ibrs"),
    (0x8000_0008, Ebx, 15, "amd_stibp"),
    (0x8000_0008, Ebx, 24, "amd_ssbd"),
];

/// AMD repeats these bits of leaf 1 EDX in leaf 0x8000_0001 EDX.
const REPEATED_BY_AMD: u32 = 0x0183_F3FF;
/// AMD's topology leaves are there (leaf 0x8000_0001 ECX).
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Leaf 1 EBX: cache lines of 64 bytes, in units of 8.
const CLFLUSH_LINE: u32 = 8 << 8;
const BRAND: &[u8; 48] = b"Casemate baseline-v2\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Caches: kind (1 data, 2 instructions, 3 both), level, KiB, ways.
const CACHES: [(u32, u32, u32, u32); 4] = [(1, 1, 32, 8), (2, 1, 32, 8), (3, 2, 512, 8), (3, 3, 16384, 16)];

fn register(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

fn has(host: &CpuId, (leaf, of, bit, _): Bit) -> bool {
    entry_of(host, leaf, 0).is_some_and(|entry| register(&entry, of) & 1 << bit != 0)
}

/// A leaf of the listed bits. Nothing else of `host` gets in.
fn listed(host: &CpuId, leaf: u32) -> kvm_cpuid_entry2 {
    let speculation = SPECULATION.iter().filter(|bit| has(host, **bit));
    let bits = REQUIRED.iter().chain(GIVEN).chain(speculation).filter(|bit| bit.0 == leaf);
    let of = |wanted| bits.clone().filter(|bit| bit.1 == wanted).fold(0, |sum, bit| sum | 1 << bit.2);
    kvm_cpuid_entry2 {
        function: leaf,
        eax: of(Eax),
        ebx: of(Ebx),
        ecx: of(Ecx),
        edx: of(Edx),
        ..Default::default()
    }
}

/// The processor, but for what tells one vCPU from another. The error names what the host lacks.
pub(super) fn entries(host: &CpuId, vendor: Vendor) -> Result<Vec<kvm_cpuid_entry2>, String> {
    let mut missing: Vec<&str> = REQUIRED.iter().filter(|bit| !has(host, **bit)).map(|bit| bit.3).collect();
    if super::cpuid::host_physical_bits(host) < PHYSICAL_BITS {
        missing.push("physical addresses of 40 bits");
    }
    if !missing.is_empty() {
        return Err(missing.join(", "));
    }
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let amd = vendor == Vendor::Amd;
    let [name_b, name_d, name_c] = vendor.name();
    // Skylake for servers, and the second EPYC: of the first, Linux guesses which cores share a cache, and asks no CPUID.
    let signature = if amd { 0x0083_0F10 } else { 0x0005_0654 };
    let (top, top_vendor) = if amd { (0x8000_001E, [name_b, name_c, name_d]) } else { (0x8000_0008, [0; 3]) };
    let mut features = listed(host, 1);
    (features.eax, features.ebx) = (signature, CLFLUSH_LINE);
    let mut extended = listed(host, 0x8000_0001);
    if amd {
        extended.eax = signature;
        extended.ecx |= TOPOLOGY_EXTENSIONS;
        extended.edx |= features.edx & REPEATED_BY_AMD;
    }
    let mut widths = listed(host, 0x8000_0008);
    widths.eax = VIRTUAL_BITS << 8 | PHYSICAL_BITS;
    let kvm = [u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), u32::from_le_bytes(*b"M\0\0\0")];
    let mut entries = vec![
        leaf(0, [0xB, name_b, name_c, name_d]),
        features,
        listed(host, 6),
        kvm_cpuid_entry2 { flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..listed(host, 7) },
        leaf(0x4000_0000, [0x4000_0001, kvm[0], kvm[1], kvm[2]]),
        listed(host, 0x4000_0001),
        leaf(0x8000_0000, [top, top_vendor[0], top_vendor[1], top_vendor[2]]),
        extended,
        // 512 KiB of second level, 8 ways, lines of 64 bytes; 16 MiB of third.
        leaf(0x8000_0006, [0, 0, 512 << 16 | 6 << 12 | 64, if amd { 32 << 18 | 8 << 12 | 64 } else { 0 }]),
        leaf(0x8000_0007, [0; 4]),
        widths,
    ];
    for (part, function) in BRAND.chunks_exact(16).zip(0x8000_0002..) {
        let words = part
            .chunks_exact(4)
            .map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte)));
        let mut registers = [0; 4];
        registers.iter_mut().zip(words).for_each(|(register, word)| *register = word);
        entries.push(leaf(function, registers));
    }
    if !amd {
        // "See leaf 4".
        entries.push(leaf(2, [0x00FF_FF01, 0, 0, 0]));
    }
    entries.extend(caches(if amd { 0x8000_001D } else { 4 }));
    Ok(entries)
}

/// The caches, as leaf 4 of Intel's and 0x8000_001D of AMD's tell them. Who shares which is filled in later.
pub(super) fn caches(function: u32) -> impl Iterator<Item = kvm_cpuid_entry2> {
    const LINE_BYTES: u32 = 64;
    const SELF_INITIALISING: u32 = 1 << 8;
    let end = kvm_cpuid_entry2 { index: CACHES.len() as u32, ..Default::default() };
    let cache = move |(index, (kind, level, kib, ways)): (u32, (u32, u32, u32, u32))| kvm_cpuid_entry2 {
        index,
        eax: kind | level << 5 | SELF_INITIALISING,
        ebx: (LINE_BYTES - 1) | (ways - 1) << 22,
        ecx: (kib << 10) / (LINE_BYTES * ways) - 1,
        ..Default::default()
    };
    let entries = (0..).zip(CACHES).map(cache).chain([end]);
    entries.map(move |entry| kvm_cpuid_entry2 { function, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..entry })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEAVES: [u32; 12] =
        [0, 1, 2, 4, 6, 7, 0xD, 0x4000_0001, 0x8000_0001, 0x8000_0006, 0x8000_0007, 0x8000_0008];

    fn host(words: &[[u32; 4]]) -> CpuId {
        let leaf = |(function, words): (u32, [u32; 4])| {
            let [eax, ebx, ecx, edx] = words;
            let mut entry = kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
            for bit in REQUIRED.iter().filter(|bit| bit.0 == function) {
                let register = match bit.1 {
                    Eax => &mut entry.eax,
                    Ebx => &mut entry.ebx,
                    Ecx => &mut entry.ecx,
                    Edx => &mut entry.edx,
                };
                *register |= 1 << bit.2;
            }
            if function == 0x8000_0008 {
                entry.eax = entry.eax & !0x00FF_00FF | 46;
            }
            entry
        };
        let entries: Vec<_> = LEAVES.into_iter().zip(words.iter().copied()).map(leaf).collect();
        CpuId::from_entries(&entries).unwrap()
    }

    fn bytes(entries: &[kvm_cpuid_entry2]) -> Vec<(u32, u32, [u32; 4])> {
        entries.iter().map(|e| (e.function, e.index, [e.eax, e.ebx, e.ecx, e.edx])).collect()
    }

    /// All bits of these lists' leaves that the host decides.
    fn without_speculation(mut host: CpuId) -> CpuId {
        for entry in host.as_mut_slice() {
            for bit in SPECULATION.iter().filter(|bit| bit.0 == entry.function) {
                match bit.1 {
                    Ebx => entry.ebx &= !(1 << bit.2),
                    _ => entry.edx &= !(1 << bit.2),
                }
            }
        }
        host
    }

    proptest! {
        /// Whatever else two hosts have, a guest of the baseline sees the same, but for the controls of speculation.
        #[test]
        fn it_is_the_same_on_every_host(one in any::<[[u32; 4]; 12]>(), other in any::<[[u32; 4]; 12]>()) {
            for vendor in [Vendor::Intel, Vendor::Amd] {
                let plain = |words: &[[u32; 4]]| entries(&without_speculation(host(words)), vendor).unwrap();
                prop_assert_eq!(bytes(&plain(&one)), bytes(&plain(&other)));
            }
        }

        /// Of the host, only listed bits are given, and each of those as the host has it.
        #[test]
        fn of_the_host_only_controls_of_speculation_get_in(words in any::<[[u32; 4]; 12]>()) {
            let host = host(&words);
            let with = entries(&host, Vendor::Amd).unwrap();
            let without = entries(&without_speculation(host.clone()), Vendor::Amd).unwrap();
            for (with, without) in with.iter().zip(&without) {
                for of in [Eax, Ebx, Ecx, Edx] {
                    let differ = register(with, of) ^ register(without, of);
                    let wanted = SPECULATION.iter().filter(|bit| bit.0 == with.function && bit.1 == of && has(&host, **bit));
                    prop_assert_eq!(differ, wanted.fold(0, |sum, bit| sum | 1 << bit.2));
                }
            }
        }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let full = host(&[[0; 4]; 12]);
        for bit in REQUIRED {
            let mut poor = full.clone();
            let entry = poor.as_mut_slice().iter_mut().find(|entry| entry.function == bit.0).unwrap();
            match bit.1 {
                Eax => entry.eax &= !(1 << bit.2),
                Ebx => entry.ebx &= !(1 << bit.2),
                Ecx => entry.ecx &= !(1 << bit.2),
                Edx => entry.edx &= !(1 << bit.2),
            }
            assert_eq!(entries(&poor, Vendor::Intel).unwrap_err(), bit.3);
        }
        let mut narrow = full;
        narrow.as_mut_slice().iter_mut().find(|entry| entry.function == 0x8000_0008).unwrap().eax = 39;
        assert!(entries(&narrow, Vendor::Amd).unwrap_err().contains("40 bits"));
    }

    #[test]
    fn caches_have_their_sizes() {
        let sizes: Vec<u32> = caches(4)
            .filter(|cache| cache.eax != 0)
            .map(|cache| ((cache.ebx >> 22) + 1) * ((cache.ebx & 0xFFF) + 1) * (cache.ecx + 1))
            .collect();
        assert_eq!(sizes, [32 << 10, 32 << 10, 512 << 10, 16 << 20]);
    }
}
