//! Questions to the kernel that have no file.

use std::{fs::File, io};

use super::{checked, ioctl_none};

/// The version of KVM's API; 12 since Linux 2.6.22, and for good.
pub(crate) fn kvm_api_version(kvm: &File) -> io::Result<libc::c_int> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    // SAFETY: KVM_GET_API_VERSION takes no argument.
    unsafe { ioctl_none(kvm, KVM_GET_API_VERSION) }
}

/// The version of Landlock's ABI (landlock_create_ruleset(2)).
///
/// # Errors
/// `ENOSYS` when the kernel was built without it, `EOPNOTSUPP` when it was not enabled at boot.
pub(crate) fn landlock_abi() -> io::Result<libc::c_int> {
    const LANDLOCK_CREATE_RULESET_VERSION: libc::c_ulong = 1;
    let none: *const libc::c_void = std::ptr::null();
    // SAFETY: with the version flag the attribute is null and its size 0, and no descriptor is made.
    let abi = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, LANDLOCK_CREATE_RULESET_VERSION)
    };
    checked(libc::c_int::try_from(abi).unwrap_or(-1))
}
