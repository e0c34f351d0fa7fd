//! A guest of a few instructions: what a machine costs without a Linux in it.

/// An ELF kernel with a PVH entry that writes a line to the serial port, and halts for ever.
pub fn tiny_kernel() -> Vec<u8> {
    kernel(&[])
}

/// The same that powers off where that is known: by the sleep register that Casemate and Cloud Hypervisor have at port 0x600,
/// or else by the reset line of the i8042, which ends Firecracker, and QEMU with `-no-reboot`.
pub fn tiny_kernel_that_ends() -> Vec<u8> {
    // mov dx, 0x600; mov al, S5 and SLP_EN; out dx, al; mov al, 0xfe; out 0x64, al.
    kernel(&[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xb0, 0xfe, 0xe6, 0x64])
}

/// One that runs `last` after its line, and halts then.
fn kernel(last: &[u8]) -> Vec<u8> {
    const LOAD_ADDRESS: u32 = 0x10_0000;
    const HEADER_BYTES: u64 = 64;
    const PROGRAM_HEADER_BYTES: u16 = 56;
    const NOTE_BYTES: u64 = 20;
    // mov dx, 0x3f8; mov al, byte; out dx, al; and so on; then hlt, and back to it.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    code.extend(b"tiny-guest-runs\n".iter().flat_map(|byte| [0xb0, *byte, 0xee]));
    code.extend(last);
    code.extend([0xf4, 0xeb, 0xfd]);

    let note_at = HEADER_BYTES + 2 * u64::from(PROGRAM_HEADER_BYTES);
    let code_at = note_at + NOTE_BYTES;
    let code_bytes = code.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |image: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|value| image.extend(value.to_le_bytes()));
    };
    let word = |image: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|value| image.extend(value.to_le_bytes()));
    };
    let long = |image: &mut Vec<u8>, values: &[u64]| {
        values.iter().for_each(|value| image.extend(value.to_le_bytes()));
    };
    // Executable, x86-64; then entry, program headers, section headers, flags, and sizes.
    half(&mut image, &[2, 62]);
    word(&mut image, &[1]);
    long(&mut image, &[LOAD_ADDRESS.into(), HEADER_BYTES, 0]);
    word(&mut image, &[0]);
    half(&mut image, &[64, PROGRAM_HEADER_BYTES, 2, 64, 0, 0]);
    // PT_LOAD, readable and executable.
    word(&mut image, &[1, 5]);
    long(&mut image, &[code_at, LOAD_ADDRESS.into(), LOAD_ADDRESS.into(), code_bytes, code_bytes, 4]);
    // PT_NOTE: XEN_ELFNOTE_PHYS32_ENTRY (18), by name "Xen".
    word(&mut image, &[4, 4]);
    long(&mut image, &[note_at, 0, 0, NOTE_BYTES, NOTE_BYTES, 4]);
    word(&mut image, &[4, 4, 18]);
    image.extend(b"Xen\0");
    word(&mut image, &[LOAD_ADDRESS]);
    image.extend(code);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_headers_lead_to_note_and_code() {
        let image = tiny_kernel();
        let long = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap()) as usize;
        let (load, note) = (long(32), long(32) + 56);
        let code = long(load + 8);
        assert_eq!(image[code..code + 4], [0x66, 0xba, 0xf8, 0x03]);
        assert_eq!(image.len(), code + long(load + 32));
        assert_eq!(image[long(note + 8)..code][12..16], *b"Xen\0");
    }
}
