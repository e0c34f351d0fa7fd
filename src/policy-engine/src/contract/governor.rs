//! The interface `governor`: samples out, actions in.

use super::{attrs, bindings::resources::exports::casemate::policy::governor as wit, reasons};
use casemate_policy::{self as ours, Deed, HOST_LIMITS, Reason, one_line};

pub(crate) use wit::Samples as WitSamples;

pub(crate) fn samples(samples: ours::Samples) -> wit::Samples {
    let host = samples.host;
    wit::Samples {
        now_seconds: samples.now_seconds,
        interval_ms: samples.interval_ms,
        host: wit::HostSample {
            name: host.name,
            cpus: host.cpus,
            memory_bytes: host.memory_bytes,
            memory_free_bytes: host.memory_free_bytes,
            cpu: pressure(host.cpu),
            memory: pressure(host.memory),
            io: pressure(host.io),
            attrs: attrs(&host.attrs),
        },
        guests: samples.guests.into_iter().map(guest).collect(),
        attrs: attrs(&samples.attrs),
    }
}

fn pressure(pressure: ours::Pressure) -> wit::Pressure {
    wit::Pressure { some_us: pressure.some_us, full_us: pressure.full_us }
}

fn guest(guest: ours::GuestSample) -> wit::GuestSample {
    let (cpu, memory, disk, net) = (guest.cpu, guest.memory, guest.disk, guest.net);
    wit::GuestSample {
        name: guest.name,
        tenant: guest.tenant,
        governed: guest.governed,
        paused: guest.paused,
        pinned: guest.pinned,
        vcpus: guest.vcpus,
        memory_bytes: guest.memory_bytes,
        cpu: wit::CpuSample {
            used_us: cpu.used_us,
            waited_us: cpu.waited_us,
            throttled_us: cpu.throttled_us,
            pressure: pressure(cpu.pressure),
        },
        memory: wit::MemorySample {
            used_bytes: memory.used_bytes,
            given_bytes: memory.given_bytes,
            free_bytes: memory.free_bytes,
            available_bytes: memory.available_bytes,
            faults: memory.faults,
            pressure: pressure(memory.pressure),
        },
        disk: wit::DiskSample {
            read_bytes: disk.read_bytes,
            written_bytes: disk.written_bytes,
            requests: disk.requests,
            pressure: pressure(disk.pressure),
        },
        net: wit::NetSample {
            received_bytes: net.received_bytes,
            sent_bytes: net.sent_bytes,
            packets: net.packets,
        },
        exits: guest.exits,
        interrupts: guest.interrupts,
        knobs: wit::Knobs {
            cpu_weight: guest.knobs.cpu_weight,
            cpu_limit: guest.knobs.cpu_limit,
            balloon_bytes: guest.knobs.balloon_bytes,
            disk_limit: rate(guest.knobs.disk_limit),
            net_limit: rate(guest.knobs.net_limit),
            attrs: attrs(&guest.knobs.attrs),
        },
        bounds: wit::Bounds {
            cpu_weight_least: guest.bounds.cpu_weight_least,
            cpu_weight_most: guest.bounds.cpu_weight_most,
            cpu_limit_least: guest.bounds.cpu_limit_least,
            memory_least_bytes: guest.bounds.memory_least_bytes,
            may_pause: guest.bounds.may_pause,
            may_stop: guest.bounds.may_stop,
            attrs: attrs(&guest.bounds.attrs),
        },
        attrs: attrs(&guest.attrs),
    }
}

fn rate(rate: ours::Rate) -> wit::Rate {
    wit::Rate { bytes_a_second: rate.bytes_a_second, requests_a_second: rate.requests_a_second }
}

/// Something that a plugin wants done.
pub(crate) struct Wanted {
    pub(crate) guest: String,
    pub(crate) deed: Deed,
    pub(crate) why: Reason,
}

/// What a plugin answers.
pub(crate) struct Governed {
    pub(crate) wanted: Vec<Wanted>,
    /// What it remembers.
    pub(crate) state: Vec<u8>,
}

/// A plugin's answer, checked. The error says which rule it breaks.
pub(crate) fn answer(plugin: &str, answer: wit::Answer) -> Result<Governed, String> {
    let (actions, state) = (answer.actions, answer.state);
    if state.len() > HOST_LIMITS.state_bytes {
        let most = HOST_LIMITS.state_bytes;
        return Err(format!("it remembers {} bytes; at most {most} are kept", state.len()));
    }
    if actions.len() > HOST_LIMITS.actions {
        return Err(format!("it wants {} actions; at most {} are read", actions.len(), HOST_LIMITS.actions));
    }
    let wanted = actions.into_iter().map(|action| {
        let why = reasons(plugin, vec![action.why])?.pop().ok_or("it gives no reason")?;
        let guest = one_line(&action.guest).chars().take(64).collect();
        Ok(Wanted { guest, deed: deed(action.deed), why })
    });
    Ok(Governed { wanted: wanted.collect::<Result<_, String>>()?, state })
}

fn deed(deed: wit::Deed) -> Deed {
    let rate = |rate: wit::Rate| ours::Rate {
        bytes_a_second: rate.bytes_a_second,
        requests_a_second: rate.requests_a_second,
    };
    match deed {
        wit::Deed::CpuWeight(weight) => Deed::CpuWeight(weight),
        wit::Deed::CpuLimit(limit) => Deed::CpuLimit(limit),
        wit::Deed::Balloon(bytes) => Deed::Balloon(bytes),
        wit::Deed::DiskLimit(limit) => Deed::DiskLimit(rate(limit)),
        wit::Deed::NetLimit(limit) => Deed::NetLimit(rate(limit)),
        wit::Deed::Pause => Deed::Pause,
        wit::Deed::Resume => Deed::Resume,
        wit::Deed::Stop => Deed::Stop,
        wit::Deed::Alert => Deed::Alert,
    }
}
