//! Virtual functions of an NVMe drive get queues, interrupts and namespaces from its primary controller (NVM Express Base
//! Specification 2.0, 8.26 and 5.28 Virtualization Management).

use std::{
    fs::{self, File},
    io,
    path::Path,
    time::Duration,
};

use casemate_spec::PciAddress;

use crate::{
    driver,
    host::{Host, names},
    sys::nvme::{Admin, admin, reset},
};

const IDENTIFY: u8 = 0x06;
const NAMESPACE_ATTACHMENT: u8 = 0x15;
const VIRTUALIZATION: u8 = 0x1c;
const CNS_PRIMARY: u32 = 0x14;
const CNS_SECONDARIES: u32 = 0x15;
/// The namespaces that there are, by number, above that of the command.
const CNS_ALLOCATED: u32 = 0x10;
/// The controllers that the command's namespace is attached to.
const CNS_ATTACHED_TO: u32 = 0x12;
const IDENTIFY_BYTES: usize = 4096;
/// Actions of Virtualization Management.
const PRIMARY_FLEXIBLE: u32 = 1;
const SECONDARY_OFFLINE: u32 = 7;
const SECONDARY_ASSIGN: u32 = 8;
const SECONDARY_ONLINE: u32 = 9;
/// Kinds of resources.
const QUEUES: u32 = 0;
const INTERRUPTS: u32 = 1;
const SECONDARIES_MAX: usize = 127;
/// For a controller to be ready again.
const READY_MAX: Duration = Duration::from_secs(20);

/// What a primary controller can hand out (Identify, CNS 14h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Primary {
    id: u16,
    /// Flexible ones in all, of the primary's own now, and at most for one secondary.
    queues: Share,
    interrupts: Share,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    total: u32,
    primary: u16,
    secondary_most: u16,
}

impl Share {
    /// What each of `count` gets.
    fn each(self, count: u16) -> u32 {
        (self.total / u32::from(count.max(1))).min(self.secondary_most.into())
    }
}

/// A secondary controller (Identify, CNS 15h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Secondary {
    id: u16,
    /// Which virtual function it is, from 1.
    function: u16,
}

/// Takes the flexible queues and interrupts from the primary controller, before virtual functions are made.
pub(super) fn prepare(host: &Host, address: PciAddress) -> io::Result<()> {
    let controller = open(host, address)?;
    let primary = primary(&controller)?;
    if primary.queues.total == 0 || primary.interrupts.total == 0 {
        return Err(io::Error::other("the drive has no queues or no interrupts for virtual functions"));
    }
    set_primary(host, address, &controller, primary, (0, 0))
}

/// Hands each of `count` virtual functions its share, brings it online, and attaches its namespace, where it has one.
pub(super) fn equip(host: &Host, address: PciAddress, count: u16, namespaces: &[u32]) -> io::Result<()> {
    let controller = open(host, address)?;
    let primary = primary(&controller)?;
    let secondaries = secondaries(&controller)?;
    for function in 1..=count {
        let secondary = secondaries.iter().find(|secondary| secondary.function == function);
        let secondary = secondary.ok_or_else(|| {
            io::Error::other(format!("the drive tells of no controller for virtual function {function}"))
        })?;
        let manage = |action, kind, number| manage(&controller, secondary.id, action, kind, number);
        manage(SECONDARY_OFFLINE, 0, 0)?;
        manage(SECONDARY_ASSIGN, QUEUES, primary.queues.each(count))?;
        manage(SECONDARY_ASSIGN, INTERRUPTS, primary.interrupts.each(count))?;
        manage(SECONDARY_ONLINE, 0, 0)?;
        let own = namespaces.get(usize::from(function - 1)).copied();
        keep_others_away(&controller, secondary.id, own)?;
        if let Some(namespace) = own {
            attach(&controller, namespace, secondary.id, true)?;
        }
    }
    Ok(())
}

/// Takes every namespace but `own` away from a virtual function's controller: drives attach some to all controllers by
/// themselves, and they are the host's or another tenant's. They stay away when the function goes.
fn keep_others_away(controller: &File, id: u16, own: Option<u32>) -> io::Result<()> {
    // One list holds 1024 of them; a drive with more is not for this.
    let allocated = identify(controller, Of { cns: CNS_ALLOCATED, ..Of::default() })?.numbers();
    for namespace in allocated.into_iter().filter(|namespace| Some(*namespace) != own) {
        let attached = identify(controller, Of { cns: CNS_ATTACHED_TO, namespace, controller: id })?;
        if attached.controllers().contains(&id) {
            attach(controller, namespace, id, false)?;
        }
    }
    Ok(())
}

/// Takes namespaces, queues and interrupts back; the virtual functions must be there yet.
pub(super) fn strip(host: &Host, address: PciAddress, namespaces: &[u32]) -> io::Result<()> {
    let controller = open(host, address)?;
    for secondary in secondaries(&controller)?.iter().filter(|secondary| secondary.function > 0) {
        if let Some(namespace) = namespaces.get(usize::from(secondary.function - 1)) {
            attach(&controller, *namespace, secondary.id, false)?;
        }
        manage(&controller, secondary.id, SECONDARY_OFFLINE, 0, 0)?;
        manage(&controller, secondary.id, SECONDARY_ASSIGN, QUEUES, 0)?;
        manage(&controller, secondary.id, SECONDARY_ASSIGN, INTERRUPTS, 0)?;
    }
    Ok(())
}

/// Gives the flexible ones back to the primary controller, once there are no virtual functions.
pub(super) fn restore(host: &Host, address: PciAddress) -> io::Result<()> {
    let controller = open(host, address)?;
    let primary = primary(&controller)?;
    let most = (primary.queues.total, primary.interrupts.total);
    set_primary(host, address, &controller, primary, most)?;
    // Only a reset of the function brings the size of its interrupts' table up to date; whoever is given the drive next
    // would see it change in the middle.
    match fs::write(host.pci(address).join("reset"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => wait_until_live(host, address),
    }
}

/// Sets how many flexible queues and interrupts the primary controller has itself; they count after a reset of it.
fn set_primary(
    host: &Host,
    address: PciAddress,
    controller: &File,
    primary: Primary,
    (queues, interrupts): (u32, u32),
) -> io::Result<()> {
    if (u32::from(primary.queues.primary), u32::from(primary.interrupts.primary)) == (queues, interrupts) {
        return Ok(());
    }
    manage(controller, primary.id, PRIMARY_FLEXIBLE, INTERRUPTS, interrupts)?;
    manage(controller, primary.id, PRIMARY_FLEXIBLE, QUEUES, queues)?;
    reset(controller)?;
    wait_until_live(host, address)
}

fn wait_until_live(host: &Host, address: PciAddress) -> io::Result<()> {
    let state = host.pci(address).join("nvme");
    let is_live = || {
        let states = names(&state)
            .into_iter()
            .filter_map(|name| fs::read_to_string(state.join(name).join("state")).ok());
        states.into_iter().any(|text| text.trim() == "live")
    };
    driver::wait(READY_MAX, is_live).then_some(()).ok_or_else(|| io::ErrorKind::TimedOut.into())
}

fn open(host: &Host, address: PciAddress) -> io::Result<File> {
    let name = names(host.pci(address).join("nvme")).into_iter().next();
    let name = name.ok_or_else(|| io::Error::other("the host's nvme driver does not have the drive"))?;
    File::options().read(true).write(true).open(host.path(Path::new("dev").join(name)))
}

fn manage(controller: &File, id: u16, action: u32, kind: u32, number: u32) -> io::Result<()> {
    let command = Admin {
        opcode: VIRTUALIZATION,
        cdw10: u32::from(id) << 16 | kind << 8 | action,
        cdw11: number,
        ..Admin::default()
    };
    admin(controller, command, &mut []).map_err(|error| {
        io::Error::other(format!(
            "virtualization management (controller {id}, action {action}, {number}): {error}"
        ))
    })
}

fn attach(controller: &File, nsid: u32, id: u16, on: bool) -> io::Result<()> {
    // A controller list: how many, then which.
    let mut list = [0; IDENTIFY_BYTES];
    for (to, from) in list.iter_mut().zip([1u16.to_le_bytes(), id.to_le_bytes()].concat()) {
        *to = from;
    }
    let command = Admin { opcode: NAMESPACE_ATTACHMENT, nsid, cdw10: u32::from(!on), ..Admin::default() };
    admin(controller, command, &mut list)
        .map_err(|error| io::Error::other(format!("namespace {nsid} and controller {id}: {error}")))
}

/// What is to be told of (Identify, command dwords 1 and 10).
#[derive(Clone, Copy, Debug, Default)]
struct Of {
    cns: u32,
    namespace: u32,
    controller: u16,
}

fn identify(controller: &File, of: Of) -> io::Result<Words> {
    let mut data = vec![0; IDENTIFY_BYTES];
    let cdw10 = u32::from(of.controller) << 16 | of.cns;
    admin(controller, Admin { opcode: IDENTIFY, nsid: of.namespace, cdw10, ..Admin::default() }, &mut data)
        .map_err(|error| io::Error::other(format!("identify {:#x}: {error}", of.cns)))?;
    Ok(Words(data))
}

fn primary(controller: &File) -> io::Result<Primary> {
    identify(controller, Of { cns: CNS_PRIMARY, ..Of::default() }).map(|words| Primary::read(&words))
}

fn secondaries(controller: &File) -> io::Result<Vec<Secondary>> {
    let answer = identify(controller, Of { cns: CNS_SECONDARIES, ..Of::default() });
    answer.map(|words| Secondary::read_all(&words))
}

/// What a drive answers; what lies past the end reads as 0.
struct Words(Vec<u8>);

impl Words {
    fn u16(&self, at: usize) -> u16 {
        let byte = |at| self.0.get(at).copied().unwrap_or(0);
        u16::from_le_bytes([byte(at), byte(at + 1)])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// A namespace list: numbers up to the first 0.
    fn numbers(&self) -> Vec<u32> {
        (0..IDENTIFY_BYTES / 4).map(|index| self.u32(4 * index)).take_while(|number| *number != 0).collect()
    }

    /// A controller list: how many, and which.
    fn controllers(&self) -> Vec<u16> {
        let count = usize::from(self.u16(0)).min(IDENTIFY_BYTES / 2 - 1);
        (1..=count).map(|index| self.u16(2 * index)).collect()
    }
}

impl Primary {
    fn read(words: &Words) -> Self {
        let share = |at| Share {
            total: words.u32(at),
            primary: words.u16(at + 8),
            secondary_most: words.u16(at + 12),
        };
        Self { id: words.u16(0), queues: share(32), interrupts: share(64) }
    }
}

impl Secondary {
    fn read_all(words: &Words) -> Vec<Self> {
        let count = usize::from(words.0.first().copied().unwrap_or(0)).min(SECONDARIES_MAX);
        let entry = |index| {
            let at = 32 + 32 * index;
            Self { id: words.u16(at), function: words.u16(at + 8) }
        };
        (0..count).map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn shares_are_read_and_split() {
        let mut data = vec![0; IDENTIFY_BYTES];
        data[0] = 9;
        for (at, value) in [(32, 4u8), (40, 4), (44, 2), (64, 2), (72, 2), (76, 1)] {
            data[at] = value;
        }
        let primary = Primary::read(&Words(data));
        assert_eq!((primary.id, primary.queues.total, primary.queues.primary), (9, 4, 4));
        assert_eq!((primary.queues.each(2), primary.queues.each(1), primary.interrupts.each(2)), (2, 2, 1));
    }

    #[test]
    fn secondaries_are_read() {
        let mut data = vec![0; IDENTIFY_BYTES];
        data[0] = 2;
        (data[32], data[40], data[64], data[72]) = (1, 1, 2, 2);
        let all = Secondary::read_all(&Words(data));
        assert_eq!(all, [Secondary { id: 1, function: 1 }, Secondary { id: 2, function: 2 }]);
    }

    #[test]
    fn lists_are_read() {
        let list = Words(vec![2, 0, 0, 0, 5, 0, 1, 0, 0, 0, 0, 0, 9]);
        assert_eq!(list.numbers(), [2, 0x1_0005]);
        assert_eq!(list.controllers(), [0, 5]);
        assert_eq!(Words(vec![0xff; IDENTIFY_BYTES]).controllers().len(), IDENTIFY_BYTES / 2 - 1);
    }

    proptest! {
        #[test]
        fn any_answer_is_read(data in prop::collection::vec(any::<u8>(), 0..200), count in 0u16..=u16::MAX) {
            let words = Words(data);
            let primary = Primary::read(&words);
            prop_assert!(primary.queues.each(count) <= primary.queues.secondary_most.into());
            prop_assert!(Secondary::read_all(&words).len() <= SECONDARIES_MAX);
        }
    }
}
