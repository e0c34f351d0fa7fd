//! A Landlock ruleset that handles every right the running kernel knows, and grants none.
//!
//! The rights are asked of the kernel bit by bit rather than read from a table by ABI, so what a newer kernel adds is
//! handled without a change here (Linux `include/uapi/linux/landlock.h`; rights are numbered from bit 0 without gaps).

use std::{fmt, os::fd::OwnedFd};

use casemate_spec::Refusal;
use rustix::io::Errno;

use crate::sys::{self, LandlockAttributes};

/// What the ruleset of a cell handles, which is what it denies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Makes the widest ruleset the kernel knows.
pub(crate) fn ruleset() -> Result<Ruleset, Refusal> {
    let refuse = |cause: String| {
        Refusal::new(
            "cell-landlock",
            "Landlock",
            cause,
            "use Linux 5.19 or newer with CONFIG_SECURITY_LANDLOCK, and name landlock in `lsm=` if that is set",
        )
    };
    let abi = sys::landlock_abi()
        .map_err(|error| refuse(format!("the kernel has none that is enabled: {error}")))?;
    if abi < ABI_MIN {
        return Err(refuse(format!("the kernel has ABI {abi}, a cell needs {ABI_MIN}")));
    }
    let empty = LandlockAttributes { filesystem: 0, network: 0, scopes: 0 };
    let known = |with_bit: &dyn Fn(u64) -> LandlockAttributes| {
        // The attribute is valid alone, so an error means that the kernel does not know the bit.
        let bits = (0..u64::BITS).map(|bit| 1 << bit);
        bits.take_while(|bit| sys::landlock_ruleset(&with_bit(*bit)).is_ok()).fold(0, |all, bit| all | bit)
    };
    let all = LandlockAttributes {
        filesystem: known(&|filesystem| LandlockAttributes { filesystem, ..empty }),
        network: known(&|network| LandlockAttributes { network, ..empty }),
        scopes: known(&|scopes| LandlockAttributes { scopes, ..empty }),
    };
    let ruleset = sys::landlock_ruleset(&all)
        .map_err(|error: Errno| refuse(format!("landlock_create_ruleset: {error}")))?;
    // From ABI 7 on denials are logged, by default until exec only; the program after exec is the one of interest.
    const LOG_NEW_EXEC_ON: u32 = 1 << 1;
    let flags = if abi >= 7 { LOG_NEW_EXEC_ON } else { 0 };
    let LandlockAttributes { filesystem, network, scopes } = all;
    Ok(Ruleset { ruleset, flags, handled: Landlock { abi, filesystem, network, scopes } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_the_abi_is_known_to_have_is_handled() {
        let Ok(abi) = sys::landlock_abi() else {
            // Then a cell must be refused by name.
            assert_eq!(ruleset().unwrap_err().code, "cell-landlock");
            return;
        };
        let handled = ruleset().unwrap().handled;
        let (filesystem, network, scopes) = match abi {
            0..=1 => panic!("ABI {abi} must be refused"),
            2 => (14, 0, 0),
            3 => (15, 0, 0),
            4 => (15, 2, 0),
            5 => (16, 2, 0),
            _ => (16, 2, 2),
        };
        assert_eq!(handled.abi, abi);
        for (mask, least) in
            [(handled.filesystem, filesystem), (handled.network, network), (handled.scopes, scopes)]
        {
            assert!(
                mask.count_ones() >= least && mask.trailing_ones() == mask.count_ones(),
                "{handled}: {mask:#x}"
            );
        }
        if abi <= 7 {
            assert_eq!(handled.filesystem.count_ones(), filesystem);
        }
    }
}
