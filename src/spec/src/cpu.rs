//! `[cpu]`: what a guest's processors are, how they are arranged, and on which of the host's they run.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    Refusal,
    guest::{Reader, short},
};

/// Pieces of a list of processors, and the highest number in one: what fits into a set of the C library's.
const RANGES_MOST: usize = 16;
const CPU_MOST: u16 = 1023;
/// x86-64 has two threads a core, where it has more than one.
const THREADS_MOST: i64 = 2;

/// Which processor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// The host's, with all that its KVM can give.
    #[default]
    Host,
    /// The second level of the x86-64 psABI, AES and carry-less multiplication: the same on every host that has them.
    BaselineV2,
}

impl CpuModel {
    /// As it is written in the guest's file.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::BaselineV2 => "baseline-v2",
        }
    }
}

/// A list of the host's processors, as Linux writes them: `2`, `4-5`, `0,2-3`. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<RangeInclusive<u16>>);

/// Why a text is no [`CpuList`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("numbers and ranges of the host's processors are wanted, as in \"2\", \"4-5\" or \"0,2-3\"")]
pub struct CpuListError;

impl CpuList {
    /// Its pieces, in the order in which they were written.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.0
    }

    /// The processors; one that was written twice comes twice.
    pub fn cpus(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().cloned().flatten()
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u16>().ok().filter(|cpu| digits && *cpu <= CPU_MOST).ok_or(CpuListError)
        };
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = number(first)?..=number(last)?;
            if range.is_empty() { Err(CpuListError) } else { Ok(range) }
        };
        // One more than may be, so that a long text is told from a full list and never read whole.
        let parts: Vec<_> = text.split(',').take(RANGES_MOST + 1).map(range).collect::<Result<_, _>>()?;
        if parts.len() > RANGES_MOST { Err(CpuListError) } else { Ok(Self(parts)) }
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            match (range.start(), range.end()) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// The processors of a guest, beside their number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// What they are.
    pub model: CpuModel,
    /// Packages; a divisor of the number of vCPUs.
    pub sockets: u8,
    /// Threads of a core, 1 or 2; vCPUs are whole cores of whole packages.
    pub threads_per_core: u8,
    /// Whether the guest may run guests.
    pub nested: bool,
    /// On which of the host's processors each vCPU runs; empty when that is the host's to choose.
    pub pins: Vec<CpuList>,
}

impl Default for Cpu {
    fn default() -> Self {
        Self { model: CpuModel::Host, sockets: 1, threads_per_core: 1, nested: false, pins: Vec::new() }
    }
}

impl Cpu {
    /// Whether `vcpus` processors can be arranged and pinned so. To be asked again when a policy changes their number.
    ///
    /// # Errors
    /// `bad-cpu`, `bad-pin`.
    pub fn fits(&self, vcpus: u8) -> Result<(), Refusal> {
        let (sockets, threads) = (u16::from(self.sockets), u16::from(self.threads_per_core));
        if !u16::from(vcpus).is_multiple_of(sockets.saturating_mul(threads).max(1)) {
            let cause =
                format!("{vcpus} vCPUs are not whole cores of {threads} threads in {sockets} sockets");
            let remedy = "let vcpus be a multiple of sockets times threads_per_core";
            return Err(Refusal::new("bad-cpu", "cpu", cause, remedy));
        }
        if !self.pins.is_empty() && self.pins.len() < usize::from(vcpus) {
            let cause = format!("{} of {vcpus} vCPUs are pinned", self.pins.len());
            return Err(Refusal::new("bad-pin", "cpu.pin", cause, "pin all of them, or none"));
        }
        Ok(())
    }
}

/// `[cpu]` as written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawCpu {
    model: Option<Spanned<String>>,
    sockets: Option<Spanned<i64>>,
    threads_per_core: Option<Spanned<i64>>,
    nested: Option<Spanned<bool>>,
    pin: Option<Spanned<Vec<Spanned<String>>>>,
}

impl Reader<'_> {
    /// The processors of a guest that has `vcpus` of them.
    pub(crate) fn cpu(&mut self, raw: RawCpu, vcpus: u8) -> Result<Cpu, Refusal> {
        let model = raw.model.map(|raw| self.cpu_model(&raw)).transpose()?.unwrap_or_default();
        let sockets = self.count_of(raw.sockets.as_ref(), 1..=64)?;
        let threads_per_core = self.count_of(raw.threads_per_core.as_ref(), 1..=THREADS_MOST)?;
        let at = raw.threads_per_core.as_ref().or(raw.sockets.as_ref()).map(|value| self.note(value));
        let nested = raw.nested.as_ref().is_some_and(|nested| *nested.get_ref());
        if let Some(nested) = raw.nested.as_ref().filter(|_| nested && model != CpuModel::Host) {
            let cause = "this model of processor has no virtualisation";
            let remedy = "remove it, or use model = \"host\"";
            return Err(Refusal::new("bad-cpu", "", cause, remedy).at(Some(self.note(nested))));
        }
        let pins = raw.pin.map(|raw| self.pins(raw, vcpus)).transpose()?.unwrap_or_default();
        let cpu = Cpu { model, sockets, threads_per_core, nested, pins };
        cpu.fits(vcpus).map_err(|refusal| Refusal { subject: String::new(), ..refusal }.at(at))?;
        Ok(cpu)
    }

    fn cpu_model(&mut self, raw: &Spanned<String>) -> Result<CpuModel, Refusal> {
        let location = self.note(raw);
        let models = [CpuModel::Host, CpuModel::BaselineV2];
        let found = models.into_iter().find(|model| model.name() == raw.get_ref());
        found.ok_or_else(|| {
            let cause = format!("{:?} is not a model of processor", short(raw.get_ref()));
            let names = models.map(CpuModel::name).join(", ");
            Refusal::new("bad-cpu", "", cause, format_args!("use one of {names}")).at(Some(location))
        })
    }

    fn count_of(&mut self, raw: Option<&Spanned<i64>>, range: RangeInclusive<i64>) -> Result<u8, Refusal> {
        let Some(raw) = raw else { return Ok(1) };
        let location = self.note(raw);
        let count = u8::try_from(*raw.get_ref()).ok().filter(|_| range.contains(raw.get_ref()));
        count.ok_or_else(|| {
            let remedy = format!("use {} to {}", range.start(), range.end());
            let cause = format!("there cannot be {}", raw.get_ref());
            Refusal::new("bad-cpu", "", cause, remedy).at(Some(location))
        })
    }

    fn pins(&mut self, raw: Spanned<Vec<Spanned<String>>>, vcpus: u8) -> Result<Vec<CpuList>, Refusal> {
        let location = self.note(&raw);
        let lists = raw.into_inner();
        if lists.len() != usize::from(vcpus) {
            let cause = format!("{} entries for {vcpus} vCPUs", lists.len());
            let remedy = "write one list of the host's processors for each vCPU, in their order";
            return Err(Refusal::new("bad-pin", "", cause, remedy).at(Some(location)));
        }
        let list = |raw: Spanned<String>| {
            raw.get_ref().parse().map_err(|error: CpuListError| {
                let cause = format!("{:?} is not a list of processors", short(raw.get_ref()));
                Refusal::new("bad-pin", "", cause, error).at(Some(location.clone()))
            })
        };
        lists.into_iter().map(list).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};
    use proptest::prelude::*;

    fn with(table: &str) -> Result<Cpu, Refusal> {
        parse(&format!("{GOOD}\n[cpu]\n{table}\n")).map(|located| located.guest.cpu)
    }

    #[test]
    fn reads_processors() {
        assert_eq!(parse(GOOD).unwrap().guest.cpu, Cpu::default());
        let cpu = with("model = \"baseline-v2\"\nthreads_per_core = 2\npin = [\"2\", \"4-5,7\"]").unwrap();
        assert_eq!((cpu.model, cpu.threads_per_core, cpu.sockets), (CpuModel::BaselineV2, 2, 1));
        assert_eq!(cpu.pins[1].cpus().collect::<Vec<_>>(), [4, 5, 7]);
        assert_eq!(cpu.pins[1].to_string(), "4-5,7");
        assert!(with("nested = true").unwrap().nested);
    }

    #[test]
    fn refuses_by_code() {
        for (table, code) in [
            ("model = \"pentium\"", "bad-cpu"),
            ("sockets = 3", "bad-cpu"),
            ("sockets = 2\nthreads_per_core = 2", "bad-cpu"),
            ("sockets = 0", "bad-cpu"),
            ("threads_per_core = 4", "bad-cpu"),
            ("model = \"baseline-v2\"\nnested = true", "bad-cpu"),
            ("pin = [\"1\"]", "bad-pin"),
            ("pin = [\"1\", \"\"]", "bad-pin"),
            ("pin = [\"1\", \"3-2\"]", "bad-pin"),
            ("pin = [\"1\", \"-1\"]", "bad-pin"),
            ("pin = [\"1\", \"1024\"]", "bad-pin"),
            ("cores = 2", "unknown-key"),
        ] {
            let refusal = with(table).unwrap_err();
            let text = refusal.to_string();
            assert!(text.starts_with(&format!("[{code}] guests/web.toml:2")), "{table}: {text}");
        }
    }

    #[test]
    fn fewer_vcpus_may_no_longer_fit() {
        let cpu = with("threads_per_core = 2\npin = [\"1\", \"2\"]").unwrap();
        assert_eq!(cpu.fits(1).unwrap_err().code, "bad-cpu");
        assert_eq!(cpu.fits(4).unwrap_err().code, "bad-pin");
    }

    proptest! {
        #[test]
        fn lists_print_as_they_read(text in "[0-9]{1,2}(-[0-9]{1,5}|,[0-9]{1,4}){0,20}") {
            if let Ok(list) = text.parse::<CpuList>() {
                prop_assert_eq!(list.to_string().parse::<CpuList>().unwrap(), list.clone());
                prop_assert!(list.cpus().all(|cpu| cpu <= CPU_MOST));
            }
        }
    }
}
