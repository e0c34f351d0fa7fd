//! The attempts themselves, as raw system calls. Pointers go as numbers: an attempt is a thing that compilers don't check.

use std::{arch::asm, ffi::CStr, mem::zeroed};

use casemate_filters::call_name;

/// Where an attempt ended: the call and its error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// The call that was refused.
    pub call: &'static str,
    /// Its errno.
    pub error: i32,
}

pub(crate) type Outcome = Result<(), Stopped>;

/// Makes a call with up to six arguments; those that are missing are 0.
pub(crate) fn call<const N: usize>(number: i64, arguments: [u64; N]) -> Result<u64, Stopped> {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    let [a, b, c, d, e, f] = [0, 1, 2, 3, 4, 5].map(argument);
    // SAFETY: numbers that are addresses are of data that the caller keeps through the call and that is as long as the call
    // takes it to be, or are 0. What a call breaks if it succeeds is this program alone, which ends after the attempt.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let name = u32::try_from(number).ok().and_then(call_name);
        return Err(Stopped { call: name.unwrap_or("unknown"), error });
    }
    Ok(result.cast_unsigned())
}

/// As [`call`], where only success counts.
pub(crate) fn only<const N: usize>(number: i64, arguments: [u64; N]) -> Outcome {
    call(number, arguments).map(drop)
}

pub(crate) fn text(text: &'static CStr) -> u64 {
    text.as_ptr().addr() as u64
}

pub(crate) fn address<T>(data: &T) -> u64 {
    std::ptr::from_ref(data).addr() as u64
}

/// A flag of the kernel's that libc types as int, without sign extension.
pub(crate) fn flag(flag: i32) -> u64 {
    u64::from(flag.cast_unsigned())
}

pub(crate) const HERE: u64 = libc::AT_FDCWD as i64 as u64;

pub(crate) fn open(path: &'static CStr, flags: i32) -> Result<u64, Stopped> {
    call(libc::SYS_openat, [HERE, text(path), flag(flags), 0o600])
}

pub(crate) fn climb_out_of_the_root() -> Outcome {
    let root = open(c"/", libc::O_PATH)?;
    only(libc::SYS_openat, [root, text(c"../../../../etc/passwd"), flag(libc::O_RDONLY)])
}

pub(crate) fn socket(family: i32, kind: i32) -> Result<u64, Stopped> {
    call(libc::SYS_socket, [flag(family), flag(kind), 0])
}

/// `127.0.0.1:PORT`.
fn loopback(port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    }
}

pub(crate) fn connect_to_loopback() -> Outcome {
    let (socket, to) = (socket(libc::AF_INET, libc::SOCK_STREAM)?, loopback(22));
    only(libc::SYS_connect, [socket, address(&to), size_of_val(&to) as u64])
}

pub(crate) fn send_a_datagram() -> Outcome {
    let (socket, to) = (socket(libc::AF_INET, libc::SOCK_DGRAM)?, loopback(53));
    only(libc::SYS_sendto, [socket, address(&to), 1, 0, address(&to), size_of_val(&to) as u64])
}

/// An abstract address, and its length.
fn abstract_address(name: &[u8]) -> (libc::sockaddr_un, u64) {
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as u16, sun_path: [0; 108] };
    for (to, from) in address.sun_path.iter_mut().skip(1).zip(name) {
        *to = from.cast_signed();
    }
    (address, 3 + name.len() as u64)
}

pub(crate) fn connect_to_an_abstract_socket() -> Outcome {
    let (to, length) = abstract_address(crate::ABSTRACT_NAME);
    only(libc::SYS_connect, [socket(libc::AF_UNIX, libc::SOCK_SEQPACKET)?, address(&to), length])
}

pub(crate) fn bind_an_abstract_socket() -> Outcome {
    let (to, length) = abstract_address(b"casemate-victim");
    only(libc::SYS_bind, [socket(libc::AF_UNIX, libc::SOCK_STREAM)?, address(&to), length])
}

pub(crate) fn connect_to_the_host_by_vsock() -> Outcome {
    // SAFETY: plain numbers, for which zero is valid.
    let mut to: libc::sockaddr_vm = unsafe { zeroed() };
    (to.svm_family, to.svm_port, to.svm_cid) = (libc::AF_VSOCK as u16, 22, libc::VMADDR_CID_HOST);
    only(
        libc::SYS_connect,
        [socket(libc::AF_VSOCK, libc::SOCK_STREAM)?, address(&to), size_of_val(&to) as u64],
    )
}

/// Fresh private memory of this protection.
pub(crate) fn map(protection: i32) -> Result<u64, Stopped> {
    let flags = flag(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    call(libc::SYS_mmap, [0, 4096, flag(protection), flags, u64::MAX, 0])
}

pub(crate) fn make_memory_executable() -> Outcome {
    let memory = map(libc::PROT_READ | libc::PROT_WRITE)?;
    only(libc::SYS_mprotect, [memory, 4096, flag(libc::PROT_READ | libc::PROT_EXEC)])
}

pub(crate) fn attach_executable_memory() -> Outcome {
    let id = call(libc::SYS_shmget, [0, 4096, flag(libc::IPC_CREAT | 0o700)])?;
    only(libc::SYS_shmat, [id, 0, flag(libc::SHM_EXEC)])
}

pub(crate) fn read_another_process() -> Outcome {
    let (buffer, mut from) = ([0u8; 8], 0u64);
    let local = [address(&buffer), 8];
    from += 4096;
    let remote = [from, 8];
    only(libc::SYS_process_vm_readv, [2, address(&local), 1, address(&remote), 1, 0])
}

/// A performance counter over a whole processor.
pub(crate) fn count_events_of_a_processor() -> Outcome {
    // perf_event_attr: type PERF_TYPE_SOFTWARE, size, config PERF_COUNT_SW_CPU_CLOCK, all else 0.
    let mut attributes = [0u32; 28];
    (attributes[0], attributes[1]) = (1, 112);
    only(libc::SYS_perf_event_open, [address(&attributes), u64::MAX, 0, u64::MAX, 0])
}

pub(crate) fn load_a_bpf_program() -> Outcome {
    // A kprobe program of two instructions: r0 = 0, exit.
    let program: [u64; 2] = [0xb7, 0x95];
    // bpf_attr of BPF_PROG_LOAD: type, count, instructions, licence.
    let mut attributes = [0u64; 16];
    (attributes[0], attributes[1], attributes[2]) = (2 | 2 << 32, address(&program), text(c"GPL"));
    only(libc::SYS_bpf, [5, address(&attributes), 128])
}

pub(crate) fn open_by_handle() -> Outcome {
    // file_handle: 8 bytes, type FILEID_INO32_GEN, inode 2.
    let handle: [u32; 4] = [8, 1, 2, 0];
    only(libc::SYS_open_by_handle_at, [HERE, address(&handle), flag(libc::O_RDONLY)])
}

pub(crate) fn raise_capabilities() -> Outcome {
    let header: [u32; 2] = [0x2008_0522, 0];
    let all = [u32::MAX; 6];
    only(libc::SYS_capset, [address(&header), address(&all)])
}

pub(crate) fn raise_a_limit() -> Outcome {
    let limit: [u64; 2] = [1 << 30, 1 << 30];
    only(libc::SYS_prlimit64, [0, u64::from(libc::RLIMIT_CORE), address(&limit), 0])
}

pub(crate) fn become_real_time() -> Outcome {
    let priority: i32 = 10;
    only(libc::SYS_sched_setscheduler, [0, flag(libc::SCHED_FIFO), address(&priority)])
}

pub(crate) fn set_the_clock() -> Outcome {
    let time: [u64; 2] = [1, 0];
    only(libc::SYS_settimeofday, [address(&time), 0])
}

pub(crate) fn make_a_ring() -> Result<u64, Stopped> {
    let parameters = [0u32; 30];
    call(libc::SYS_io_uring_setup, [8, address(&parameters)])
}

/// Has a ring know memory by itself, which it would then reach without naming it.
pub(crate) fn register_buffers_with_a_ring() -> Outcome {
    const IORING_REGISTER_BUFFERS: u64 = 0;
    let memory = [0u8; 4096];
    let buffer = [address(&memory), memory.len() as u64];
    only(libc::SYS_io_uring_register, [make_a_ring()?, IORING_REGISTER_BUFFERS, address(&buffer), 1])
}

/// Gives a ring a file that it was not made with.
pub(crate) fn change_the_files_of_a_ring() -> Outcome {
    const IORING_REGISTER_FILES: u64 = 2;
    const IORING_REGISTER_FILES_UPDATE: u64 = 6;
    let ring = make_a_ring()?;
    let (none, log) = (-1i32, 2i32);
    only(libc::SYS_io_uring_register, [ring, IORING_REGISTER_FILES, address(&none), 1])?;
    // struct io_uring_files_update: where, nothing, the address of descriptors.
    let update: [u64; 2] = [0, address(&log)];
    only(libc::SYS_io_uring_register, [ring, IORING_REGISTER_FILES_UPDATE, address(&update), 1])
}

pub(crate) fn write_an_ldt_entry() -> Outcome {
    // user_desc: entry 0, 32-bit code segment.
    let entry: [u32; 4] = [0, 0, 0xfffff, 0b0101_0101];
    only(libc::SYS_modify_ldt, [1, address(&entry), 16])
}

pub(crate) fn add_a_key() -> Outcome {
    const SESSION_KEYRING: u64 = -3i64 as u64;
    only(libc::SYS_add_key, [text(c"user"), text(c"victim"), text(c"x"), 1, SESSION_KEYRING])
}

pub(crate) fn fork() -> Outcome {
    // Without CLONE_VM or CLONE_THREAD: another process.
    if call(libc::SYS_clone, [flag(libc::SIGCHLD)])? == 0 {
        // SAFETY: ends the new process at once.
        unsafe { libc::_exit(0) };
    }
    Ok(())
}

pub(crate) fn clone3() -> Outcome {
    let mut arguments = [0u64; 11];
    arguments[4] = flag(libc::SIGCHLD);
    if call(libc::SYS_clone3, [address(&arguments), 88])? == 0 {
        // SAFETY: ends the new process at once.
        unsafe { libc::_exit(0) };
    }
    Ok(())
}

/// getpid() of the 32-bit ABI, which has numbers of its own.
pub(crate) fn call_as_32_bit() -> Outcome {
    let result: i32;
    // SAFETY: the call takes no argument and touches no memory; int 0x80 keeps all registers but eax, and r8 to r11 before Linux
    // 4.17.
    unsafe {
        asm!("int 0x80", inlateout("eax") 20 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    if result < 0 { Err(Stopped { call: "getpid (32-bit)", error: -result }) } else { Ok(()) }
}

/// getpid() of the x32 ABI: the same numbers with a bit more.
pub(crate) fn call_as_x32() -> Outcome {
    only(0x4000_0000 | libc::SYS_getpid, [])
}

/// A thread that is heard and not joined, as the VMM's are.
pub(crate) fn start_a_thread() -> Outcome {
    let (tell, hear) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("second".into()).spawn(move || {
        let _ = tell
            .send(std::hint::black_box(vec![1u8; 1 << 20]).iter().map(|byte| u64::from(*byte)).sum::<u64>());
        std::thread::park();
    });
    let told = |error| Stopped { call: "clone", error };
    thread.map_err(|error| told(error.raw_os_error().unwrap_or(0)))?;
    if hear.recv() == Ok(1 << 20) { Ok(()) } else { Err(told(0)) }
}

/// What every role must be able to do.
pub(crate) fn use_memory() -> Outcome {
    let mut blocks: Vec<Vec<u8>> = (0..64).map(|shift| vec![1; 1000 * (shift + 1)]).collect();
    blocks.push(vec![2; 64 << 20]);
    for block in &mut blocks {
        block.resize(block.len() * 2, 3);
        block.shrink_to_fit();
    }
    let bytes: usize = std::hint::black_box(&blocks).iter().map(Vec::len).sum();
    if bytes > 0 { Ok(()) } else { Err(Stopped { call: "brk", error: 0 }) }
}

/// A fault that ends the program: a write to a page that is not mapped.
pub(crate) fn touch_what_is_not_there() -> Outcome {
    let at = std::ptr::without_provenance_mut::<u8>(8);
    // SAFETY: there is none: nothing is ever mapped there (mmap_min_addr), so the program ends by SIGSEGV here, which is the
    // attempt. In assembly, for a compiler might make of it what it likes.
    unsafe { asm!("mov byte ptr [{at}], 1", at = in(reg) at) };
    Ok(())
}

/// A request of ioctl(2) on the pipe of the log, to which it means nothing.
pub(crate) fn request(request: u64) -> Outcome {
    only(libc::SYS_ioctl, [2, request, 0])
}

pub(crate) fn fork_without_end() -> Outcome {
    loop {
        if call(libc::SYS_clone, [flag(libc::SIGCHLD)])? == 0 {
            loop {
                // SAFETY: waits for a signal, and touches nothing.
                unsafe { libc::pause() };
            }
        }
    }
}

/// As casemate-vmm does first: one arena of the allocator's for all threads. With more, it would ask how many processors
/// there are when the ninth thread allocates, by a file.
pub fn allocate_as_the_vmm() {
    // SAFETY: sets a number in the allocator, before there is another thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

pub(crate) fn start_threads_without_end() -> Outcome {
    loop {
        let thread = std::thread::Builder::new().spawn(|| {
            loop {
                std::thread::park();
            }
        });
        thread.map_err(|error| Stopped { call: "clone", error: error.raw_os_error().unwrap_or(0) })?;
    }
}

pub(crate) fn make_events_without_end() -> Outcome {
    loop {
        call(libc::SYS_eventfd2, [0, 0])?;
    }
}

/// Fresh memory, a mebibyte at a time, each page of it touched.
pub(crate) fn use_memory_without_end() -> Outcome {
    loop {
        let block = vec![1u8; 1 << 20];
        std::hint::black_box(block.as_slice());
        std::mem::forget(block);
    }
}
