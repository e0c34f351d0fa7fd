use std::{fs, io::Write};

use proptest::prelude::*;

use super::*;
use crate::testing::{
    INDIRECT, MEMORY_BYTES, NEXT, Part, Ring, WRITE, active, attack, bytes, descriptor, fill, memory, run,
    signals,
};

const SIZE: u64 = 64 * SECTOR_BYTES;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const STATUS: u64 = 0x9000;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

fn disk(read_only: bool) -> (Blk, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..SIZE).map(|at| (at / SECTOR_BYTES) as u8).collect();
    file.write_all(&content).unwrap();
    let backend = BlkBackend {
        file: file.reopen().unwrap().into(),
        size_bytes: SIZE,
        read_only,
        serial: "disk-7".into(),
    };
    (Blk::new(backend).unwrap(), file)
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
    let (used, written) = ring.take().expect("the request comes back");
    assert_eq!((used, signals(&events[0])), (head, 1));
    Ok((bytes(memory, STATUS, 1)[0], written))
}

#[test]
fn describes_itself() {
    let (disk, _file) = disk(true);
    assert_eq!(disk.config()[..8], 64u64.to_le_bytes());
    assert_eq!(disk.config()[20..24], 512u32.to_le_bytes());
    assert_ne!(disk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(disk.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    // max_discard_sectors and all after it, where struct virtio_blk_config has them.
    let word = |at: usize| u32::from_le_bytes(disk.config()[at..at + 4].try_into().unwrap());
    assert_eq!([36, 40, 44, 48, 52, 56].map(word), [RANGE_MAX_SECTORS, 32, 1, RANGE_MAX_SECTORS, 32, 1]);
    assert_eq!(disk.config().len(), 60);
    for size_bytes in [0, 511, 513] {
        let file = tempfile::tempfile().unwrap().into();
        assert!(Blk::new(BlkBackend { file, size_bytes, read_only: false, serial: String::new() }).is_err());
    }
}

#[test]
fn reads_writes_flushes_and_tells_its_serial() {
    let memory = memory();
    let (mut disk, file) = disk(false);
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
    let memory = memory();
    let (mut writable, _keep) = disk(false);
    let (mut read_only, file) = disk(true);
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
    let memory = memory();
    let (mut disk, file) = disk(false);
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
    let memory = memory();
    let (mut disk, file) = disk(false);
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

#[test]
fn a_broken_chain_stops_the_device() {
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
        ("loops", |ring, _, table| {
            ring.describe(ring.base, 0, (table, 16), INDIRECT, 0);
            ring.describe(table, 0, (table, 16), INDIRECT, 0);
        }),
        ("longer than its queue", |ring, _, table| {
            ring.describe(ring.base, 0, (table, 17 * 16), INDIRECT, 0);
            for index in 0..17 {
                ring.describe(table, index, (DATA, 1), WRITE | if index < 16 { NEXT } else { 0 }, index + 1);
            }
        }),
        ("leads out of its table", |ring, _, table| ring.describe(ring.base, 0, (table, 8), INDIRECT, 0)),
    ];
    for (expected, make) in cases {
        let (mut disk, _file) = disk(false);
        fill(&memory, 0x1000, &[0; 0x3000]);
        let mut ring = Ring::new(&memory, 0x1000, 16);
        make(&ring, header, table);
        ring.make_available(0);
        let (mut active, _events) = active(&memory, &[&ring], FLUSH);
        let fault = run(&mut disk, &mut active, 0).unwrap_err().to_string();
        assert!(fault.contains(expected), "{fault} is not: {expected}");
        assert_eq!(ring.take(), None);
    }
}

#[test]
fn indirect_descriptors_work() {
    let memory = memory();
    let (mut disk, _file) = disk(false);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    let table = 0x20000;
    fill(&memory, HEADER, &[0; 16]);
    fill(&memory, HEADER + 8, &[5]);
    ring.describe(table, 0, (HEADER, 16), NEXT, 2);
    ring.describe(table, 2, (DATA, 512), WRITE | NEXT, 1);
    ring.describe(table, 1, (STATUS, 1), WRITE, 0);
    ring.describe(ring.base, 7, (table, 48), INDIRECT, 0);
    ring.make_available(7);
    let (mut active, _events) = active(&memory, &[&ring], FLUSH);
    run(&mut disk, &mut active, 0).unwrap();
    assert_eq!(ring.take(), Some((7, 513)));
    assert_eq!(bytes(&memory, DATA, 512), [5; 512]);
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let memory = memory();
    let (mut disk, _file) = disk(false);
    let mut ring = Ring::new(&memory, 0x1000, 128);
    fill(&memory, HEADER, &VIRTIO_BLK_T_FLUSH.to_le_bytes());
    for _ in 0..64 {
        ring.offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    let (mut active, _events) = active(&memory, &[&ring], FLUSH);
    assert_eq!(disk.queue_ready(&mut active, 0).unwrap(), Progress::More);
    assert_eq!(std::iter::from_fn(|| ring.take()).count(), BUDGET);
    run(&mut disk, &mut active, 0).unwrap();
    assert_eq!(std::iter::from_fn(|| ring.take()).count(), 64 - BUDGET);
}

#[test]
fn an_available_index_too_far_ahead_stops_the_device() {
    let memory = memory();
    let (mut disk, _file) = disk(false);
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
    ) {
        let (mut disk, file) = disk(read_only);
        attack(&mut disk, &table, &heads, kind);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), SIZE);
    }
}
