//! Stands in for casemate-vmm in its cell, and does to its keep what a captured one could: says too much, nonsense, or
//! nothing.
//!
//! A test puts it in the place of casemate-vmm. What it does is chosen by the guest's command line: `liar=WORD`, which
//! stands as it is in the message that the keep sends.

use std::{
    io::{self, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread::park,
};

use casemate_filters::{Role, install};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    accept_with, recvmsg, sendmsg,
};

/// `FromCell::Running` in casemate-wire.
const RUNNING: &[u8] = &[0];

fn main() {
    if let Err(error) = run() {
        // As casemate-vmm does when its keep can't be told.
        eprintln!("casemate-liar: {error}");
        std::process::exit(2);
    }
}

fn run() -> io::Result<()> {
    install(Role::Build)?;
    // SAFETY: descriptor 3 is the control socket of the cell for as long as the process lives; nothing here closes it.
    #[allow(unsafe_code, reason = "a number that the cell fixes becomes a descriptor")]
    let control = unsafe { BorrowedFd::borrow_raw(3) };
    let keep = accept_with(control, SocketFlags::CLOEXEC)?;
    let mut message = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(&keep, &mut [IoSliceMut::new(&mut message)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    message.truncate(received.bytes);
    let text = String::from_utf8_lossy(&message);
    let (_, lie) = text.split_once("liar=").ok_or_else(|| io::Error::other("no lie is asked for"))?;
    let lie: String = lie.chars().take_while(char::is_ascii_lowercase).collect();
    tell(&keep, &lie)
}

fn tell(keep: &OwnedFd, lie: &str) -> io::Result<()> {
    match lie {
        // Ends without a word.
        "gone" => Ok(()),
        // Says the first word for ever.
        "flood" => loop {
            say(keep, RUNNING)?;
        },
        // Says what is no message, once it has been believed to run.
        "nonsense" => {
            say(keep, RUNNING)?;
            say(keep, &[0xff; 1000])?;
            wait()
        }
        // A packet far longer than any message.
        "long" => {
            say(keep, &vec![0; 100_000])?;
            wait()
        }
        // A packet that tells of a text which is not there.
        "short" => {
            say(keep, &[1, 0xff, 0xff, 0xff, 0xff, 0x0f])?;
            wait()
        }
        // Descriptors that nobody asked for.
        "gifts" => {
            let gifts = [keep.as_fd(); 64];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&gifts));
            sendmsg(keep, &[IoSlice::new(RUNNING)], &mut ancillary, SendFlags::NOSIGNAL)?;
            say(keep, &[])?;
            wait()
        }
        // A refusal that paints the operator's terminal.
        "paint" => {
            let word = b"\x1b[2J\x1b]0;root\x07\nfake";
            let length = word.len() as u8;
            say(keep, &[&[1, length], word.as_slice(), &[length], word.as_slice()].concat())?;
            wait()
        }
        // A log without end.
        "log" => loop {
            io::stderr().write_all(&[b'x'; 4096])?;
        },
        // Nothing at all.
        "silence" => wait(),
        _ => Err(io::Error::other(format!("no such lie: {lie}"))),
    }
}

fn say(keep: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let mut none = SendAncillaryBuffer::new(&mut []);
    Ok(sendmsg(keep, &[IoSlice::new(bytes)], &mut none, SendFlags::NOSIGNAL).map(drop)?)
}

fn wait() -> io::Result<()> {
    loop {
        park();
    }
}
