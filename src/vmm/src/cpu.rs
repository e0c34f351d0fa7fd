//! A virtual processor: what it is told of itself, how it starts, and its run loop.

use std::{thread, time::Duration};

use kvm_bindings::{
    CpuId, KVM_EXIT_NOTIFY, KVM_EXIT_X86_BUS_LOCK, KVM_MAX_CPUID_ENTRIES, KVM_RUN_X86_BUS_LOCK, Msrs,
    kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::{
    boot::Entry,
    error::{During, Error},
    kvm, layout,
};

mod baseline;
mod cpuid;
mod topology;

pub(crate) use cpuid::Processors;

/// The CPUID answers that KVM can give on this host, before they are made a processor's own.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).during("asking KVM for its CPUID")
}

/// Makes a new processor ready: CPUID and memory types; the first one starts at `entry`, the others wait for it.
pub(crate) fn prepare(vcpu: &VcpuFd, processors: &Processors, id: u8, entry: Entry) -> Result<(), Error> {
    vcpu.set_cpuid2(&processors.cpuid(id)?).during("setting CPUID")?;
    // IA32_MTRR_DEF_TYPE: on, write-back. Linux takes memory for uncached without it.
    let memory_types = kvm_msr_entry { index: 0x2FF, data: 1 << 11 | 6, ..Default::default() };
    let mut entries = vec![memory_types];
    if processors.is_intel() {
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
    /// Counts an exit for ports; the accesses follow, several where a string instruction makes them.
    fn port_exit(&mut self);
    /// A read of a port, of 1, 2 or 4 bytes.
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
    /// Counts a lock of the host's memory bus, for which this processor is held back.
    fn bus_lock(&mut self);
}

/// Why a processor no longer runs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Halt {
    /// A triple fault.
    TripleFault,
    /// KVM cannot go on: what it said.
    Fault(String),
}

/// How long a processor rests that has locked the memory bus: what it does slows all others of the host, other guests'
/// too.
const BUS_LOCK_PAUSE: Duration = Duration::from_millis(1);

/// Runs a processor until it cannot go on.
pub(crate) fn run(vcpu: &mut VcpuFd, bus: &mut impl Bus) -> Halt {
    loop {
        // Told beside the reason of the last exit, where that was another.
        if u32::from(vcpu.get_kvm_run().flags) & KVM_RUN_X86_BUS_LOCK != 0 {
            bus.bus_lock();
            thread::park_timeout(BUS_LOCK_PAUSE);
        }
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, _)) => {
                bus.port_exit();
                let (data, width) = kvm::port_data(vcpu);
                data.chunks_mut(width).for_each(|access| bus.port_read(port, access));
            }
            Ok(VcpuExit::IoOut(port, _)) => {
                bus.port_exit();
                let (data, width) = kvm::port_data(vcpu);
                data.chunks(width).for_each(|access| bus.port_write(port, access));
            }
            Ok(VcpuExit::MmioRead(address, data)) => bus.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.memory_write(address, data),
            Ok(VcpuExit::IoapicEoi(vector)) => bus.end_of_interrupt(vector),
            Ok(VcpuExit::Shutdown) => return Halt::TripleFault,
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => bus.other_exit(),
            Ok(VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK)) => bus.other_exit(),
            Ok(VcpuExit::Unsupported(KVM_EXIT_NOTIFY)) => {
                return Halt::Fault("a processor let no interrupt in for too long".into());
            }
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
