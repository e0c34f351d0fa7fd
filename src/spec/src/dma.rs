//! The table `[dma]`: what a guest's devices reach beside its memory.

use serde::Deserialize;

/// What a guest's devices reach by DMA, beside its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dma {
    /// Each other's registers: those of the functions that the guest starts with.
    #[serde(default)]
    pub peer_to_peer: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::tests::{GOOD, parse};

    #[test]
    fn devices_reach_each_other_when_asked_alone() {
        let with = |table: &str| parse(&format!("{GOOD}\n[dma]\n{table}\n"));
        assert_eq!(parse(GOOD).unwrap().guest.dma, Dma::default());
        assert!(!with("").unwrap().guest.dma.peer_to_peer);
        assert!(with("peer_to_peer = true").unwrap().guest.dma.peer_to_peer);
        for wrong in ["peer_to_peer = 1", "peers = true"] {
            assert!(with(wrong).unwrap_err().to_string().contains(":23: dma"), "{wrong}");
        }
    }
}
