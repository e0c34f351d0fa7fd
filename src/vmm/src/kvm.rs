//! KVM's descriptor, and a virtual machine made with it: what it must have, and what is turned on or off.

use std::{
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    ptr, slice,
    sync::Arc,
};

use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_BUS_LOCK_EXIT,
    KVM_CAP_X86_NOTIFY_VMEXIT, KVM_EXIT_IO, KVM_PMU_CAP_DISABLE, KVM_X86_NOTIFY_VMEXIT_ENABLED,
    KVM_X86_NOTIFY_VMEXIT_USER, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::{
    control::FIRST_MSI_GSI,
    error::{During, Error},
    layout,
};

/// How long a guest may keep a processor from taking any event, in ticks of its crystal clock
/// (`KVM_CAP_X86_NOTIFY_VMEXIT`), beyond a threshold that the processor adds by itself and that KVM's authors hold for enough.
const NOTIFY_WINDOW: u64 = 128 << 10;

/// Takes `/dev/kvm` over and makes a machine without processors, memory or devices.
pub(crate) fn open(kvm: OwnedFd) -> Result<(Kvm, Arc<VmFd>), Error> {
    // SAFETY: the descriptor is owned and given away whole; Kvm closes it.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    if kvm.get_api_version() != 12 {
        return Err(Error::Lacks("the stable API (or the descriptor is not /dev/kvm)"));
    }
    for (capability, name) in [
        (Cap::SplitIrqchip, "a split interrupt controller"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::UserMemory, "memory slots"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(Error::Lacks(name));
        }
    }
    let vm = kvm.create_vm().during("making a virtual machine")?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).during("placing KVM's pages")?;
    vm.set_tss_address(layout::KVM_TSS).during("placing KVM's pages")?;
    enable(&vm, KVM_CAP_SPLIT_IRQCHIP, u64::from(FIRST_MSI_GSI))
        .during("splitting the interrupt controller")?;
    harden(&vm)?;
    Ok((kvm, Arc::new(vm)))
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut wanted = kvm_enable_cap { cap, ..Default::default() };
    wanted.args[0] = argument;
    vm.enable_cap(&wanted)
}

/// Takes from the guest what it has no use for, and lets it not slow its neighbours down, where this host can. Which of
/// these there are is KVM's and the processor's business: Linux 5.18 and later can turn counters off; bus locks and
/// processors that take no interrupt are told of by Intel's from Sapphire Rapids on, bus locks also by AMD's Zen 5.
///
/// Exits that KVM could be told to leave out (`KVM_CAP_X86_DISABLE_EXITS`: HLT, PAUSE, MWAIT) all stay: an idle guest
/// gives its processor back, and one that spins is preempted for those it waits for.
fn harden(vm: &VmFd) -> Result<(), Error> {
    let has = |cap: u32, bits: u32| vm.check_extension_raw(cap.into()) as u32 & bits == bits;
    if has(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE) {
        enable(vm, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE.into()).during("turning counters off")?;
    }
    if has(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT) {
        enable(vm, KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT.into())
            .during("asking to be told of bus locks")?;
    }
    let notify = KVM_X86_NOTIFY_VMEXIT_ENABLED | KVM_X86_NOTIFY_VMEXIT_USER;
    if has(KVM_CAP_X86_NOTIFY_VMEXIT, notify) {
        enable(vm, KVM_CAP_X86_NOTIFY_VMEXIT, NOTIFY_WINDOW << 32 | u64::from(notify))
            .during("asking to be told of processors that take no interrupt")?;
    }
    Ok(())
}

/// The bytes of an exit for ports, and how many of them are one access: a string instruction brings several for the same port.
/// No bytes when the processor left the guest for another reason.
pub(crate) fn port_data(vcpu: &mut VcpuFd) -> (&mut [u8], usize) {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return (&mut [], 1);
    }
    // SAFETY: the reason says that the kernel filled in this one of the union's fields; all of them are plain numbers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (start, width) = (ptr::from_mut(run).cast::<u8>(), usize::from(io.size).max(1));
    let length = usize::from(io.size) * io.count as usize;
    // SAFETY: by KVM's interface the bytes lie so far behind the start of `kvm_run`, in the same mapping, which lives as long
    // as `vcpu`; they are this thread's until it runs the processor again, for which it needs `vcpu` back.
    (unsafe { slice::from_raw_parts_mut(start.add(io.data_offset as usize), length) }, width)
}
