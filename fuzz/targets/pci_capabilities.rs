//! Whatever a device says in its configuration space, its capability list is read or refused.
#![no_main]

use casemate_pci::capabilities;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|space: &[u8]| {
    if let Ok(found) = capabilities(space) {
        // Each where it says, apart from the next.
        assert!(found.iter().all(|capability| usize::from(capability.offset) < space.len()));
    }
});
