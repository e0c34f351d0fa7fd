use std::{
    fs,
    io::Write,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::*;
use crate::{
    qcow2,
    testing::{
        INDIRECT, MEMORY_BYTES, NEXT, Part, Ring, WRITE, active, attack, bytes, descriptor, fill, memory,
        run, signals,
    },
};

const SIZE: u64 = 64 * SECTOR_BYTES;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const STATUS: u64 = 0x9000;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// With a ring, and without.
const ENGINES: [bool; 2] = [true, false];

/// Where the kernel has no ring for this process, as in many containers, there are two disks without; the lab's kernel
/// has one.
fn made(ring: bool, file: OwnedFd, read_only: bool, queues: u16) -> Blk {
    let serial = "disk-7".into();
    let format = Format::Raw;
    let backend = BlkBackend { file, format, size_bytes: SIZE, read_only, serial, queues };
    if ring {
        let disk = Blk::new(backend).unwrap();
        if let Some(error) = disk.without_ring() {
            eprintln!("not tested with a ring: {error}");
        }
        disk
    } else {
        Blk::with_spare(backend, None).unwrap()
    }
}

fn disk_by(ring: bool, read_only: bool) -> (Blk, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..SIZE).map(|at| (at / SECTOR_BYTES) as u8).collect();
    file.write_all(&content).unwrap();
    (made(ring, file.reopen().unwrap().into(), read_only, 1), file)
}

/// Gives the disk turns until `done` says that it has done enough.
fn wait(disk: &mut Blk, active: &mut Active, mut done: impl FnMut() -> bool) -> Result<(), Fault> {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "the disk does not answer");
        disk.backend_ready(active, 0)?;
        thread::yield_now();
    }
    Ok(())
}

/// Sends one request through a queue of its own; returns status and bytes written, or the fault.
fn ask(
    disk: &mut Blk,
    memory: &crate::Memory,
    kind: u32,
    sector: u64,
    data: &[Part],
) -> Result<(u8, u32), Fault> {
    let mut ring = Ring::new(memory, 0x1000, 16);
    fill(memory, 0x2000, &[0; 0x2000]);
    fill(memory, HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    fill(memory, STATUS, &[0xee]);
    let parts = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
    let head = ring.offer(&parts);
    let (mut active, events) = active(memory, &[&ring], FLUSH);
    run(disk, &mut active, 0)?;
    let mut taken = None;
    wait(disk, &mut active, || {
        taken = taken.or_else(|| ring.take());
        taken.is_some()
    })?;
    let (used, written) = taken.unwrap();
    assert_eq!((used, signals(&events[0])), (head, 1));
    Ok((bytes(memory, STATUS, 1)[0], written))
}

#[test]
fn describes_itself() {
    let (disk, _file) = disk_by(true, true);
    assert_eq!(disk.config()[..8], 64u64.to_le_bytes());
    assert_eq!(disk.config()[20..24], 512u32.to_le_bytes());
    assert_ne!(disk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(disk.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    // max_discard_sectors and all after it, where struct virtio_blk_config has them.
    let word = |at: usize| u32::from_le_bytes(disk.config()[at..at + 4].try_into().unwrap());
    assert_eq!([36, 40, 44, 48, 52, 56].map(word), [RANGE_MAX_SECTORS, 32, 1, RANGE_MAX_SECTORS, 32, 1]);
    assert_eq!(disk.config().len(), 60);
    assert_eq!((disk.config()[34], disk.features() & 1 << VIRTIO_BLK_F_MQ), (1, 0));
    let many = made(false, tempfile::tempfile().unwrap().into(), false, 4);
    assert_eq!((many.config()[34], many.queue_sizes().len()), (4, 4));
    assert_ne!(many.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    for (size_bytes, queues) in [(0, 1), (511, 1), (513, 1), (512, 0), (512, 9)] {
        let file = tempfile::tempfile().unwrap().into();
        let serial = String::new();
        let format = Format::Raw;
        let backend = BlkBackend { file, format, size_bytes, read_only: false, serial, queues };
        assert!(Blk::new(backend).is_err());
    }
}

#[test]
fn reads_writes_flushes_and_tells_its_serial() {
    ENGINES.into_iter().for_each(reads_writes_flushes_and_tells_its_serial_by);
}

fn reads_writes_flushes_and_tells_its_serial_by(ring: bool) {
    let memory = memory();
    let (mut disk, file) = disk_by(ring, false);
    // Over the border of the two memory regions, in parts of odd lengths.
    let border = MEMORY_BYTES as u64 / 2;
    let parts = [(border - 100, 500, true), (DATA, 524, true)];
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_IN, 3, &parts).unwrap(), (0, 1025));
    let read = [bytes(&memory, border - 100, 500), bytes(&memory, DATA, 524)].concat();
    assert_eq!(read, [[3; 512], [4; 512]].concat());

    fill(&memory, DATA, &[0xab; 512]);
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_OUT, 63, &[(DATA, 512, false)]).unwrap(), (0, 1));
    let content = fs::read(file.path()).unwrap();
    assert_eq!((&content[63 * 512..], content[62 * 512]), (&[0xab; 512][..], 62));

    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_FLUSH, 0, &[]).unwrap(), (0, 1));
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]).unwrap(), (0, 21));
    assert_eq!(bytes(&memory, DATA, 20), b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn refuses_with_a_status_what_cannot_be_done() {
    ENGINES.into_iter().for_each(refuses_with_a_status_what_cannot_be_done_by);
}

fn refuses_with_a_status_what_cannot_be_done_by(ring: bool) {
    let memory = memory();
    let (mut writable, _keep) = disk_by(ring, false);
    let (mut read_only, file) = disk_by(ring, true);
    const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
    let data = |length, write| [(DATA, length, write)];
    let status =
        |disk: &mut Blk, kind, sector, parts: &[Part]| ask(disk, &memory, kind, sector, parts).unwrap().0;
    assert_eq!(status(&mut writable, VIRTIO_BLK_T_IN, 64, &data(512, true)), IOERR, "past the end");
    assert_eq!(status(&mut writable, VIRTIO_BLK_T_IN, 63, &data(1024, true)), IOERR, "over the end");
    assert_eq!(status(&mut writable, VIRTIO_BLK_T_OUT, u64::MAX, &data(512, false)), IOERR, "overflow");
    assert_eq!(
        status(&mut writable, VIRTIO_BLK_T_OUT, 1 << 55, &data(512, false)),
        IOERR,
        "overflow in bytes"
    );
    assert_eq!(status(&mut writable, VIRTIO_BLK_T_IN, 0, &data(100, true)), IOERR, "not in sectors");
    assert_eq!(status(&mut read_only, VIRTIO_BLK_T_OUT, 0, &data(512, false)), IOERR, "read-only");
    assert_eq!(status(&mut writable, 99, 0, &data(512, true)), VIRTIO_BLK_S_UNSUPP as u8);
    assert_eq!(fs::read(file.path()).unwrap()[..512], [0; 512]);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn discards_and_writes_zeroes() {
    ENGINES.into_iter().for_each(discards_and_writes_zeroes_by);
}

fn discards_and_writes_zeroes_by(ring: bool) {
    let memory = memory();
    let (mut disk, file) = disk_by(ring, false);
    let mut clear = |kind, ranges: &[Vec<u8>]| {
        let data = ranges.concat();
        fill(&memory, DATA, &data);
        ask(&mut disk, &memory, kind, 0, &[(DATA, data.len() as u32, false)]).unwrap().0
    };
    assert_eq!(clear(VIRTIO_BLK_T_DISCARD, &[range(8, 8, 0), range(60, 4, 0), range(3, 0, 0)]), 0);
    assert_eq!(clear(VIRTIO_BLK_T_WRITE_ZEROES, &[range(1, 1, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)]), 0);
    let content = fs::read(file.path()).unwrap();
    let cleared = |sector: usize| content[sector * 512..][..512] == [0; 512];
    let found: Vec<usize> = (1..64).filter(|sector| cleared(*sector)).collect();
    assert_eq!(found, [&[1][..], &(8..16).collect::<Vec<_>>(), &(60..64).collect::<Vec<_>>()].concat());
    // Not on every file system; if not, the driver is told so, and it is not done by another way.
    let zeroed = clear(VIRTIO_BLK_T_WRITE_ZEROES, &[range(20, 1, 0)]);
    let content = fs::read(file.path()).unwrap();
    let now = content[20 * 512..][..512] == [0; 512];
    assert!(matches!((zeroed, now), (0, true) | (2, false)), "{zeroed} {now}");
    assert_eq!(content.len() as u64, SIZE);
}

#[test]
fn clears_all_ranges_or_none() {
    ENGINES.into_iter().for_each(clears_all_ranges_or_none_by);
}

fn clears_all_ranges_or_none_by(ring: bool) {
    let memory = memory();
    let (mut disk, file) = disk_by(ring, false);
    let before = fs::read(file.path()).unwrap();
    let (io, unsupported) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let mut odd = range(1, 1, 0);
    odd.push(0);
    let cases: [(Vec<u8>, u8); 8] = [
        (range(63, 2, 0), io),
        (range(u64::MAX, 1, 0), io),
        (range(1 << 55, 1, 0), io),
        (range(0, u32::MAX, 0), io),
        (range(0, 1, 1), unsupported),
        (range(0, 1, 2), unsupported),
        (odd, io),
        (range(1, 1, 0).repeat(RANGES_MAX), io),
    ];
    for (second, status) in cases {
        let data = [range(5, 1, 0), second].concat();
        fill(&memory, DATA, &data);
        let parts = [(DATA, data.len() as u32, false)];
        assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_DISCARD, 0, &parts).unwrap().0, status, "{data:?}");
    }
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_DISCARD, 0, &[]).unwrap().0, io);
    assert_eq!(fs::read(file.path()).unwrap(), before);
}

/// Over a raw image of two sectors of 0xbe.
fn qcow2_disk() -> (Blk, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&qcow2::tests::empty(3, true)).unwrap();
    let mut below = tempfile::tempfile().unwrap();
    below.write_all(&[0xbe; 1024]).unwrap();
    let below = Below { file: below.into(), size_bytes: 1024, format: Format::Raw };
    let backend = BlkBackend {
        file: file.reopen().unwrap().into(),
        format: Format::Qcow2 { file_bytes_max: 8 << 20, below: Some(Box::new(below)) },
        size_bytes: qcow2::tests::SIZE as u64,
        read_only: false,
        serial: String::new(),
        queues: 1,
    };
    (Blk::new(backend).unwrap(), file)
}

#[test]
fn a_qcow2_image_is_a_disk() {
    let memory = memory();
    let (mut disk, file) = qcow2_disk();
    assert!(disk.holds_back() && disk.without_ring().is_none());
    let sectors = qcow2::tests::SIZE as u64 / SECTOR_BYTES;
    fill(&memory, DATA, &[0xab; 1024]);
    let out = [(DATA, 512, false), (DATA + 512, 512, false)];
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_OUT, 1, &out).unwrap().0, 0);
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_OUT, sectors - 1, &out[..1]).unwrap().0, 0);
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_OUT, sectors, &out[..1]).unwrap().0, 1, "the end");
    // From the image below, from this one, and from neither.
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_IN, 0, &[(DATA, 2048, true)]).unwrap(), (0, 2049));
    let expected = [[0xbe; 512], [0xab; 512], [0xab; 512], [0; 512]].concat();
    assert_eq!(bytes(&memory, DATA, 2048), expected);
    // The first cluster, after which the image below must not show through.
    fill(&memory, DATA, &range(0, 8, 0));
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16, false)]).unwrap().0, 0);
    // Within the last.
    fill(&memory, DATA, &range(sectors - 1, 1, 0));
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16, false)]).unwrap().0, 0);
    for sector in [0, sectors - 1] {
        assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_IN, sector, &[(DATA, 512, true)]).unwrap().0, 0);
        assert_eq!(bytes(&memory, DATA, 512), [0; 512]);
    }
    assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_FLUSH, 0, &[]).unwrap().0, 0);
    qcow2::tests::check(&fs::read(file.path()).unwrap());
}

#[test]
fn a_broken_chain_stops_the_device() {
    ENGINES.into_iter().for_each(a_broken_chain_stops_the_device_by);
}

fn a_broken_chain_stops_the_device_by(ring: bool) {
    let memory = memory();
    let header = (HEADER, 16);
    let table = 0x20000;
    // Each makes a chain that begins at descriptor 0.
    type Case = (&'static str, fn(&Ring, (u64, u32), u64));
    let cases: [Case; 9] = [
        ("loops", |ring, header, _| {
            ring.describe(ring.base, 0, header, NEXT, 1);
            ring.describe(ring.base, 1, (DATA, 512), WRITE | NEXT, 1);
        }),
        ("leads out of its table", |ring, header, _| ring.describe(ring.base, 0, header, NEXT, 16)),
        ("behind a writable one", |ring, header, _| {
            ring.describe(ring.base, 0, (STATUS, 1), WRITE | NEXT, 1);
            ring.describe(ring.base, 1, header, 0, 0);
        }),
        ("no room for its status", |ring, header, _| ring.describe(ring.base, 0, header, 0, 0)),
        ("no header", |ring, _, _| {
            ring.describe(ring.base, 0, (HEADER, 15), NEXT, 1);
            ring.describe(ring.base, 1, (STATUS, 1), WRITE, 0);
        }),
        ("not in memory", |ring, header, _| {
            ring.describe(ring.base, 0, header, NEXT, 1);
            ring.describe(ring.base, 1, (MEMORY_BYTES as u64 - 1, 2), WRITE, 0);
        }),
        ("more than one indirect table", |ring, _, table| {
            ring.describe(ring.base, 0, (table, 16), INDIRECT, 0);
            ring.describe(table, 0, (table, 16), INDIRECT, 0);
        }),
        ("longer than its queue", |ring, _, table| {
            ring.describe(ring.base, 0, (table, 17 * 16), INDIRECT, 0);
            for index in 0..17 {
                ring.describe(table, index, (DATA, 1), WRITE | if index < 16 { NEXT } else { 0 }, index + 1);
            }
        }),
        ("whole descriptors", |ring, _, table| ring.describe(ring.base, 0, (table, 8), INDIRECT, 0)),
    ];
    for (expected, make) in cases {
        let (mut disk, _file) = disk_by(ring, false);
        fill(&memory, 0x1000, &[0; 0x3000]);
        let mut queue = Ring::new(&memory, 0x1000, 16);
        make(&queue, header, table);
        queue.make_available(0);
        let (mut active, _events) = active(&memory, &[&queue], FLUSH);
        let fault = run(&mut disk, &mut active, 0).unwrap_err().to_string();
        assert!(fault.contains(expected), "{fault} is not: {expected}");
        assert_eq!(queue.take(), None);
    }
}

#[test]
fn indirect_descriptors_work() {
    ENGINES.into_iter().for_each(indirect_descriptors_work_by);
}

fn indirect_descriptors_work_by(ring: bool) {
    let memory = memory();
    let (mut disk, _file) = disk_by(ring, false);
    let mut queue = Ring::new(&memory, 0x1000, 16);
    let table = 0x20000;
    fill(&memory, HEADER, &[0; 16]);
    fill(&memory, HEADER + 8, &[5]);
    queue.describe(table, 0, (HEADER, 16), NEXT, 2);
    queue.describe(table, 2, (DATA, 512), WRITE | NEXT, 1);
    queue.describe(table, 1, (STATUS, 1), WRITE, 0);
    queue.describe(queue.base, 7, (table, 48), INDIRECT, 0);
    queue.make_available(7);
    let (mut active, _events) = active(&memory, &[&queue], FLUSH);
    run(&mut disk, &mut active, 0).unwrap();
    let mut taken = None;
    wait(&mut disk, &mut active, || {
        taken = taken.or_else(|| queue.take());
        taken.is_some()
    })
    .unwrap();
    assert_eq!(taken, Some((7, 513)));
    assert_eq!(bytes(&memory, DATA, 512), [5; 512]);
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let memory = memory();
    let (mut disk, _file) = disk_by(false, false);
    let mut ring = Ring::new(&memory, 0x1000, 128);
    fill(&memory, HEADER, &VIRTIO_BLK_T_FLUSH.to_le_bytes());
    for _ in 0..64 {
        ring.offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    let (mut active, events) = active(&memory, &[&ring], FLUSH);
    assert_eq!(disk.queue_ready(&mut active, 0).unwrap(), Progress::More);
    assert_eq!(std::iter::from_fn(|| ring.take()).count(), sync::BUDGET);
    assert_eq!(signals(&events[0]), 1, "once for all of a turn");
    run(&mut disk, &mut active, 0).unwrap();
    assert_eq!(std::iter::from_fn(|| ring.take()).count(), 64 - sync::BUDGET);
}

#[test]
fn more_than_a_ring_holds_waits_in_the_queues() {
    let memory = memory();
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let mut disk = made(true, file.into(), false, 3);
    let bases = [0x20000, 0x28000, 0x30000];
    let mut rings: Vec<Ring> = bases.iter().map(|base| Ring::new(&memory, *base, 256)).collect();
    fill(&memory, HEADER, &VIRTIO_BLK_T_IN.to_le_bytes());
    for ring in &mut rings {
        for _ in 0..85 {
            ring.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
        }
    }
    let (mut active, _events) = active(&memory, &rings.iter().collect::<Vec<_>>(), FLUSH);
    for index in 0..3 {
        run(&mut disk, &mut active, index).unwrap();
    }
    let mut count = 0;
    wait(&mut disk, &mut active, || {
        count += rings.iter_mut().flat_map(Ring::take).count();
        count == 3 * 85
    })
    .unwrap();
}

#[test]
fn a_busy_queue_leaves_the_others_their_turn() {
    let memory = memory();
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let mut disk = made(true, file.into(), false, 2);
    if disk.without_ring().is_some() {
        return;
    }
    let (mut busy, mut other) = (Ring::new(&memory, 0x20000, 256), Ring::new(&memory, 0x28000, 256));
    fill(&memory, HEADER, &VIRTIO_BLK_T_IN.to_le_bytes());
    let request = [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)];
    for _ in 0..85 {
        busy.offer(&request);
    }
    other.offer(&request);
    let (mut active, _events) = active(&memory, &[&busy, &other], FLUSH);
    disk.turn(&mut active, 0b11).unwrap();
    // What ends later is told of, and nothing more is taken.
    wait(&mut disk, &mut active, || other.take().is_some()).unwrap();
}

/// A disk whose reads last until somebody writes to the other end.
fn slow_disk() -> Option<(Blk, io::PipeWriter)> {
    let (file, end) = io::pipe().unwrap();
    let disk = made(true, file.into(), false, 1);
    disk.without_ring().is_none().then_some((disk, end))
}

#[test]
fn a_reset_waits_for_what_the_kernel_still_does() {
    let memory = memory();
    let Some((mut disk, mut end)) = slow_disk() else { return };
    let mut ring = Ring::new(&memory, 0x1000, 16);
    fill(&memory, HEADER, &VIRTIO_BLK_T_IN.to_le_bytes());
    ring.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    let (mut active, _events) = active(&memory, &[&ring], FLUSH);
    run(&mut disk, &mut active, 0).unwrap();
    let writer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        end.write_all(&[7; 512]).unwrap();
        end
    });
    disk.quiesce();
    // What the kernel wrote is there now, so nothing comes later; and the driver is not told.
    assert_eq!((bytes(&memory, DATA, 512), ring.take()), (vec![7; 512], None));
    drop(writer.join().unwrap());
    drop((active, ring));
    assert!(Arc::try_unwrap(memory).is_ok(), "the disk still holds the memory");
}

#[test]
fn what_comes_in_pieces_is_put_together() {
    let memory = memory();
    let Some((mut disk, mut end)) = slow_disk() else { return };
    let mut ring = Ring::new(&memory, 0x1000, 16);
    fill(&memory, HEADER, &VIRTIO_BLK_T_IN.to_le_bytes());
    ring.offer(&[(HEADER, 16, false), (DATA, 300, true), (DATA + 4096, 212, true), (STATUS, 1, true)]);
    let (mut active, _events) = active(&memory, &[&ring], FLUSH);
    run(&mut disk, &mut active, 0).unwrap();
    for (bytes, byte) in [(100, 1), (200, 2), (200, 3), (12, 4)] {
        assert_eq!(ring.take(), None);
        end.write_all(&vec![byte; bytes]).unwrap();
        let soon = Instant::now() + Duration::from_millis(50);
        while Instant::now() < soon {
            disk.backend_ready(&mut active, 0).unwrap();
        }
    }
    assert_eq!(ring.take(), Some((0, 513)));
    assert_eq!(bytes(&memory, DATA, 300), [[1; 100].to_vec(), vec![2; 200]].concat());
    assert_eq!(bytes(&memory, DATA + 4096, 212), [[3; 200].to_vec(), vec![4; 12]].concat());
}

#[test]
fn an_available_index_too_far_ahead_stops_the_device() {
    let memory = memory();
    let (mut disk, _file) = disk_by(true, false);
    let ring = Ring::new(&memory, 0x1000, 16);
    fill(&memory, 0x2002, &17u16.to_le_bytes());
    let (mut active, _events) = active(&memory, &[&ring], FLUSH);
    assert!(matches!(run(&mut disk, &mut active, 0), Err(Fault::Ring(_))));
}

proptest! {
    #[test]
    fn survives_any_driver(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0u16..18, 1..16),
        kind in 0u32..14,
        read_only: bool,
        ring: bool,
    ) {
        let (mut disk, file) = disk_by(ring, read_only);
        attack(&mut disk, &table, &heads, kind);
        drop(disk);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), SIZE);
    }
}

/// A ring that was made before its disks serves one after the other, and never two.
#[test]
fn a_spare_ring_serves_one_disk_after_the_other() {
    let spare = match SpareRing::new() {
        Ok(spare) => spare,
        Err(error) => return eprintln!("not tested: {error}"),
    };
    let made = |content: u8| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[content; SIZE as usize]).unwrap();
        let backend = BlkBackend {
            file: file.reopen().unwrap().into(),
            format: Format::Raw,
            size_bytes: SIZE,
            read_only: false,
            serial: "slot1".into(),
            queues: 1,
        };
        Blk::with_spare(backend, Some(&spare)).unwrap()
    };
    let memory = memory();
    for content in [1, 2, 3] {
        let mut disk = made(content);
        assert!(disk.without_ring().is_none(), "{:?}", disk.without_ring());
        assert_eq!(made(9).without_ring().and_then(io::Error::raw_os_error), Some(libc::EBUSY));
        assert_eq!(ask(&mut disk, &memory, VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]).unwrap(), (0, 513));
        assert_eq!(bytes(&memory, DATA, 512), [content; 512]);
        drop(disk);
        spare.forget_file();
    }
}

/// Whoever lets the last reader of a pipe go ends it for who writes.
#[test]
fn a_spare_ring_forgets_its_file() {
    let Ok(spare) = SpareRing::new() else { return eprintln!("not tested: no ring") };
    let (file, mut end) = io::pipe().unwrap();
    let backend = BlkBackend {
        file: file.into(),
        format: Format::Raw,
        size_bytes: SIZE,
        read_only: false,
        serial: String::new(),
        queues: 1,
    };
    drop(Blk::with_spare(backend, Some(&spare)).unwrap());
    end.write_all(b"is held").unwrap();
    spare.forget_file();
    // Older kernels let it go a moment later.
    let until = Instant::now() + Duration::from_secs(20);
    while end.write_all(b"is it held").is_ok() {
        assert!(Instant::now() < until, "the ring still holds its file");
        thread::sleep(Duration::from_millis(10));
    }
}
