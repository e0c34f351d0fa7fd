//! A drive in memory, which does what it's told, or not.

use super::*;
use proptest::prelude::*;

/// How it misbehaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flaw {
    None,
    /// It says that it has formatted, and has not.
    KeepsData,
    /// It forgets what is written.
    Forgets,
    NeverReady,
    Gone,
    Fails,
    Silent,
    AnswersAnother,
    CannotFormat,
    Shared,
    Detached,
    LargeBlocks,
    Metadata,
}

struct Model {
    flaw: Flaw,
    enabled: bool,
    memory: Vec<u8>,
    blocks: std::collections::BTreeMap<(u32, u64), Vec<u8>>,
    /// Of each queue: commands taken, completions given.
    taken: [u16; 2],
    given: [u16; 2],
    formatted: Vec<u32>,
}

const ADDRESS: u64 = 0x10_0000;

impl Model {
    fn new(flaw: Flaw) -> Self {
        let memory = vec![0; MEMORY_BYTES];
        Self {
            flaw,
            enabled: false,
            memory,
            blocks: Default::default(),
            taken: [0; 2],
            given: [0; 2],
            formatted: Vec::new(),
        }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn identify(&mut self, cns: u32, at: usize) {
        let mut page = vec![0u8; PAGE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        match cns {
            CNS_CONTROLLER => {
                put(78, &7u16.to_le_bytes());
                let can = if self.flaw == Flaw::CannotFormat {
                    MANAGES_NAMESPACES
                } else {
                    FORMATS | MANAGES_NAMESPACES
                };
                put(256, &can.to_le_bytes());
            }
            CNS_ACTIVE => put(0, &[1, 0, 0, 0, 3, 0, 0, 0]),
            CNS_ALLOCATED if self.flaw == Flaw::Detached => put(0, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]),
            CNS_ALLOCATED => put(0, &[1, 0, 0, 0, 3, 0, 0, 0]),
            CNS_ATTACHED_TO => {
                put(0, if self.flaw == Flaw::Shared { &[2, 0, 7, 0, 8, 0] } else { &[1, 0, 7, 0] })
            }
            _ => {
                put(0, &1_000_000u64.to_le_bytes());
                put(26, &[1]);
                put(30, &[1]);
                put(
                    132,
                    &[
                        if self.flaw == Flaw::Metadata { 8 } else { 0 },
                        0,
                        if self.flaw == Flaw::LargeBlocks { 16 } else { 9 },
                    ],
                );
            }
        }
        self.put(at, &page);
    }

    fn command(&mut self, queue: usize, at: usize) -> u16 {
        let word = |at: usize| u32::from_le_bytes(self.memory[at..at + 4].try_into().unwrap());
        let (opcode, namespace) = (self.memory[at], word(at + 4));
        let data = u64::from(word(at + 24)) | u64::from(word(at + 28)) << 32;
        let data = usize::try_from(data.saturating_sub(ADDRESS)).unwrap();
        let (first, place) = (word(at + 40), u64::from(word(at + 40)) | u64::from(word(at + 44)) << 32);
        match (queue, opcode) {
            (0, IDENTIFY) => self.identify(first, data),
            (0, CREATE_COMPLETION | CREATE_SUBMISSION) | (1, FLUSH) => {}
            (0, FORMAT) => {
                assert_eq!(first, 1 | ERASE_USER_DATA, "its own format");
                self.formatted.push(namespace);
                if self.flaw != Flaw::KeepsData {
                    self.blocks.retain(|(of, _), _| *of != namespace);
                }
            }
            (1, WRITE) if self.flaw == Flaw::Forgets => {}
            (1, WRITE) => {
                let block = self.memory[data..data + 512].to_vec();
                self.blocks.insert((namespace, place), block);
            }
            (1, READ) => {
                let block = self.blocks.get(&(namespace, place)).cloned().unwrap_or_else(|| vec![0; 512]);
                self.put(data, &block);
            }
            _ => return 1 << 1,
        }
        if self.flaw == Flaw::Fails && opcode == FORMAT { 6 << 1 } else { 0 }
    }

    fn work(&mut self, queue: usize, tail: u32) {
        while u32::from(self.taken[queue]) != tail {
            let commands = queue * 2 * PAGE_BYTES;
            let at = commands + usize::from(self.taken[queue]) * 64;
            self.taken[queue] = (self.taken[queue] + 1) % DEPTH;
            let id = [self.memory[at + 2], self.memory[at + 3]];
            let status = self.command(queue, at);
            if self.flaw == Flaw::Silent && self.memory[at] == FORMAT {
                continue;
            }
            let given = self.given[queue];
            self.given[queue] = given.wrapping_add(1);
            let phase = 1 ^ ((given / DEPTH) & 1);
            let id = if self.flaw == Flaw::AnswersAnother { [id[0] ^ 1, id[1]] } else { id };
            let mut done = [0; 16];
            done[12..14].copy_from_slice(&id);
            done[14..16].copy_from_slice(&(status | phase).to_le_bytes());
            self.put(commands + PAGE_BYTES + usize::from(given % DEPTH) * 16, &done);
        }
    }
}

impl Controller for Model {
    fn read(&mut self, register: u64) -> io::Result<u32> {
        Ok(match (register, self.flaw) {
            (_, Flaw::Gone) => u32::MAX,
            (CAP, _) => 1 << 24 | 0x7ff,
            (CAP_HIGH, _) => 1 << 5,
            (CSTS, Flaw::NeverReady) => 0,
            (CSTS, _) => u32::from(self.enabled),
            _ => 0,
        })
    }

    fn write(&mut self, register: u64, value: u32) -> io::Result<()> {
        match register {
            CC => self.enabled = value & 1 != 0,
            DOORBELLS => self.work(0, value),
            register if register == DOORBELLS + 8 => self.work(1, value),
            _ => {}
        }
        Ok(())
    }

    fn load(&mut self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.memory[at..at + bytes.len()]);
    }

    fn store(&mut self, at: usize, bytes: &[u8]) {
        self.put(at, bytes);
    }

    fn address(&self) -> u64 {
        ADDRESS
    }
}

#[test]
fn each_namespace_is_formatted_and_nothing_is_left() {
    let mut drive = Model::new(Flaw::None);
    drive.blocks.insert((3, 999_999), b"a tenant's data".to_vec());
    let done = format_all(&mut drive).unwrap();
    assert_eq!(done, "2 namespaces formatted, 64 marks written before are gone");
    assert_eq!((drive.formatted.as_slice(), drive.blocks.len(), drive.enabled), (&[1, 3][..], 0, false));
}

#[test]
fn a_drive_that_does_not_do_it_is_told() {
    for (flaw, why) in [
        (Flaw::KeepsData, "namespace 1: block 0 still has what was written before the format"),
        (Flaw::Forgets, "namespace 1: block 0 does not keep what is written to it"),
        (Flaw::NeverReady, "it was not ready within 500ms"),
        (Flaw::Gone, "it does not answer"),
        (Flaw::Fails, "namespace 1: command 0x80 failed with status 0x6"),
        (Flaw::AnswersAnother, "it completes a command that it was not given, at 0x6"),
        (Flaw::CannotFormat, "it does not know Format NVM"),
        (Flaw::Shared, "its namespace 1 is another controller's too"),
        (Flaw::Detached, "its namespace 2 is attached to nobody"),
        (Flaw::LargeBlocks, "blocks of its namespace 1 have 2^16 bytes"),
        (Flaw::Metadata, "blocks of its namespace 1 have 8 bytes of metadata"),
    ] {
        let told = format_all(&mut Model::new(flaw)).unwrap_err();
        assert!(told.starts_with(why), "{flaw:?}: {told}");
    }
}

#[test]
fn what_does_not_answer_is_waited_for_no_longer_than_said() {
    let mut model = Model::new(Flaw::Silent);
    let mut drive = Drive::enable(&mut model).unwrap();
    let format = Command { opcode: FORMAT, words: [1 | ERASE_USER_DATA, 0, 0], ..Command::default() };
    let told = drive.admin(format, Duration::from_millis(20)).unwrap_err();
    assert_eq!(told, "command 0x80 was not done within 20ms");
}

#[test]
fn marks_lie_at_both_ends_and_tell_their_places() {
    let namespace = |blocks| Namespace { id: 1, blocks, block_bytes: 512, format: 0 };
    let places = namespace(u64::MAX).places();
    assert_eq!((places.len(), places.first(), places.last()), (32, Some(&0), Some(&(u64::MAX - 1))));
    assert_eq!(namespace(3).places(), BTreeSet::from([0, 1, 2]));
    assert_eq!((namespace(0).places().len(), namespace(1).places().len()), (1, 1));
    let marks: BTreeSet<_> = places.iter().map(|place| namespace(9).mark(*place)).collect();
    assert_eq!(marks.len(), places.len());
    assert!(marks.iter().all(|mark| mark.len() == 512 && mark.iter().any(|byte| *byte != 0)));
}

/// Registers and memory as they come.
struct Anything {
    bytes: Vec<u8>,
    at: usize,
}

impl Anything {
    fn next(&mut self) -> u8 {
        self.at += 1;
        self.bytes.get(self.at % self.bytes.len().max(1)).copied().unwrap_or(0)
    }
}

impl Controller for Anything {
    fn read(&mut self, _: u64) -> io::Result<u32> {
        Ok(u32::from_le_bytes([self.next(), self.next(), self.next(), self.next()]) & 0x00ff_ffff)
    }
    fn write(&mut self, _: u64, _: u32) -> io::Result<()> {
        if self.next() == 7 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
    fn load(&mut self, _: usize, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.next());
    }
    fn store(&mut self, _: usize, _: &[u8]) {}
    fn address(&self) -> u64 {
        ADDRESS
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_that_a_drive_says_is_a_panic(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
        let mut drive = Anything { bytes, at: 0 };
        let own = Queue::new(1);
        let mut drive = Drive {
            controller: &mut drive,
            stride: 4,
            ready_max: Duration::from_millis(1),
            admin: Queue::new(0),
            data: own,
            next_id: u16::MAX,
        };
        let about = drive.identify(CNS_NAMESPACE, 1);
        prop_assert!(about.map_or(true, |page| page.len() == PAGE_BYTES));
        let _ = drive.namespaces();
        let _ = drive.namespace(1, 7).and_then(|namespace| drive.format(&namespace));
        let _ = drive.disable();
    }
}
