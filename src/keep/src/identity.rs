//! Who a guest's machine says that it is.

use std::{fs::File, io::Read};

use casemate_spec::Guest;
use casemate_wire::Platform;
use sha2::{Digest, Sha256};

/// The host's own identity (machine-id(5)), which everybody on it may read.
const HOST_ID: &str = "/etc/machine-id";
/// A machine-id has 33.
const HOST_ID_BYTES_MAX: u64 = 64;

/// What a guest's file says of its machine. The UUID is made where the file has none.
pub(crate) fn platform(guest: &Guest) -> Platform {
    let told = &guest.platform;
    Platform {
        uuid: told.uuid.unwrap_or_else(|| uuid(&host_id(), guest.tenant.as_str(), guest.name.as_str())),
        serial: told.serial.clone().unwrap_or_default(),
        oem_strings: told.oem_strings.clone(),
        rtc: told.rtc,
    }
}

/// Nothing where the host has none: guests are still apart from each other by their names.
fn host_id() -> Vec<u8> {
    let mut id = Vec::new();
    let read = File::open(HOST_ID).and_then(|file| file.take(HOST_ID_BYTES_MAX).read_to_end(&mut id));
    if read.is_err() {
        id.clear();
    }
    id
}

/// The same for a guest at each of its starts on a host, another for every other guest there and on other hosts (RFC 9562, 5.8). Of the
/// host's identity, which is nobody's business, it tells nothing.
fn uuid(host_id: &[u8], tenant: &str, name: &str) -> [u8; 16] {
    let mut hash = Sha256::new();
    for part in [b"casemate guest".as_slice(), host_id, tenant.as_bytes(), name.as_bytes()] {
        hash.update(part);
        // None of them has this byte.
        hash.update([0]);
    }
    let mut uuid = [0; 16];
    for (place, byte) in uuid.iter_mut().zip(hash.finalize()) {
        *place = byte;
    }
    let number = u128::from_be_bytes(uuid);
    // Version 8, and the variant of that RFC.
    let number = number & !(0xf << 76) | 8 << 76;
    (number & !(0b11 << 62) | 0b10 << 62).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_stable_and_apart() {
        let first = uuid(b"host", "acme", "web");
        assert_eq!(first, uuid(b"host", "acme", "web"));
        for other in
            [uuid(b"other", "acme", "web"), uuid(b"host", "acm", "eweb"), uuid(b"host", "acme", "db")]
        {
            assert_ne!(first, other);
        }
        assert_eq!((first[6] >> 4, first[8] >> 6), (8, 0b10));
    }
}
