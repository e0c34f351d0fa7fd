//! Virtual functions: made for the guests that want them, and removed when the last of these has ended.
//!
//! The physical function stays with the host's driver and is written down in the ledger, before it is touched, with those
//! who use its virtual ones. Virtual functions get no driver of the host's (`sriov_drivers_autoprobe` is off meanwhile).

mod link;
mod nvme;

use std::{
    thread,
    time::{Duration, Instant},
};

use casemate_spec::{PciAddress, Refusal, VirtualFunctions};
use serde::{Deserialize, Serialize};

use crate::{
    Ledger, Owner, driver,
    host::{Host, attribute, link_name, names},
    judge,
    ledger::{Book, this_process},
    process::Process,
    sys::child,
};

pub use link::VfNetwork;

/// For a driver to make or remove its virtual functions.
const NUMBER_MAX: Duration = Duration::from_secs(60);
/// For another command that makes or removes them to have done so.
const OTHERS_MAX: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(50);
/// More virtual functions than one physical function can have on its buses.
const FUNCTIONS_MAX: usize = 256;

/// Where the virtual functions of one physical function are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    /// They are being made.
    Making,
    /// They are there.
    Ready,
    /// They are being removed.
    Leaving,
}

/// A physical function whose virtual ones Casemate has made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Physical {
    pub(crate) address: PciAddress,
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    count: u16,
    namespaces: Vec<u32>,
    /// What stood in `sriov_drivers_autoprobe`.
    autoprobe: String,
    stage: Stage,
    /// Who makes or removes them.
    worker: Process,
    /// Whose guests may have some of them.
    users: Vec<Owner>,
}

/// What a command finds when it wants virtual functions of one physical function.
enum Turn {
    /// They are there.
    Joined,
    /// This command makes them.
    Mine(Box<Physical>),
    /// Another command makes or removes them.
    Wait,
}

/// Has the virtual functions of a physical one made, if they aren't there, and notes that the owner uses them until
/// [`leave_virtual_functions`].
///
/// # Errors
/// `device-missing`, `device-claimed`, `device-quarantined`, `vf-not-made`, `ledger-*`.
pub fn make_virtual_functions(
    host: &Host,
    ledger: &Ledger,
    owner: &Owner,
    address: PciAddress,
    wanted: &VirtualFunctions,
) -> Result<(), Refusal> {
    let until = Instant::now() + OTHERS_MAX;
    let physical = loop {
        match ledger.change(|book| take_turn(host, book, owner, address, wanted))? {
            Turn::Joined => return Ok(()),
            Turn::Mine(physical) => break physical,
            Turn::Wait if Instant::now() < until => thread::sleep(POLL),
            Turn::Wait => {
                let cause =
                    "another command makes or removes its virtual functions, and does not come to an end";
                return Err(refused(address, cause));
            }
        }
    };
    match make(host, &physical) {
        Ok(()) => ledger.change(|book| {
            if let Some(physical) = book.physical_mut(address) {
                physical.stage = Stage::Ready;
            }
            Ok(())
        }),
        Err(cause) => {
            let undone = remove(host, &physical).and_then(|()| {
                ledger.change(|book| book.forget_physical(address)).map_err(|refusal| refusal.to_string())
            });
            let and = undone
                .err()
                .map(|why| format!("; and it could not all be undone: {why}"))
                .unwrap_or_default();
            Err(refused(address, &format!("{cause}{and}")))
        }
    }
}

fn refused(address: PciAddress, cause: &str) -> Refusal {
    let remedy = "see the kernel's log (dmesg); the card's driver must be loaded, and the firmware must leave room for them";
    Refusal::new("vf-not-made", address, format!("its virtual functions cannot be had: {cause}"), remedy)
}

fn take_turn(
    host: &Host,
    book: &mut Book,
    owner: &Owner,
    address: PciAddress,
    wanted: &VirtualFunctions,
) -> Result<Turn, Refusal> {
    let function = host.function(address).ok_or_else(|| judge::missing(address))?;
    if let Some(physical) = book.physical_mut(address) {
        if physical.stage != Stage::Ready {
            return Ok(Turn::Wait);
        }
        if (physical.count, &physical.namespaces) != (wanted.count, &wanted.namespaces) {
            let cause = format!("guests have some of {} already, made by another host file", physical.count);
            return Err(refused(address, &cause));
        }
        if !physical.users.contains(owner) {
            physical.users.push(owner.clone());
        }
        return Ok(Turn::Joined);
    }
    judge::is_free(host, book, &function)?;
    let directory = host.pci(address);
    let number = |name: &str| attribute(directory.join(name)).and_then(|text| text.parse::<u16>().ok());
    match (number("sriov_totalvfs"), number("sriov_numvfs")) {
        (None | Some(0), _) => return Err(refused(address, "it can make none")),
        (Some(most), _) if most < wanted.count => {
            return Err(refused(
                address,
                &format!("it can make {most}, and its pool wants {}", wanted.count),
            ));
        }
        (_, Some(made @ 1..)) => {
            return Err(refused(
                address,
                &format!("somebody else has made {made} (echo 0 > sriov_numvfs removes them)"),
            ));
        }
        _ => {}
    }
    let physical = Physical {
        address,
        vendor: function.vendor,
        device: function.device,
        count: wanted.count,
        namespaces: wanted.namespaces.clone(),
        autoprobe: attribute(directory.join("sriov_drivers_autoprobe")).unwrap_or_else(|| "1".to_owned()),
        stage: Stage::Making,
        worker: this_process(host)?,
        users: vec![owner.clone()],
    };
    book.physical.push(physical.clone());
    Ok(Turn::Mine(Box::new(physical)))
}

fn make(host: &Host, physical: &Physical) -> Result<(), String> {
    let address = physical.address;
    let is_nvme = is_nvme(host, address);
    if is_nvme {
        nvme::prepare(host, address).map_err(|error| error.to_string())?;
    }
    write(host, address, "sriov_drivers_autoprobe", "0")?;
    write(host, address, "sriov_numvfs", &physical.count.to_string())?;
    let are_there = || virtual_functions(host, address).len() == usize::from(physical.count);
    if !driver::wait(host.deadlines.bind, are_there) {
        return Err(format!("{} were made of {}", virtual_functions(host, address).len(), physical.count));
    }
    if is_nvme {
        nvme::equip(host, address, physical.count, &physical.namespaces)
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Takes all back, from whatever was done.
fn remove(host: &Host, physical: &Physical) -> Result<(), String> {
    let address = physical.address;
    if !host.pci(address).exists() {
        return Ok(());
    }
    let is_nvme = is_nvme(host, address);
    let has_some = attribute(host.pci(address).join("sriov_numvfs")).is_some_and(|number| number != "0");
    if has_some {
        if is_nvme {
            // What it does not give up is lost with the virtual functions.
            let _ = nvme::strip(host, address, &physical.namespaces);
        }
        write(host, address, "sriov_numvfs", "0")?;
    }
    write(host, address, "sriov_drivers_autoprobe", &physical.autoprobe)?;
    if is_nvme {
        nvme::restore(host, address).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn write(host: &Host, address: PciAddress, name: &str, value: &str) -> Result<(), String> {
    let path = host.pci(address).join(name);
    child::write(&path, value.as_bytes(), NUMBER_MAX).map_err(|error| format!("{name} = {value}: {error}"))
}

fn is_nvme(host: &Host, address: PciAddress) -> bool {
    host.pci(address).join("nvme").exists()
}

/// The virtual functions of a physical one, by number.
fn virtual_functions(host: &Host, address: PciAddress) -> Vec<PciAddress> {
    let directory = host.pci(address);
    let of = |number: usize| link_name(directory.join(format!("virtfn{number}")))?.parse().ok();
    (0..FUNCTIONS_MAX).map_while(of).collect()
}

/// Says what a virtual function of a network card may do, and sees that it is so.
///
/// # Errors
/// `vf-settings` when the card does not take them, or reads back other ones; `device-missing`.
pub fn set_vf_network(host: &Host, address: PciAddress, wanted: &VfNetwork) -> Result<(), Refusal> {
    let refuse = |cause: String| {
        let remedy = "see the kernel's log (dmesg); a rate wants a card with its link up";
        Refusal::new("vf-settings", address, cause, remedy)
    };
    let Some((index, number)) = place_of(host, address)? else { return Ok(()) };
    link::set(index, number, wanted).map_err(refuse)?;
    let now = link::get(index, number)
        .map_err(|error| refuse(format!("its settings cannot be read back: {error}")))?;
    if now.as_ref() != Some(wanted) {
        return Err(refuse(format!("its settings read back as {now:?}, and {wanted:?} was set")));
    }
    Ok(())
}

/// The network interface of a virtual function's physical one, and its number there; `None` where that is no network card.
fn place_of(host: &Host, address: PciAddress) -> Result<Option<(u32, u32)>, Refusal> {
    let physical =
        link_name(host.pci(address).join("physfn")).and_then(|name| name.parse::<PciAddress>().ok());
    let physical = physical.ok_or_else(|| judge::missing(address))?;
    let number = virtual_functions(host, physical).iter().position(|other| *other == address);
    let number =
        number.and_then(|number| u32::try_from(number).ok()).ok_or_else(|| judge::missing(address))?;
    let net = host.pci(physical).join("net");
    let index =
        names(&net).into_iter().find_map(|name| attribute(net.join(name).join("ifindex"))?.parse().ok());
    Ok(index.map(|index| (index, number)))
}

/// The settings of a virtual function that nobody has.
fn nobodys() -> VfNetwork {
    VfNetwork { spoof_check: true, ..VfNetwork::default() }
}

/// The owner uses virtual functions no more; those that nobody uses are removed. Its devices must have been given back.
///
/// # Errors
/// Each thing that went wrong; it is tried again by [`recover`](crate::recover).
pub fn leave_virtual_functions(host: &Host, ledger: &Ledger, owner: &Owner) -> Result<(), Vec<Refusal>> {
    let left = ledger.read().and_then(|book| {
        // Most guests have none, and need no change.
        if book.physical.iter().all(|physical| !physical.users.contains(owner)) {
            return Ok(Vec::new());
        }
        let worker = this_process(host)?;
        ledger.change(|book| {
            book.physical.iter_mut().for_each(|physical| physical.users.retain(|user| user != owner));
            Ok(book.unused(&worker, |physical| physical.stage == Stage::Ready))
        })
    });
    remove_all(host, ledger, left.map_err(|refusal| vec![refusal])?)
}

/// Those whose users have all died, or whose worker did. After a restart of the host none of them is there.
pub(crate) fn recover_virtual_functions(host: &Host, ledger: &Ledger) -> Result<(), Vec<Refusal>> {
    let left = ledger.read().and_then(|book| {
        if book.physical.is_empty() {
            return Ok(Vec::new());
        }
        let worker = this_process(host)?;
        ledger.change(|book| {
            book.physical.retain(|physical| physical.worker.is_of_this_boot(host));
            for physical in &mut book.physical {
                physical.users.retain(|user| user.keep.is_alive(host));
            }
            // A claim that could not be undone yet still has its functions.
            let held: Vec<PciAddress> = book
                .entries
                .iter()
                .flat_map(|entry| entry.devices.iter().map(|device| device.address))
                .collect();
            Ok(book.unused(&worker, |physical| {
                let is_held =
                    virtual_functions(host, physical.address).iter().any(|address| held.contains(address));
                !is_held && (physical.stage == Stage::Ready || !physical.worker.is_alive(host))
            }))
        })
    });
    remove_all(host, ledger, left.map_err(|refusal| vec![refusal])?)
}

fn remove_all(host: &Host, ledger: &Ledger, all: Vec<Physical>) -> Result<(), Vec<Refusal>> {
    let mut wrong = Vec::new();
    for physical in all {
        let address = physical.address;
        for function in virtual_functions(host, address) {
            // Taken back first: a card may keep them for the next that are made.
            wrong.extend(set_vf_network(host, function, &nobodys()).err());
        }
        match remove(host, &physical) {
            Ok(()) => wrong.extend(ledger.change(|book| book.forget_physical(address)).err()),
            Err(cause) => {
                let remedy = "it is tried again by the next command; see the kernel's log: dmesg";
                wrong.push(Refusal::new("vf-not-removed", address, cause, remedy));
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

impl Book {
    fn physical_mut(&mut self, address: PciAddress) -> Option<&mut Physical> {
        self.physical.iter_mut().find(|physical| physical.address == address)
    }

    fn forget_physical(&mut self, address: PciAddress) -> Result<(), Refusal> {
        self.physical.retain(|physical| physical.address != address);
        Ok(())
    }

    /// Makes `worker` the one who removes what nobody uses and is `ripe`.
    fn unused(&mut self, worker: &Process, ripe: impl Fn(&Physical) -> bool) -> Vec<Physical> {
        let unused = self.physical.iter_mut().filter(|physical| physical.users.is_empty() && ripe(physical));
        let take = |physical: &mut Physical| {
            physical.stage = Stage::Leaving;
            physical.worker = worker.clone();
            physical.clone()
        };
        unused.map(take).collect()
    }
}

/// The physical function at an address makes virtual ones for guests.
pub(crate) fn makes_virtual_functions(book: &Book, address: PciAddress) -> bool {
    book.physical.iter().any(|physical| physical.address == address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};

    const PF: &str = "0000:02:00.0";

    fn wanted(count: u16) -> VirtualFunctions {
        VirtualFunctions { count, ..VirtualFunctions::default() }
    }

    /// A machine whose card can make seven, with two as if its driver had made them.
    fn machine(made: bool) -> Fixture {
        let machine = Fixture::typical();
        let this = Process::with_pid(&Host::live(), std::process::id()).unwrap();
        machine.write("proc/sys/kernel/random/boot_id", &this.boot_id);
        let (pid, zeros) = (this.pid, "0 ".repeat(18));
        machine
            .write(&format!("proc/{pid}/stat"), &format!("{pid} (test) S {zeros}{} 0\n", this.start_ticks));
        let directory = format!("sys/bus/pci/devices/{PF}");
        machine.write(&format!("{directory}/sriov_totalvfs"), "7\n");
        machine.write(&format!("{directory}/sriov_numvfs"), "0\n");
        machine.write(&format!("{directory}/sriov_drivers_autoprobe"), "1\n");
        if made {
            for number in 0..2 {
                let address = format!("0000:02:10.{number}");
                machine.pci(&address, &[("class", "0x020000")], None, Some(20 + number));
                machine.link(
                    &format!("sys/devices/pci0000:00/{PF}/virtfn{number}"),
                    &format!("sys/devices/pci0000:00/{address}"),
                );
                machine.link(
                    &format!("sys/devices/pci0000:00/{address}/physfn"),
                    &format!("sys/devices/pci0000:00/{PF}"),
                );
            }
        }
        machine
    }

    fn owner(guest: &str) -> Owner {
        Owner::this_process(guest).unwrap()
    }

    #[test]
    fn they_are_made_for_the_first_and_removed_after_the_last() {
        let machine = machine(true);
        let (host, ledger) = (machine.host(), machine.ledger());
        let make = |guest: &str, count| {
            make_virtual_functions(&host, &ledger, &owner(guest), at(PF), &wanted(count))
        };
        make("web", 2).unwrap();
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs")), "2");
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_drivers_autoprobe")), "0");
        make("db", 2).unwrap();
        assert_eq!(make("odd", 3).unwrap_err().code, "vf-not-made");
        let given = crate::assignable(&host, &host.functions().unwrap(), Some(&ledger), &[at(PF)]);
        assert_eq!(given.unwrap_err().code, "device-makes-vfs");

        leave_virtual_functions(&host, &ledger, &owner("web")).unwrap();
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs")), "2");
        leave_virtual_functions(&host, &ledger, &owner("db")).unwrap();
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs")), "0");
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_drivers_autoprobe")), "1");
        assert_eq!(ledger.read().unwrap().physical, []);
    }

    #[test]
    fn what_a_dead_keep_made_is_removed() {
        let machine = machine(true);
        let (host, ledger) = (machine.host(), machine.ledger());
        let mut dead = owner("web");
        dead.keep.start_ticks += 1;
        make_virtual_functions(&host, &ledger, &dead, at(PF), &wanted(2)).unwrap();
        recover_virtual_functions(&host, &ledger).unwrap();
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs")), "0");
        assert_eq!(ledger.read().unwrap().physical, []);
    }

    #[test]
    fn what_fails_is_undone_and_told() {
        let machine = machine(false);
        let each = Duration::from_millis(50);
        let host =
            machine.host().with_deadlines(crate::Deadlines { unbind: each, bind: each, group_free: each });
        let ledger = machine.ledger();
        let make = |count| make_virtual_functions(&host, &ledger, &owner("web"), at(PF), &wanted(count));
        let refusal = make(2).unwrap_err();
        assert!(refusal.cause.contains("0 were made of 2"), "{refusal}");
        assert_eq!(machine.read(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs")), "0");
        assert_eq!(ledger.read().unwrap().physical, []);
        assert!(make(8).unwrap_err().cause.contains("it can make 7"));
        machine.write(&format!("sys/bus/pci/devices/{PF}/sriov_numvfs"), "1\n");
        assert!(make(2).unwrap_err().cause.contains("somebody else has made 1"));
        assert!(machine.path("state/ledger.json").exists());
    }
}
