//! The socket device in a guest file.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::{Refusal, guest::Reader};

/// A way between guest and host without a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vsock {
    /// The socket on the host by which the guest's ports are reached; its name with `_PORT` is one of the host's ports.
    pub socket: PathBuf,
    /// What the guest is known by: 3 or more.
    pub cid: u32,
}

/// What most guests are known by; it says something to the guest alone, so all may have the same.
const CID: u32 = 3;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawVsock {
    socket: Spanned<String>,
    cid: Option<Spanned<i64>>,
}

impl Reader<'_> {
    pub(crate) fn vsock(&mut self, raw: RawVsock) -> Result<Vsock, Refusal> {
        let socket = self.path(&raw.socket)?;
        // sun_path, with the longest port and a NUL behind it.
        if raw.socket.get_ref().len() > 96 {
            let location = self.note(&raw.socket);
            let refusal =
                Refusal::new("bad-path", "", "a socket's path has at most 96 bytes", "use a shorter one");
            return Err(refusal.at(Some(location)));
        }
        let Some(raw) = raw.cid else { return Ok(Vsock { socket, cid: CID }) };
        let location = self.note(&raw);
        let cid = u32::try_from(*raw.get_ref()).ok().filter(|cid| (CID..u32::MAX).contains(cid));
        let cid = cid.ok_or_else(|| {
            let cause = format!("{} cannot be a guest's cid", raw.get_ref());
            Refusal::new("bad-cid", "", cause, "use 3 to 4294967294, or leave it out").at(Some(location))
        })?;
        Ok(Vsock { socket, cid })
    }
}
