//! pvpanic: by which a guest's kernel tells that it panics (QEMU's `docs/specs/pvpanic.rst`; Linux's side is
//! `drivers/misc/pvpanic`).

/// The I/O port.
pub const PANIC_PORT: u16 = 0x505;
/// Number of I/O ports, from [`PANIC_PORT`].
pub const PANIC_PORTS: u16 = 1;

/// The kernel has panicked and does nothing about it.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and starts its crash kernel. That one runs on, and ends the machine when it has saved what it
/// wants: there is nothing to do, but a guest that may not say so would say [`PANICKED`].
const CRASH_LOADED: u8 = 1 << 1;

/// Reads the register: the events that may be told.
pub fn panic_read(data: &mut [u8]) {
    data.fill(0);
    if let Some(first) = data.first_mut() {
        *first = PANICKED | CRASH_LOADED;
    }
}

/// Writes the register; true when the guest says that it has panicked and goes no further. The register takes bytes only.
pub fn panic_write(data: &[u8]) -> bool {
    matches!(*data, [events] if events & PANICKED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_panic_from_a_crash_kernel_and_from_nothing() {
        let mut data = [0xEE; 2];
        panic_read(&mut data);
        assert_eq!(data, [3, 0]);
        panic_read(&mut []);
        assert!(panic_write(&[PANICKED]) && panic_write(&[0xFF]));
        for nothing in [&[CRASH_LOADED][..], &[0], &[], &[PANICKED, 0]] {
            assert!(!panic_write(nothing), "{nothing:?}");
        }
    }
}
