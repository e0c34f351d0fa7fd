//! How much memory a cell's process uses.

use std::{fs, io};

/// Memory of a process, in proportional shares: a page that n processes map counts as an n-th.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// All of it.
    pub pss_bytes: u64,
    /// Without the guest's memory: what the VMM costs.
    pub pss_bytes_less_guest: u64,
}

pub(crate) fn read(pid: u32, guest_memory_bytes: u64) -> io::Result<MemoryUse> {
    Ok(parse(&fs::read_to_string(format!("/proc/{pid}/smaps"))?, guest_memory_bytes))
}

/// Mappings without a name that lie one behind the other.
#[derive(Clone, Copy, Default)]
struct Run {
    end: u64,
    size_bytes: u64,
    pss_bytes: u64,
}

/// Adds up /proc/PID/smaps (proc_pid_smaps(5)). The guest's memory is told by its name, or else by its size: it is larger than all that
/// a VMM has besides, and around each of its pieces lie bytes that can't be touched.
fn parse(smaps: &str, guest_memory_bytes: u64) -> MemoryUse {
    let mut sum = MemoryUse::default();
    // What the guest has, once a mapping is named so.
    let (mut named_pss_bytes, mut is_named) = (None::<u64>, false);
    let mut runs: Vec<Run> = Vec::new();
    let mut is_in_run = false;
    for line in smaps.lines() {
        if let Some(mapping) = Mapping::of(line) {
            // By the name the VMM gave it, or, where pages are set aside, by the kernel's.
            is_named = ["[anon:guest-ram]", "/anon_hugepage (deleted)"].contains(&mapping.name);
            is_in_run = mapping.name.is_empty() && mapping.is_writable;
            if is_in_run {
                match runs.last_mut().filter(|run| run.end == mapping.start) {
                    Some(run) => {
                        run.size_bytes = run.size_bytes.saturating_add(mapping.size_bytes());
                        run.end = mapping.end;
                    }
                    None => {
                        runs.push(Run {
                            end: mapping.end,
                            size_bytes: mapping.size_bytes(),
                            ..Run::default()
                        });
                    }
                }
            }
        } else if let Some(kib) = line.strip_prefix("Pss:").and_then(|rest| rest.trim().strip_suffix(" kB")) {
            let bytes = kib.parse::<u64>().unwrap_or(0).saturating_mul(1024);
            sum.pss_bytes = sum.pss_bytes.saturating_add(bytes);
            if is_named {
                named_pss_bytes = Some(named_pss_bytes.unwrap_or(0).saturating_add(bytes));
            }
            if let Some(run) = runs.last_mut().filter(|_| is_in_run) {
                run.pss_bytes = run.pss_bytes.saturating_add(bytes);
            }
        }
    }
    let guests_pss_bytes = named_pss_bytes.unwrap_or_else(|| largest(runs, guest_memory_bytes));
    sum.pss_bytes_less_guest = sum.pss_bytes.saturating_sub(guests_pss_bytes);
    sum
}

/// What the largest of them have that are as large as the guest together.
fn largest(mut runs: Vec<Run>, guest_memory_bytes: u64) -> u64 {
    let (mut left, mut pss_bytes) = (guest_memory_bytes, 0u64);
    runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.size_bytes));
    for run in runs {
        if left == 0 {
            break;
        }
        left = left.saturating_sub(run.size_bytes);
        pss_bytes = pss_bytes.saturating_add(run.pss_bytes);
    }
    pss_bytes
}

/// The line that begins a mapping's: `START-END perms offset device inode name`.
struct Mapping<'a> {
    start: u64,
    end: u64,
    is_writable: bool,
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let address = |digits| u64::from_str_radix(digits, 16).ok();
        let (start, end) = (address(start)?, address(end)?);
        let is_writable = words.next()?.starts_with("rw");
        let name = words.nth(3).unwrap_or_default().trim();
        (end >= start).then_some(Self { start, end, is_writable, name })
    }

    fn size_bytes(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 00:01 7      /memfd:casemate-vmm (deleted)
Size:               1024 kB
Pss:                 300 kB
Pss_Dirty:             4 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0     [anon:guest-ram]
Size:             262144 kB
Pss:              100000 kB
7f0020000000-7f0020100000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                   8 kB
";

    #[test]
    fn the_guest_is_told_by_name_or_by_size() {
        let by_name = parse(SMAPS, 0);
        assert_eq!(by_name, MemoryUse { pss_bytes: 100_308 << 10, pss_bytes_less_guest: 308 << 10 });
        let unnamed = SMAPS.replace("[anon:guest-ram]", "");
        assert_eq!(parse(&unnamed, 256 << 20), by_name);
        // Pages that are set aside are in no process's share.
        let set_aside = unnamed
            .replacen("00:00 0     ", "00:10 9     /anon_hugepage (deleted)", 1)
            .replace("100000", "0");
        assert_eq!(parse(&set_aside, 256 << 20).pss_bytes_less_guest, 308 << 10);
    }

    /// A guest with a hole in its addresses, whose first pages are small ones; beside it memory of the VMM's own.
    #[test]
    fn pieces_of_a_guest_are_told_together() {
        let smaps = "\
7f0000000000-7f0000200000 ---p 00000000 00:00 0
Pss:                   0 kB
7f0000200000-7f0000400000 rw-p 00000000 00:00 0
Pss:                  20 kB
7f0000400000-7f00c0200000 rw-p 00000000 00:00 0
Pss:              500000 kB
7f00c0200000-7f00c0400000 ---p 00000000 00:00 0
Pss:                   0 kB
7f00c0400000-7f00c4400000 rw-p 00000000 00:00 0
Pss:               10000 kB
7f00c4400000-7f00c4600000 ---p 00000000 00:00 0
Pss:                   0 kB
7f00c4600000-7f00c4700000 rw-p 00000000 00:00 0
Pss:                 400 kB
";
        let used = parse(smaps, (3 << 30) + (64 << 20));
        assert_eq!(used, MemoryUse { pss_bytes: 510_420 << 10, pss_bytes_less_guest: 400 << 10 });
    }

    #[test]
    fn this_process_uses_memory() {
        let used = read(std::process::id(), 0).unwrap();
        assert!(used.pss_bytes > 100 << 10 && used.pss_bytes == used.pss_bytes_less_guest);
    }

    proptest! {
        #[test]
        fn never_panics(text in "[-0-9a-f :kBPs\n]{0,80}", guest: u64) {
            let used = parse(&text, guest);
            prop_assert!(used.pss_bytes_less_guest <= used.pss_bytes);
        }
    }
}
