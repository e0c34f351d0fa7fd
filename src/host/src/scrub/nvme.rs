//! Formats all namespaces of an NVMe drive, and sees that what was there is gone (NVM Express Base Specification 2.0).
//!
//! The smallest driver that can do it: one queue for administration, one for data, one command at a time, no interrupts. Marks
//! are written before the format and looked for after it; a drive that says that it has formatted and still has one has not.

use std::{
    collections::BTreeSet,
    io, thread,
    time::{Duration, Instant},
};

/// Two pairs of queues, and a page of data.
pub(super) const MEMORY_BYTES: usize = 5 * PAGE_BYTES;

/// A drive's registers, and memory that it reaches.
pub(super) trait Controller {
    /// A register of 32 bits.
    fn read(&mut self, register: u64) -> io::Result<u32>;
    /// Sets one.
    fn write(&mut self, register: u64, value: u32) -> io::Result<()>;
    /// Copies out of the memory.
    fn load(&mut self, at: usize, bytes: &mut [u8]);
    /// Copies into the memory.
    fn store(&mut self, at: usize, bytes: &[u8]);
    /// Where the drive finds the memory.
    fn address(&self) -> u64;
}

const PAGE_BYTES: usize = 4096;
const DATA: usize = 4 * PAGE_BYTES;
/// Entries of each queue.
const DEPTH: u16 = 16;

// Registers (3.1.3).
const CAP: u64 = 0x00;
const CAP_HIGH: u64 = 0x04;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// Enabled; 64 bytes a command, 16 a completion, pages of 4 KiB, NVM command set.
const CC_ENABLED: u32 = 1 | 6 << 16 | 4 << 20;
const READY: u32 = 1;
const FATAL: u32 = 1 << 1;

// Administration (5).
const CREATE_SUBMISSION: u8 = 0x01;
const CREATE_COMPLETION: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const FORMAT: u8 = 0x80;
const CNS_NAMESPACE: u32 = 0x00;
const CNS_CONTROLLER: u32 = 0x01;
const CNS_ACTIVE: u32 = 0x02;
const CNS_ALLOCATED: u32 = 0x10;
const CNS_ATTACHED_TO: u32 = 0x12;
/// Erase user data (5.14, SES).
const ERASE_USER_DATA: u32 = 1 << 9;
const MANAGES_NAMESPACES: u16 = 1 << 3;
const FORMATS: u16 = 1 << 1;

// Data (NVM Command Set Specification 3.2).
const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;

/// For commands that touch no data.
const SOON: Duration = Duration::from_secs(10);
/// A drive may overwrite itself whole.
const FORMAT_MAX: Duration = Duration::from_secs(30 * 60);
/// More than any drive that is given to guests has.
const NAMESPACES_MAX: usize = 64;
/// Marks in each namespace.
const MARKS: u64 = 32;

/// Formats every namespace; in words what was done.
pub(super) fn format_all(drive: &mut dyn Controller) -> Result<String, String> {
    let mut drive = Drive::enable(drive)?;
    let namespaces = drive.namespaces()?;
    drive.make_data_queue()?;
    let mut blocks = 0u64;
    for namespace in &namespaces {
        drive.format(namespace)?;
        blocks = blocks.saturating_add(namespace.places().len() as u64);
    }
    drive.disable()?;
    Ok(format!("{} formatted, {blocks} marks written before are gone", plural(namespaces.len())))
}

fn plural(count: usize) -> String {
    if count == 1 { "1 namespace".into() } else { format!("{count} namespaces") }
}

/// A namespace, as it says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Namespace {
    id: u32,
    blocks: u64,
    block_bytes: usize,
    /// The format that it has, as Format NVM wants it: LBA format, metadata, protection.
    format: u32,
}

impl Namespace {
    /// Where marks are put: the first and the last block, and as far apart as can be.
    fn places(&self) -> BTreeSet<u64> {
        let last = self.blocks.saturating_sub(1);
        let steps = MARKS.saturating_sub(1);
        (0..MARKS)
            .map(|step| {
                u64::try_from(u128::from(last) * u128::from(step) / u128::from(steps)).unwrap_or(last)
            })
            .collect()
    }

    /// A block that no other place has.
    fn mark(&self, place: u64) -> Vec<u8> {
        let word = (place ^ u64::from(self.id).rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        word.to_le_bytes().into_iter().cycle().take(self.block_bytes).collect()
    }
}

/// A queue pair.
struct Queue {
    id: u16,
    /// Where its commands lie; its completions lie a page later.
    commands: usize,
    tail: u16,
    head: u16,
    phase: bool,
}

impl Queue {
    fn new(id: u16) -> Self {
        Self { id, commands: usize::from(id) * 2 * PAGE_BYTES, tail: 0, head: 0, phase: true }
    }
}

/// One command.
#[derive(Clone, Copy, Default)]
struct Command {
    opcode: u8,
    namespace: u32,
    /// Of data: where, as the drive says it.
    data: u64,
    words: [u32; 3],
}

struct Drive<'a> {
    controller: &'a mut dyn Controller,
    stride: u64,
    ready_max: Duration,
    admin: Queue,
    data: Queue,
    next_id: u16,
}

impl<'a> Drive<'a> {
    /// Brings it up with its queue for administration.
    fn enable(controller: &'a mut dyn Controller) -> Result<Self, String> {
        let (low, high) = (read(controller, CAP)?, read(controller, CAP_HIGH)?);
        if low == u32::MAX && high == u32::MAX {
            return Err("it does not answer".into());
        }
        if low & 0xffff < u32::from(DEPTH) - 1 {
            return Err(format!("its queues have {} entries", low & 0xffff));
        }
        if high >> 16 & 0xf != 0 {
            return Err("its pages are larger than 4 KiB".into());
        }
        if high >> 5 & 1 == 0 {
            return Err("it does not speak the NVM command set".into());
        }
        let ready_max = Duration::from_millis(500).saturating_mul((low >> 24).max(1));
        let (admin, data) = (Queue::new(0), Queue::new(1));
        let mut drive = Self { controller, stride: 4 << (high & 0xf), ready_max, admin, data, next_id: 0 };
        drive.disable()?;
        let address = drive.controller.address();
        let size = u32::from(DEPTH - 1);
        drive.write(AQA, size << 16 | size)?;
        drive.write_address(ASQ, address)?;
        drive.write_address(ACQ, address + PAGE_BYTES as u64)?;
        drive.write(CC, CC_ENABLED)?;
        drive.wait_until_ready(true)?;
        Ok(drive)
    }

    fn disable(&mut self) -> Result<(), String> {
        self.write(CC, 0)?;
        self.wait_until_ready(false)
    }

    fn wait_until_ready(&mut self, wanted: bool) -> Result<(), String> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            if (status & READY != 0) == wanted {
                return Ok(());
            }
            if start.elapsed() > self.ready_max {
                let word = if wanted { "ready" } else { "disabled" };
                return Err(format!("it was not {word} within {:?}", self.ready_max));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn status(&mut self) -> Result<u32, String> {
        match read(self.controller, CSTS)? {
            u32::MAX => Err("it does not answer any more".into()),
            status if status & FATAL != 0 => Err(format!("it has failed (CSTS {status:#x})")),
            status => Ok(status),
        }
    }

    fn write(&mut self, register: u64, value: u32) -> Result<(), String> {
        self.controller.write(register, value).map_err(|error| format!("its register {register:#x}: {error}"))
    }

    fn write_address(&mut self, register: u64, address: u64) -> Result<(), String> {
        let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
        self.write(register, u32::from_le_bytes([a, b, c, d]))?;
        self.write(register + 4, u32::from_le_bytes([e, f, g, h]))
    }

    /// The namespaces that are there, each of this drive alone.
    fn namespaces(&mut self) -> Result<Vec<Namespace>, String> {
        let controller = self.identify(CNS_CONTROLLER, 0)?;
        let (own_id, can) = (word(&controller, 78), word(&controller, 256));
        if can & FORMATS == 0 {
            return Err("it does not know Format NVM".into());
        }
        let active = list(&self.identify(CNS_ACTIVE, 0)?);
        if active.len() > NAMESPACES_MAX {
            return Err(format!("it has more than {NAMESPACES_MAX} namespaces"));
        }
        if can & MANAGES_NAMESPACES != 0 {
            let all = list(&self.identify(CNS_ALLOCATED, 0)?);
            if let Some(other) = all.iter().find(|id| !active.contains(id)) {
                return Err(format!(
                    "its namespace {other} is attached to nobody, so it can't be formatted, and a guest could have attached it; \
                     attach it or delete it"
                ));
            }
        }
        active.into_iter().map(|id| self.namespace(id, own_id)).collect()
    }

    fn namespace(&mut self, id: u32, own_id: u16) -> Result<Namespace, String> {
        let about = self.identify(CNS_NAMESPACE, id)?;
        let byte = |at: usize| about.get(at).copied().unwrap_or(0);
        if byte(30) & 1 != 0 {
            let attached = self.identify(CNS_ATTACHED_TO, id)?;
            let others = (0..word(&attached, 0)).map(|at| word(&attached, 2 + 2 * usize::from(at)));
            if others.take(NAMESPACES_MAX).any(|other| other != own_id) {
                return Err(format!("its namespace {id} is another controller's too"));
            }
        }
        let used = usize::from(byte(26) & 0xf);
        let shift = byte(128 + 4 * used + 2);
        let block_bytes = 1usize.checked_shl(shift.into()).filter(|bytes| (512..=PAGE_BYTES).contains(bytes));
        let block_bytes =
            block_bytes.ok_or_else(|| format!("blocks of its namespace {id} have 2^{shift} bytes"))?;
        let metadata = word(&about, 128 + 4 * used);
        if metadata != 0 {
            return Err(format!("blocks of its namespace {id} have {metadata} bytes of metadata"));
        }
        let mut blocks = [0; 8];
        blocks.iter_mut().zip(&about).for_each(|(to, from)| *to = *from);
        let blocks = u64::from_le_bytes(blocks);
        let format = u32::from(byte(26) & 0x1f) | u32::from(byte(29) & 0xf) << 5;
        Ok(Namespace { id, blocks, block_bytes, format })
    }

    fn identify(&mut self, cns: u32, namespace: u32) -> Result<Vec<u8>, String> {
        // What it leaves unwritten is not what was there before.
        self.controller.store(DATA, &[0; PAGE_BYTES]);
        let data = self.data_address();
        self.admin(Command { opcode: IDENTIFY, namespace, data, words: [cns, 0, 0] }, SOON)?;
        let mut page = vec![0; PAGE_BYTES];
        self.controller.load(DATA, &mut page);
        Ok(page)
    }

    fn data_address(&self) -> u64 {
        self.controller.address() + DATA as u64
    }

    fn make_data_queue(&mut self) -> Result<(), String> {
        let commands = self.controller.address() + self.data.commands as u64;
        let size = u32::from(DEPTH - 1) << 16 | u32::from(self.data.id);
        let completions = commands + PAGE_BYTES as u64;
        // Contiguous in memory; completions without interrupts.
        self.admin(
            Command {
                opcode: CREATE_COMPLETION,
                data: completions,
                words: [size, 1, 0],
                ..Command::default()
            },
            SOON,
        )?;
        let of = u32::from(self.data.id) << 16 | 1;
        self.admin(
            Command { opcode: CREATE_SUBMISSION, data: commands, words: [size, of, 0], ..Command::default() },
            SOON,
        )?;
        Ok(())
    }

    fn format(&mut self, namespace: &Namespace) -> Result<(), String> {
        let about = |cause: String| format!("namespace {}: {cause}", namespace.id);
        for place in namespace.places() {
            self.controller.store(DATA, &namespace.mark(place));
            self.block(WRITE, namespace, place).map_err(about)?;
        }
        let flush = Command { opcode: FLUSH, namespace: namespace.id, ..Command::default() };
        Self::ask(self.controller, &mut self.data, &mut self.next_id, self.stride, flush, SOON)
            .map_err(about)?;
        for place in namespace.places() {
            if self.read_block(namespace, place).map_err(about)? != namespace.mark(place) {
                return Err(about(format!("block {place} does not keep what is written to it")));
            }
        }
        let words = [namespace.format | ERASE_USER_DATA, 0, 0];
        let format = Command { opcode: FORMAT, namespace: namespace.id, words, ..Command::default() };
        self.admin(format, FORMAT_MAX).map_err(about)?;
        for place in namespace.places() {
            if self.read_block(namespace, place).map_err(about)? == namespace.mark(place) {
                return Err(about(format!("block {place} still has what was written before the format")));
            }
        }
        Ok(())
    }

    fn read_block(&mut self, namespace: &Namespace, place: u64) -> Result<Vec<u8>, String> {
        self.controller.store(DATA, &vec![0; namespace.block_bytes]);
        self.block(READ, namespace, place)?;
        let mut block = vec![0; namespace.block_bytes];
        self.controller.load(DATA, &mut block);
        Ok(block)
    }

    fn block(&mut self, opcode: u8, namespace: &Namespace, place: u64) -> Result<(), String> {
        let [a, b, c, d, e, f, g, h] = place.to_le_bytes();
        let words = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), 0];
        let command = Command { opcode, namespace: namespace.id, data: self.data_address(), words };
        Self::ask(self.controller, &mut self.data, &mut self.next_id, self.stride, command, SOON)
    }

    fn admin(&mut self, command: Command, most: Duration) -> Result<(), String> {
        Self::ask(self.controller, &mut self.admin, &mut self.next_id, self.stride, command, most)
    }

    /// Gives it a command and waits for its completion.
    fn ask(
        controller: &mut dyn Controller,
        queue: &mut Queue,
        next_id: &mut u16,
        stride: u64,
        command: Command,
        most: Duration,
    ) -> Result<(), String> {
        let Command { opcode, namespace, data, words } = command;
        *next_id = next_id.wrapping_add(1);
        let id = *next_id;
        let mut bytes = [0; 64];
        let [a, b, c, d, e, f, g, h] = data.to_le_bytes();
        let parts = [
            (0, u32::from(opcode) | u32::from(id) << 16),
            (4, namespace),
            (24, u32::from_le_bytes([a, b, c, d])),
            (28, u32::from_le_bytes([e, f, g, h])),
            (40, words[0]),
            (44, words[1]),
            (48, words[2]),
        ];
        for (at, value) in parts {
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        }
        controller.store(queue.commands + usize::from(queue.tail) * bytes.len(), &bytes);
        queue.tail = (queue.tail + 1) % DEPTH;
        let bell = DOORBELLS + 2 * u64::from(queue.id) * stride;
        let rung = |error: io::Error| format!("its doorbell: {error}");
        controller.write(bell, queue.tail.into()).map_err(rung)?;
        let start = Instant::now();
        let done = loop {
            let mut done = [0; 16];
            controller.load(queue.commands + PAGE_BYTES + usize::from(queue.head) * done.len(), &mut done);
            if (done[14] & 1 != 0) == queue.phase {
                break done;
            }
            if start.elapsed() > most {
                return Err(format!("command {opcode:#x} was not done within {most:?}"));
            }
            if read(controller, CSTS)? & (READY | FATAL) != READY {
                return Err(format!("it failed at command {opcode:#x}"));
            }
            thread::sleep(Duration::from_micros(200));
        };
        queue.head += 1;
        if queue.head == DEPTH {
            (queue.head, queue.phase) = (0, !queue.phase);
        }
        controller.write(bell + stride, queue.head.into()).map_err(rung)?;
        if word(&done, 12) != id {
            return Err(format!("it completes a command that it was not given, at {opcode:#x}"));
        }
        match word(&done, 14) >> 1 {
            0 => Ok(()),
            // Code, its type, and whether it's no use to try again (4.2.3).
            status => Err(format!("command {opcode:#x} failed with status {:#x}", status & 0x7ff)),
        }
    }
}

fn read(controller: &mut dyn Controller, register: u64) -> Result<u32, String> {
    controller.read(register).map_err(|error| format!("its register {register:#x}: {error}"))
}

/// 16 bits of a page; 0 past its end.
fn word(bytes: &[u8], at: usize) -> u16 {
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    u16::from_le_bytes([byte(at), byte(at.saturating_add(1))])
}

/// Numbers up to the first 0.
fn list(page: &[u8]) -> Vec<u32> {
    let (numbers, _) = page.as_chunks::<4>();
    numbers.iter().map(|number| u32::from_le_bytes(*number)).take_while(|number| *number != 0).collect()
}

#[cfg(test)]
#[path = "nvme_tests.rs"]
mod tests;
