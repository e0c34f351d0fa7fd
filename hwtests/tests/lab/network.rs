//! What network cards leave to the host, and who carries their frames.

use std::{fs, time::Duration};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, WITH_TOOLS},
};

use crate::{disks::with_tools, endings::cell_of};

const LONG: Duration = Duration::from_secs(120);

pub(crate) fn cards_carry_long_frames(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = format!(
        "{WITH_TOOLS}
        ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
        count() {{ cat /sys/class/net/eth0/statistics/$1; }}
        tools iperf3 -c 192.0.2.1 -p 7011 -n 24M && echo up is good
        packets=$(count rx_packets); bytes=$(count rx_bytes)
        tools iperf3 -c 192.0.2.1 -p 7012 -n 24M -R && echo down is good
        echo frame: $(( ($(count rx_bytes) - bytes) / ($(count rx_packets) - packets) ))
        ifconfig eth0 down; ip link set eth0 up; ping -c 1 -W 5 192.0.2.1 && echo up again"
    );
    ctx.shell("modprobe vhost_net")?;
    for vhost in [false, true] {
        let servers = ["7011", "7012"].map(|port| ctx.start(["iperf3", "-s", "-1", "-p", port]));
        let guest = with_tools(ctx, ctx.guest(&script)?).net("cmtest0", "192.0.2.1/24").vhost(vhost);
        let running = ctx.start_guest(&guest)?;
        running.wait_for_text("CASEMATE-INIT", LONG)?;
        let (pid, _) = cell_of(&running)?;
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
        let has_vhost = targets.filter(|to| to.as_os_str() == "/dev/vhost-net").count() > 0;
        expect!(has_vhost == vhost, "the cell has vhost: {has_vhost}, and the file says {vhost}");
        // Far more than there is, for one; the other can't be limited at all, and says so.
        let limited =
            ctx.run(["casemate", "limit", ctx.name(), "net", "0", "--operations-per-second", "1000000"])?;
        if vhost { limited.refusal("ask-no-limits").map(drop) } else { limited.success().map(drop) }?;
        let run = running.wait(LONG)?;
        run.success()?.printed("up is good")?.printed("down is good")?.printed("up again")?;
        let frame: u32 = run.value("frame:")?.parse().unwrap_or(0);
        // A segment of an MTU of 1500 is no longer than 1514.
        expect!(frame > 2000, "with vhost {vhost} the guest received frames of {frame} bytes, on average");
        for server in servers {
            server?.wait(Duration::from_secs(10))?.success()?;
        }
    }
    Ok(())
}

/// Two processors with a pair of queues each: the host spreads what comes, the guest what goes, and both pairs are used.
pub(crate) fn several_queues(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = format!(
        "{WITH_TOOLS}
        ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up
        echo queues: $(ls /sys/class/net/eth0/queues | grep -c rx)
        tools iperf3 -c 192.0.2.1 -p 7031 -P 4 -n 6M && echo up is good
        tools iperf3 -c 192.0.2.1 -p 7032 -P 4 -n 6M -R && echo down is good
        used() {{ awk -v q=$1 '$NF ~ q {{ for (i = 2; i < NF; i++) if ($i ~ /^[0-9]+$/) n += $i }} END {{ print n + 0 }}' /proc/interrupts; }}
        echo first: $(used input.0); echo second: $(used input.1)
        echo sent-second: $(used output.1)"
    );
    ctx.shell("modprobe vhost_net")?;
    for vhost in [false, true] {
        let servers = ["7031", "7032"].map(|port| ctx.start(["iperf3", "-s", "-1", "-p", port]));
        let guest = with_tools(ctx, ctx.guest(&script)?.vcpus(2)).net("cmtest0", "192.0.2.1/24");
        let run = ctx.start_guest(&guest.net_queues(2).vhost(vhost))?.wait(LONG)?;
        run.success()?.printed("up is good")?.printed("down is good")?;
        expect!(run.value("queues:")? == "2", "the guest has {} queues", run.value("queues:")?);
        for queue in ["first:", "second:", "sent-second:"] {
            let interrupts: u32 = run.value(queue)?.parse().unwrap_or(0);
            expect!(interrupts > 0, "with vhost {vhost} a queue was not used: {queue} {interrupts}");
        }
        for server in servers {
            server?.wait(Duration::from_secs(10))?.success()?;
        }
    }
    Ok(())
}
