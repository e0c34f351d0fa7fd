//! Which functions the host's network stands on.

use std::{collections::HashSet, io};

use casemate_spec::{PciAddress, Refusal};

use crate::{
    PciFunction, Use,
    function::unreadable,
    host::{Host, hex_attribute, names, pci_parent},
};

const IFF_UP: u64 = 1;
/// Route flags of linux/route.h.
const RTF_UP: u32 = 1;
const RTF_REJECT: u32 = 0x200;
/// Stacked interfaces (VLAN on bond on card) are a handful deep.
const WALK_MAX: usize = 1024;

/// The host's network cards, and what runs over them.
pub(crate) struct Network {
    /// Interfaces with hardware below them.
    cards: Vec<Card>,
    /// PCI functions of class network that no driver, or a driver without interface, has; those of VFIO left out.
    spare: Vec<PciAddress>,
    /// Names of hardware interfaces below a default route.
    routed: HashSet<String>,
}

struct Card {
    interface: String,
    /// Absent for hardware that hangs from no PCI function.
    address: Option<PciAddress>,
    up: bool,
}

impl Network {
    /// Reads /sys/class/net and the routing tables.
    pub(crate) fn read(host: &Host, functions: &[PciFunction]) -> Result<Self, Refusal> {
        let class = host.path("sys/class/net");
        let of = |interface: String| {
            let device = class.join(&interface).join("device");
            let flags = hex_attribute(class.join(&interface).join("flags")).unwrap_or(0);
            device.exists().then(|| Card { address: pci_parent(&device), up: flags & IFF_UP != 0, interface })
        };
        let cards: Vec<Card> = names(&class).into_iter().filter_map(of).collect();
        let taken =
            |function: &PciFunction| function.driver.as_deref().is_some_and(|driver| driver.contains("vfio"));
        let spare = functions
            .iter()
            .filter(|function| function.class >> 16 == 0x02 && !taken(function))
            .map(|function| function.address)
            .filter(|address| cards.iter().all(|card| card.address != Some(*address)))
            .collect();
        let mut routed = HashSet::new();
        for interface in default_route_interfaces(host)? {
            lower(host, interface, &mut routed);
        }
        Ok(Self { cards, spare, routed })
    }

    /// The function's interfaces with the default route on or above them.
    pub(crate) fn default_routes(&self, address: PciAddress) -> impl Iterator<Item = (PciAddress, Use)> {
        let cards = self.cards.iter().filter(move |card| card.address == Some(address));
        let routed = cards.filter(|card| self.routed.contains(&card.interface));
        routed.map(move |card| (address, Use::DefaultRoute { interface: card.interface.clone() }))
    }

    /// What of `wanted`, all taken together, would leave the host without a network card, or without one that is up.
    /// A function without an interface carries nothing, and is no loss.
    pub(crate) fn only(&self, wanted: &[PciAddress]) -> Vec<(PciAddress, Use)> {
        let taken = |card: &&Card| card.address.is_some_and(|address| wanted.contains(&address));
        let kept = || self.cards.iter().filter(|card| !taken(card));
        let none_left = kept().next().is_none() && self.spare.iter().all(|address| wanted.contains(address));
        let none_up = !kept().any(|card| card.up);
        let lost = self.cards.iter().filter(taken).filter(|card| none_left || (card.up && none_up));
        lost.filter_map(|card| Some((card.address?, Use::OnlyNetwork { interface: card.interface.clone() })))
            .collect()
    }
}

/// Interfaces that a default route of IPv4 or IPv6 names, in the main table's order.
fn default_route_interfaces(host: &Host) -> Result<Vec<String>, Refusal> {
    // A kernel without the protocol has no such file.
    let read = |path: &str| match host.table(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read.map_err(|error| unreadable(path, error)),
    };
    let v4 = read("proc/net/route")?;
    let v6 = read("proc/net/ipv6_route")?;
    let mut interfaces: Vec<String> = v4.lines().skip(1).filter_map(v4_default).collect();
    interfaces.extend(v6.lines().filter_map(v6_default));
    Ok(interfaces)
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, numbers in hexadecimal.
fn v4_default(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    let is_default = *fields.get(1)? == "00000000" && *fields.get(7)? == "00000000";
    (is_default && flags & RTF_UP != 0 && flags & RTF_REJECT == 0)
        .then(|| fields.first().map(|name| (*name).to_owned()))?
}

/// `destination prefix source prefix gateway metric refcount use flags interface`, numbers in hexadecimal.
fn v6_default(line: &str) -> Option<String> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
    let is_default = fields.first()?.bytes().all(|b| b == b'0') && *fields.get(1)? == "00";
    (is_default && flags & RTF_UP != 0 && flags & RTF_REJECT == 0)
        .then(|| fields.get(9).map(|name| (*name).to_owned()))?
}

/// Adds `interface` and all that it stands on (a bridge's ports, a bond's members, a VLAN's carrier).
fn lower(host: &Host, interface: String, found: &mut HashSet<String>) {
    let mut todo = vec![interface];
    while let Some(name) = todo.pop() {
        if found.len() >= WALK_MAX || !found.insert(name.clone()) {
            continue;
        }
        let directory = host.path("sys/class/net").join(&name);
        todo.extend(
            names(directory).iter().filter_map(|entry| entry.strip_prefix("lower_")).map(str::to_owned),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};
    use proptest::prelude::*;

    const E1000E: &str = "0000:01:00.0";
    const IGB: &str = "0000:02:00.0";

    #[test]
    fn the_default_route_through_a_bridge() {
        let machine = Fixture::typical();
        machine.netdev("eth0", E1000E, true);
        machine.netdev("eth1", IGB, true);
        machine.write("sys/class/net/br0/flags", "0x1003");
        machine.write("sys/class/net/br0/lower_eth0/flags", "0x1003");
        machine.default_route("br0");
        assert_eq!(machine.uses(E1000E), [Use::DefaultRoute { interface: "eth0".into() }]);
        assert_eq!(machine.uses(IGB), []);
    }

    #[test]
    fn the_last_card_and_the_last_that_is_up() {
        let machine = Fixture::typical();
        machine.netdev("eth0", E1000E, false);
        let only = [Use::OnlyNetwork { interface: "eth0".into() }];
        // igb is there without a driver: another card.
        assert_eq!(machine.uses(E1000E), []);
        machine.netdev("eth0", E1000E, true);
        assert_eq!(machine.uses(E1000E), only);
        machine.netdev("eth1", IGB, true);
        assert_eq!(machine.uses(E1000E), []);
        machine.remove(IGB);
        machine.netdev("eth0", E1000E, false);
        assert_eq!(machine.uses(E1000E), only);
    }

    #[test]
    fn two_last_cards_taken_together() {
        let machine = Fixture::typical();
        machine.netdev("eth0", E1000E, true);
        machine.netdev("eth1", IGB, true);
        let functions = machine.host().functions().unwrap();
        let network = Network::read(&machine.host(), &functions).unwrap();
        assert!(network.only(&[at(E1000E)]).is_empty());
        assert_eq!(network.only(&[at(E1000E), at(IGB)]).len(), 2);
    }

    #[test]
    fn reads_routes() {
        assert_eq!(
            v4_default("eth0\t00000000\t0202000A\t0003\t0\t0\t100\t00000000\t0\t0\t0").as_deref(),
            Some("eth0")
        );
        assert_eq!(v4_default("eth0\t0002000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0"), None);
        let zeros = "0".repeat(32);
        let v6 =
            |flags: &str| v6_default(&format!("{zeros} 00 {zeros} 00 {zeros} 00000400 1 0 {flags} eth1"));
        assert_eq!(v6("00450003").as_deref(), Some("eth1"));
        assert_eq!(v6("00200200"), None);
    }

    proptest! {
        #[test]
        fn routes_never_panic(line in "[a-z0-9\t ]{0,160}") {
            let _ = (v4_default(&line), v6_default(&line));
        }
    }
}
