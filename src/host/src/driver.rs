//! Moving a function between drivers, each step within its deadline.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use casemate_spec::{PciAddress, Refusal};

use crate::{
    host::{Host, attribute, link_name},
    ledger::DeviceRecord,
    sys::child,
    variant::{self, is_vfio_driver},
};

/// The driver that hands functions to guests.
pub(crate) const VFIO: &str = "vfio-pci";
/// How often a function is taken from VFIO's driver before something else is at work.
const MOVES_MAX: usize = 3;
const POLL: Duration = Duration::from_millis(5);

/// The driver that has the function now.
pub(crate) fn current(host: &Host, address: PciAddress) -> Option<String> {
    link_name(host.pci(address).join("driver"))
}

/// What stands in `driver_override`; the kernel shows `(null)` for nothing.
pub(crate) fn driver_override(host: &Host, address: PciAddress) -> Option<String> {
    attribute(host.pci(address).join("driver_override")).filter(|name| !name.is_empty() && name != "(null)")
}

/// Sets `driver_override`, or clears it.
pub(crate) fn set_driver_override(
    host: &Host,
    address: PciAddress,
    name: Option<&str>,
) -> Result<(), Refusal> {
    // The store takes the device's lock, which a hanging unbind holds: this can hang too.
    let text = format!("{}\n", name.unwrap_or_default());
    let written =
        child::write(&host.pci(address).join("driver_override"), text.as_bytes(), host.deadlines.unbind);
    written.map_err(|error| {
        failed("device-bind-failed", address, &format!("its driver_override cannot be set: {error}"))
    })
}

/// Makes its driver let go of it. No driver is no error.
pub(crate) fn unbind(host: &Host, address: PciAddress) -> Result<(), Refusal> {
    let Some(driver) = current(host, address) else { return Ok(()) };
    let path = host.pci(address).join("driver/unbind");
    let timeout = || {
        let cause =
            format!("driver {driver} did not let go of it within {} s", host.deadlines.unbind.as_secs_f32());
        Refusal::new(
            "device-unbind-timeout",
            address,
            cause,
            "end what uses the device; if nothing does, restart the host",
        )
    };
    match child::write(&path, address.to_string().as_bytes(), host.deadlines.unbind) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(timeout()),
        // It went by itself meanwhile.
        Err(_) if current(host, address).is_none() => {}
        Err(error) => {
            return Err(failed("device-bind-failed", address, &format!("driver {driver} kept it: {error}")));
        }
    }
    wait(host.deadlines.unbind, || current(host, address).is_none()).then_some(()).ok_or_else(timeout)
}

/// Takes a function from whatever driver has it to VFIO's: to that for its vendor's cards where the kernel has one, else, or
/// when that doesn't take it, to the one for all.
pub(crate) fn bind_vfio(host: &Host, address: PciAddress) -> Result<(), Refusal> {
    if let Some(name) = current(host, address).filter(|name| is_vfio_driver(name)) {
        return set_driver_override(host, address, Some(&name));
    }
    let of_vendor = variant::of(host, address).filter(|name| load(host, name));
    if of_vendor.is_some_and(|name| bind(host, address, &name).is_ok()) {
        return Ok(());
    }
    bind(host, address, VFIO)
}

fn bind(host: &Host, address: PciAddress, name: &str) -> Result<(), Refusal> {
    set_driver_override(host, address, Some(name))?;
    unbind(host, address)?;
    // Not by drivers_probe: that does nothing, and says it went well, while a driver is still on its way out. The
    // driver's own bind waits for the device's lock, and tells what its probe said.
    let bind = host.path("sys/bus/pci/drivers").join(name).join("bind");
    let probed = child::write(&bind, address.to_string().as_bytes(), host.deadlines.bind);
    let bound = || current(host, address).as_deref() == Some(name);
    match probed {
        _ if bound() => Ok(()),
        Ok(()) if wait(host.deadlines.bind, bound) => Ok(()),
        Ok(()) => Err(failed("device-bind-failed", address, &format!("{name} did not take it"))),
        Err(error) => Err(failed("device-bind-failed", address, &format!("{name} did not take it: {error}"))),
    }
}

/// How giving a function back to the host failed.
#[derive(Debug)]
pub(crate) struct NotReturned {
    /// Whether VFIO still has it: then it is not the host's, and has to be tried again.
    pub(crate) still_ours: bool,
    pub(crate) why: String,
}

/// Waits until no other process binds or unbinds the function: a store of power/control takes the device's lock, as
/// they do (`control_store` in `drivers/base/power/sysfs.c`), and storing what is there changes nothing. (That of
/// driver_override waits no more, since Linux 6.12.) Without power management there is no such file, and no wait.
pub(crate) fn wait_for_moves(host: &Host, address: PciAddress) {
    let control = host.pci(address).join("power/control");
    if let Some(now) = attribute(control.clone()) {
        let _ = child::write(&control, now.as_bytes(), host.deadlines.bind);
    }
}

/// Takes a function out of VFIO's hands, unless it came from there, and restores `driver_override`. The driver that has
/// it then: none, or its own, or one that somebody else gave it since.
fn leave_vfio(host: &Host, record: &DeviceRecord) -> Result<Option<String>, Refusal> {
    // A helper of a process that was killed may be in the middle of a move: what is seen after it holds.
    wait_for_moves(host, record.address);
    for _ in 0..MOVES_MAX {
        let from_vfio = record.former_driver.as_deref().is_some_and(is_vfio_driver);
        if !from_vfio && current(host, record.address).as_deref().is_some_and(is_vfio_driver) {
            unbind(host, record.address)?;
        }
        set_driver_override(host, record.address, record.driver_override.as_deref())?;
        let now = current(host, record.address);
        if from_vfio || !now.as_deref().is_some_and(is_vfio_driver) {
            return Ok(now);
        }
    }
    Err(failed("device-bind-failed", record.address, &format!("{VFIO} takes it again and again")))
}

/// Gives a function back to the driver it came from, from whatever state it is in. The name of the driver that has it
/// then; `None` when it had none before.
pub(crate) fn give_back(host: &Host, record: &DeviceRecord) -> Result<Option<String>, NotReturned> {
    let address = record.address;
    let now = leave_vfio(host, record)
        .map_err(|refusal| NotReturned { still_ours: true, why: refusal.to_string() })?;
    let Some(former) = record.former_driver.as_ref().filter(|_| now.is_none()) else { return Ok(now) };
    let bind = host.path("sys/bus/pci/drivers").join(former).join("bind");
    let text = address.to_string();
    let bound = || current(host, address).as_ref() == Some(former);
    let mut result = child::write(&bind, text.as_bytes(), host.deadlines.bind);
    if result.is_err() && !bound() {
        // The driver may match by an ID that it was told, or be loaded anew by now.
        result = result.or(child::write(
            &host.path("sys/bus/pci/drivers_probe"),
            text.as_bytes(),
            host.deadlines.bind,
        ));
    }
    if bound() || (result.is_ok() && wait(host.deadlines.bind, bound)) {
        return Ok(Some(former.clone()));
    }
    let cause = result.err().map_or_else(|| "it did not say why".into(), |error| error.to_string());
    Err(NotReturned { still_ours: false, why: format!("driver {former} did not take it back: {cause}") })
}

/// Has the kernel look for a driver that takes the function, and waits until one has, or none is likely to come.
pub(crate) fn probe(host: &Host, address: PciAddress) {
    let path = host.path("sys/bus/pci/drivers_probe");
    // That none takes it is no error of the store's; what has it then is seen elsewhere.
    if child::write(&path, address.to_string().as_bytes(), host.deadlines.bind).is_ok() {
        wait(Duration::from_secs(2).min(host.deadlines.bind), || current(host, address).is_some());
    }
}

/// Loads VFIO's driver when it is not there.
pub(crate) fn load_vfio(host: &Host) -> Result<(), Refusal> {
    load(host, VFIO).then_some(()).ok_or_else(|| {
        let remedy = "load it: modprobe vfio-pci (Debian's linux-image has it, its cloud image does not)";
        Refusal::new(
            "vfio-missing",
            VFIO,
            "the kernel's driver that hands devices to guests is not there",
            remedy,
        )
    })
}

/// Whether a driver is there, after it was loaded if need be.
fn load(host: &Host, name: &str) -> bool {
    let driver = host.path("sys/bus/pci/drivers").join(name);
    if !driver.exists() && host.is_live() {
        let modprobe = attribute(host.path("proc/sys/kernel/modprobe")).filter(|path| !path.is_empty());
        run(Path::new(modprobe.as_deref().unwrap_or("/sbin/modprobe")), &[name], host.deadlines.bind);
    }
    driver.exists()
}

/// Runs a program to its end or its deadline; what it did is seen elsewhere.
fn run(program: &Path, arguments: &[&str], deadline: Duration) {
    let quiet = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = quiet else { return };
    if !wait(deadline, || child.try_wait().is_ok_and(|status| status.is_some())) {
        let _ = child.kill();
        thread::spawn(move || child.wait());
    }
}

/// Waits until it holds, or the deadline has passed: then `false`.
pub(crate) fn wait(deadline: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + deadline;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(POLL);
    }
}

fn failed(code: &'static str, address: PciAddress, cause: &str) -> Refusal {
    Refusal::new(code, address, cause, "see the kernel's log for the reason: dmesg")
}
