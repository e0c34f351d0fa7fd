//! The parts of a long run: each a caption, a command, a result, the time it took, and the tests it counted.

use std::{
    io::{BufRead, BufReader, IsTerminal},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Tests, as the runners' closing lines count them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Counts {
    /// Adds another's.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// How many were run to an end.
    pub(crate) fn ran(self) -> u64 {
        self.passed + self.failed
    }

    /// Reads a runner's closing line: `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    pub(crate) fn from_closing_line(line: &str) -> Option<Self> {
        let (_, numbers) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
        let count = |word: &str| {
            let part = numbers.split(';').map(str::trim).find_map(|part| part.strip_suffix(word));
            part.and_then(|number| number.trim().parse().ok())
        };
        Some(Self { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }
}

/// What became of one part.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) ok: bool,
    pub(crate) took: Duration,
    pub(crate) counts: Counts,
}

/// The parts done so far.
#[derive(Debug, Default)]
pub(crate) struct Parts(pub(crate) Vec<Part>);

impl Parts {
    /// Runs commands one after another as one part, showing what they print; stops at the first that fails. Returns
    /// whether all went well.
    pub(crate) fn run(&mut self, name: &'static str, commands: impl IntoIterator<Item = Command>) -> bool {
        self.record(name, || {
            let mut counts = Counts::default();
            for mut command in commands {
                let (ok, counted) = run_counting(&mut command);
                counts.add(counted);
                if !ok {
                    return (false, counts);
                }
            }
            (true, counts)
        })
    }

    /// Does any other work as a part.
    pub(crate) fn record(&mut self, name: &'static str, work: impl FnOnce() -> (bool, Counts)) -> bool {
        println!("\n== {name}");
        let start = Instant::now();
        let (ok, counts) = work();
        self.0.push(Part { name, ok, took: start.elapsed(), counts });
        ok
    }

    /// The sum of all parts' tests.
    pub(crate) fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        for part in &self.0 {
            sum.add(part.counts);
        }
        sum
    }

    /// Prints what each part took.
    pub(crate) fn print_times(&self) {
        println!("\n== what each part took");
        for part in &self.0 {
            let tests = match part.counts {
                counts if counts == Counts::default() => String::new(),
                counts => {
                    format!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped)
                }
            };
            let word = if part.ok { "ok" } else { "FAILED" };
            println!("{:>7.1} s  {:<24} {word:<7} {tests}", part.took.as_secs_f64(), part.name);
        }
    }
}

/// Runs a command, passes its output on line by line, and adds up the closing lines of test runners in it.
fn run_counting(command: &mut Command) -> (bool, Counts) {
    let mut counts = Counts::default();
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            eprintln!("cannot run {:?}: {error}", command.get_program());
            return (false, counts);
        }
    };
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            if let Some(more) = Counts::from_closing_line(&text) {
                counts.add(more);
            }
            line.clear();
        }
    }
    (child.wait().is_ok_and(|status| status.success()), counts)
}

/// `cargo` with these arguments, in the workspace, in colour if somebody watches.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace());
    if std::io::stdout().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    command
}

/// The commands that build every program a user runs. The policy compiler is a workspace of its own: in one with the
/// others, cargo would give them its code generator too. It goes beside them all the same.
pub(crate) fn build_programs(tests: Tests) -> [Command; 2] {
    let mut compiler =
        cargo(&["build", "--release", "--locked", "--manifest-path", "src/policy-compiler/Cargo.toml"]);
    compiler.env("CARGO_TARGET_DIR", target_directory());
    let mut programs = vec!["build", "--release", "--workspace", "--bins"];
    match tests {
        Tests::Too => programs.push("--tests"),
        Tests::No => programs.extend(["--exclude", "xtask"]),
    }
    [cargo(&programs), compiler]
}

/// Whether tests are built together with the programs, so that both share what they are made of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tests {
    Too,
    No,
}

/// The target for which the VMM is linked with musl.
const MUSL: &str = "x86_64-unknown-linux-musl";

/// The commands that build the VMM as nobody runs it, for its filters to be held against: with assertions, and with another C
/// library where the toolchain has that.
pub(crate) fn other_vmms() -> Vec<Command> {
    let mut commands = vec![cargo(&["build", "--package", "casemate-vmm"])];
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace()).output();
    let sysroot = sysroot.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    if sysroot.is_ok_and(|sysroot| Path::new(&sysroot).join("lib/rustlib").join(MUSL).exists()) {
        commands.push(cargo(&["build", "--release", "--target", MUSL, "--package", "casemate-vmm"]));
    } else {
        println!("the VMM is not built for musl: `rustup target add {MUSL}`, and it will be");
    }
    commands
}

/// Cargo's target directory, as this program was built into it.
pub(crate) fn target_directory() -> PathBuf {
    programs().ancestors().nth(2).unwrap_or(Path::new("target")).to_path_buf()
}

/// Where [`build_programs`] leaves the programs: `TARGET/x86_64-unknown-linux-gnu/release`.
pub(crate) fn programs() -> PathBuf {
    let target = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => workspace().join("target"),
    };
    let target = std::path::absolute(&target).unwrap_or(target);
    target.join("x86_64-unknown-linux-gnu/release")
}

/// The root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 16.19s\n";
        assert_eq!(Counts::from_closing_line(line), Some(Counts { passed: 3, failed: 2, skipped: 1 }));
        assert_eq!(Counts::from_closing_line("test result: who knows"), None);
        assert_eq!(Counts::from_closing_line("3 passed; 2 failed; 1 ignored"), None);
    }

    #[test]
    fn a_part_counts_what_its_command_prints() {
        let mut parts = Parts::default();
        let mut command = Command::new("sh");
        command.args(["-c", "echo 'test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured'; exit 3"]);
        assert!(!parts.run("example", [command]));
        assert_eq!(parts.counts(), Counts { passed: 4, failed: 0, skipped: 0 });
    }
}
