//! What lies between a function and the root, and what else an operator asks of it: vectors, power, virtual functions.

use std::{borrow::Cow, fs};

use casemate_spec::PciAddress;
use serde::{Deserialize, Serialize};

use crate::{
    config::{ConfigSnapshot, PortType},
    host::{Host, attribute},
    identity::Configs,
};

/// More bridges than any machine has on one path.
const STEPS_MAX: usize = 32;

/// Access control that keeps functions apart (PCI Express base 7.7.8), by the bits that Linux asks for when it makes IOMMU
/// groups (`REQ_ACS_FLAGS` in drivers/iommu/iommu.c).
const ACS_WANTED: [(u16, &str); 4] = [
    (1 << 0, "source validation"),
    (1 << 2, "request redirect"),
    (1 << 3, "completion redirect"),
    (1 << 4, "upstream forwarding"),
];

/// What is told of a function beside what a claim needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// From the root to the function, which is the last.
    pub path: Vec<Step>,
    /// Vectors of MSI-X; 0 without.
    pub msix_vectors: u16,
    /// Vectors of MSI; 0 without.
    pub msi_vectors: u16,
    /// It has an INTx line.
    pub intx: bool,
    /// Its power state, as the kernel has it: `D0`, `D3hot`, `D3cold`, `unknown`.
    pub power_state: Option<String>,
    /// Virtual functions that it could make; `None` when it can make none.
    pub virtual_functions_most: Option<u16>,
    /// Virtual functions that it has made.
    pub virtual_functions: u16,
    /// The firmware showed its picture on it.
    pub boot_display: bool,
}

/// One function on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Where it sits.
    pub address: PciAddress,
    /// What it is: `root port`, `endpoint`...; `conventional PCI` without PCI Express.
    pub kind: Cow<'static, str>,
    /// What of access control is off or absent where it matters. What is beside the function, or behind this bridge,
    /// can then be reached past the IOMMU, and Linux puts it into one group.
    pub acs_missing: Vec<Cow<'static, str>>,
}

impl Details {
    /// Vectors of the kind that a guest gets: MSI-X where there is one, else MSI.
    pub fn vectors(&self) -> u16 {
        if self.msix_vectors > 0 { self.msix_vectors } else { self.msi_vectors }
    }
}

impl Host {
    /// What is told of one function; empty where it can't be read. Config space past the header is root's to read.
    pub(crate) fn details(&self, address: PciAddress, configs: &Configs) -> Details {
        let directory = self.pci(address);
        let number = |name: &str| attribute(directory.join(name)).and_then(|text| text.parse().ok());
        let config = configs.get(&address);
        Details {
            path: self.steps(address, configs),
            msix_vectors: config.map_or(0, ConfigSnapshot::msix_vectors),
            msi_vectors: config.map_or(0, ConfigSnapshot::msi_vectors),
            intx: config.is_some_and(ConfigSnapshot::has_intx),
            power_state: attribute(directory.join("power_state")),
            virtual_functions_most: number("sriov_totalvfs").filter(|total| *total > 0),
            virtual_functions: number("sriov_numvfs").unwrap_or(0),
            boot_display: attribute(directory.join("boot_vga")).as_deref() == Some("1"),
        }
    }

    /// From the root: sysfs nests what is behind a bridge in the bridge.
    fn steps(&self, address: PciAddress, configs: &Configs) -> Vec<Step> {
        let Ok(real) = fs::canonicalize(self.pci(address)) else { return Vec::new() };
        let names = real.components().filter_map(|part| part.as_os_str().to_str());
        let is_whole = |name: &&str| name.parse().is_ok_and(|at: PciAddress| at.to_string() == *name);
        let addresses = names.filter(is_whole).filter_map(|name| name.parse().ok());
        addresses.take(STEPS_MAX).map(|address| step(address, configs.get(&address))).collect()
    }
}

/// One function on the way.
fn step(address: PciAddress, config: Option<&ConfigSnapshot>) -> Step {
    let port = config.map_or(PortType::Unreadable, ConfigSnapshot::port_type);
    let matters = match port {
        PortType::RootPort | PortType::DownstreamPort | PortType::BridgeToPci | PortType::Conventional => {
            true
        }
        // Functions of one device could reach each other inside it.
        PortType::Endpoint | PortType::UpstreamPort => config.is_some_and(ConfigSnapshot::is_multifunction),
        PortType::Integrated | PortType::Other | PortType::Unreadable => false,
    };
    let on = config.and_then(ConfigSnapshot::acs_control).unwrap_or(0);
    let missing = ACS_WANTED.iter().filter(|(bit, _)| matters && on & bit == 0);
    Step {
        address,
        kind: port.words().into(),
        acs_missing: missing.map(|(_, name)| (*name).into()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};

    fn told(machine: &Fixture, address: PciAddress) -> Details {
        let host = machine.host();
        let configs = host.configs(&host.survey().unwrap());
        host.details(address, &configs)
    }

    /// A function of this Express port type; with ACS whose control register reads `acs`.
    fn set(machine: &Fixture, address: &str, port: u8, acs: Option<u16>) {
        let path = machine.path(&format!("sys/bus/pci/devices/{address}/config"));
        let mut config = fs::read(&path).unwrap();
        config[0xe2] = port << 4 | 2;
        if let Some(control) = acs {
            config[0x140..0x144].copy_from_slice(&0x0001_000du32.to_le_bytes());
            config[0x146..0x148].copy_from_slice(&control.to_le_bytes());
        }
        fs::write(path, config).unwrap();
    }

    #[test]
    fn the_path_tells_what_is_missing_on_it() {
        let machine = Fixture::typical();
        // Behind the root port, as sysfs nests it.
        let nested = "sys/devices/pci0000:00/0000:00:01.0/0000:07:00.0";
        machine.pci("0000:07:00.0", &[("class", "0x020000"), ("power_state", "D0")], None, None);
        fs::rename(machine.path("sys/devices/pci0000:00/0000:07:00.0"), machine.path(nested)).unwrap();
        machine.link("sys/bus/pci/devices/0000:07:00.0", nested);
        machine.write(&format!("{nested}/sriov_totalvfs"), "7\n");
        set(&machine, "0000:00:01.0", 4, Some(0x1d));
        set(&machine, "0000:07:00.0", 0, None);

        let details = told(&machine, at("0000:07:00.0"));
        let [port, endpoint] = details.path.as_slice() else { panic!("{details:?}") };
        assert_eq!(
            (port.address, &*port.kind, &port.acs_missing),
            (at("0000:00:01.0"), "root port", &vec![])
        );
        assert_eq!((&*endpoint.kind, &endpoint.acs_missing), ("endpoint", &vec![]));
        assert_eq!((details.msix_vectors, details.msi_vectors, details.intx), (5, 1, true));
        assert_eq!((details.power_state.as_deref(), details.virtual_functions_most), (Some("D0"), Some(7)));

        set(&machine, "0000:00:01.0", 4, Some(0x18));
        let missing = |index: usize| told(&machine, at("0000:07:00.0")).path.remove(index).acs_missing;
        assert_eq!(missing(0), ["source validation", "request redirect"]);
        set(&machine, "0000:00:01.0", 7, None);
        assert_eq!(missing(0).len(), 2, "a bridge to PCI has what it has");
        let path = machine.path("sys/bus/pci/devices/0000:07:00.0/config");
        let mut config = fs::read(&path).unwrap();
        config[0x0e] = 0x80;
        fs::write(path, config).unwrap();
        assert_eq!(missing(1).len(), 4, "of a device with more functions");
    }

    #[test]
    fn what_is_gone_has_no_details() {
        assert_eq!(told(&Fixture::typical(), at("0000:1f:00.0")), Details::default());
    }
}
