//! Processes: told apart from later ones with the same number, ended within bounds.

use std::{
    collections::BTreeMap,
    fs, io,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use crate::host::{Host, attribute, names};

/// How /proc names VFIO's descriptor of a device, whichever it is.
pub(crate) const VFIO_DEVICE: &str = "anon_inode:[vfio-device]";
/// How many open descriptors of all processes are looked at.
const DESCRIPTORS_MAX: usize = 1 << 20;

/// One process of one boot: its number alone is used again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number in the namespace of this host.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
    /// The boot it belongs to: /proc/sys/kernel/random/boot_id.
    pub boot_id: String,
}

impl Process {
    /// The process with this number now; `None` when there is none.
    pub fn with_pid(host: &Host, pid: u32) -> Option<Self> {
        let stat = host.table(&format!("proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        // A zombie or a dead one holds nothing any more.
        (!matches!(state, 'Z' | 'X')).then_some(())?;
        Some(Self { pid, start_ticks, boot_id: boot_id(host)? })
    }

    /// Whether this very process still runs.
    pub fn is_alive(&self, host: &Host) -> bool {
        Self::with_pid(host, self.pid).as_ref() == Some(self)
    }

    /// Whether it ran in this boot.
    pub(crate) fn is_of_this_boot(&self, host: &Host) -> bool {
        boot_id(host).as_ref() == Some(&self.boot_id)
    }

    /// Ends it with SIGKILL and waits until it is gone. `Ok(false)` when it was gone already.
    ///
    /// # Errors
    /// `TimedOut` when it does not go (it sleeps in the kernel), or the error of the signal.
    pub(crate) fn kill(&self, host: &Host, deadline: Duration) -> io::Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return Ok(false) };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            opened => opened?,
        };
        // Only now is the number held: look again whose it is.
        if !self.is_alive(host) {
            return Ok(false);
        }
        pidfd_send_signal(&pidfd, Signal::KILL)?;
        let until = Instant::now() + deadline;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not end after SIGKILL"));
                }
                polled => return polled.map(|_| true).map_err(io::Error::from),
            }
        }
    }
}

fn boot_id(host: &Host) -> Option<String> {
    attribute(host.path("proc/sys/kernel/random/boot_id")).filter(|id| !id.is_empty())
}

/// State (field 3) and start time (field 22) of proc_pid_stat(5). The name in field 2 may hold spaces and brackets.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Device nodes that processes hold open, and by whom. What may not be read (other users' processes, for one who is
/// not root) is not seen.
pub(crate) fn open_device_nodes(host: &Host) -> BTreeMap<String, String> {
    let mut nodes = BTreeMap::new();
    let proc = host.path("proc");
    let mut looked_at = 0usize;
    for pid in names(&proc).into_iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
        let descriptors = proc.join(&pid).join("fd");
        for name in names(&descriptors) {
            looked_at += 1;
            if looked_at > DESCRIPTORS_MAX {
                return nodes;
            }
            let Ok(target) = fs::read_link(descriptors.join(name)) else { continue };
            if let Some(node) =
                target.to_str().filter(|node| node.starts_with("/dev/") || *node == VFIO_DEVICE)
            {
                let by = || {
                    format!("process {pid} ({})", attribute(proc.join(&pid).join("comm")).unwrap_or_default())
                };
                nodes.entry(node.to_owned()).or_insert_with(by);
            }
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_stat() {
        let tail = "S 1 2 3 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 10";
        assert_eq!(parse_stat(&format!("7 (a) b) (c) {tail}")), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (a) S 1"), None);
    }

    #[test]
    fn knows_itself_and_not_an_earlier_one() {
        let host = Host::live();
        let this = Process::with_pid(&host, std::process::id()).unwrap();
        assert!(this.is_alive(&host) && this.is_of_this_boot(&host));
        assert!(!Process { start_ticks: this.start_ticks + 1, ..this.clone() }.is_alive(&host));
        assert!(!Process { boot_id: "another".into(), ..this }.is_alive(&host));
    }

    #[test]
    fn ends_a_process_but_not_its_successor() {
        let host = Host::live();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::with_pid(&host, child.id()).unwrap();
        let successor = Process { start_ticks: process.start_ticks + 1, ..process.clone() };
        assert!(!successor.kill(&host, Duration::from_secs(5)).unwrap());
        assert!(process.is_alive(&host));
        assert!(process.kill(&host, Duration::from_secs(5)).unwrap());
        assert!(!process.is_alive(&host), "a zombie counts as gone");
        child.wait().unwrap();
    }

    proptest! {
        #[test]
        fn stat_never_panics(text in "[0-9]{1,3} \\(.{0,8}\\) [A-Z]?( [0-9-]{0,22}){0,24}|.{0,60}") {
            let _ = parse_stat(&text);
        }
    }
}
