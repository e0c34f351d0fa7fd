//! What a test has in hand inside the lab.

use std::{
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use super::{Failure, Finished, GuestFile, GuestImage, PATIENCE, Running, protocol::PROGRAMS};
use crate::{Layout, devices, layout::workspace};

/// How long a host program other than a guest's run may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a guest may take from `casemate run` to its end.
const GUEST_TIMEOUT: Duration = Duration::from_secs(90);

/// A running test: its directory, and the ways to start programs and guests. All that it starts is shown in its log.
#[derive(Debug)]
pub struct Ctx {
    name: &'static str,
    directory: PathBuf,
    programs: PathBuf,
    layout: Layout,
}

impl Ctx {
    pub(super) fn new(name: &'static str) -> Result<Self, Failure> {
        let directory = Path::new("/run/lab-tests").join(name);
        fs::create_dir_all(&directory)?;
        let programs = std::env::var_os(PROGRAMS).map(PathBuf::from);
        let programs = programs.ok_or_else(|| Failure::new(format_args!("{PROGRAMS} is not set")))?;
        Ok(Self { name, directory, programs, layout: Layout::of_workspace() })
    }

    /// The test's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// An empty directory of the test's own, in memory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the guests' kernel and initramfs lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The path of one of the programs under test, such as `casemate-vmm`; fails when it wasn't built.
    pub fn program(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.programs.join(name);
        if path.exists() {
            return Ok(path);
        }
        Err(Failure::new(format_args!(
            "{} was not built; `cargo xtask test {}` builds and runs all that this test needs",
            path.display(),
            self.name
        )))
    }

    /// Starts a program: one of those under test when the first word begins with `casemate`, else one of the host's.
    pub fn start<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Running, Failure> {
        let words: Vec<_> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let [program, arguments @ ..] = words.as_slice() else {
            return Err(Failure::new("no program named"));
        };
        let name = program.to_string_lossy();
        let path = if name.starts_with("casemate") { self.program(&name)? } else { PathBuf::from(program) };
        let mut command = Command::new(path);
        command.args(arguments).current_dir(&self.directory);
        // What an installed Casemate finds in /etc; a test that wants another bundle names it with --policy.
        command.env("CASEMATE_POLICY", workspace().join("policies/default.toml"));
        let shown: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        Running::spawn(command, shown.join(" "))
    }

    /// Runs a program, as [`Ctx::start`] names it, to its end; a minute at most. How it ended is the caller's to judge.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Finished, Failure> {
        self.start(words)?.wait(COMMAND_TIMEOUT)
    }

    /// Runs a shell script that must succeed, and returns what it printed, trimmed.
    pub fn shell(&self, script: &str) -> Result<String, Failure> {
        let finished = self.run(["sh", "-euc", script])?;
        Ok(finished.success()?.stdout.trim().to_owned())
    }

    /// Loads a driver of the lab's own kernel (`e1000e`, `igb`, `nvme`, `8139cp`...), which takes the devices it knows.
    pub fn load_driver(&self, name: &str) -> Result<(), Failure> {
        // Of two drives one is enough for the host, and which of them is the first would differ from run to run.
        let (spared, none) = (devices::ERASED_NVME, "no-driver");
        self.shell(&format!("echo {none} >/sys/bus/pci/devices/{spared}/driver_override; modprobe {name}"))
            .map(drop)
    }

    /// The driver that owns a PCI function now.
    pub fn driver_of(&self, address: &str) -> Option<String> {
        let link = fs::read_link(format!("/sys/bus/pci/devices/{address}/driver")).ok()?;
        link.file_name().map(|name| name.to_string_lossy().into_owned())
    }

    /// A guest's file with the lab's kernel and an image that runs `script`; the caller adds disks and devices to it.
    pub fn guest(&self, script: &str) -> Result<GuestFile, Failure> {
        let initrd = self.image("guest", script);
        if !initrd.exists() {
            GuestImage::new(script).write(&self.layout, &initrd)?;
        }
        Ok(GuestFile::new(self.name, &self.layout.guest_kernel(), &initrd))
    }

    /// The same with another of Debian's kernels: `6.1`, `6.1-cloud`, `6.12-cloud`.
    pub fn guest_of(&self, kernel: &str, script: &str) -> Result<GuestFile, Failure> {
        let initrd = self.image(kernel, script);
        let (image, base) = self.layout.other_guest(kernel);
        if !initrd.exists() {
            GuestImage::new(script).write_on(&base, &initrd)?;
        }
        Ok(GuestFile::new(self.name, &image, &initrd))
    }

    /// Where the image that runs `script` is. A script has an image of its own, which is written once: a guest that was started may not
    /// have read its own yet when the test makes the next one.
    fn image(&self, base: &str, script: &str) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        script.hash(&mut hasher);
        self.directory.join(format!("{base}-{:016x}.cpio", hasher.finish()))
    }

    /// Writes the guest's file, starts `casemate run --json` on it, and returns at once.
    pub fn start_guest(&self, guest: &GuestFile) -> Result<Running, Failure> {
        let path = guest.write_into(&self.directory)?;
        self.start([OsStr::new("casemate"), OsStr::new("run"), OsStr::new("--json"), path.as_os_str()])
    }

    /// Runs a guest to its end. Its serial console is in `stdout`, steps and report are in `stderr` as JSON.
    pub fn run_guest(&self, guest: &GuestFile) -> Result<Finished, Failure> {
        self.start_guest(guest)?.wait(GUEST_TIMEOUT)
    }
}

/// Waits until `condition` holds; fails, naming `what`, when it doesn't within `timeout`.
pub fn wait_until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) -> Result<(), Failure> {
    let timeout = timeout * PATIENCE;
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() > deadline {
            return Err(Failure::new(format_args!("not within {} s: {what}", timeout.as_secs())));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
