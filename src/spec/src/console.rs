//! The table `[console]` and the `[[port]]`s of a guest file.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::{
    Refusal,
    guest::{LIMITS, Reader, short},
};

/// The longest name of a port: what Linux makes a directory entry of.
const NAME_BYTES_MAX: usize = 64;

/// Which of a guest's terminals a person types at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleDevice {
    /// The serial port: `ttyS0` in Linux.
    #[default]
    Serial,
    /// A virtio console beside it: `hvc0` in Linux, which learns of the terminal's size.
    Virtio,
}

impl ConsoleDevice {
    /// As a guest file writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Virtio => "virtio",
        }
    }
}

/// A way between a program in the guest, which finds it by its name, and a socket of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// `/dev/virtio-ports/NAME` in Linux, where udev makes it.
    pub name: String,
    /// The socket on the host.
    pub socket: PathBuf,
}

/// A `[console]` as written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawConsole {
    #[serde(default)]
    pub(crate) device: ConsoleDevice,
}

/// A `[[port]]` as written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawPort {
    name: Spanned<String>,
    socket: Spanned<String>,
}

impl Reader<'_> {
    pub(crate) fn ports(&mut self, raw: Vec<RawPort>) -> Result<Vec<Port>, Refusal> {
        let mut ports: Vec<Port> = Vec::new();
        for port in raw {
            let location = self.note(&port.name);
            let name = port.name.get_ref();
            let refuse = |cause: String, remedy: &str| {
                Err(Refusal::new("bad-port", "", cause, remedy).at(Some(location.clone())))
            };
            if ports.len() >= LIMITS.ports {
                return refuse(format!("a guest has at most {} ports", LIMITS.ports), "remove some");
            }
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(plain) {
                let cause = format!("{:?} cannot be a port's name", short(name));
                return refuse(cause, "use 1 to 64 letters, digits, dots, - and _");
            }
            if ports.iter().any(|other| other.name == *name) {
                return refuse(format!("there are two ports {name}"), "give each a name of its own");
            }
            let socket = self.path(&port.socket)?;
            // sun_path, with a NUL behind it.
            if port.socket.get_ref().len() > 107 {
                let location = self.note(&port.socket);
                let cause = "a socket's path has at most 107 bytes";
                return Err(Refusal::new("bad-path", "", cause, "use a shorter one").at(Some(location)));
            }
            ports.push(Port { name: name.clone(), socket });
        }
        Ok(ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};

    #[test]
    fn reads_the_terminal_and_ports() {
        let guest = parse(GOOD).unwrap().guest;
        assert_eq!((guest.console, guest.ports.len()), (ConsoleDevice::Serial, 0));
        let text = format!(
            "{GOOD}\n[console]\ndevice = \"virtio\"\n[[port]]\nname = \"org.qemu.guest_agent.0\"\nsocket = \"agent.sock\"\n"
        );
        let guest = parse(&text).unwrap().guest;
        assert_eq!(guest.console, ConsoleDevice::Virtio);
        let port = Port { name: "org.qemu.guest_agent.0".into(), socket: "agent.sock".into() };
        assert_eq!(guest.ports, [port]);
    }

    #[test]
    fn refuses_by_code() {
        let port = |name: &str| format!("[[port]]\nname = \"{name}\"\nsocket = \"s\"\n");
        for (table, code) in [
            (port(""), "bad-port"),
            (port("a b"), "bad-port"),
            (port("../x"), "bad-port"),
            (port(&"x".repeat(65)), "bad-port"),
            (port("a") + &port("a"), "bad-port"),
            ((0..9).map(|number| port(&format!("p{number}"))).collect(), "bad-port"),
            (format!("[[port]]\nname = \"a\"\nsocket = \"{}\"", "s".repeat(108)), "bad-path"),
        ] {
            assert_eq!(parse(&format!("{GOOD}\n{table}")).unwrap_err().code, code, "{table}");
        }
        assert!(parse(&format!("{GOOD}\n[console]\ndevice = \"vga\"")).is_err());
    }
}
