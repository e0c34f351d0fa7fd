//! Tap devices and interface addresses (linux/if_tun.h, linux/sockios.h).

use std::{
    fs::OpenOptions,
    io,
    mem::zeroed,
    net::{Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use super::{checked, ioctl_in, ioctl_in_out, ioctl_value};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// Longest name of an interface, without the final NUL.
pub(crate) const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Makes the tap `name`, which must not exist: no packet information, a virtio-net header of `header_bytes` in front of
/// each frame, no offloads. It goes with the last descriptor; there is one for each of its `queues`.
pub(crate) fn create(name: &str, header_bytes: i32, queues: u8) -> io::Result<Vec<OwnedFd>> {
    let shared = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // Only the first may make it.
    let open =
        |number: u8| queue(name, header_bytes, shared | if number == 0 { libc::IFF_TUN_EXCL } else { 0 });
    (0..queues.max(1)).map(open).collect()
}

fn queue(name: &str, header_bytes: i32, more: libc::c_int) -> io::Result<OwnedFd> {
    // Not blocking: who reads frames asks epoll, and waits for nobody.
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let tun: OwnedFd = options.open("/dev/net/tun")?.into();
    let mut request = request(name)?;
    // IFF_TUN_EXCL is the sign bit of the field's type.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = u16::try_from(flags).map_err(io::Error::other)?.cast_signed();
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    unsafe { ioctl_in_out(&tun, TUNSETIFF, &mut request)? };
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl_in(&tun, TUNSETVNETHDRSZ, &header_bytes)? };
    // SAFETY: TUNSETOFFLOAD takes its flags as a number.
    unsafe { ioctl_value(&tun, TUNSETOFFLOAD, 0)? };
    Ok(tun)
}

/// Gives the interface an IPv4 address and its network's prefix.
pub(crate) fn set_ipv4(name: &str, address: Ipv4Addr, prefix_bits: u8) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    let mask = u32::MAX.checked_shl(32u32.saturating_sub(prefix_bits.into())).unwrap_or(0);
    for (command, address) in
        [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, Ipv4Addr::from_bits(mask))]
    {
        let mut request = request(name)?;
        request.ifr_ifru.ifru_addr = sockaddr(address);
        // SAFETY: SIOCSIFADDR and SIOCSIFNETMASK read one ifreq.
        unsafe { ioctl_in(&socket, command, &request)? };
    }
    Ok(())
}

/// Gives the interface an IPv6 address and its network's prefix.
pub(crate) fn set_ipv6(name: &str, address: Ipv6Addr, prefix_bits: u8) -> io::Result<()> {
    let socket = socket(libc::AF_INET6)?;
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr { s6_addr: address.octets() },
        ifr6_prefixlen: prefix_bits.into(),
        ifr6_ifindex: index(&socket, name)?,
    };
    // SAFETY: on an IPv6 socket SIOCSIFADDR reads one in6_ifreq.
    unsafe { ioctl_in(&socket, libc::SIOCSIFADDR, &request).map(drop) }
}

/// Brings the interface up.
pub(crate) fn set_up(name: &str) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    let mut request = request(name)?;
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq.
    unsafe { ioctl_in_out(&socket, libc::SIOCGIFFLAGS, &mut request)? };
    // SAFETY: the kernel filled the union's flags, and all other bytes of it are zero: any member is initialised.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    unsafe { ioctl_in(&socket, libc::SIOCSIFFLAGS, &request).map(drop) }
}

/// Makes the interface a port of a bridge.
pub(crate) fn add_to_bridge(name: &str, bridge: &str) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    let mut request = request(bridge)?;
    request.ifr_ifru.ifru_ifindex = index(&socket, name)?;
    // SAFETY: SIOCBRADDIF reads one ifreq.
    unsafe { ioctl_in(&socket, SIOCBRADDIF, &request).map(drop) }
}

fn index(socket: impl AsFd, name: &str) -> io::Result<libc::c_int> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFINDEX reads and writes one ifreq.
    unsafe { ioctl_in_out(socket, libc::SIOCGIFINDEX, &mut request)? };
    // SAFETY: the kernel filled the union's index, and all other bytes of it are zero: any member is initialised.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) touches no memory of this process.
    let fd = checked(unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: `fd` is new, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An ifreq with this name and zeros.
fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: an ifreq is plain numbers and a pointer that may be null: all zeros is a valid one.
    let mut request: libc::ifreq = unsafe { zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    // struct sockaddr_in lies over the 14 bytes: port (2), address (4), zeros.
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}
