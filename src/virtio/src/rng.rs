//! The entropy device (virtio 1.3, 5.4): the host's random numbers.

use rustix::{
    io::Errno,
    rand::{GetRandomFlags, getrandom},
};

use crate::{
    active::Active,
    device::{Device, Fault, Kind, Progress},
    request::Request,
};

/// Bytes that one request gets at most. The driver asks again when it wants more.
const REQUEST_MAX_BYTES: usize = 64 << 10;
/// Bytes asked of the kernel at once; up to 256 it never gives fewer.
const CHUNK_BYTES: usize = 256;
/// Requests handled before others have their turn.
const BUDGET: usize = 16;

/// An entropy source over getrandom(2).
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// A source.
    pub fn new() -> Self {
        Self
    }
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn queue_ready(&mut self, active: &mut Active, index: usize) -> Result<Progress, Fault> {
        active.serve(index, BUDGET, |request| Ok(Some(fill(request))))
    }
}

/// Fills the request's buffers and returns how many bytes it wrote.
fn fill(request: &Request<'_>) -> u32 {
    let wanted = request.writable.bytes().min(REQUEST_MAX_BYTES);
    let mut written = 0;
    let mut chunk = [0; CHUNK_BYTES];
    while written < wanted {
        let Some(part) = chunk.get_mut(..CHUNK_BYTES.min(wanted - written)) else { break };
        let got = match getrandom(&mut *part, GetRandomFlags::empty()) {
            Err(Errno::INTR) => continue,
            got => got.unwrap_or(0),
        };
        // A short answer is what the specification allows; a wrong one is not.
        if got != part.len() || !request.writable.write(written, part) {
            break;
        }
        written += got;
    }
    u32::try_from(written).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Rng;
    use crate::testing::{Ring, active, attack, bytes, descriptor, memory, run};

    #[test]
    fn fills_what_it_is_given_and_no_more_than_its_bound() {
        let memory = memory();
        let mut ring = Ring::new(&memory, 0x1000, 16);
        let small = ring.offer(&[(0x10000, 300, true), (0x11000, 5, true)]);
        let large = ring.offer(&[(0x20000, 100_000, true)]);
        let useless = ring.offer(&[(0x10000, 16, false)]);
        let (mut active, _events) = active(&memory, &[&ring], 0);
        run(&mut Rng::new(), &mut active, 0).unwrap();
        assert_eq!(ring.take(), Some((small, 305)));
        assert_eq!(ring.take(), Some((large, 65536)));
        assert_eq!(ring.take(), Some((useless, 0)));
        let zeros = |at, length| bytes(&memory, at, length).iter().filter(|byte| **byte == 0).count();
        assert!(zeros(0x10000, 300) < 30, "300 random bytes are not zeros");
        assert_eq!(zeros(0x10000 + 300, 100), 100);
        assert_eq!(zeros(0x20000 + 65536, 100), 100);
    }

    proptest! {
        #[test]
        fn survives_any_driver(
            table in prop::collection::vec(descriptor(), 16),
            heads in prop::collection::vec(0u16..18, 1..16),
        ) {
            attack(&mut Rng::new(), &table, &heads, 0);
        }
    }
}
