//! A Landlock ruleset that handles every right the running kernel knows, and grants none.
//!
//! How many rights there are is asked of the kernel rather than read from a table by ABI, so what a newer kernel adds is
//! handled without a change here (Linux `include/uapi/linux/landlock.h`; rights are numbered from bit 0 without gaps).

use std::{
    fmt,
    os::fd::{AsRawFd, OwnedFd},
};

use casemate_spec::{CellPart, Refusal};
use rustix::{fs::OFlags, io::Errno};

use crate::{
    lacking::Lack,
    sys::{self, LandlockAttributes},
};

/// What the ruleset of a cell handles, which is what it denies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Landlock {
    /// The kernel's Landlock ABI.
    pub abi: u32,
    /// Rights to files and directories (`LANDLOCK_ACCESS_FS_*`); 14 bits at ABI 2.
    pub filesystem: u64,
    /// Rights to the network (`LANDLOCK_ACCESS_NET_*`): TCP bind and connect from ABI 4 on.
    pub network: u64,
    /// Scopes (`LANDLOCK_SCOPE_*`): abstract unix sockets and signals from ABI 6 on.
    pub scopes: u64,
}

impl fmt::Display for Landlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { abi, filesystem, network, scopes } = self;
        let [filesystem, network, scopes] = [filesystem, network, scopes].map(|mask| mask.count_ones());
        write!(
            f,
            "ABI {abi}: {filesystem} file rights, {network} network rights and {scopes} scopes, none granted"
        )
    }
}

/// The oldest ABI that closes a cell: without ABI 2 files could still be linked and renamed between directories.
const ABI_MIN: u32 = 2;

/// A ruleset, ready to be enforced.
#[derive(Debug)]
pub(crate) struct Ruleset {
    pub(crate) ruleset: OwnedFd,
    pub(crate) flags: u32,
    pub(crate) handled: Landlock,
}

/// Why a cell can't have Landlock here; `None` where it can.
pub(crate) fn lack() -> Option<Lack> {
    let cause = match sys::landlock_abi() {
        Ok(abi) if abi >= ABI_MIN => return None,
        Ok(abi) => format!("the kernel has Landlock ABI {abi}, a cell needs {ABI_MIN}"),
        Err(error) => format!("the kernel has no Landlock that is enabled: {error}"),
    };
    let remedy =
        "use Linux 5.19 or newer with CONFIG_SECURITY_LANDLOCK, and name landlock in `lsm=` if that is set";
    Some(Lack { part: CellPart::Landlock, cause, remedy })
}

/// Makes the widest ruleset the kernel knows.
pub(crate) fn ruleset() -> Result<Ruleset, Refusal> {
    let refuse = |error: Errno| {
        let remedy = "see that the keep has descriptors left";
        Refusal::new("cell-landlock", "Landlock", format_args!("landlock_create_ruleset: {error}"), remedy)
    };
    let abi = sys::landlock_abi().map_err(refuse)?;
    // Each attribute is valid alone, so an error means that the kernel does not know all of its bits.
    let handled = widest(abi, &|attributes| sys::landlock_ruleset(attributes).is_ok());
    let Landlock { filesystem, network, scopes, .. } = handled;
    let ruleset =
        sys::landlock_ruleset(&LandlockAttributes { filesystem, network, scopes }).map_err(refuse)?;
    Ok(Ruleset { ruleset, flags: flags(abi), handled })
}

/// From now on the calling thread, and those that it starts, may read files and folders by path, as far as their user may, and do nothing else
/// that Landlock governs: not write, make, remove or execute, not reach the network or abstract sockets, not signal others. What is open
/// already stays as it is. False where the kernel has no Landlock. The thread has to have `no_new_privs`.
///
/// # Errors
/// `cell-landlock`.
pub fn read_only() -> Result<bool, Refusal> {
    const READ_FILE: u64 = 1 << 2;
    const READ_DIR: u64 = 1 << 3;
    if lack().is_some() {
        return Ok(false);
    }
    let refuse = |error: Errno| {
        let cause = format_args!("this process can't be held to reading: {error}");
        Refusal::new("cell-landlock", "Landlock", cause, "see the kernel's log: dmesg")
    };
    let ruleset = ruleset()?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags, rustix::fs::Mode::empty()).map_err(refuse)?;
    let allowed = (READ_FILE | READ_DIR) & ruleset.handled.filesystem;
    sys::landlock_allow_beneath(&ruleset.ruleset, &root, allowed).map_err(refuse)?;
    sys::landlock_restrict_self(ruleset.ruleset.as_raw_fd(), ruleset.flags).map_err(refuse)?;
    Ok(true)
}

/// All rights that the kernel knows, by asking for more or fewer than those of ABI 7 until it is known how many there are.
fn widest(abi: u32, knows: &dyn Fn(&LandlockAttributes) -> bool) -> Landlock {
    let empty = LandlockAttributes { filesystem: 0, network: 0, scopes: 0 };
    let known = |guess: u32, with: &dyn Fn(u64) -> LandlockAttributes| {
        let first = |count: u32| u64::MAX.checked_shr(u64::BITS.saturating_sub(count)).unwrap_or(0);
        let knows = |count: &u32| knows(&with(first(*count)));
        let fewer = (1..=guess).rev().find(knows).unwrap_or(0);
        let most = if fewer == guess { (guess + 1..=u64::BITS).take_while(knows).last() } else { None };
        first(most.unwrap_or(fewer))
    };
    Landlock {
        abi,
        filesystem: known(16, &|filesystem| LandlockAttributes { filesystem, ..empty }),
        network: known(2, &|network| LandlockAttributes { network, ..empty }),
        scopes: known(2, &|scopes| LandlockAttributes { scopes, ..empty }),
    }
}

/// What landlock_restrict_self(2) is asked for beside. From ABI 7 on denials are logged, by default until exec only; the
/// program after exec is the one of interest.
fn flags(abi: u32) -> u32 {
    const LOG_NEW_EXEC_ON: u32 = 1 << 1;
    if abi >= 7 { LOG_NEW_EXEC_ON } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each ABI knows: rights to files, to the network, scopes, and what is asked for beside (Linux
    /// `Documentation/userspace-api/landlock.rst`, "Previous limitations").
    const ABIS: [(u32, u32, u32, u32, u32); 7] = [
        (1, 13, 0, 0, 0),
        // Linking and renaming between directories.
        (2, 14, 0, 0, 0),
        // Truncating.
        (3, 15, 0, 0, 0),
        // Binding and connecting TCP.
        (4, 15, 2, 0, 0),
        // ioctl on devices.
        (5, 16, 2, 0, 0),
        // Abstract unix sockets and signals.
        (6, 16, 2, 2, 0),
        // Logging.
        (7, 16, 2, 2, 2),
    ];

    #[test]
    fn of_each_abi_all_that_it_knows_is_asked_for() {
        // One that nobody has seen yet has more.
        for (abi, filesystem, network, scopes, beside) in ABIS.into_iter().chain([(99, 20, 5, 4, 2)]) {
            let mask = |bits: u32| (1u64 << bits) - 1;
            // As the kernel does: a bit that it does not know is an error, and so is an attribute that handles nothing.
            let knows = |asked: &LandlockAttributes| {
                let unknown = asked.filesystem & !mask(filesystem)
                    | asked.network & !mask(network)
                    | asked.scopes & !mask(scopes);
                unknown == 0 && (asked.filesystem | asked.network | asked.scopes) != 0
            };
            let [filesystem, network, scopes] = [filesystem, network, scopes].map(mask);
            assert_eq!(widest(abi, &knows), Landlock { abi, filesystem, network, scopes }, "ABI {abi}");
            assert_eq!(flags(abi), beside, "ABI {abi}");
        }
    }

    #[test]
    fn of_the_running_kernel_all_that_its_abi_is_known_to_have_is_handled() {
        let Ok(abi) = sys::landlock_abi() else {
            // Then a cell is refused by name.
            assert_eq!(lack().unwrap().refusal().code, "cell-landlock");
            return;
        };
        let handled = ruleset().unwrap().handled;
        let known = ABIS.iter().rev().find(|(known, ..)| *known <= abi);
        let (known, filesystem, network, scopes, _) = *known.unwrap();
        assert_eq!(handled.abi, abi);
        for (mask, least) in
            [(handled.filesystem, filesystem), (handled.network, network), (handled.scopes, scopes)]
        {
            let count = mask.count_ones();
            assert!(count >= least && mask.trailing_ones() == count, "{handled}: {mask:#x}");
            assert!(count == least || abi > known, "{handled}: {mask:#x}");
        }
    }
}
