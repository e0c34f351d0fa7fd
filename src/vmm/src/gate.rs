//! Where processors stand while the machine is paused.
//!
//! A processor is called out of the guest by `immediate_exit` in the page that it shares with KVM, and a signal. The flag
//! is set before the signal is sent, so that one that is just on its way into the guest turns back too; it is the
//! processor that takes the flag away again, when the gate is open. So nothing is looked at on the way into the guest,
//! and a machine that is never paused pays nothing.

use std::{
    ptr::NonNull,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_ioctls::VcpuFd;

use crate::{
    control::Requests,
    error::{During, Error},
    platform::lock,
};

/// The signal that calls a processor out of the guest: the first that both glibc and musl leave free (`SIGRTMIN`, signal(7);
/// musl's is 35).
const KICK: libc::c_int = 35;

/// The gate of one machine's processors.
pub(crate) struct Gate {
    state: Mutex<State>,
    opened: Condvar,
    requests: Arc<Requests>,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// Processors that stand here.
    standing: usize,
    kicks: Vec<Kick>,
}

/// How one processor is called out of the guest.
struct Kick {
    thread: libc::pid_t,
    immediate_exit: NonNull<u8>,
}

// SAFETY: the pointer is used for atomic stores alone, under the gate's lock, and points into a mapping that is never taken
// down (see `Gate::enter`).
unsafe impl Send for Kick {}

impl Gate {
    /// An open gate. `requests` hear when the last processor stands.
    pub(crate) fn new(requests: Arc<Requests>) -> Self {
        Self { state: Mutex::default(), opened: Condvar::new(), requests }
    }

    /// Tells the gate of the processor that this thread runs, before its first guest instruction. The thread must keep
    /// `vcpu` until the process ends.
    pub(crate) fn enter(&self, vcpu: &mut VcpuFd) {
        let immediate_exit = NonNull::from(&mut vcpu.get_kvm_run().immediate_exit);
        // SAFETY: gettid takes nothing and gives a number.
        let thread = unsafe { libc::gettid() };
        lock(&self.state).kicks.push(Kick { thread, immediate_exit });
    }

    /// Calls all processors out of the guest; each stands here until the gate is opened. [`Gate::is_full`] tells when all
    /// do, and the requests hear of it.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for kick in &state.kicks {
            // SAFETY: the byte lies in the page that the processor shares with KVM, which stays mapped while its VcpuFd
            // lives; the thread that `enter` was called on keeps that until the process ends. Who else stores to it, the
            // processor in `pass`, holds the same lock; the kernel reads it as a byte.
            let immediate_exit = unsafe { AtomicU8::from_ptr(kick.immediate_exit.as_ptr()) };
            immediate_exit.store(1, Ordering::SeqCst);
            // SAFETY: tgkill takes three numbers; the thread is one of this process, and its handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), kick.thread, KICK) };
        }
    }

    /// Lets the processors go on.
    pub(crate) fn open(&self) {
        lock(&self.state).closed = false;
        self.opened.notify_all();
    }

    /// Whether it is closed.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }

    /// Whether it is closed and all processors stand here.
    pub(crate) fn is_full(&self) -> bool {
        let state = lock(&self.state);
        state.closed && state.standing == state.kicks.len()
    }

    /// A processor that was called out of the guest comes by; it stands here as long as the gate is closed.
    pub(crate) fn pass(&self, vcpu: &mut VcpuFd) {
        let mut state = lock(&self.state);
        if state.closed {
            // The guest's watchdogs then know that it was the host that held it up. One without kvmclock can't be told.
            let _ = vcpu.kvmclock_ctrl();
            state.standing += 1;
            if state.standing == state.kicks.len() {
                self.requests.paused();
            }
            while state.closed {
                state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.standing -= 1;
        }
        // Under the lock: a gate that is closed again sets it again.
        vcpu.set_kvm_immediate_exit(0);
    }
}

/// Makes the signal that calls processors out of the guest do nothing but that. To be called before there are threads.
pub(crate) fn install_handler() -> Result<(), Error> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is one with no flags and an empty mask; the handler is a function that touches nothing,
    // so it may run at any point of any thread; both pointers live for the call.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        // A thread that waits for something else when it is called waits on.
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(KICK, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        .during("setting a signal's handler")
}
