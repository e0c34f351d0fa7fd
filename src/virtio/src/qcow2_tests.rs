use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use proptest::prelude::*;

use super::*;

const BITS: u32 = 12;
const CLUSTER: usize = 1 << BITS;
const SECTOR: usize = 512;
/// Of two second-level tables and a bit.
pub(crate) const SIZE: usize = 2 * (CLUSTER / 8) * CLUSTER + 3 * CLUSTER + 1024;

/// A file in memory that knows what would be there after a loss of power.
#[derive(Debug, Default)]
struct Disk {
    now: RefCell<Vec<u8>>,
    safe: RefCell<Vec<u8>>,
    unsafe_writes: RefCell<Vec<(u64, Vec<u8>)>>,
}

fn put(bytes: &mut Vec<u8>, at: u64, from: &[u8]) {
    let (start, end) = (at as usize, at as usize + from.len());
    bytes.resize(bytes.len().max(end), 0);
    bytes[start..end].copy_from_slice(from);
}

impl Storage for Rc<Disk> {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let now = self.now.borrow();
        let start = usize::try_from(at).map_err(io::Error::other)?.min(now.len());
        let there = &now[start..(start + into.len()).min(now.len())];
        into.fill(0);
        into[..there.len()].copy_from_slice(there);
        Ok(())
    }
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        if at > 64 << 20 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        put(&mut self.now.borrow_mut(), at, from);
        self.unsafe_writes.borrow_mut().push((at, from.to_vec()));
        Ok(())
    }
    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        self.write(at, &vec![0; length.min(1 << 24) as usize])
    }
    fn sync(&self) -> io::Result<()> {
        self.safe.borrow_mut().clone_from(&self.now.borrow());
        self.unsafe_writes.borrow_mut().clear();
        Ok(())
    }
}

impl Disk {
    fn of(bytes: Vec<u8>) -> Rc<Self> {
        Rc::new(Self { now: bytes.clone().into(), safe: bytes.into(), ..Self::default() })
    }
    /// What a loss of power leaves: each write since the last sync is there or not, in any order.
    fn after_crash(&self, mut kept: impl FnMut() -> bool) -> Vec<u8> {
        let mut bytes = self.safe.borrow().clone();
        for (at, from) in self.unsafe_writes.borrow().iter() {
            // A sector is written whole or not at all.
            for (number, sector) in from.chunks(SECTOR).enumerate() {
                if kept() {
                    put(&mut bytes, at + (number * SECTOR) as u64, sector);
                }
            }
        }
        bytes
    }
}

/// An empty image: header, refcount table, one block of refcounts, first-level table.
pub(crate) fn empty(version: u32, backing: bool) -> Vec<u8> {
    let mut bytes = vec![0; 4 * CLUSTER];
    let words: [(usize, u32); 9] = [
        (0, 0x5146_49fb),
        (4, version),
        // The name is not read.
        (12, if backing { 200 } else { 0 }),
        (20, BITS),
        (28, SIZE as u32),
        (36, SIZE.div_ceil(CLUSTER / 8 * CLUSTER) as u32),
        (44, 3 * CLUSTER as u32),
        (52, CLUSTER as u32),
        (56, 1),
    ];
    let more = [(96, 4), (100, 104)];
    for (at, word) in words.into_iter().chain(more.into_iter().filter(|_| version == 3)) {
        put(&mut bytes, at as u64, &word.to_be_bytes());
    }
    put(&mut bytes, CLUSTER as u64, &(2 * CLUSTER as u64).to_be_bytes());
    put(&mut bytes, 2 * CLUSTER as u64, &[0, 1].repeat(4));
    bytes
}

fn expected(disk: &Disk, has_below: bool) -> Expected {
    Expected {
        size_bytes: SIZE as u64,
        file_bytes: disk.now.borrow().len() as u64,
        file_bytes_max: 8 << 20,
        has_below,
        read_only: false,
    }
}

fn open(bytes: Vec<u8>) -> (Rc<Disk>, Result<Qcow2<Rc<Disk>>, FormatError>) {
    let disk = Disk::of(bytes);
    let image = Qcow2::open(Rc::clone(&disk), expected(&disk, false));
    (disk, image)
}

fn write(image: &mut Qcow2<Rc<Disk>>, at: usize, data: &[u8], below: u8) -> Result<(), Error> {
    let (mut at, mut data) = (at as u64, data);
    while !data.is_empty() {
        let length = match image.target(at, data.len() as u64)? {
            Target::Ready { at, length } => {
                image.storage().write(at, &data[..length as usize])?;
                length as usize
            }
            Target::New(cluster) => {
                let within = (at - cluster.disk_at) as usize;
                let length = data.len().min(CLUSTER - within);
                let old = if cluster.old == Place::Below { below } else { 0 };
                let mut content = vec![old; CLUSTER];
                content[within..within + length].copy_from_slice(&data[..length]);
                image.storage().write(cluster.at, &content)?;
                image.give(cluster)?;
                length
            }
        };
        (at, data) = (at + length as u64, &data[length..]);
    }
    Ok(())
}

fn read(image: &mut Qcow2<Rc<Disk>>, at: usize, length: usize, below: u8) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    while bytes.len() < length {
        let extent = image.look_up((at + bytes.len()) as u64, (length - bytes.len()) as u64)?;
        let mut part = vec![if extent.place == Place::Below { below } else { 0 }; extent.length as usize];
        if let Place::At(at) = extent.place {
            image.storage().read(at, &mut part)?;
        }
        bytes.extend(part);
    }
    Ok(bytes)
}

/// Follows all tables: every cluster that is named is counted, and named once. Returns how many are counted in vain.
pub(crate) fn check(bytes: &[u8]) -> usize {
    let long = |at: u64| {
        u64::from_be_bytes(std::array::from_fn(|n| bytes.get(at as usize + n).copied().unwrap_or(0)))
    };
    let count = |cluster: u64| {
        let block = long(CLUSTER as u64 + cluster / (CLUSTER as u64 / 2) * 8);
        let at = (block + cluster % (CLUSTER as u64 / 2) * 2) as usize;
        if block == 0 {
            0
        } else {
            u16::from_be_bytes([bytes.get(at).copied().unwrap_or(0), bytes.get(at + 1).copied().unwrap_or(0)])
        }
    };
    let mut named: BTreeMap<u64, u16> = (0..4).map(|cluster| (cluster, 1)).collect();
    let mut name = |at: u64| *named.entry(at >> BITS).or_default() += 1;
    (0..512)
        .map(|n| long(CLUSTER as u64 + n * 8))
        .filter(|at| *at != 0 && *at != 2 * CLUSTER as u64)
        .for_each(&mut name);
    for table in (0..3).map(|n| long(3 * CLUSTER as u64 + n * 8) & OFFSET_MASK).filter(|at| *at != 0) {
        name(table);
        (0..CLUSTER as u64 / 8)
            .map(|n| long(table + n * 8) & OFFSET_MASK)
            .filter(|at| *at != 0)
            .for_each(&mut name);
    }
    for (cluster, times) in &named {
        assert_eq!((*times, count(*cluster)), (1, 1), "cluster {cluster}: named, counted");
    }
    let all = (bytes.len() / CLUSTER + 1) as u64;
    (0..all).filter(|cluster| count(*cluster) > 0 && !named.contains_key(cluster)).count()
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Discard(usize),
    Flush,
    Reopen,
}

/// Places near each other, so that they meet.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sectors = SIZE / SECTOR;
    let place = prop_oneof![3 => 0..40usize, 1 => 0..sectors, 1 => sectors - 40..sectors];
    let step = prop_oneof![
        6 => (place, 1usize..40, 1u8..).prop_map(|(at, length, byte)| Step::Write(at, length, byte)),
        2 => (0usize..6).prop_map(Step::Discard),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

fn run(image: &mut Qcow2<Rc<Disk>>, model: &mut [u8], step: &Step, below: u8) {
    match *step {
        Step::Write(at, length, byte) => {
            let (start, end) = (at * SECTOR, ((at + length) * SECTOR).min(SIZE));
            write(image, start, &vec![byte; end - start], below).unwrap();
            model[start..end].fill(byte);
        }
        Step::Discard(cluster) => {
            if image.discard((cluster * CLUSTER) as u64).unwrap() {
                model[cluster * CLUSTER..][..CLUSTER].fill(0);
            }
        }
        Step::Flush | Step::Reopen => image.flush().unwrap(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn is_a_disk(steps in steps(), version in 2u32..4, has_below: bool) {
        let below = if has_below { 0xbe } else { 0 };
        let disk = Disk::of(empty(version, has_below));
        let mut model = vec![below; SIZE];
        let mut image = Qcow2::open(Rc::clone(&disk), expected(&disk, has_below)).unwrap();
        for step in &steps {
            run(&mut image, &mut model, step, below);
            if let Step::Reopen = step {
                // Counted in vain are at most those that are freed after the tables were written.
                image = Qcow2::open(Rc::clone(&disk), expected(&disk, has_below)).unwrap();
                check(&disk.now.borrow());
            }
        }
        prop_assert!(read(&mut image, 0, SIZE, below).unwrap() == model);
        image.flush().unwrap();
        image.flush().unwrap();
        let leaks = check(&disk.now.borrow());
        // A second opening does not know what the first would still have freed.
        prop_assert!(leaks == 0 || steps.iter().any(|step| matches!(step, Step::Reopen)), "{} leaks", leaks);
    }

    #[test]
    fn a_loss_of_power_loses_what_was_not_flushed_and_no_more(steps in steps(), kept in prop::collection::vec(any::<bool>(), 1..97)) {
        let (disk, image) = open(empty(3, false));
        let mut image = image.unwrap();
        let mut model = vec![0; SIZE];
        // What each sector may be: as flushed, or anything when it was touched since.
        let mut flushed = vec![Some(0u8); SIZE / SECTOR];
        for step in &steps {
            let before = model.clone();
            run(&mut image, &mut model, step, 0);
            for (sector, value) in flushed.iter_mut().enumerate() {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                if matches!(step, Step::Flush | Step::Reopen) {
                    *value = Some(model[range.start]);
                } else if before[range.clone()] != model[range] {
                    *value = None;
                }
            }
            if let Step::Write(at, length, _) = *step {
                let end = (at + length).min(flushed.len());
                flushed[at.min(end)..end].fill(None);
            }
        }
        let mut kept = kept.iter().cycle().copied();
        let bytes = disk.after_crash(|| kept.next().unwrap_or(true));
        check(&bytes);
        let (_, image) = open(bytes);
        let found = read(&mut image.unwrap(), 0, SIZE, 0).unwrap();
        for (sector, value) in flushed.iter().enumerate() {
            if let Some(value) = value {
                prop_assert!(found[sector * SECTOR..][..SECTOR].iter().all(|byte| byte == value), "sector {}", sector);
            }
        }
    }

    #[test]
    fn survives_any_image(
        changes in prop::collection::vec((0usize..5 * CLUSTER, any::<[u8; 4]>()), 0..24),
        tables in prop::collection::vec((2u64..6, 0u64..512, prop_oneof![any::<u64>(), (0u64..8).prop_map(|n| n << BITS | COPIED)]), 0..24),
        steps in steps(),
        version in 2u32..4,
    ) {
        let mut bytes = empty(version, false);
        for (table, index, entry) in tables {
            put(&mut bytes, (table << BITS) + index * 8, &entry.to_be_bytes());
        }
        for (at, change) in changes {
            put(&mut bytes, at as u64, &change);
        }
        let (_disk, image) = open(bytes);
        let Ok(mut image) = image else { return Ok(()) };
        for step in steps {
            let _ = match step {
                Step::Write(at, length, byte) => write(&mut image, at * SECTOR, &vec![byte; length.min(SIZE / SECTOR - at) * SECTOR], 0),
                Step::Discard(cluster) => image.discard((cluster * CLUSTER) as u64).map(drop),
                Step::Flush | Step::Reopen => image.flush(),
            };
            let _ = read(&mut image, 0, 8 * CLUSTER, 0);
        }
    }
}

#[test]
fn says_by_name_what_it_refuses() {
    let with = |at: usize, change: &[u8]| {
        let mut bytes = empty(3, false);
        put(&mut bytes, at as u64, change);
        open(bytes).1.map(drop).unwrap_err().to_string()
    };
    for (at, change, expected) in [
        (0, &[0u8; 4][..], "no qcow2"),
        (7, &[4], "version 4"),
        (15, &[1], "names another image"),
        (35, &[1], "encrypted"),
        (63, &[1], "snapshots"),
        (79, &[1], "was not closed"),
        (79, &[2], "corrupt"),
        (79, &[4], "in another file"),
        (79, &[8], "not by zlib"),
        (79, &[16], "subclusters"),
        (79, &[32], "not known"),
        (99, &[5], "16 bits"),
        (23, &[9], "4 KiB"),
        (23, &[22], "2 MiB"),
        (26, &[1], "too large"),
        (31, &[1], "damaged"),
        (47, &[1], "not on a cluster"),
        (39, &[1], "too short"),
        (58, &[1], "more than 1 MiB"),
        (2 * CLUSTER, &[0; 2], "not counted"),
    ] {
        let found = if expected == "names another image" {
            with(8, &[0, 0, 0, 0, 0, 0, 0, 200])
        } else {
            with(at, change)
        };
        assert!(found.contains(expected), "{at}: {found} is not: {expected}");
    }
    let disk = Disk::of(empty(3, false));
    let other = Expected { size_bytes: 512, ..expected(&disk, false) };
    assert!(matches!(Qcow2::open(disk, other), Err(FormatError::Size(..))));
}

#[test]
fn what_is_discarded_is_used_again() {
    let (disk, image) = open(empty(3, false));
    let mut image = image.unwrap();
    for round in 0..20 {
        for cluster in 0..50 {
            write(&mut image, cluster * CLUSTER, &[round + 1; CLUSTER], 0).unwrap();
        }
        for cluster in 0..50 {
            assert!(image.discard((cluster * CLUSTER) as u64).unwrap());
        }
        image.flush().unwrap();
    }
    let bytes = disk.now.borrow();
    assert!(bytes.len() < 64 * CLUSTER, "the file has {} clusters", bytes.len() / CLUSTER);
}

#[test]
fn a_file_does_not_grow_beyond_its_bound() {
    let disk = Disk::of(empty(3, false));
    let bound = Expected { file_bytes_max: 10 << BITS, ..expected(&disk, false) };
    let mut image = Qcow2::open(Rc::clone(&disk), bound).unwrap();
    let full = (0..20)
        .map(|cluster| write(&mut image, cluster * CLUSTER, &[1; 512], 0))
        .position(|end| end.is_err());
    assert_eq!(full, Some(5), "four clusters are there, one is a table");
    image.flush().unwrap();
    assert_eq!(check(&disk.now.borrow()), 0);
}
