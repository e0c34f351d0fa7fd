//! What a captured VMM could still do: read out of running processes, ours and the others', by the kernel's word. No call is made.

use casemate_hwtests::harness::{Ctx, Failure};
use casemate_jail::{Answer, Call, CellView, ThreadFilters, filters, inspect};

use crate::{
    SOON, guest,
    peers::{Guest, Peer},
};

/// A running VMM.
struct Seen {
    view: CellView,
    filters: Vec<ThreadFilters>,
}

/// What is counted, and how; less is better.
type Count = (&'static str, fn(&Seen) -> usize);

const COUNTS: &[Count] = &[
    ("calls that a vCPU's thread may make", |seen| seen.calls_of(seen.processor())),
    ("calls that its widest thread may make", |seen| {
        (0..seen.filters.len()).map(|thread| seen.calls_of(thread)).max().unwrap_or(0)
    }),
    ("threads that may open a path", |seen| {
        seen.threads_with(&[Call::any(2), Call::any(257), Call::any(437)])
    }),
    ("threads that may make a socket", |seen| seen.threads_with(&[Call::any(41)])),
    ("threads that may start a program", |seen| seen.threads_with(&[Call::any(59), Call::any(322)])),
    ("threads that may make a process", |seen| {
        // fork, vfork, and clone with no flag but the signal of its end.
        seen.threads_with(&[Call::any(57), Call::any(58), Call::any(56).with(0, 17)])
    }),
    ("threads that may have memory that can be written and run", |seen| {
        seen.threads_with(&[Call::any(9).with(2, 7), Call::any(10).with(2, 7)])
    }),
    ("threads that may make a ring of io_uring", |seen| seen.threads_with(&[Call::any(425)])),
    ("threads that may call bpf, userfaultfd, perf, keys, ptrace, mount, unshare, setns", |seen| {
        seen.threads_with(&[321, 323, 298, 250, 101, 165, 272, 308].map(Call::any))
    }),
    ("requests of ioctl that a vCPU's thread may make, of 256 of KVM's", |seen| {
        (0xae00..=0xaeffu64)
            .filter(|request| seen.may(seen.processor(), &Call::any(16).with(1, *request)))
            .count()
    }),
    ("capabilities that it may use or get", |seen| {
        let sets = seen.view.threads.iter().map(|thread| {
            let of = thread.capabilities;
            (of.permitted | of.effective | of.inheritable | of.ambient | of.bounding).count_ones()
        });
        sets.max().unwrap_or(0) as usize
    }),
    ("threads with root's uid", |seen| {
        seen.view.threads.iter().filter(|thread| thread.uids.contains(&0)).count()
    }),
    ("threads that exec could give rights", |seen| {
        seen.view.threads.iter().filter(|thread| !thread.no_new_privs).count()
    }),
    ("namespaces that it shares with the host, of 6", |seen| {
        seen.view.namespaces.iter().filter(|namespace| namespace.is_shared).count()
    }),
    ("names in its root directory", |seen| seen.view.root_entries.len()),
    ("mounts that it sees", |seen| seen.view.mounts.len()),
    ("descriptors that are open", |seen| seen.view.descriptors.len()),
    ("bytes of environment", |seen| seen.view.environment_bytes),
    ("processes of its uid may trace it", |seen| usize::from(seen.view.is_dumpable)),
];

impl Seen {
    fn of_process(pid: u32) -> Result<Self, Failure> {
        let view = inspect(pid)?;
        let tids: Vec<u32> = view.threads.iter().map(|thread| thread.tid).collect();
        Ok(Self { filters: filters(&tids)?, view })
    }

    /// The thread of the first virtual processor.
    fn processor(&self) -> usize {
        let is_its = |name: &str| ["vcpu0", "fc_vcpu 0"].contains(&name) || name.starts_with("CPU 0");
        let tid = self.view.threads.iter().find(|thread| is_its(&thread.name)).map(|thread| thread.tid);
        self.filters.iter().position(|thread| Some(thread.tid) == tid).unwrap_or(0)
    }

    /// Whether a call, with these arguments or with some, gets past all filters of a thread.
    fn may(&self, thread: usize, call: &Call) -> bool {
        let filters = self.filters.get(thread).map_or(&[][..], |thread| thread.filters.as_slice());
        filters.iter().all(|filter| filter.answers(call).contains(&Answer::Runs))
    }

    /// How many different calls a thread may make, with some arguments.
    fn calls_of(&self, thread: usize) -> usize {
        casemate_filters::calls().iter().filter(|(number, _)| self.may(thread, &Call::any(*number))).count()
    }

    fn threads_with(&self, calls: &[Call]) -> usize {
        (0..self.filters.len()).filter(|thread| calls.iter().any(|call| self.may(*thread, call))).count()
    }
}

/// A guest with a disk, in each of them as closed as it can be by its own options.
pub(crate) fn jail(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    std::fs::write(&disk, vec![1; 8 << 20])?;
    let script = "dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; echo used-all; sleep 1000";
    let guest: Guest = guest(ctx, script, vec![(disk, false)])?;
    let mut peers = Peer::found(ctx)?;
    peers.iter_mut().for_each(|peer| peer.close(ctx));
    // For whoever is not root.
    ctx.shell("chmod 666 /dev/kvm disk.img; chmod a+rx . ..; chmod a+r guest.cpio")?;
    let mut seen = Vec::new();
    for peer in &peers {
        let running = peer.start(ctx, &guest)?;
        running.wait_for_text("used-all", SOON)?;
        seen.push(Seen::of_process(peer.vmm_of(&running)?)?);
        running.signal(rustix::process::Signal::TERM)?;
        running.wait(SOON)?;
    }
    for (name, count) in COUNTS {
        let counts: Vec<f64> = seen.iter().map(|seen| count(seen) as f64).collect();
        crate::tell_counts(name, &peers, &counts);
    }
    Ok(())
}
