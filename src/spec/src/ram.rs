//! `[ram]`: which pages a guest's memory is made of, and from which node of the host's it comes.

use serde::Deserialize;
use toml::Spanned;

use crate::{
    ByteSize, Refusal,
    guest::{Reader, short},
};

/// Linux's MAX_NUMNODES on x86-64 ends there.
const NODE_MOST: i64 = 1023;

/// What a guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Pages of 4 KiB, and of 2 MiB where the kernel can make them.
    #[default]
    Transparent,
    /// Pages of 4 KiB alone.
    Small,
    /// Pages of 2 MiB, taken from those the host has set aside.
    Huge2Mib,
    /// Pages of 1 GiB, likewise.
    Huge1Gib,
}

impl Pages {
    const ALL: [Self; 4] = [Self::Transparent, Self::Small, Self::Huge2Mib, Self::Huge1Gib];

    /// As it is written in the guest's file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transparent => "transparent",
            Self::Small => "none",
            Self::Huge2Mib => "2 MiB",
            Self::Huge1Gib => "1 GiB",
        }
    }

    /// The size of pages that the host must have set aside.
    pub const fn set_aside_bytes(self) -> Option<u64> {
        match self {
            Self::Transparent | Self::Small => None,
            Self::Huge2Mib => Some(2 << 20),
            Self::Huge1Gib => Some(1 << 30),
        }
    }
}

/// The memory of a guest, beside its size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ram {
    /// What it is made of.
    pub pages: Pages,
    /// Whether all of it is taken from the host before the guest starts.
    pub prefault: bool,
    /// The node of the host's that it comes from; any, when absent.
    pub numa_node: Option<u16>,
}

impl Ram {
    /// Whether `memory` can be made of such pages. To be asked again when a policy changes its size.
    ///
    /// # Errors
    /// `bad-ram`.
    pub fn fits(&self, memory: ByteSize) -> Result<(), Refusal> {
        match self.pages.set_aside_bytes() {
            Some(page) if !memory.bytes().is_multiple_of(page) => {
                let cause = format!("{memory} are not whole pages of {}", self.pages.name());
                Err(Refusal::new(
                    "bad-ram",
                    "ram.huge_pages",
                    cause,
                    "round the memory, or use smaller pages",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// `[ram]` as written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawRam {
    huge_pages: Option<Spanned<String>>,
    #[serde(default)]
    prefault: bool,
    numa_node: Option<Spanned<i64>>,
}

impl Reader<'_> {
    /// What `memory` is made of.
    pub(crate) fn ram(&mut self, raw: RawRam, memory: ByteSize) -> Result<Ram, Refusal> {
        let mut ram = Ram { prefault: raw.prefault, ..Ram::default() };
        if let Some(raw) = &raw.huge_pages {
            let location = self.note(raw);
            let found = Pages::ALL.into_iter().find(|pages| pages.name() == raw.get_ref());
            ram.pages = found.ok_or_else(|| {
                let cause = format!("{:?} are no pages that a guest can have", short(raw.get_ref()));
                let names = Pages::ALL.map(Pages::name).join("\", \"");
                let remedy = format!("use one of \"{names}\"");
                Refusal::new("bad-ram", "", cause, remedy).at(Some(location.clone()))
            })?;
            ram.fits(memory)
                .map_err(|refusal| Refusal { subject: String::new(), ..refusal }.at(Some(location)))?;
        }
        if let Some(raw) = &raw.numa_node {
            let location = self.note(raw);
            let node = u16::try_from(*raw.get_ref()).ok().filter(|node| i64::from(*node) <= NODE_MOST);
            ram.numa_node = Some(node.ok_or_else(|| {
                let cause = format!("there is no node {}", raw.get_ref());
                let remedy = "name one of the directories nodeN in /sys/devices/system/node";
                Refusal::new("bad-ram", "", cause, remedy).at(Some(location))
            })?);
        }
        Ok(ram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};

    fn with(table: &str) -> Result<Ram, Refusal> {
        parse(&format!("{GOOD}\n[ram]\n{table}\n")).map(|located| located.guest.ram)
    }

    #[test]
    fn reads_memory() {
        assert_eq!(parse(GOOD).unwrap().guest.ram, Ram::default());
        let ram = with("huge_pages = \"2 MiB\"\nprefault = true\nnuma_node = 1").unwrap();
        assert_eq!(ram, Ram { pages: Pages::Huge2Mib, prefault: true, numa_node: Some(1) });
        assert_eq!(with("huge_pages = \"none\"").unwrap().pages, Pages::Small);
    }

    #[test]
    fn refuses_by_code() {
        for table in
            ["huge_pages = \"4 MiB\"", "huge_pages = \"1 GiB\"", "numa_node = -1", "numa_node = 1024"]
        {
            let text = with(table).unwrap_err().to_string();
            assert!(text.starts_with("[bad-ram] guests/web.toml:2"), "{table}: {text}");
        }
        let whole = Ram { pages: Pages::Huge1Gib, ..Ram::default() };
        assert!(whole.fits(ByteSize::from_bytes(4 << 30)).is_ok());
    }
}
