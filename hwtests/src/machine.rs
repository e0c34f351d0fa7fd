//! The lab as a machine: its command line, its run, its end.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{LabError, Layout, harness::LONG};

/// What becomes of the lab's serial console, besides its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Only the log.
    Logged,
    /// Also this process's standard output, as it comes.
    Shown,
    /// As `Shown`, and this process's standard input is the console's: for exploring by hand.
    Interactive,
}

/// One run of one program in the lab, as root, in this machine's own root (read-only under a tmpfs).
///
/// The machine is a q35 with an Intel IOMMU (interrupt remapping on), an emulated AMD-V processor, and the devices of
/// [`crate::devices`].
#[derive(Clone, Debug)]
pub struct Lab {
    layout: Layout,
    program: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    console: Console,
    cpus: u32,
    memory_mib: u32,
    extra: Vec<OsString>,
}

const NVME_BYTES: u64 = 64 << 20;
const NVME_PATTERN_BYTES: usize = 16 << 20;

/// Processors of the lab: one, or what CASEMATE_LAB_CPUS says. With two, QEMU 10.0.2's emulation loses a processor's
/// timer interrupt now and then (its vector stays in service for ever), and the machine freezes: seen in four of five
/// runs that bound and unbound devices a hundred times, and in none with one.
fn cpus() -> u32 {
    let asked = std::env::var("CASEMATE_LAB_CPUS").ok().and_then(|text| text.parse().ok());
    asked.filter(|cpus| (1..=8).contains(cpus)).unwrap_or(1)
}

/// Set to 1, the lab's time is the number of instructions that its processor has executed, one each nanosecond: what is measured in it
/// doesn't depend on the machine that emulates it. It takes a QEMU of its own, made by `hwtests/qemu/build`.
pub const COUNTED: &str = "CASEMATE_LAB_COUNTED";

/// Whether [`COUNTED`] is set, here or, where it's passed on, in the lab.
pub fn is_counted() -> bool {
    is_set(COUNTED)
}

/// Whether a variable of this process's environment is 1.
pub(crate) fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

/// Memory of the lab: that of long tests has room for a guest of 4 GiB.
fn memory_mib() -> u32 {
    if is_set(LONG) { 7168 } else { 4096 }
}

impl Lab {
    /// A lab with one vCPU (or what CASEMATE_LAB_CPUS says) and 4096 MiB (7168 with CASEMATE_LONG=1), to run `program` (a path and its arguments). [`crate::prepare`] comes first.
    pub fn new<S: AsRef<OsStr>>(layout: &Layout, program: impl IntoIterator<Item = S>) -> Self {
        Self {
            layout: layout.clone(),
            program: program.into_iter().map(|word| word.as_ref().to_owned()).collect(),
            environment: Vec::new(),
            console: Console::Logged,
            cpus: cpus(),
            memory_mib: memory_mib(),
            extra: Vec::new(),
        }
    }

    /// Sets a variable for the program; of this process's environment it gets nothing.
    #[must_use]
    pub fn environment(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Where the console goes.
    #[must_use]
    pub fn console(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    /// Adds arguments to QEMU's command line, such as further devices.
    #[must_use]
    pub fn qemu_arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.extra.extend(arguments.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Starts the machine. It is up, and the program starts, 5 to 10 s later.
    ///
    /// # Errors
    /// When the run's files can't be written or QEMU can't be started.
    pub fn start(self) -> Result<RunningLab, LabError> {
        let qemu = self.qemu()?;
        let directory = new_run_directory(&self.layout)?;
        let share = directory.join("share");
        write(&share.join("command"), self.command_file().as_encoded_bytes())?;
        pattern_disk(&directory.join("nvme.img"), NVME_BYTES)?;
        pattern_disk(&directory.join("nvme-2.img"), NVME_PATTERN_BYTES as u64)?;
        pattern_disk(&directory.join("sata.img"), NVME_PATTERN_BYTES as u64)?;
        pattern_disk(&directory.join("nvme-3.img"), NVME_PATTERN_BYTES as u64)?;
        let shared = directory.join("shared.img");
        fs::copy(self.layout.shared_disk(), &shared)
            .map_err(|error| LabError::io("copy", &self.layout.shared_disk(), error))?;
        // setpriv: should this process be killed, the machine goes with it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(qemu).args(self.qemu_command_line(&directory)?);
        let stdin = if self.console == Console::Interactive { Stdio::inherit() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            LabError::new(format_args!("cannot start QEMU: {error}"), "run `cargo xtask lab prepare`")
        })?;
        let console_log = directory.join("console.log");
        let log =
            fs::File::create(&console_log).map_err(|error| LabError::io("write", &console_log, error))?;
        let shown = self.console != Console::Logged;
        let copies = [
            child.stdout.take().map(|stream| {
                let log = log.try_clone();
                thread::spawn(move || copy_console(stream, log.ok(), shown))
            }),
            child.stderr.take().map(|stream| thread::spawn(move || copy_console(stream, Some(log), shown))),
        ];
        Ok(RunningLab { child, directory, copies: copies.into_iter().flatten().collect(), ended: None })
    }

    fn qemu(&self) -> Result<PathBuf, LabError> {
        if !is_counted() {
            return Ok(PathBuf::from(QEMU));
        }
        let counting = self.layout.counting_qemu();
        if counting.is_file() {
            return Ok(counting);
        }
        let what = format_args!("{} isn't there, whose instructions can be counted", counting.display());
        Err(LabError::new(what, "build it with `hwtests/qemu/build`; docs/lab.md says why another is needed"))
    }

    /// The shell script that the lab's first process runs.
    fn command_file(&self) -> OsString {
        let mut script = OsString::new();
        if let Ok(directory) = std::env::current_dir() {
            script.push("cd ");
            script.push(quoted(directory.as_os_str()));
            script.push("\n");
        }
        for (name, value) in &self.environment {
            script.push("export ");
            script.push(name);
            script.push("=");
            script.push(quoted(value));
            script.push("\n");
        }
        script.push("exec");
        for word in &self.program {
            script.push(" ");
            script.push(quoted(word));
        }
        script.push("\n");
        script
    }

    fn qemu_command_line(&self, directory: &Path) -> Result<Vec<OsString>, LabError> {
        let path = |path: PathBuf| {
            // In an option's value, QEMU reads a doubled comma as one.
            let text = path.to_str().map(|text| text.replace(',', ",,"));
            text.ok_or_else(|| {
                LabError::new(format_args!("{} is not UTF-8", path.display()), "move the workspace")
            })
        };
        let booted = self.layout.lab_kernel();
        let release = fs::read_to_string(&booted.release)
            .map_err(|error| LabError::io("read", &booted.release, error))?;
        let kernel = booted.tree.join("boot").join(format!("vmlinuz-{release}"));
        // Without no_timer_check the kernel panics now and then on a loaded machine.
        let append = "console=ttyS0 panic=1 quiet loglevel=3 no_timer_check intel_iommu=on";
        // Told of ERMS and FSRM, kernels clear and copy pages by `rep stosb` and `rep movsb`, which TCG does byte by byte: a guest starts
        // in two thirds of the time without.
        let mut line: Vec<String> = words(&[
            "-cpu max,-erms,-fsrm -machine q35,kernel-irqchip=split -nodefaults -no-reboot",
            "-display none -serial stdio",
            if is_counted() { COUNTING } else { "-accel tcg,thread=multi" },
        ]);
        line.extend(words(&[&format!("-smp {} -m {}", self.cpus, self.memory_mib)]));
        line.extend(["-kernel".into(), path(kernel)?, "-initrd".into(), path(booted.initramfs)?]);
        line.extend(["-append".into(), append.into()]);
        line.extend(words(DEVICES));
        let nvme = path(directory.join("nvme.img"))?;
        let shared = path(directory.join("shared.img"))?;
        let share = path(directory.join("share"))?;
        line.extend(["-drive".into(), format!("file={nvme},if=none,id=nvme0,format=raw")]);
        line.extend(words(&["-device nvme-ns,drive=nvme0,nsid=1,shared=on"]));
        let (second, sata) = (path(directory.join("nvme-2.img"))?, path(directory.join("sata.img"))?);
        line.extend(["-drive".into(), format!("file={second},if=none,id=nvme1,format=raw")]);
        line.extend(words(&["-device nvme-ns,drive=nvme1,nsid=2,shared=on,detached=on"]));
        let third = path(directory.join("nvme-3.img"))?;
        line.extend(["-drive".into(), format!("file={third},if=none,id=nvme2,format=raw")]);
        line.extend(words(&["-device nvme,serial=labscrub,drive=nvme2,bus=rp11,use-intel-id=on"]));
        line.extend(["-drive".into(), format!("file={sata},if=none,id=sata0,format=raw")]);
        line.extend(words(&["-device ide-hd,drive=sata0,bus=ahci.0,serial=labsata"]));
        line.extend(["-drive".into(), format!("file={shared},if=none,id=shared,format=raw")]);
        line.extend(words(&["-device virtio-blk-pci,drive=shared,bus=pci1,addr=2"]));
        let root = "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap";
        line.extend(["-virtfs".into(), root.into()]);
        line.extend(["-virtfs".into(), format!("local,path={share},mount_tag=out,security_model=none")]);
        Ok(line.into_iter().map(OsString::from).chain(self.extra.iter().cloned()).collect())
    }
}

/// As Debian has it.
const QEMU: &str = "qemu-system-x86_64";
/// An instruction each 2^0 ns; a processor that has nothing to do waits as long as it would. Built by ourselves, QEMU looks for Debian's
/// firmware where that isn't.
const COUNTING: &str =
    "-accel tcg,thread=single -icount shift=0,sleep=on,align=off -L /usr/share/qemu -L /usr/share/seabios";

/// QEMU's arguments for what [`crate::devices`] describes; disks come after. The order of the root ports gives the bus
/// numbers.
const DEVICES: &[&str] = &[
    "-device intel-iommu,intremap=on,caching-mode=on,device-iotlb=on,aw-bits=48",
    "-device pcie-root-port,id=rp1,chassis=1 -device pcie-root-port,id=rp2,chassis=2",
    "-device pcie-root-port,id=rp3,chassis=3 -device pcie-root-port,id=rp4,chassis=4",
    "-device pcie-pci-bridge,id=pci1,bus=rp4",
    "-netdev user,id=n1 -device e1000e,netdev=n1,bus=rp1,romfile=",
    "-netdev user,id=n2 -device igb,netdev=n2,bus=rp2,romfile=",
    "-device nvme-subsys,id=ss0",
    "-device nvme,serial=labnvme,bus=rp3,subsys=ss0,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2,\
     max_ioqpairs=8,msix_qsize=9",
    "-netdev user,id=n3 -device rtl8139,netdev=n3,bus=pci1,addr=1,romfile=",
    "-device edu",
    // Each behind a port of its own, and so with a reset: its bus's.
    "-device pcie-root-port,id=rp5,chassis=5 -device edu,bus=rp5,dma_mask=0xffffffffffffffff",
    "-device pcie-root-port,id=rp6,chassis=6 -object memory-backend-ram,id=large,size=8G,share=on,reserve=off",
    "-device ivshmem-plain,memdev=large,bus=rp6",
    "-device pcie-root-port,id=rp7,chassis=7 -device bochs-display,bus=rp7",
    "-device pcie-root-port,id=rp8,chassis=8 -netdev user,id=n4",
    "-device virtio-net-pci,netdev=n4,bus=rp8,iommu_platform=on,disable-legacy=on,romfile=",
    "-device pcie-root-port,id=rp9,chassis=9 -device ich9-ahci,id=ahci,bus=rp9",
    // One card with two functions.
    "-device pcie-root-port,id=rp10,chassis=10 -device edu,bus=rp10,addr=0.0,multifunction=on",
    "-device edu,bus=rp10,addr=0.1",
    "-device pcie-root-port,id=rp11,chassis=11",
    "-device pcie-root-port,id=rp12,chassis=12",
    "-device virtio-gpu-pci,bus=rp12,iommu_platform=on,disable-legacy=on",
];

/// A lab that was started. Dropped, it is killed and its disks are removed.
#[derive(Debug)]
pub struct RunningLab {
    child: Child,
    directory: PathBuf,
    copies: Vec<JoinHandle<()>>,
    ended: Option<LabEnd>,
}

/// How a lab's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabEnd {
    /// The program came to its end; its exit status as the shell tells it (above 128: killed by a signal).
    Program(u8),
    /// The machine ended without the program's end being told: it crashed, or the program turned it off.
    Machine(String),
    /// The deadline passed and the machine was killed.
    Deadline(Duration),
}

impl RunningLab {
    /// The directory that the lab has, writable, at `/lab/out`.
    pub fn share(&self) -> PathBuf {
        self.directory.join("share")
    }

    /// The log of the serial console.
    pub fn console_log(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// How the run ended, if it has.
    pub fn try_end(&mut self) -> Option<LabEnd> {
        if self.ended.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            for copy in self.copies.drain(..) {
                let _ = copy.join();
            }
            let told = fs::read_to_string(self.share().join("status")).ok();
            self.ended = Some(match told.and_then(|text| text.trim().parse().ok()) {
                Some(code) => LabEnd::Program(code),
                None => LabEnd::Machine(match status.signal() {
                    Some(signal) => format!("QEMU was killed by signal {signal}"),
                    None => format!("QEMU ended with {}", status.code().unwrap_or(-1)),
                }),
            });
        }
        self.ended.clone()
    }

    /// Waits for the end, and kills the machine when it hasn't come by the deadline.
    pub fn wait(&mut self, deadline: Duration) -> LabEnd {
        let start = Instant::now();
        loop {
            if let Some(end) = self.try_end() {
                return end;
            }
            if start.elapsed() > deadline {
                self.kill();
                return LabEnd::Deadline(deadline);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the machine at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for RunningLab {
    fn drop(&mut self) {
        if self.try_end().is_none() {
            self.kill();
            let _ = self.try_end();
        }
        // Only an empty share goes with its run; what a program left there is kept for whoever ran it.
        for name in [
            "nvme.img",
            "nvme-2.img",
            "nvme-3.img",
            "sata.img",
            "shared.img",
            "share/command",
            "share/status",
            "console.log",
        ] {
            let _ = fs::remove_file(self.directory.join(name));
        }
        let _ = fs::remove_dir(self.share());
        let _ = fs::remove_dir(&self.directory);
    }
}

/// A fresh directory under `runs`, with an empty share. Those of processes that were killed are cleared away.
fn new_run_directory(layout: &Layout) -> Result<PathBuf, LabError> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let runs = layout.runs();
    for entry in fs::read_dir(&runs).map_err(|error| LabError::io("read", &runs, error))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let name = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let directory = runs.join(name);
    let share = directory.join("share");
    fs::create_dir_all(&share).map_err(|error| LabError::io("create", &share, error))?;
    Ok(directory)
}

/// A sparse disk whose first 16 MiB are a fixed pattern (xorshift64), so that a digest of it says something.
fn pattern_disk(path: &Path, bytes: u64) -> Result<(), LabError> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut pattern = Vec::with_capacity(NVME_PATTERN_BYTES);
    while pattern.len() < NVME_PATTERN_BYTES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pattern.extend_from_slice(&state.to_le_bytes());
    }
    write(path, &pattern)?;
    let sized = fs::OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(bytes));
    sized.map_err(|error| LabError::io("write", path, error))
}

/// Copies a stream of the console to the log and, if wanted, to standard output, without carriage returns at line ends.
fn copy_console(mut stream: impl Read, mut log: Option<fs::File>, shown: bool) {
    let mut buffer = [0; 4096];
    let mut held_return = false;
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let mut text = Vec::with_capacity(count + 1);
        for &byte in buffer.get(..count).unwrap_or_default() {
            if held_return && byte != b'\n' {
                text.push(b'\r');
            }
            held_return = byte == b'\r';
            if !held_return {
                text.push(byte);
            }
        }
        if let Some(log) = &mut log {
            let _ = log.write_all(&text);
        }
        if shown {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(&text).and_then(|()| out.flush());
        }
    }
}

fn words(lines: &[&str]) -> Vec<String> {
    lines.iter().flat_map(|line| line.split_whitespace()).map(str::to_owned).collect()
}

/// A word as the shell reads it back unchanged.
fn quoted(word: &OsStr) -> OsString {
    let mut quoted = OsString::from("'");
    for (n, part) in word.to_string_lossy().split('\'').enumerate() {
        if n > 0 {
            quoted.push("'\\''");
        }
        quoted.push(part);
    }
    quoted.push("'");
    quoted
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    fs::write(path, bytes).map_err(|error| LabError::io("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_shell_reads_a_quoted_word_back(word in "[ -~]{0,40}") {
            let script = format!("printf %s {}", quoted(OsStr::new(&word)).to_string_lossy());
            let output = Command::new("sh").arg("-c").arg(script).output().unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn carriage_returns_go_only_at_line_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        copy_console(&b"a\r\nb\rc\r\r\n"[..], Some(fs::File::create(&path).unwrap()), false);
        assert_eq!(fs::read(&path).unwrap(), b"a\nb\rc\r\n");
    }
}
