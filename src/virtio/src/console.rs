//! The console device (virtio 1.3, 5.3): a terminal whose size can change, or ports with names.
//!
//! A terminal is a device of its own with one port. With several ports the driver is told of a new size by a message whose two
//! fields Linux read in the wrong order until 6.15; a device without them tells by its configuration, where the order was always
//! right.

mod message;
mod port;

use std::{
    collections::VecDeque,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use self::{
    message::{HEADER_BYTES, Header},
    port::Port,
};
use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    device_config::DeviceConfig,
    request::Request,
};

// Feature bits (`linux/virtio_console.h`).
const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;
const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;

// Fields of `struct virtio_console_config`.
const COLUMNS: usize = 0;
const PORTS: usize = 4;
const CONFIG_BYTES: usize = 12;

const QUEUE_SIZE: u16 = 64;
/// Queues of a device with so many ports: two each, and two for messages.
const QUEUES: [u16; 2 * (PORTS_MAX + 1) + 2] = [QUEUE_SIZE; 2 * (PORTS_MAX + 1) + 2];
/// The queues for messages, behind those of port 0.
const TO_DRIVER: usize = 2;
const FROM_DRIVER: usize = 3;
/// Ports with names that a device has at most, beside its port 0, which is none of them.
pub const PORTS_MAX: usize = 8;
/// Requests handled before others have their turn.
const BUDGET: usize = 32;
/// Messages that wait for the driver: as many as it can ask for at a time.
const MESSAGES_MAX: usize = 4 * (PORTS_MAX + 1);

/// What one port is connected to. Neither blocks.
#[derive(Debug)]
pub struct PortBackend {
    /// Its name, by which the guest finds it; of ports with names alone.
    pub name: String,
    /// What the guest reads; without it nothing ever comes.
    pub input: Option<OwnedFd>,
    /// Where the guest writes to.
    pub output: OwnedFd,
}

/// The device.
pub struct Console {
    ports: Vec<Port>,
    /// Ports with names: the driver has to be told of them by messages.
    is_named: bool,
    config: Arc<DeviceConfig>,
    messages: VecDeque<Vec<u8>>,
}

/// What is changed of a terminal while it runs. The driver has to be told, by [`crate::Interrupt::signal_config`].
#[derive(Clone, Debug)]
pub struct ConsoleControl(Arc<DeviceConfig>);

impl ConsoleControl {
    /// The terminal has another size.
    pub fn set_size(&self, columns: u16, rows: u16) {
        let [[a, b], [c, d]] = [columns.to_le_bytes(), rows.to_le_bytes()];
        self.0.set(COLUMNS, &[a, b, c, d]);
    }
}

impl Console {
    /// A terminal.
    pub fn terminal(backend: PortBackend) -> Self {
        Self::new(vec![Port::new(backend)], false)
    }

    /// Ports with names; those behind the first [`PORTS_MAX`] are left out.
    pub fn named(backends: Vec<PortBackend>) -> Self {
        Self::new(backends.into_iter().take(PORTS_MAX).map(Port::new).collect(), true)
    }

    fn new(ports: Vec<Port>, is_named: bool) -> Self {
        let mut config = vec![0; CONFIG_BYTES];
        // Port 0 is there in any case, and means a terminal to old drivers.
        let count = if is_named { ports.len() + 1 } else { 1 } as u32;
        if let Some(field) = config.get_mut(PORTS..PORTS + 4) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let config = Arc::new(DeviceConfig::new(config, &[]));
        Self { ports, is_named, config, messages: VecDeque::new() }
    }

    /// The way to change its size.
    pub fn control(&self) -> ConsoleControl {
        ConsoleControl(Arc::clone(&self.config))
    }

    /// Which port a queue is of, and whether it carries what the guest writes.
    fn port_of(&self, queue: usize) -> Option<(usize, bool)> {
        let writes = queue % 2 == 1;
        match (self.is_named, queue) {
            (false, 0 | 1) => Some((0, writes)),
            // Behind port 0 and the messages.
            (true, 4..) => Some(((queue - 4) / 2, writes)),
            _ => None,
        }
    }

    /// The queue of a port.
    fn queue_of(&self, port: usize, writes: bool) -> usize {
        let first = if self.is_named { 4 + 2 * port } else { 0 };
        first + usize::from(writes)
    }

    fn give(&mut self, active: &mut Active, port: usize) -> Result<Progress, Fault> {
        let queue = self.queue_of(port, false);
        let Some(port) = self.ports.get_mut(port) else { return Ok(Progress::Idle) };
        active.serve(queue, BUDGET, |request| Ok(port.fill(request)))
    }

    fn take(&mut self, active: &mut Active, port: usize) -> Result<Progress, Fault> {
        let queue = self.queue_of(port, true);
        let Some(port) = self.ports.get_mut(port) else { return Ok(Progress::Idle) };
        let progress = active.serve(queue, BUDGET, |request| Ok(port.drain(request)))?;
        Ok(if port.has_more() { Progress::More } else { progress })
    }

    /// Gives the driver messages that wait for it.
    fn tell(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        let messages = &mut self.messages;
        active.serve(TO_DRIVER, BUDGET, |request| {
            let Some(message) = messages.front() else { return Ok(None) };
            if !request.writable.write(0, message) {
                return Err(Fault::Request("has no room for a message"));
            }
            let length = message.len() as u32;
            messages.pop_front();
            Ok(Some(length))
        })
    }

    /// Hears the driver's messages.
    fn hear(&mut self, active: &mut Active) -> Result<Progress, Fault> {
        let progress = active.serve(FROM_DRIVER, BUDGET, |request| {
            // What it would be told waits until it takes what it is told already.
            if self.messages.len() >= MESSAGES_MAX {
                return Ok(None);
            }
            self.obey(request)?;
            Ok(Some(0))
        })?;
        self.tell(active)?;
        Ok(progress)
    }

    fn obey(&mut self, request: &Request<'_>) -> Result<(), Fault> {
        let mut bytes = [0; HEADER_BYTES];
        if !request.readable.read(0, &mut bytes) {
            return Err(Fault::Request("has no message"));
        }
        let header = Header::read(&bytes);
        match (header.event, header.value) {
            (message::DEVICE_READY, 1) => {
                // Anew, whatever it was told before.
                self.messages.clear();
                let ids = (1..).take(self.ports.len());
                self.messages.extend(ids.map(|id| Header::of(id, message::PORT_ADD, 1).bytes()));
            }
            (message::PORT_READY, 1) => {
                let number = usize::try_from(header.port).ok().and_then(|id| id.checked_sub(1));
                if let Some(port) = number.and_then(|number| self.ports.get(number)) {
                    let mut name = Header::of(header.port, message::PORT_NAME, 1).bytes();
                    name.extend(port.name().bytes());
                    self.messages.push_back(name);
                    self.messages.push_back(Header::of(header.port, message::PORT_OPEN, 1).bytes());
                }
            }
            // What else a driver says is nothing to us: that it can't have a port, or whether a program has one open.
            _ => {}
        }
        Ok(())
    }
}

impl Device for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn features(&self) -> u64 {
        if self.is_named { VIRTIO_CONSOLE_F_MULTIPORT } else { VIRTIO_CONSOLE_F_SIZE }
    }

    fn queue_sizes(&self) -> &[u16] {
        let count = if self.is_named { 2 * (self.ports.len() + 1) + 2 } else { 2 };
        QUEUES.get(..count).unwrap_or(&QUEUES)
    }

    fn config(&self) -> &[u8] {
        &[0; CONFIG_BYTES]
    }

    fn changing_config(&self) -> Option<Arc<DeviceConfig>> {
        Some(Arc::clone(&self.config))
    }

    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        self.ports.iter().filter_map(Port::input).collect()
    }

    fn sinks(&self) -> Vec<BorrowedFd<'_>> {
        self.ports.iter().map(Port::output).collect()
    }

    fn activate(&mut self, _active: &mut Active) -> Result<(), Fault> {
        self.messages.clear();
        self.ports.iter_mut().for_each(Port::begin);
        Ok(())
    }

    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        match self.port_of(index) {
            Some((port, true)) => self.take(active, port),
            Some((port, false)) => self.give(active, port),
            None if self.is_named && index == TO_DRIVER => self.tell(active),
            None if self.is_named && index == FROM_DRIVER => self.hear(active),
            // Port 0 of a device with names is nobody's.
            None => Ok(Progress::Idle),
        }
    }

    fn backend_ready(&mut self, active: &mut Active, backend: usize) -> Result<Progress, Fault> {
        let inputs: Vec<usize> = self
            .ports
            .iter()
            .enumerate()
            .filter(|(_, port)| port.input().is_some())
            .map(|(at, _)| at)
            .collect();
        match inputs.get(backend) {
            Some(port) => self.give(active, *port),
            None => self.take(active, backend - inputs.len()),
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
