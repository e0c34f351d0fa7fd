//! What the host file says about cells: which parts of one this host may lack, and what guests may do to its disks.

use std::{collections::BTreeSet, fmt, path::Path};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::{ByteSize, Refusal, guest::short, locate::locate};

/// A part of a cell that some hosts can't give. Where one is lacking, no guest starts unless the host file names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CellPart {
    /// Landlock, of ABI 2 at least.
    Landlock,
    /// Core scheduling, where processors have SMT.
    CoreScheduling,
    /// The limits of `[cell.io]`, where a disk has no device of its own to be limited, or the io controller is not to be had.
    IoLimits,
}

impl CellPart {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Landlock, Self::CoreScheduling, Self::IoLimits];

    /// Its name in the host file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Landlock => "landlock",
            Self::CoreScheduling => "core-scheduling",
            Self::IoLimits => "io-limits",
        }
    }
}

impl fmt::Display for CellPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The table `[cell]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CellRules {
    /// uids and gids of cells: so many from this one on.
    pub uids: CellUids,
    /// Parts that may be lacking: a guest starts without them, and is shown as weakened.
    pub may_lack: BTreeSet<CellPart>,
    /// What each guest may do to the host's disks.
    pub io: IoRules,
}

impl Default for CellRules {
    fn default() -> Self {
        Self { uids: CellUids::DEFAULT, may_lack: BTreeSet::new(), io: IoRules::default() }
    }
}

/// The users and groups that cells are, [`CellUids::COUNT`] of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CellUids {
    /// The first.
    pub first: u32,
}

impl CellUids {
    /// Cells on a host at most.
    pub const COUNT: u32 = 8192;
    /// Above those of users, containers and systemd's dynamic users.
    pub const DEFAULT: Self = Self { first: 0x4361_0000 };
    /// Below are users and services of the host's.
    const LEAST: u64 = 65_536;
    /// The last uid says "leave it as it is" to the kernel.
    const MOST: u64 = u32::MAX as u64 - 1 - Self::COUNT as u64;
}

/// The table `[cell.io]`: what a guest's images may cost each of the host's disks that they lie on. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoRules {
    /// Its share against others, 1 to 10000; the kernel's own is 100.
    pub weight: Option<u16>,
    /// Bytes that may be read in a second; at least 1 MiB.
    pub read_bytes_per_second: Option<u64>,
    /// Bytes that may be written in a second; at least 1 MiB.
    pub write_bytes_per_second: Option<u64>,
    /// Reads in a second; at least 10.
    pub read_ops_per_second: Option<u64>,
    /// Writes in a second; at least 10.
    pub write_ops_per_second: Option<u64>,
}

impl IoRules {
    /// Whether anything is limited.
    pub fn limits(&self) -> bool {
        *self != Self::default()
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawCell {
    #[serde(default)]
    allow_weaker: Vec<Spanned<String>>,
    first_uid: Option<Spanned<u64>>,
    #[serde(default)]
    io: RawIo,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawIo {
    weight: Option<Spanned<u64>>,
    read_bytes_per_second: Option<Spanned<String>>,
    write_bytes_per_second: Option<Spanned<String>>,
    read_ops_per_second: Option<Spanned<u64>>,
    write_ops_per_second: Option<Spanned<u64>>,
}

/// Less than this stops a guest rather than slowing it.
const BYTES_MIN: u64 = 1 << 20;
const OPS_MIN: u64 = 10;

impl RawCell {
    /// Checks the table.
    pub(crate) fn check(self, file: &Path, source: &str) -> Result<CellRules, Refusal> {
        let refuse = |at: usize, value: &dyn fmt::Display, remedy: &str| {
            let cause = format!("{value} is not what stands here");
            Refusal::new("bad-cell", "", cause, remedy).at(Some(locate(file, source, at)))
        };
        let mut may_lack = BTreeSet::new();
        for name in &self.allow_weaker {
            let part = CellPart::ALL.into_iter().find(|part| part.name() == name.get_ref());
            may_lack.insert(part.ok_or_else(|| {
                let known = CellPart::ALL.map(|part| format!("\"{part}\"")).join(", ");
                refuse(
                    name.span().start,
                    &format_args!("{:?}", short(name.get_ref())),
                    &format!("name some of {known}"),
                )
            })?);
        }
        let number = |raw: Option<Spanned<u64>>, least: u64, most: u64| {
            raw.map(|raw| {
                let value = *raw.get_ref();
                let remedy = format!("write a number from {least} to {most}");
                (least..=most)
                    .contains(&value)
                    .then_some(value)
                    .ok_or_else(|| refuse(raw.span().start, &value, &remedy))
            })
            .transpose()
        };
        let bytes = |raw: Option<Spanned<String>>| {
            raw.map(|raw| {
                let size = raw.get_ref().parse().ok().map(ByteSize::bytes).filter(|size| *size >= BYTES_MIN);
                let remedy = "write a size of 1 MiB or more, as in \"200 MiB\"";
                size.ok_or_else(|| {
                    refuse(raw.span().start, &format_args!("{:?}", short(raw.get_ref())), remedy)
                })
            })
            .transpose()
        };
        const OPS_MAX: u64 = u32::MAX as u64;
        let io = IoRules {
            weight: number(self.io.weight, 1, 10_000)?.and_then(|weight| u16::try_from(weight).ok()),
            read_bytes_per_second: bytes(self.io.read_bytes_per_second)?,
            write_bytes_per_second: bytes(self.io.write_bytes_per_second)?,
            read_ops_per_second: number(self.io.read_ops_per_second, OPS_MIN, OPS_MAX)?,
            write_ops_per_second: number(self.io.write_ops_per_second, OPS_MIN, OPS_MAX)?,
        };
        let first = number(self.first_uid, CellUids::LEAST, CellUids::MOST)?;
        let first = first.and_then(|first| u32::try_from(first).ok());
        let uids = first.map_or(CellUids::DEFAULT, |first| CellUids { first });
        Ok(CellRules { uids, may_lack, io })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse_host;

    const GOOD: &str = r#"[cell]
allow_weaker = ["landlock", "io-limits"]
first_uid = 200000
[cell.io]
weight = 50
read_bytes_per_second = "200 MiB"
write_ops_per_second = 1000
"#;

    #[test]
    fn reads_what_may_be_lacking_and_what_disks_bear() {
        let rules = parse_host(Path::new("host.toml"), GOOD).unwrap().cell;
        assert_eq!(rules.may_lack, [CellPart::Landlock, CellPart::IoLimits].into());
        assert_eq!(rules.uids, CellUids { first: 200_000 });
        let io = IoRules {
            weight: Some(50),
            read_bytes_per_second: Some(200 << 20),
            write_ops_per_second: Some(1000),
            ..IoRules::default()
        };
        assert_eq!(rules.io, io);
        assert!(io.limits() && !IoRules::default().limits());
        assert_eq!(parse_host(Path::new("host.toml"), "").unwrap().cell, CellRules::default());
    }

    #[test]
    fn refuses_by_line_and_key() {
        for (from, to, start) in [
            ("\"landlock\"", "\"seccomp\"", "[bad-cell] host.toml:2: cell.allow_weaker"),
            ("200000", "1000", "[bad-cell] host.toml:3: cell.first_uid"),
            ("200000", "4294967295", "[bad-cell] host.toml:3: cell.first_uid"),
            ("50", "0", "[bad-cell] host.toml:5: cell.io.weight"),
            ("200 MiB", "200 KiB", "[bad-cell] host.toml:6: cell.io.read_bytes_per_second"),
            ("200 MiB", "fast", "[bad-cell] host.toml:6: cell.io.read_bytes_per_second"),
            ("1000", "1", "[bad-cell] host.toml:7: cell.io.write_ops_per_second"),
            ("1000", "-1", "[bad-toml] host.toml:7: cell.io.write_ops_per_second"),
            ("weight", "wait", "[unknown-key] host.toml:5: cell.io.wait"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let refusal = parse_host(Path::new("host.toml"), &text).unwrap_err().to_string();
            assert!(refusal.starts_with(start), "{refusal}");
        }
    }
}
