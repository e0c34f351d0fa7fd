//! A virtual processor: what it is told of itself, how it starts, and its run loop.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::{
    boot::Entry,
    error::{During, Error},
    layout,
};

/// Bits that CPUID answers are edited by.
mod bit {
    /// Leaf 1 ECX: VMX (Intel's nested virtualisation).
    pub(super) const VMX: u32 = 1 << 5;
    /// Leaf 1 ECX: x2APIC.
    pub(super) const X2APIC: u32 = 1 << 21;
    /// Leaf 1 ECX: the local APIC's timer counts TSC ticks; KVM always has it, CPUID must tell.
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    /// Leaf 1 ECX: running under a hypervisor.
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// Leaf 1 EDX: more than one logical processor in a package.
    pub(super) const HTT: u32 = 1 << 28;
    /// Leaf 0x8000_0001 ECX: SVM (AMD's nested virtualisation).
    pub(super) const SVM: u32 = 1 << 2;
    /// Leaf 0x8000_0001 ECX: the performance counters of AMD's cores, north bridge and caches.
    pub(super) const AMD_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
    /// Leaf 0x8000_0001 ECX: AMD's topology leaves, which would tell the host's topology.
    pub(super) const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
}

/// The CPUID answers that KVM can give on this host, before they are made a processor's own.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).during("asking KVM for its CPUID")
}

/// Width of guest physical addresses: CPUID 0x8000_0008 EAX, bits 23:16 when set (KVM's own limit), else 7:0.
pub(crate) fn physical_bits(cpuid: &CpuId) -> u32 {
    let eax =
        cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008).map_or(36, |entry| entry.eax);
    match eax >> 16 & 0xFF {
        0 => eax & 0xFF,
        guest => guest.min(eax & 0xFF),
    }
}

/// CPUID for processor `id` of `count`: one package, one thread a core; nested virtualisation and performance counters
/// off.
fn cpuid_for(supported: &CpuId, id: u8, count: u8) -> Result<CpuId, Error> {
    // Bits of the APIC id that number a core of the package.
    let core_bits = u32::from(count).next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for mut entry in supported.as_slice().iter().copied() {
        match entry.function {
            1 => {
                entry.ecx |= bit::TSC_DEADLINE | bit::HYPERVISOR | bit::X2APIC;
                entry.ecx &= !bit::VMX;
                entry.ebx = entry.ebx & 0x0000_FFFF | u32::from(id) << 24 | u32::from(count) << 16;
                if count > 1 {
                    entry.edx |= bit::HTT;
                }
            }
            // Deterministic cache parameters: who shares a cache is the host's business.
            4 => entry.eax &= 0x3FFF,
            // Performance monitoring: none.
            0xA => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // The topology below replaces the host's.
            0xB | 0x1F | 0x8000_001D | 0x8000_001E | 0x8000_0022 => continue,
            0x8000_0001 => entry.ecx &= !(bit::SVM | bit::AMD_COUNTERS | bit::TOPOLOGY_EXTENSIONS),
            0x8000_0008 => entry.ecx = (core_bits << 12) | (u32::from(count) - 1),
            0x8000_000A => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
        entries.push(entry);
    }
    for (level, shift, processors, kind) in [(0, 0, 1, 1), (1, core_bits, u32::from(count), 2), (2, 0, 0, 0)]
    {
        entries.push(kvm_cpuid_entry2 {
            function: 0xB,
            index: level,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: kind << 8 | level,
            edx: u32::from(id),
            ..Default::default()
        });
    }
    CpuId::from_entries(&entries).map_err(|_| Error::Layout("more CPUID entries than KVM takes".into()))
}

/// Makes a new processor ready: CPUID and memory types; the first one starts at `entry`, the others wait for it.
pub(crate) fn prepare(
    vcpu: &VcpuFd,
    supported: &CpuId,
    id: u8,
    count: u8,
    entry: Entry,
) -> Result<(), Error> {
    vcpu.set_cpuid2(&cpuid_for(supported, id, count)?).during("setting CPUID")?;
    // IA32_MTRR_DEF_TYPE: on, write-back. Linux takes memory for uncached without it.
    let memory_types = kvm_msr_entry { index: 0x2FF, data: 1 << 11 | 6, ..Default::default() };
    let mut entries = vec![memory_types];
    if is_intel(supported) {
        // IA32_MISC_ENABLE: fast strings. Linux copies memory slowly where they are off, as they are by KVM's reset.
        entries.push(kvm_msr_entry { index: 0x1A0, data: 1, ..Default::default() });
    }
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Lacks("room for two MSRs"))?;
    if vcpu.set_msrs(&msrs).during("setting the memory types")? != entries.len() {
        return Err(Error::Lacks("the registers for memory types"));
    }
    if id == 0 {
        start_at(vcpu, entry)?;
    }
    Ok(())
}

/// The table of segments at [`layout::SEGMENTS`]: code at selector 0x10 and data at 0x18, both flat, as Linux's 32-bit
/// boot protocol has them; PVH leaves the selectors open.
pub(crate) const SEGMENTS: [u64; 4] = [0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];

/// The state in which PVH and Linux's 32-bit protocol start a kernel: 32-bit protected mode, flat segments, paging off.
/// Whether this is a processor of Intel's: leaf 0 says GenuineIntel.
fn is_intel(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|entry| entry.function == 0 && entry.ebx.to_le_bytes() == *b"Genu")
}

fn start_at(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut special = vcpu.get_sregs().during("reading a processor's state")?;
    let flat = |kind| kvm_segment {
        limit: u32::MAX,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    special.cs = kvm_segment { selector: 0x10, ..flat(0xB) };
    let data = kvm_segment { selector: 0x18, ..flat(0x3) };
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment { selector: 0x20, limit: 0x67, type_: 0xB, present: 1, ..Default::default() };
    special.gdt.base = layout::SEGMENTS;
    special.gdt.limit = size_of_val(&SEGMENTS) as u16 - 1;
    special.cr0 = 1;
    special.cr4 = 0;
    special.efer = 0;
    vcpu.set_sregs(&special).during("setting a processor's state")?;
    let Entry { address, ebx, esi } = entry;
    let registers = kvm_regs { rip: address, rbx: ebx, rsi: esi, rflags: 2, ..Default::default() };
    vcpu.set_regs(&registers).during("setting a processor's registers")
}

/// What a processor needs from the machine around it: answers to its accesses.
pub(crate) trait Bus {
    /// A read of a port.
    fn port_read(&mut self, port: u16, data: &mut [u8]);
    /// A write to a port; true when the guest has ended by it and this processor should rest.
    fn port_write(&mut self, port: u16, data: &[u8]);
    /// A read of guest physical memory that no memory slot has.
    fn memory_read(&mut self, address: u64, data: &mut [u8]);
    /// A write there.
    fn memory_write(&mut self, address: u64, data: &[u8]);
    /// The guest ended a level-triggered interrupt of the IOAPIC's.
    fn end_of_interrupt(&mut self, vector: u8);
    /// Counts an exit of the kinds not told above.
    fn other_exit(&mut self);
    /// This processor was called out of the guest; it may be held here.
    fn called(&mut self, vcpu: &mut VcpuFd);
}

/// Why a processor no longer runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Halt {
    /// A triple fault.
    TripleFault,
    /// KVM cannot go on: what it said.
    Fault(String),
}

/// Runs a processor until it cannot go on.
pub(crate) fn run(vcpu: &mut VcpuFd, bus: &mut impl Bus) -> Halt {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.memory_write(address, data),
            Ok(VcpuExit::IoapicEoi(vector)) => bus.end_of_interrupt(vector),
            Ok(VcpuExit::Shutdown) => return Halt::TripleFault,
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => bus.other_exit(),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Halt::Fault(format!("the processor refused to enter the guest (reason {reason:#x})"));
            }
            Ok(VcpuExit::InternalError) => {
                return Halt::Fault("KVM could not emulate an instruction of the guest's".into());
            }
            Ok(exit) => {
                return Halt::Fault(format!("KVM left the guest with an exit nobody asked for: {exit:?}"));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                bus.other_exit();
                bus.called(vcpu);
            }
            Err(error) => return Halt::Fault(format!("KVM_RUN failed: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 { function, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() }
    }

    fn answer(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).copied()
    }

    #[test]
    fn cpuid_tells_the_guest_of_itself_and_not_of_the_host() {
        let host =
            CpuId::from_entries(&[1, 4, 0xA, 0xB, 0x1F, 0x8000_0001, 0x8000_0008, 0x8000_001E].map(entry))
                .unwrap();
        let guest = cpuid_for(&host, 2, 3).unwrap();
        let one = answer(&guest, 1, 0).unwrap();
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xFF), (2, 3));
        assert_eq!(one.ecx & bit::VMX, 0);
        assert_eq!(answer(&guest, 0x8000_0001, 0).unwrap().ecx & bit::SVM, 0);
        assert_eq!(answer(&guest, 0xA, 0).unwrap().eax, 0);
        assert!(answer(&guest, 0x8000_001E, 0).is_none() && answer(&guest, 0x1F, 0).is_none());
        let core = answer(&guest, 0xB, 1).unwrap();
        assert_eq!((core.eax, core.ebx, core.edx), (2, 3, 2));
    }

    #[test]
    fn physical_width_is_the_least_told() {
        let width = |eax| {
            let entry = kvm_cpuid_entry2 { function: 0x8000_0008, eax, ..Default::default() };
            physical_bits(&CpuId::from_entries(&[entry]).unwrap())
        };
        assert_eq!(width(0x0000_3028), 40);
        assert_eq!(width(0x0030_3034), 48);
        assert_eq!(width(0x0034_3030), 48);
    }
}
