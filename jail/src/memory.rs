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

/// Adds up /proc/PID/smaps (proc_pid_smaps(5)).
fn parse(smaps: &str, guest_memory_bytes: u64) -> MemoryUse {
    let mut sum = MemoryUse::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        if let Some(size_bytes) = mapping(line) {
            // Anonymous memory by the name the VMM gave it, shared memory by its memfd's.
            let is_named = ["[anon:guest-ram]", "[anon_shmem:guest-ram]", "/memfd:guest-ram (deleted)"];
            is_guest = is_named.iter().any(|name| line.ends_with(name))
                || (guest_memory_bytes > 0 && size_bytes >= guest_memory_bytes);
        } else if let Some(kib) = line.strip_prefix("Pss:").and_then(|rest| rest.trim().strip_suffix(" kB")) {
            let bytes = kib.parse::<u64>().unwrap_or(0).saturating_mul(1024);
            sum.pss_bytes = sum.pss_bytes.saturating_add(bytes);
            if !is_guest {
                sum.pss_bytes_less_guest = sum.pss_bytes_less_guest.saturating_add(bytes);
            }
        }
    }
    sum
}

/// The size of the mapping that this line begins: `START-END perms ...`.
fn mapping(line: &str) -> Option<u64> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    let address = |digits| u64::from_str_radix(digits, 16).ok();
    address(end)?.checked_sub(address(start)?)
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
7f0020000000-7f0030000000 rw-p 00000000 00:00 0
Size:             262144 kB
Pss:                   8 kB
";

    #[test]
    fn the_guest_is_told_by_name_or_by_size() {
        let by_name = parse(SMAPS, 0);
        assert_eq!(by_name, MemoryUse { pss_bytes: 100_308 << 10, pss_bytes_less_guest: 308 << 10 });
        assert_eq!(parse(SMAPS, 256 << 20).pss_bytes_less_guest, 300 << 10);
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
