//! Messages about ports (`struct virtio_console_control`, virtio 1.3, 5.3.6.2).

pub(super) const HEADER_BYTES: usize = 8;

/// The driver is there; its value is 1.
pub(super) const DEVICE_READY: u16 = 0;
/// There is a port.
pub(super) const PORT_ADD: u16 = 1;
/// The driver has made room for it; its value is 1.
pub(super) const PORT_READY: u16 = 3;
/// Somebody has the other end open.
pub(super) const PORT_OPEN: u16 = 6;
/// What it is called; the name follows.
pub(super) const PORT_NAME: u16 = 7;

/// A message without what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Header {
    pub(super) fn of(port: u32, event: u16, value: u16) -> Self {
        Self { port, event, value }
    }

    pub(super) fn read(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h] = *bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        [&self.port.to_le_bytes()[..], &self.event.to_le_bytes(), &self.value.to_le_bytes()].concat()
    }
}
