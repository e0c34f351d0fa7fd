//! The demo's steps, on the machine that has the devices.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use super::watch::{Seen, casemate};

/// Where the demo plays, and with what.
pub(super) struct Stage {
    /// The directory of the programs.
    pub(super) programs: PathBuf,
    /// The guest's file.
    pub(super) guest: PathBuf,
    /// The emulated disk that the guest's file names.
    pub(super) disk: PathBuf,
    /// In the lab the demo loads the drivers whose devices it is going to take, and knows what must answer.
    pub(super) in_lab: bool,
}

/// The digest of the drive's first 16 MiB is taken on both sides.
const DRIVE_MIB: u32 = 16;

/// What has been shown to hold, or not.
#[derive(Default)]
struct Findings {
    wrong: u32,
}

impl Findings {
    /// Prints a finding with its sign.
    fn check(&mut self, holds: bool, what: &str) {
        println!("  {} {what}", if holds { "ok  " } else { "FAIL" });
        self.wrong += u32::from(!holds);
    }
}

impl Stage {
    /// Plays every step; the exit code tells whether all that should hold did.
    pub(super) fn play(&self) -> ExitCode {
        let mut findings = Findings::default();
        title(1, "What this host can do");
        let doctor = casemate(&self.programs, &["doctor"]);
        findings.check(doctor.succeeded(), "this host can run Casemate's guests");

        title(2, "Its PCI functions, and which of them a guest could have");
        if self.in_lab {
            own_drivers();
        }
        let devices = casemate(&self.programs, &["devices"]);
        findings.check(devices.succeeded(), "the PCI functions are listed");

        title(3, "A guest with an NVMe drive and a network card of the host's");
        let run = self.run_guest(&mut findings);

        title(4, "A guest that the policy refuses");
        self.run_refused(&mut findings);

        title(5, "In figures (times are an emulated machine's, if this was the lab)");
        print_table(&run);
        if findings.wrong == 0 {
            println!("\nThe demo is over; everything held.");
            return ExitCode::SUCCESS;
        }
        println!("\nThe demo is over; {} of its checks did not hold.", findings.wrong);
        ExitCode::FAILURE
    }

    fn run_guest(&self, findings: &mut Findings) -> Seen {
        let before = drivers();
        let drive = digest_of_drive();
        if let Some(digest) = &drive {
            println!("  the drive's first {DRIVE_MIB} MiB as the host sees them: {digest}");
        }
        let disk = sha256_of(&self.disk);
        let guest = self.guest.display().to_string();
        let run = casemate(&self.programs, &["run", &guest, "--note-line", "CASEMATE-INIT"]);
        findings.check(run.succeeded(), "the guest ran and powered off");
        findings.check(run.guest_init.is_some(), "the guest's kernel reached its first process");
        if drive.is_some() {
            findings.check(
                run.value("drive-digest:") == drive.as_deref(),
                "the guest read the same from the drive",
            );
        }
        let rose = run.value("card-interrupts:").is_some_and(|text| {
            let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            matches!(numbers.as_slice(), [before, after] if after > before)
        });
        if self.in_lab {
            findings.check(
                run.value("card-ping:") == Some("answered"),
                "ping through the assigned card was answered",
            );
            findings.check(rose, "the card's MSI-X interrupts rose meanwhile");
        }
        findings.check(
            disk.is_some() && run.value("disk-digest:") == disk.as_deref(),
            "the emulated disk reads the same",
        );
        findings
            .check(run.value("tap-ping:") == Some("answered"), "ping through the emulated card was answered");
        findings.check(
            run.value("entropy:").is_some_and(|text| text.len() == 32),
            "the emulated entropy source gave",
        );
        let returned = soon(|| drivers() == before);
        findings.check(returned, "every device is back with the driver it came from");
        run
    }

    fn run_refused(&self, findings: &mut Findings) {
        let before = host_state();
        let run = casemate(&self.programs, &["run", "examples/too-big.toml"]);
        let refused = run.status.and_then(|status| status.code()) == Some(1);
        let by_policy = run.lines.iter().any(|line| line.contains("[policy-denied]"));
        findings.check(refused && by_policy, "it was refused, by the policy");
        findings.check(host_state() == before, "nothing on the host has changed");
    }
}

fn title(number: u32, text: &str) {
    println!("\n== {number}. {text}");
}

/// The lab starts with these devices free; here the host owns them first, as it would elsewhere.
fn own_drivers() {
    for driver in ["nvme", "e1000e"] {
        println!("$ modprobe {driver}");
        let _ = Command::new("modprobe").arg(driver).status();
    }
    soon(|| Path::new("/dev/nvme0n1").exists());
}

fn digest_of_drive() -> Option<String> {
    let script = format!("dd if=/dev/nvme0n1 bs=1M count={DRIVE_MIB} 2>/dev/null | sha256sum");
    Path::new("/dev/nvme0n1").exists().then(|| first_word_of("sh", &["-c", &script]))?
}

fn sha256_of(path: &Path) -> Option<String> {
    first_word_of("sha256sum", &[&path.display().to_string()])
}

fn first_word_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    String::from_utf8(output.stdout).ok()?.split_whitespace().next().map(str::to_owned)
}

/// The driver of every PCI function.
fn drivers() -> BTreeMap<String, Option<String>> {
    let Ok(entries) = fs::read_dir("/sys/bus/pci/devices") else { return BTreeMap::new() };
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let pair =
        |path: PathBuf| Some((name(path.clone())?, fs::read_link(path.join("driver")).ok().and_then(name)));
    entries.flatten().filter_map(|entry| pair(entry.path())).collect()
}

/// What a refused guest must leave as it was: drivers, and the names of network interfaces, VFIO groups and control
/// groups.
fn host_state() -> (BTreeMap<String, Option<String>>, [Vec<String>; 3]) {
    let names = |directory: &str| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    (drivers(), ["/sys/class/net", "/dev/vfio", "/sys/fs/cgroup"].map(names))
}

/// Casemate's own words that belong in the table: what a line holds, and what the table calls it.
const TOLD: &[(&str, &str)] = &[
    ("admitted by ", "policy"),
    ("the noted line came ", "guest's init"),
    ("the VMM used ", "memory"),
    ("filters allow", "system calls"),
    ("exits to the VMM", "exits"),
    (": reset by ", "device"),
];

fn print_table(run: &Seen) {
    let init = run.guest_init.map_or("not seen".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()));
    println!("  {:<14} {init} from `casemate run` to the guest's first process", "start");
    for (words, name) in TOLD {
        let lines: Vec<&String> = run.lines.iter().filter(|line| line.contains(words)).collect();
        if lines.is_empty() {
            println!("  {name:<14} not told");
        }
        for line in lines {
            println!("  {name:<14} {}", line.strip_prefix("casemate: ").unwrap_or(line));
        }
    }
}

/// Waits up to 10 s for something that follows with a delay.
fn soon(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(100));
    }
    condition()
}
