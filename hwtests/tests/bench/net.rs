//! A virtio network card: how long data takes to the host and back, and a packet both ways.

use std::time::Duration;

use casemate_hwtests::harness::{Ctx, Failure, Running, WITH_TOOLS};

use crate::{
    NOW, SOON, guest, in_turn,
    peers::{Guest, Net, Peer},
    seconds_between,
};

/// Data each way.
const MIB: u32 = 128;
/// Of each: the scheduler of an emulated machine of one processor decides as much as who carries the frames.
const RUNS: usize = 5;
/// For all that one guest does, where KVM is emulated.
const RUN_MAX: Duration = Duration::from_secs(180);
const TAP: &str = "cmbench0";
const HOST: &str = "192.0.2.1";

/// What one run took: seconds to the host, seconds from it, milliseconds of a round trip.
type Times = [f64; 3];

pub(crate) fn net(ctx: &mut Ctx) -> Result<(), Failure> {
    ctx.shell("modprobe vhost_net")?;
    let script = format!(
        r#"{WITH_TOOLS}
        {NOW}
        ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
        n=0; until ping -c 1 -W 1 {HOST} >/dev/null || [ $n = 60 ]; do n=$((n + 1)); done
        # From the first byte to the last, as iperf3 has it from the side that received them.
        data() {{ tools iperf3 -c {HOST} -n {MIB}M -J $@ | sed -n '/"sum_received"/,/}}/s/.*"seconds":[^0-9]*\([0-9.]*\),.*/\1/p'; }}
        echo up: $(data -p 7021)
        echo down: $(data -p 7022 -R)
        begin=$(now); ping -c 500 -A -q {HOST} >/dev/null && echo trips: $begin $(now)"#
    );
    let mut guest: Guest = guest(ctx, &script, vec![(ctx.layout().guest_tools(), true)])?;
    for vhost in [false, true] {
        guest.net = Some(Net { tap: TAP, host_address: "192.0.2.1/24", vhost });
        let mut peers = Peer::found(ctx)?;
        peers.retain(|peer| peer.can(&guest));
        // What is read from disks for the first time is in none of the rounds.
        in_turn(peers.get(..1).unwrap_or_default(), 1, |peer| run(ctx, peer, &guest))?;
        let measured = in_turn(&peers, crate::rounds(RUNS), |peer| run(ctx, peer, &guest))?;
        let of = |index: usize| -> Vec<Vec<f64>> {
            let runs =
                |runs: &Vec<Times>| runs.iter().filter_map(|times| times.get(index).copied()).collect();
            measured.iter().map(runs).collect()
        };
        let by = if vhost { "vhost-net" } else { "the VMM" };
        crate::tell(&format!("{MIB} MiB to the host, by {by}"), "s", &peers, &of(0));
        crate::tell(&format!("{MIB} MiB from the host, by {by}"), "s", &peers, &of(1));
        crate::tell(&format!("round trip, by {by}"), "ms", &peers, &of(2));
    }
    Ok(())
}

fn run(ctx: &Ctx, peer: &Peer, guest: &Guest) -> Result<Times, Failure> {
    let servers = ["7021", "7022"].map(|port| ctx.start(["iperf3", "-s", "-1", "-p", port]));
    let running = peer.start(ctx, guest)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    if !peer.makes_taps() {
        ctx.shell(&format!("ip addr add {HOST}/24 dev {TAP}; ip link set {TAP} up"))?;
    }
    let times = times(peer, running)?;
    for server in servers {
        server?.wait(Duration::from_secs(10))?.success()?;
    }
    Ok(times)
}

fn times(peer: &Peer, running: Running) -> Result<Times, Failure> {
    let run = peer.end(running, RUN_MAX)?;
    let trips = run.value("trips:")?;
    let trips =
        seconds_between(trips).ok_or_else(|| Failure::new(format_args!("no times of trips: {trips}")))?;
    Ok([run.value("up:")?.parse()?, run.value("down:")?.parse()?, trips * 1e3 / 500.0])
}
