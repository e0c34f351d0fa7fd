//! What a network card's physical function decides for its virtual ones, by rtnetlink (`IFLA_VFINFO_LIST` in
//! linux/if_link.h).

use std::{io, os::fd::OwnedFd, time::Duration};

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{
        LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoMac, VfInfoRate,
        VfInfoSpoofCheck, VfInfoTrust, VfInfoVlan,
    },
};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, connect,
    netlink::SocketAddrNetlink,
    send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};
use serde::{Deserialize, Serialize};

/// The kernel answers at once; a driver may take a moment.
const PATIENCE: Duration = Duration::from_secs(10);
/// An answer about a card with 256 virtual functions has some 50 KB.
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// What a virtual function may do on the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VfNetwork {
    /// Its MAC address, which its guest can't change; zeros for none.
    pub mac: [u8; 6],
    /// Its frames go out and come in on this VLAN, of which it sees nothing; 0 for none.
    pub vlan: u16,
    /// It sends at most this many Mbit/s; 0 for no limit.
    pub rate_mbps: u32,
    /// Frames from other MAC addresses than its own are dropped.
    pub spoof_check: bool,
    /// It may listen to what isn't sent to it, and more that the card's driver allows to trusted ones.
    pub trusted: bool,
}

/// Sets all of it, each by a request of its own, so that a refusal names what was refused. A rate is only asked for where
/// there is one, or was: not every card can.
pub(super) fn set(index: u32, vf: u32, wanted: &VfNetwork) -> Result<(), String> {
    let now = get(index, vf).map_err(|error| error.to_string())?.unwrap_or_default();
    let socket = socket().map_err(|error| error.to_string())?;
    let mut settings = vec![
        ("its MAC address", VfInfo::Mac(VfInfoMac::new(vf, &wanted.mac))),
        ("its VLAN", VfInfo::Vlan(VfInfoVlan::new(vf, wanted.vlan.into(), 0))),
        ("its spoof check", VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, wanted.spoof_check))),
        ("its trust", VfInfo::Trust(VfInfoTrust::new(vf, wanted.trusted))),
    ];
    if wanted.rate_mbps != now.rate_mbps {
        settings.push(("its rate", VfInfo::Rate(VfInfoRate::new(vf, 0, wanted.rate_mbps))));
    }
    for (what, setting) in settings {
        let list = LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![setting])]);
        let request = message(index, list);
        ask(&socket, RouteNetlinkMessage::SetLink(request), NLM_F_ACK)
            .map_err(|error| format!("{what} cannot be set: {error}"))?;
    }
    Ok(())
}

/// What is set now; `None` where the card tells nothing of such a virtual function.
pub(super) fn get(index: u32, vf: u32) -> io::Result<Option<VfNetwork>> {
    let request = message(index, LinkAttribute::ExtMask(vec![LinkExtentMask::Vf]));
    let answer = ask(&socket()?, RouteNetlinkMessage::GetLink(request), 0)?;
    Ok(answer.and_then(|link| read(&link, vf)))
}

fn read(link: &LinkMessage, vf: u32) -> Option<VfNetwork> {
    let lists = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::VfInfoList(list) => Some(list),
        _ => None,
    });
    let is_meant =
        |info: &&LinkVfInfo| info.0.iter().any(|value| matches!(value, VfInfo::Mac(mac) if mac.vf_id == vf));
    let info = lists.flatten().find(is_meant)?;
    let mut network = VfNetwork::default();
    for value in &info.0 {
        match value {
            VfInfo::Mac(mac) => {
                for (to, from) in network.mac.iter_mut().zip(mac.mac) {
                    *to = from;
                }
            }
            VfInfo::Vlan(vlan) => network.vlan = u16::try_from(vlan.vlan_id).unwrap_or(u16::MAX),
            VfInfo::Rate(rate) => network.rate_mbps = rate.max_tx_rate,
            VfInfo::SpoofCheck(check) => network.spoof_check = check.enabled,
            // A driver that doesn't know trust tells all ones, which reads as on.
            VfInfo::Trust(trust) => network.trusted = trust.enabled,
            _ => {}
        }
    }
    Some(network)
}

fn message(index: u32, attribute: LinkAttribute) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![attribute];
    message
}

fn socket() -> io::Result<OwnedFd> {
    // Protocol 0 of this family is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    Ok(socket)
}

/// One request and its answer: a link, or with `NLM_F_ACK` none.
fn ask(socket: &OwnedFd, request: RouteNetlinkMessage, flags: u16) -> io::Result<Option<LinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = 1;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    if send(socket, &bytes, SendFlags::empty())? != bytes.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    let count = rustix::io::read(socket, answer.as_mut_slice())?;
    let answer = answer.get(..count).unwrap_or_default();
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.raw_code() == 0 => Ok(None),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        _ => Err(io::Error::other("the kernel answered something else")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_by_the_function_that_is_meant() {
        let of = |vf: u32| {
            LinkVfInfo(vec![
                VfInfo::Mac(VfInfoMac::new(vf, &[2, 0, 0, 0, 0, vf as u8])),
                VfInfo::Vlan(VfInfoVlan::new(vf, 100 + vf, 0)),
                VfInfo::Rate(VfInfoRate::new(vf, 0, 50)),
                VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, true)),
                VfInfo::Trust(VfInfoTrust::new(vf, vf == 0)),
            ])
        };
        let link = message(3, LinkAttribute::VfInfoList(vec![of(0), of(1)]));
        let network = VfNetwork {
            mac: [2, 0, 0, 0, 0, 1],
            vlan: 101,
            rate_mbps: 50,
            spoof_check: true,
            trusted: false,
        };
        assert_eq!(read(&link, 1), Some(network));
        assert!(read(&link, 0).unwrap().trusted);
        assert_eq!(read(&link, 2), None);
    }

    #[test]
    fn the_kernel_is_asked() {
        // The loopback has no virtual functions, and takes no settings for them.
        assert_eq!(get(1, 0).unwrap(), None);
        let refused = set(1, 0, &VfNetwork::default()).unwrap_err();
        assert!(refused.starts_with("its MAC address cannot be set: "), "{refused}");
    }
}
