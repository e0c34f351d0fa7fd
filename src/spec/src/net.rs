//! `[[net]]`: an emulated network card.

use std::net::Ipv4Addr;

use serde::Deserialize;
use toml::Spanned;

use crate::{
    IoLimits, Refusal,
    guest::{Reader, short},
    limit::RawLimit,
};

/// Pairs of queues that a network card can have.
pub const NET_QUEUES_MAX: u8 = 8;

/// An emulated network card on a tap that lives as long as the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    /// Name of the tap, at most 15 bytes.
    pub tap: String,
    /// The host's address on the tap and the length of its prefix.
    pub host_address: Option<(Ipv4Addr, u8)>,
    /// The card's MAC address; made from guest's name and slot when absent.
    pub mac: Option<[u8; 6]>,
    /// Pairs of queues, 1 to [`NET_QUEUES_MAX`].
    pub queues: u8,
    /// Whether the host's kernel serves the card's queues.
    pub vhost: bool,
    /// How much it may do.
    pub limits: IoLimits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawNet {
    tap: Spanned<String>,
    host_address: Option<Spanned<String>>,
    mac: Option<Spanned<String>>,
    queues: Option<Spanned<i64>>,
    #[serde(default)]
    vhost: bool,
    limit: Option<RawLimit>,
}

impl Reader<'_> {
    pub(crate) fn net(&mut self, raw: RawNet) -> Result<Net, Refusal> {
        let location = self.note(&raw.tap);
        let tap = raw.tap.into_inner();
        let good = (1..=15).contains(&tap.len())
            && tap.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        if !good {
            let cause = format!("{:?} is not a name for a network interface", short(&tap));
            let refusal = Refusal::new("bad-tap", "", cause, "use 1 to 15 letters, digits, - and _");
            return Err(refusal.at(Some(location)));
        }
        let host_address = raw.host_address.map(|raw| {
            let location = self.note(&raw);
            prefix(raw.get_ref()).ok_or_else(|| {
                let cause = format!("{:?} is not an IPv4 address with a prefix", short(raw.get_ref()));
                Refusal::new("bad-address", "", cause, "write it as \"192.0.2.1/24\"").at(Some(location))
            })
        });
        let mac = raw.mac.map(|raw| {
            let location = self.note(&raw);
            mac(raw.get_ref()).ok_or_else(|| {
                let cause = format!("{:?} is not the MAC address of one card", short(raw.get_ref()));
                Refusal::new(
                    "bad-mac",
                    "",
                    cause,
                    "write six hexadecimal pairs, the first even: \"02:00:00:00:00:01\"",
                )
                .at(Some(location))
            })
        });
        let limits = match raw.limit {
            Some(limit) if raw.vhost => {
                let refusal = Refusal::new(
                    "bad-limit",
                    "",
                    "the kernel serves this card, and heeds no limits",
                    "take vhost = true or the limit out",
                );
                return Err(refusal.at(Some(self.note_limit(&limit).unwrap_or(location))));
            }
            limit => self.limits(limit)?,
        };
        let queues = raw.queues.map_or(Ok(1), |queues| self.queues(&queues, NET_QUEUES_MAX))?;
        let (host_address, mac) = (host_address.transpose()?, mac.transpose()?);
        Ok(Net { tap, host_address, mac, queues, vhost: raw.vhost, limits })
    }
}

fn prefix(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, length) = text.split_once('/')?;
    let length: u8 = length.parse().ok()?;
    Some((address.parse().ok()?, length)).filter(|(_, length)| (1..=30).contains(length))
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
    (parts.next().is_none() && unicast).then_some(bytes)
}
