//! Who is at the other end of a socket.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Whether who connected is the same user as who made the listening socket: the keep that started this cell, or one
/// that was restarted. The kernel notes a listener's credentials at `listen(2)` and a peer's at `connect(2)`; a forged
/// process id would tell nothing here, since the keep is outside the cell's pid namespace and shows as 0.
///
/// # Errors
/// When the kernel does not tell.
pub fn peer_is_listener(listener: BorrowedFd<'_>, peer: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(user(listener)? == user(peer)?)
}

/// The uid of SO_PEERCRED. rustix's wrapper takes a process id of 0 for an error, and so cannot be asked in a cell.
fn user(socket: BorrowedFd<'_>) -> io::Result<libc::uid_t> {
    let mut credentials = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `credentials`; both are live locals, and the
    // descriptor is open for the borrow's time.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    // What was never connected and never listened has no user, and nobody is the same as nobody.
    match result {
        0 if credentials.uid != libc::uid_t::MAX => Ok(credentials.uid),
        0 => Err(io::Error::from(io::ErrorKind::NotConnected)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect, listen, socket_with,
    };
    use std::os::fd::{AsFd, OwnedFd};

    fn socket() -> OwnedFd {
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn the_one_who_listens_is_told() {
        let name = format!("casemate-wire-{}", std::process::id());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let (listener, peer) = (socket(), socket());
        bind(&listener, &address).unwrap();
        listen(&listener, 1).unwrap();
        connect(&peer, &address).unwrap();
        let accepted = accept(&listener).unwrap();
        assert!(peer_is_listener(listener.as_fd(), accepted.as_fd()).unwrap());
        assert!(peer_is_listener(socket().as_fd(), accepted.as_fd()).is_err());
    }
}
