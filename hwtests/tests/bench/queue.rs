//! A virtio disk with many requests under way.

use casemate_hwtests::harness::{Ctx, Failure, WITH_TOOLS};

use crate::{
    disk::{Part, image, parts_of},
    guest, in_turn,
    peers::{Guest, Peer},
};

/// Of 4 KiB each, at random places.
const REQUESTS: u32 = 6_000;
const IMAGE_MIB: usize = 64;
/// Begun before the first has ended.
const DEPTHS: [u32; 2] = [16, 64];

pub(crate) fn queue(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")?;
    let image = image(ctx, IMAGE_MIB)?;
    // By fio's own clock, which tells milliseconds, since it takes a second to start here: the field of its terse line that is the
    // run's time. The first run brings the program from its disk.
    let mut script = format!(
        "{WITH_TOOLS}
        # fio aligns by it, and in some guests it's no power of two on a processor that is emulated.
        line=/mnt/sys/devices/system/cpu/cpu0/cache/index0/coherency_line_size
        if [ -e $line ]; then echo 64 >/run/line; mount --bind /run/line $line; fi
        one() {{ tools fio --name=queue --thread --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=$2 --bs=4k \\
            --size={IMAGE_MIB}m --number_ios={REQUESTS} --norandommap --randseed=7 --rw=$3 --minimal | cut -d';' -f$4; }}
        part() {{ echo $1-begin; sleep 1; took=$(one $@); echo $1: 0 ${{took}}000000; echo $1-end; sleep 1; }}
        one warm 1 randread 9 >/dev/null\n"
    );
    let mut names = Vec::new();
    for depth in DEPTHS {
        for (kind, rw, field) in [("reads", "randread", 9), ("writes", "randwrite", 50)] {
            let name = format!("{kind}-{depth}");
            script.push_str(&format!("part {name} {depth} {rw} {field}\n"));
            names.push((name, format!("4 KiB random {kind}, {depth} at once")));
        }
    }
    let disks = vec![(image, false), (ctx.layout().guest_tools(), true)];
    let guest: Guest = guest(ctx, &script, disks)?;
    let peers = Peer::found(ctx)?;
    let parts: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
    let measured = in_turn(&peers, 3, |peer| {
        let running = peer.start(ctx, &guest)?;
        let parts = parts_of(peer, &running, &parts)?;
        peer.end(running, crate::SOON)?;
        Ok(parts)
    })?;
    let requests = f64::from(REQUESTS);
    for (index, (_, name)) in names.iter().enumerate() {
        let of = |value: &dyn Fn(&Part) -> f64| -> Vec<Vec<f64>> {
            let runs =
                |runs: &Vec<Vec<Part>>| runs.iter().filter_map(|parts| parts.get(index).map(value)).collect();
            measured.iter().map(runs).collect()
        };
        crate::tell(name, "µs each", &peers, &of(&|part| part.seconds * 1e6 / requests));
        crate::tell(
            &format!("{name}: exits"),
            "per 1,000",
            &peers,
            &of(&|part| part.exits as f64 * 1e3 / requests),
        );
    }
    Ok(())
}
