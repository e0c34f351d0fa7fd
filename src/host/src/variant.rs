//! Drivers of VFIO that know a vendor's card (`mlx5_vfio_pci`, `nvgrace_gpu_vfio_pci`, …): the kernel's table of modules names them
//! by the device, as aliases that begin with `vfio_pci:` (`PCI_DRIVER_OVERRIDE_DEVICE_VFIO` of `linux/pci.h`).

use casemate_spec::PciAddress;

use crate::{
    driver::VFIO,
    host::{Host, attribute, read_text},
};

/// Distributions' tables have some 2 MiB.
const ALIASES_BYTES_MAX: u64 = 16 << 20;
/// How the names of all of them end.
const ENDING: &str = "_vfio_pci";

/// Whether a driver is VFIO's own, or one of its for a vendor's cards.
pub fn is_vfio_driver(name: &str) -> bool {
    name == VFIO || name.ends_with(ENDING)
}

/// The driver that the kernel names for this very device, if any: of several the one that is named most closely.
pub(crate) fn of(host: &Host, address: PciAddress) -> Option<String> {
    let device = attribute(host.pci(address).join("modalias"))?;
    let device = device.strip_prefix("pci:")?;
    let release = attribute(host.path("proc/sys/kernel/osrelease"))?;
    let table =
        read_text(&host.path("lib/modules").join(release).join("modules.alias"), ALIASES_BYTES_MAX).ok()?;
    let named = table.lines().filter_map(|line| {
        let (pattern, module) = line.strip_prefix("alias vfio_pci:")?.split_once(' ')?;
        let sound = module.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        (sound && module.ends_with(ENDING) && matches(pattern, device)).then_some((pattern, module))
    });
    let closest = named.min_by_key(|(pattern, _)| pattern.matches('*').count());
    closest.map(|(_, module)| module.to_owned())
}

/// Whether a text is what a pattern says, in which `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Fixture, at};
    use proptest::prelude::*;

    const TABLE: &str = "# Aliases extracted from modules themselves.
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias pci:v00008086d000010C9sv*sd*bc*sc*i* igb
alias vfio_pci:v00008086d000010C9sv*sd*bc*sc*i* near_vfio_pci
alias vfio_pci:v00008086d*sv*sd*bc*sc*i* far_vfio_pci
alias vfio_pci:v00008086d000010C9sv00008086sd00000001bc02sc00i00 ../x_vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
";
    const IGB: &str = "pci:v00008086d000010C9sv00008086sd00000001bc02sc00i00\n";

    #[test]
    fn the_closest_is_taken_and_others_have_none() {
        let machine = Fixture::typical();
        let of = |address| super::of(&machine.host(), at(address));
        assert_eq!(of("0000:02:00.0"), None, "there is no table");
        machine.write("proc/sys/kernel/osrelease", "6.12.0\n");
        machine.write("lib/modules/6.12.0/modules.alias", TABLE);
        machine.write("sys/bus/pci/devices/0000:02:00.0/modalias", IGB);
        machine.write(
            "sys/bus/pci/devices/0000:03:00.0/modalias",
            "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02\n",
        );
        assert_eq!(of("0000:02:00.0").as_deref(), Some("near_vfio_pci"));
        assert_eq!(of("0000:03:00.0"), None, "vfio-pci itself is for all");
    }

    #[test]
    fn vfios_drivers_are_known() {
        assert!(["vfio-pci", "mlx5_vfio_pci"].into_iter().all(is_vfio_driver));
        assert!(["nvme", "vfio-pci-x", "pci-stub", ""].into_iter().all(|name| !is_vfio_driver(name)));
    }

    proptest! {
        #[test]
        fn a_star_is_anything(parts in proptest::collection::vec("[ab]{0,3}", 1..5), between in "[abc]{0,4}") {
            prop_assert!(matches(&parts.join("*"), &parts.join(&between)));
            let is_open = parts.len() > 1 && parts.last().is_some_and(String::is_empty);
            prop_assert_eq!(matches(&parts.join("*"), &(parts.join(&between) + "x")), is_open);
        }
    }
}
