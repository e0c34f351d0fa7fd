//! Power-off and reset: the registers of a hardware-reduced ACPI machine (ACPI 6.5, 4.8.3.7 and 4.8.3.6), and the
//! interrupt of its power button (4.8.2.2.1.2: a device of its own, told by a generic event device, 5.6.9).

/// First I/O port: sleep control, sleep status, reset, in this order.
pub const POWER_PORT: u16 = 0x600;
/// Number of I/O ports, from [`POWER_PORT`].
pub const POWER_PORTS: u16 = 3;

/// The interrupt by which the power button is pressed: edge-triggered, active high.
pub const POWER_BUTTON_GSI: u8 = 5;

pub(crate) const SLEEP_CONTROL: u16 = 0;
pub(crate) const SLEEP_STATUS: u16 = 1;
pub(crate) const RESET: u16 = 2;
/// What the guest writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// SLP_TYP of the soft-off state, as the DSDT's `\_S5` names it.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;
const SLP_EN: u8 = 1 << 5;

/// Where [`RESET_CODE`] belongs in guest memory: where a PC's processor begins in real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// What a guest finds that jumps to its BIOS to be reset: code that writes the reset register.
///
/// Linux does so: on a hardware-reduced machine it resets by EFI, and without EFI by the BIOS, never by the FADT's
/// register unless told `reboot=acpi` (`reboot_init` in `arch/x86/kernel/reboot.c`).
pub const RESET_CODE: [u8; 9] = {
    let [low, high] = (POWER_PORT + RESET).to_le_bytes();
    [
        0xba,
        low,
        high, // mov dx, port
        0xb0,
        RESET_VALUE, // mov al, value
        0xee,        // out dx, al
        0xf4,        // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ]
};

/// What the guest asked of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Enter S5: the guest has shut down.
    PowerOff,
    /// Reset the machine.
    Reset,
}

/// The registers; they hold no state.
#[derive(Debug, Default)]
pub struct Power;

impl Power {
    /// Reads at `offset` from [`POWER_PORT`]. All registers read as zero; there is no wake-up to report.
    pub fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    /// Writes at `offset` from [`POWER_PORT`] and tells what the guest asked for. The registers take bytes only.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Option<PowerEvent> {
        let [value] = *data else { return None };
        let s5 = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == SLEEP_TYPE_S5;
        match offset {
            SLEEP_CONTROL if s5 && value & SLP_EN != 0 => Some(PowerEvent::PowerOff),
            RESET if value == RESET_VALUE => Some(PowerEvent::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_power_off_from_reset_from_nothing() {
        let mut power = Power;
        assert_eq!(power.write(SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2 | SLP_EN]), Some(PowerEvent::PowerOff));
        assert_eq!(power.write(RESET, &[RESET_VALUE]), Some(PowerEvent::Reset));
        // Without SLP_EN; another sleep type; the status register's write-one-to-clear; another value; wide; far.
        let nothing: [(u16, &[u8]); 7] = [
            (SLEEP_CONTROL, &[SLEEP_TYPE_S5 << 2]),
            (SLEEP_CONTROL, &[3 << 2 | SLP_EN]),
            (SLEEP_STATUS, &[0x80]),
            (RESET, &[0]),
            (RESET, &[1, 0]),
            (RESET, &[]),
            (999, &[1]),
        ];
        for (offset, data) in nothing {
            assert_eq!(power.write(offset, data), None, "{offset} {data:?}");
        }
        // What the reset code writes, as a processor would decode it.
        let [0xba, low, high, 0xb0, value, 0xee, 0xf4, 0xeb, 0xfd] = RESET_CODE else {
            panic!("{RESET_CODE:x?}")
        };
        let offset = u16::from_le_bytes([low, high]) - POWER_PORT;
        assert_eq!(power.write(offset, &[value]), Some(PowerEvent::Reset));
        let mut status = [0xff];
        power.read(SLEEP_STATUS, &mut status);
        assert_eq!(status, [0]);
    }
}
