//! INTx of assigned functions: lines to the IOAPIC's pins.
//!
//! KVM can't do it by itself when the IOAPIC is in user space. VFIO masks the device when it interrupts, and signals an
//! eventfd; a thread that waits for it raises the pin. When the guest ends the interrupt, the pin is lowered and a second
//! eventfd tells VFIO to unmask. If the device still asserts its line, it all begins again, so nothing is lost.

use std::sync::Arc;

use casemate_passthrough::VfioDevice;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    error::{During, Error},
    platform::{SharedIoApic, lock},
};

/// The guest's end of a line: which pin it comes in at, and how its device is let interrupt again.
pub(crate) struct Intx {
    /// The IOAPIC's pin.
    pub(crate) pin: u8,
    unmask: EventFd,
}

impl Intx {
    /// Lets the device interrupt again.
    pub(crate) fn unmask(&self) {
        // It fails only when the counter is full, and then VFIO has been told often enough.
        let _ = self.unmask.write(1);
    }
}

/// The device's end of a line.
pub(crate) struct IntxSource {
    pin: u8,
    trigger: EventFd,
    /// The eventfd is heard as long as the device is open.
    _device: Arc<VfioDevice>,
}

impl IntxSource {
    /// Waits for the device's interrupts and raises the pin at each; returns when the eventfd can't be read.
    pub(crate) fn run(self, ioapic: &SharedIoApic) {
        while wait(&self.trigger) {
            lock(ioapic).raise_until_eoi(self.pin);
        }
    }
}

/// Waits for a signal; `false` when none can come.
fn wait(event: &EventFd) -> bool {
    loop {
        match event.read() {
            Ok(_) => return true,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("casemate-vmm: an INTx line cannot be heard: {error}");
                return false;
            }
        }
    }
}

/// Turns a device's INTx on and wires it to `pin`.
pub(crate) fn connect(device: &Arc<VfioDevice>, address: &str, pin: u8) -> Result<(Intx, IntxSource), Error> {
    // The trigger blocks its reader; the unmasker's counter is drained by the kernel.
    let trigger = EventFd::new(libc::EFD_CLOEXEC).during("making an eventfd")?;
    let unmask = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).during("making an eventfd")?;
    device.set_intx(&trigger, &unmask).map_err(|error| Error::device(address, error))?;
    Ok((Intx { pin, unmask }, IntxSource { pin, trigger, _device: Arc::clone(device) }))
}
