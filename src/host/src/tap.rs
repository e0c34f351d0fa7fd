//! Taps: the host's end of an emulated network card.

use std::{io, net::IpAddr, os::fd::OwnedFd};

use casemate_spec::Refusal;
use serde::{Deserialize, Serialize};

use crate::sys::tun;

/// Size of the header in front of each frame: `virtio_net_hdr_v1` (virtio 1.x, 5.1.6).
const VNET_HEADER_BYTES: i32 = 12;

/// A tap to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapRequest {
    /// Name of the interface, 1 to 15 bytes.
    pub name: String,
    /// The host's own address on it, with the length of the network's prefix in bits.
    pub host_address: Option<(IpAddr, u8)>,
    /// The bridge that it becomes a port of.
    pub bridge: Option<String>,
    /// Queues, 1 or more: the kernel spreads flows over them.
    pub queues: u8,
}

/// A tap: up, without offloads, each frame with a virtio-net header of 12 bytes. Not persistent: it goes with the last
/// copy of its descriptor.
#[derive(Debug)]
pub struct Tap {
    /// Read and write a frame at a time.
    pub queues: Vec<OwnedFd>,
    /// Name of the interface.
    pub name: String,
}

impl Tap {
    /// Makes a tap. What fails leaves none behind.
    ///
    /// # Errors
    /// `tap-name`, `tap-exists`, `tap-address`, `tap-bridge`, `tap-failed`.
    pub fn create(request: &TapRequest) -> Result<Self, Refusal> {
        let name = &request.name;
        check_name(name)?;
        check_address(request)?;
        let queues = tun::create(name, VNET_HEADER_BYTES, request.queues).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EBUSY) => Refusal::new(
                    "tap-exists",
                    name,
                    "there is a network interface of this name",
                    format!("choose another name, or remove it: ip link del {name}"),
                ),
                _ => failed(name, &error, "making the tap failed"),
            }
        })?;
        match request.host_address {
            Some((IpAddr::V4(address), prefix_bits)) => tun::set_ipv4(name, address, prefix_bits),
            Some((IpAddr::V6(address), prefix_bits)) => tun::set_ipv6(name, address, prefix_bits),
            None => Ok(()),
        }
        .map_err(|error| {
            let remedy = "give an address that no other interface of the host has";
            Refusal::new(
                "tap-address",
                name,
                format!("the kernel refused the host's address: {error}"),
                remedy,
            )
        })?;
        if let Some(bridge) = &request.bridge {
            tun::add_to_bridge(name, bridge).map_err(|error| {
                let remedy = format!("make the bridge first: ip link add {bridge} type bridge");
                Refusal::new(
                    "tap-bridge",
                    name,
                    format!("it cannot become a port of {bridge}: {error}"),
                    remedy,
                )
            })?;
        }
        tun::set_up(name).map_err(|error| failed(name, &error, "bringing the tap up failed"))?;
        Ok(Self { queues, name: name.clone() })
    }
}

impl Tap {
    /// The queue of a tap that was made with one.
    ///
    /// # Errors
    /// `tap-failed` for another.
    pub fn only(self) -> Result<OwnedFd, Refusal> {
        let count = self.queues.len();
        let queue = self.queues.into_iter().next().filter(|_| count == 1);
        queue.ok_or_else(|| {
            let error = io::Error::other(format!("it has {count} queues"));
            failed(&self.name, &error, "taking the tap's queue failed")
        })
    }
}

/// The kernel's rule (dev_valid_name), without `%`, which would number the name.
fn check_name(name: &str) -> Result<(), Refusal> {
    let is_plain = |b: u8| b.is_ascii_graphic() && !b"/:%".contains(&b);
    let fits = (1..=tun::NAME_BYTES_MAX).contains(&name.len()) && !matches!(name, "." | "..");
    if fits && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(Refusal::new(
        "tap-name",
        format!("{:?}", name.chars().take(64).collect::<String>()),
        "this cannot be the name of a network interface",
        format!("use 1 to {} letters, digits, dashes", tun::NAME_BYTES_MAX),
    ))
}

fn check_address(request: &TapRequest) -> Result<(), Refusal> {
    let Some((address, prefix_bits)) = request.host_address else { return Ok(()) };
    let bits_max = if address.is_ipv4() { 32 } else { 128 };
    if (1..=bits_max).contains(&prefix_bits) && !address.is_unspecified() && !address.is_multicast() {
        return Ok(());
    }
    Err(Refusal::new(
        "tap-address",
        &request.name,
        format!("{address}/{prefix_bits} cannot be the address of an interface"),
        "write an address with the length of its network's prefix: 192.168.77.1/24",
    ))
}

fn failed(name: &str, error: &io::Error, what: &str) -> Refusal {
    let remedy = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => "load the module: modprobe tun",
        Some(libc::EPERM | libc::EACCES) => "run as root, or with CAP_NET_ADMIN",
        _ => "see the kernel's log: dmesg",
    };
    Refusal::new("tap-failed", name, format!("{what}: {error}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_and_addresses() {
        let request = |name: &str, address: &str, prefix: u8| TapRequest {
            name: name.into(),
            host_address: Some((address.parse().unwrap(), prefix)),
            bridge: None,
            queues: 1,
        };
        for name in ["", "a name", "a/b", "tap%d", "..", "sixteen-letters!", "t\u{e4}p"] {
            assert_eq!(Tap::create(&request(name, "10.0.0.1", 24)).unwrap_err().code, "tap-name", "{name:?}");
        }
        for (address, prefix) in
            [("10.0.0.1", 33), ("10.0.0.1", 0), ("0.0.0.0", 24), ("fd00::1", 129), ("224.0.0.1", 8)]
        {
            assert_eq!(
                Tap::create(&request("tap0", address, prefix)).unwrap_err().code,
                "tap-address",
                "{address}"
            );
        }
    }
}
