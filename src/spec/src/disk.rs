//! Emulated disks in a guest file.

use std::path::PathBuf;

use serde::Deserialize;
use toml::Spanned;

use crate::{
    IoLimits, Refusal,
    guest::{Reader, short},
    limit::RawLimit,
};

/// Queues that an emulated disk can have.
pub const DISK_QUEUES_MAX: u8 = 8;

/// What an image is written in. It is said and never guessed: a guest that may write to a raw disk could write the
/// beginning of another format there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// The disk's bytes, from the first to the last.
    #[default]
    Raw,
    /// qcow2.
    Qcow2,
}

impl DiskFormat {
    /// As a guest file names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An emulated disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// An image or a block device.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// The image under a qcow2 image; it is only read.
    pub backing: Option<Backing>,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Queues, 1 to [`DISK_QUEUES_MAX`]; one a vCPU, up to 4, when absent.
    pub queues: Option<u8>,
    /// How much it may do.
    pub limits: IoLimits,
}

/// An image under another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The image or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawDisk {
    path: Spanned<String>,
    format: Option<Spanned<String>>,
    backing: Option<Spanned<String>>,
    backing_format: Option<Spanned<String>>,
    #[serde(default)]
    read_only: bool,
    queues: Option<Spanned<i64>>,
    limit: Option<RawLimit>,
}

impl Reader<'_> {
    pub(crate) fn disk(&mut self, raw: RawDisk) -> Result<Disk, Refusal> {
        let path = self.path(&raw.path)?;
        let format = self.format(raw.format.as_ref())?;
        let queues = raw.queues.map(|queues| self.queues(&queues, DISK_QUEUES_MAX)).transpose()?;
        let backing = match (raw.backing, raw.backing_format) {
            (None, None) => None,
            (None, Some(stray)) => {
                let cause = "there is a format for an image under this one, and no such image";
                return Err(self.bad_backing(&stray, cause, "name it: backing = \"FILE\""));
            }
            (Some(backing), _) if format == DiskFormat::Raw => {
                let cause = "a raw image has no other under it";
                return Err(self.bad_backing(
                    &backing,
                    cause,
                    "write format = \"qcow2\", or take the key out",
                ));
            }
            (Some(backing), format) => {
                Some(Backing { path: self.path(&backing)?, format: self.format(format.as_ref())? })
            }
        };
        let limits = self.limits(raw.limit)?;
        Ok(Disk { path, format, backing, read_only: raw.read_only, queues, limits })
    }

    fn format(&mut self, raw: Option<&Spanned<String>>) -> Result<DiskFormat, Refusal> {
        let Some(raw) = raw else { return Ok(DiskFormat::Raw) };
        let location = self.note(raw);
        let known = [DiskFormat::Raw, DiskFormat::Qcow2];
        known.into_iter().find(|format| format.name() == raw.get_ref()).ok_or_else(|| {
            let cause = format!("{:?} is no format of disks", short(raw.get_ref()));
            let remedy = "use \"raw\" or \"qcow2\"; qemu-img convert makes one of others";
            Refusal::new("bad-disk-format", "", cause, remedy).at(Some(location))
        })
    }

    fn bad_backing(&mut self, raw: &Spanned<String>, cause: &str, remedy: &str) -> Refusal {
        let location = self.note(raw);
        Refusal::new("bad-backing", "", cause, remedy).at(Some(location))
    }

    /// A number of queues, 1 to `most`.
    pub(crate) fn queues(&mut self, raw: &Spanned<i64>, most: u8) -> Result<u8, Refusal> {
        let location = self.note(raw);
        let count = u8::try_from(*raw.get_ref()).ok().filter(|count| (1..=most).contains(count));
        count.ok_or_else(|| {
            let cause = format!("a device cannot have {} queues", raw.get_ref());
            Refusal::new("bad-queues", "", cause, format_args!("use 1 to {most}, or leave it out"))
                .at(Some(location))
        })
    }
}
