//! Admin commands to an NVMe controller that the host's driver has (linux/nvme_ioctl.h).

use std::{fs::File, io, mem::size_of};

use super::{ioctl_in_out, ioctl_none};

/// A `nvme_passthru_cmd`, without metadata.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Passthru {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    address: u64,
    metadata_bytes: u32,
    data_bytes: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const NVME_IOCTL_RESET: libc::c_ulong = 0x4e44;
/// `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = 0xc000_4e41 | (size_of::<Passthru>() as libc::c_ulong) << 16;
/// For commands that only set a number.
const TIMEOUT_MS: u32 = 10_000;

/// One admin command.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Admin {
    pub(crate) opcode: u8,
    pub(crate) nsid: u32,
    pub(crate) cdw10: u32,
    pub(crate) cdw11: u32,
}

/// Issues a command with `data`, which the controller reads or fills as the command has it; an NVMe status other than
/// success is an error.
pub(crate) fn admin(controller: &File, command: Admin, data: &mut [u8]) -> io::Result<()> {
    let mut passthru = Passthru {
        opcode: command.opcode,
        nsid: command.nsid,
        cdw10: command.cdw10,
        cdw11: command.cdw11,
        address: data.as_mut_ptr() as u64,
        data_bytes: u32::try_from(data.len()).map_err(io::Error::other)?,
        timeout_ms: TIMEOUT_MS,
        ..Passthru::default()
    };
    // SAFETY: NVME_IOCTL_ADMIN_CMD reads and writes one nvme_passthru_cmd, and the `data_bytes` at `address`: those of
    // `data`, borrowed for the call's length and kept by nobody after it.
    match unsafe { ioctl_in_out(controller, NVME_IOCTL_ADMIN_CMD, &mut passthru)? } {
        0 => Ok(()),
        status => Err(io::Error::other(format!("the controller answers with status {status:#x}"))),
    }
}

/// Resets the controller, which stays with its driver.
pub(crate) fn reset(controller: &File) -> io::Result<()> {
    // SAFETY: NVME_IOCTL_RESET takes no argument.
    unsafe { ioctl_none(controller, NVME_IOCTL_RESET).map(drop) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_the_headers() {
        // linux/nvme_ioctl.h: _IOWR('N', 0x41, 72 bytes).
        assert_eq!(NVME_IOCTL_ADMIN_CMD, 0xc048_4e41);
        let null = File::open("/dev/null").unwrap();
        assert!(admin(&null, Admin::default(), &mut []).is_err());
        assert!(reset(&null).is_err());
    }
}
