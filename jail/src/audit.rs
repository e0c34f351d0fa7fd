//! The line that the kernel logs when seccomp kills (`kernel/auditsc.c`, `audit_seccomp`; record type 1326).

use std::{
    fs::File,
    io::{ErrorKind, Read},
    thread::sleep,
    time::Duration,
};

/// A call that a filter stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoppedCall {
    pub(crate) call: u32,
    pub(crate) thread: String,
}

/// Looks for the line of this process in what is left of /dev/kmsg, opened non-blocking. The kernel's audit thread may be
/// late, so it looks for a fifth of a second. `None` when an audit daemon takes the lines, or there were too many.
pub(crate) fn find(log: &mut File, pid: u32) -> Option<StoppedCall> {
    // The longest record of /dev/kmsg (`PRINTK_MESSAGE_MAX`).
    let mut record = [0; 2048];
    for _ in 0..20 {
        loop {
            match log.read(&mut record) {
                Ok(length) => {
                    let line = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
                    if let Some(stopped) = parse(&line, pid) {
                        return Some(stopped);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // EPIPE: records were lost before they were read; the next read goes on after them.
                Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
                Err(_) => return None,
            }
        }
        sleep(Duration::from_millis(10));
    }
    None
}

/// Reads a record; `None` when it is no seccomp record of this process.
fn parse(line: &str, pid: u32) -> Option<StoppedCall> {
    let (_, fields) = line.split_once("audit: type=1326 ")?;
    let field =
        |name: &str| fields.split_whitespace().find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    if field("pid")?.parse() != Ok(pid) {
        return None;
    }
    // Written as "name", or in hexadecimal when a byte of it is not plain; a name may hold a space, so it is cut out by its quotes.
    let (_, name) = fields.split_once(" comm=")?;
    let thread = match name.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next()?,
        None => name.split_whitespace().next()?,
    };
    Some(StoppedCall { call: field("syscall")?.parse().ok()?, thread: thread.chars().take(32).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = "5,911,18223544,-;audit: type=1326 audit(1700000000.123:4): auid=4294967295 uid=70001 gid=70001 \
                        ses=4294967295 subj=unconfined pid=412 comm=\"vcpu 0\" exe=\"/memfd:casemate-vmm\" sig=31 \
                        arch=c000003e syscall=257 compat=0 ip=0x7f6 code=0x80000000";

    #[test]
    fn the_line_of_the_process_is_read() {
        let stopped = StoppedCall { call: 257, thread: "vcpu 0".into() };
        assert_eq!(parse(LINE, 412), Some(stopped));
        assert_eq!(parse(LINE, 41), None);
        assert_eq!(parse(&LINE.replace("1326", "1400"), 412), None);
        let hexadecimal = LINE.replace("\"vcpu 0\"", "7663");
        assert_eq!(parse(&hexadecimal, 412).unwrap().thread, "7663");
    }

    proptest! {
        #[test]
        fn never_panics(cut in 0..LINE.len(), tail in ".{0,20}") {
            let _ = parse(&format!("{}{tail}", &LINE[..cut]), 412);
        }
    }
}
