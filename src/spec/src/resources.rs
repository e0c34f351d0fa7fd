//! How far governors may go: the table `[resources]` of a guest's file, and that of the host's.

use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use crate::{
    ByteSize, Name, Refusal,
    guest::{Reader, short},
    locate::locate,
};

/// Of cgroup v2's `cpu.weight`.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;
/// Tenants that a host file names.
const TENANTS_MAX: usize = 1024;

/// How far a running guest's share of the host may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceBounds {
    /// `cpu.weight` is not set below this,
    pub cpu_weight_least: u32,
    /// nor above this.
    pub cpu_weight_most: u32,
    /// Thousandths of one processor: a limit is at least this.
    pub cpu_limit_least: u32,
    /// The balloon leaves the guest at least this.
    pub memory_least_bytes: u64,
    /// Whether it may be paused.
    pub pause: bool,
    /// Whether it may be stopped.
    pub stop: bool,
}

impl ResourceBounds {
    /// What holds for a guest whose file says nothing: half of its memory stays, a tenth of a processor for each vCPU, and nobody
    /// pauses or stops it.
    pub fn of(vcpus: u8, memory: ByteSize) -> Self {
        Self {
            cpu_weight_least: 10,
            cpu_weight_most: 1_000,
            cpu_limit_least: u32::from(vcpus) * 100,
            memory_least_bytes: memory.bytes() / 2,
            pause: false,
            stop: false,
        }
    }

    /// The narrower of both.
    #[must_use]
    pub fn within(self, tenant: &TenantBounds, memory_bytes: u64) -> Self {
        let most = self.cpu_weight_most.min(tenant.cpu_weight_most.unwrap_or(u32::MAX));
        let share = u128::from(memory_bytes) * u128::from(tenant.memory_least_percent.unwrap_or(0)) / 100;
        Self {
            cpu_weight_least: self.cpu_weight_least.min(most),
            cpu_weight_most: most,
            memory_least_bytes: self.memory_least_bytes.max(u64::try_from(share).unwrap_or(u64::MAX)),
            pause: self.pause && tenant.pause.unwrap_or(true),
            stop: self.stop && tenant.stop.unwrap_or(true),
            ..self
        }
    }
}

/// What the host's file says of running guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostResources {
    /// How often governors look, in milliseconds: 100 to 60,000.
    pub interval_ms: u32,
    /// What holds for all guests of a tenant besides.
    pub tenants: Vec<(Name, TenantBounds)>,
}

impl Default for HostResources {
    fn default() -> Self {
        Self { interval_ms: 1_000, tenants: Vec::new() }
    }
}

impl HostResources {
    /// A guest's bounds on this host.
    pub fn bounds(&self, tenant: &str, own: ResourceBounds, memory_bytes: u64) -> ResourceBounds {
        let bounds = self.tenants.iter().find(|(name, _)| name.as_str() == tenant);
        bounds.map_or(own, |(_, tenant)| own.within(tenant, memory_bytes))
    }
}

/// What is said of a tenant; what isn't doesn't narrow anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in ResourceBounds")]
pub struct TenantBounds {
    pub cpu_weight_most: Option<u32>,
    pub memory_least_percent: Option<u8>,
    pub pause: Option<bool>,
    pub stop: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawResources {
    cpu_weight_least: Option<Spanned<u32>>,
    cpu_weight_most: Option<Spanned<u32>>,
    cpu_limit_least_percent: Option<Spanned<u32>>,
    memory_least: Option<Spanned<String>>,
    #[serde(default)]
    pause: bool,
    #[serde(default)]
    stop: bool,
}

impl Reader<'_> {
    /// Reads `[resources]` of a guest with so much.
    pub(crate) fn resources(
        &mut self,
        raw: Option<RawResources>,
        vcpus: u8,
        memory: ByteSize,
    ) -> Result<ResourceBounds, Refusal> {
        let mut bounds = ResourceBounds::of(vcpus, memory);
        let Some(raw) = raw else { return Ok(bounds) };
        (bounds.pause, bounds.stop) = (raw.pause, raw.stop);
        let most = u32::from(vcpus) * 100;
        if let Some(least) = self.number(raw.cpu_weight_least, WEIGHTS)? {
            bounds.cpu_weight_least = least;
            bounds.cpu_weight_most = bounds.cpu_weight_most.max(least);
        }
        if let Some(raw) = raw.cpu_weight_most {
            let location = self.note(&raw);
            let weight = self.number(Some(raw), WEIGHTS)?.unwrap_or(*WEIGHTS.end());
            if weight < bounds.cpu_weight_least {
                let cause = format!("{weight} is less than cpu_weight_least, {}", bounds.cpu_weight_least);
                return Err(Refusal::new("bad-resources", "", cause, "let the most be the larger one")
                    .at(Some(location)));
            }
            bounds.cpu_weight_most = weight;
        }
        if let Some(percent) = self.number(raw.cpu_limit_least_percent, 1..=most)? {
            bounds.cpu_limit_least = percent * 10;
        }
        if let Some(raw) = raw.memory_least {
            let location = self.note(&raw);
            let size = raw.get_ref().parse::<ByteSize>().ok().filter(|size| size.bytes() <= memory.bytes());
            let size = size.ok_or_else(|| {
                let cause = format!("{:?} is not a size up to the guest's memory", short(raw.get_ref()));
                Refusal::new("bad-resources", "", cause, format!("write at most \"{memory}\""))
                    .at(Some(location))
            })?;
            bounds.memory_least_bytes = size.bytes();
        }
        Ok(bounds)
    }

    fn number(
        &mut self,
        raw: Option<Spanned<u32>>,
        range: std::ops::RangeInclusive<u32>,
    ) -> Result<Option<u32>, Refusal> {
        let Some(raw) = raw else { return Ok(None) };
        let location = self.note(&raw);
        in_range(*raw.get_ref(), &range).map(Some).map_err(|refusal| refusal.at(Some(location)))
    }
}

fn in_range(number: u32, range: &std::ops::RangeInclusive<u32>) -> Result<u32, Refusal> {
    if range.contains(&number) {
        return Ok(number);
    }
    let remedy = format!("use {} to {}", range.start(), range.end());
    Err(Refusal::new("bad-resources", "", format!("{number} cannot be here"), remedy))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawHostResources {
    interval_ms: Option<Spanned<u32>>,
    #[serde(default)]
    tenant: Vec<RawTenant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTenant {
    name: Spanned<String>,
    cpu_weight_most: Option<Spanned<u32>>,
    memory_least_percent: Option<Spanned<u32>>,
    pause: Option<bool>,
    stop: Option<bool>,
}

/// Reads `[resources]` of a host's file.
pub(crate) fn host_resources(
    file: &Path,
    source: &str,
    raw: RawHostResources,
) -> Result<HostResources, Refusal> {
    let number = |raw: Option<Spanned<u32>>, range: std::ops::RangeInclusive<u32>| {
        let read = |raw: Spanned<u32>| {
            let location = locate(file, source, raw.span().start);
            in_range(*raw.get_ref(), &range).map_err(|refusal| refusal.at(Some(location)))
        };
        raw.map(read).transpose()
    };
    if raw.tenant.len() > TENANTS_MAX {
        let cause = format!("{} tables [[resources.tenant]]", raw.tenant.len());
        let remedy = format!("a host names at most {TENANTS_MAX}");
        return Err(Refusal::new("too-many", file.display(), cause, remedy));
    }
    let mut tenants: Vec<(Name, TenantBounds)> = Vec::new();
    for raw in raw.tenant {
        let location = locate(file, source, raw.name.span().start);
        let name =
            Name::new(raw.name.get_ref()).filter(|name| tenants.iter().all(|(other, _)| other != name));
        let name = name.ok_or_else(|| {
            let cause = format!("{:?} is no name, or named twice", short(raw.name.get_ref()));
            Refusal::new("bad-resources", "", cause, "name each tenant once").at(Some(location))
        })?;
        let percent = number(raw.memory_least_percent, 0..=100)?;
        let bounds = TenantBounds {
            cpu_weight_most: number(raw.cpu_weight_most, WEIGHTS)?,
            memory_least_percent: percent.map(|percent| u8::try_from(percent).unwrap_or(100)),
            pause: raw.pause,
            stop: raw.stop,
        };
        tenants.push((name, bounds));
    }
    let interval_ms = number(raw.interval_ms, 100..=60_000)?.unwrap_or(1_000);
    Ok(HostResources { interval_ms, tenants })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{parse_guest, parse_host};

    fn guest(table: &str) -> Result<ResourceBounds, Refusal> {
        let text = format!(
            "name = \"web\"\ntenant = \"acme\"\nvcpus = 2\nmemory = \"1 GiB\"\n[boot]\nkernel = \"k\"\n{table}"
        );
        parse_guest(Path::new("g.toml"), &text).map(|located| located.guest.resources)
    }

    #[test]
    fn without_a_table_a_guest_keeps_half_and_is_not_paused() {
        let bounds = guest("").unwrap();
        assert_eq!(bounds, ResourceBounds::of(2, ByteSize::from_bytes(1 << 30)));
        assert_eq!((bounds.memory_least_bytes, bounds.pause, bounds.stop), (512 << 20, false, false));
    }

    #[test]
    fn a_table_says_how_far_governors_may_go() {
        let bounds = guest(
            "[resources]\ncpu_weight_least = 50\ncpu_weight_most = 200\ncpu_limit_least_percent = 150\n\
             memory_least = \"256 MiB\"\npause = true\n",
        );
        let expected = ResourceBounds {
            cpu_weight_least: 50,
            cpu_weight_most: 200,
            cpu_limit_least: 1_500,
            memory_least_bytes: 256 << 20,
            pause: true,
            stop: false,
        };
        assert_eq!(bounds, Ok(expected));
    }

    #[test]
    fn what_cannot_be_is_refused_where_it_stands() {
        for (line, key) in [
            ("cpu_weight_least = 0", "cpu_weight_least"),
            ("cpu_weight_most = 10001", "cpu_weight_most"),
            ("cpu_weight_most = 9", "cpu_weight_most"),
            ("cpu_limit_least_percent = 201", "cpu_limit_least_percent"),
            ("memory_least = \"2 GiB\"", "memory_least"),
            ("memory_least = \"much\"", "memory_least"),
        ] {
            let refusal = guest(&format!("[resources]\n{line}\n")).unwrap_err();
            assert_eq!(refusal.code, "bad-resources", "{refusal}");
            let location = refusal.location.unwrap();
            assert_eq!((location.line, location.key), (8, format!("resources.{key}")));
        }
        assert_eq!(guest("[resources]\nturbo = true\n").unwrap_err().code, "unknown-key");
    }

    #[test]
    fn a_tenants_bounds_narrow_and_never_widen() {
        let text = "[resources]\ninterval_ms = 250\n[[resources.tenant]]\nname = \"acme\"\ncpu_weight_most = 5\n\
                    memory_least_percent = 75\npause = false\nstop = true\n";
        let host = parse_host(Path::new("h.toml"), text).unwrap().resources;
        assert_eq!(host.interval_ms, 250);
        let own = guest("[resources]\npause = true\n").unwrap();
        let bounds = host.bounds("acme", own, 1 << 30);
        assert_eq!((bounds.cpu_weight_least, bounds.cpu_weight_most), (5, 5));
        assert_eq!((bounds.memory_least_bytes, bounds.pause, bounds.stop), (768 << 20, false, false));
        assert_eq!(host.bounds("rival", own, 1 << 30), own);
        for bad in ["interval_ms = 99", "[[resources.tenant]]\nname = \"A\""] {
            let refusal = parse_host(Path::new("h.toml"), &format!("[resources]\n{bad}\n")).unwrap_err();
            assert_eq!(refusal.code, "bad-resources");
        }
    }
}
