//! Debian's packages: which the lab needs, and how they come onto this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{LabError, command::text_of, kernel::Series};

/// From bookworm itself: what builds and fills the lab.
const TOOLS: &[&str] = &[
    "busybox-static",
    "e2fsprogs",
    "fio",
    "iperf3",
    "kmod",
    "pciutils",
    "qemu-utils",
    "socat",
    "stress-ng",
    "xz-utils",
    "zstd",
];
/// From backports: bookworm's own QEMU 7.2 has no igb and no NVMe SR-IOV.
const QEMU: &str = "qemu-system-x86";
const QEMU_MAJOR_MIN: u32 = 10;
const RELEASE: &str = "bookworm";

/// The package manager, refreshed at most once and only when something must be fetched.
pub(crate) struct Apt {
    log: PathBuf,
    ready: bool,
}

impl Apt {
    /// `log` receives what apt says.
    pub(crate) fn new(log: PathBuf) -> Self {
        Self { log, ready: false }
    }

    /// Installs what is missing of the packages the lab needs, and says which through `say`.
    pub(crate) fn install_missing(&mut self, say: &mut dyn FnMut(&str)) -> Result<(), LabError> {
        let tools: Vec<&str> =
            TOOLS.iter().copied().filter(|name| installed_version(name).is_none()).collect();
        if !tools.is_empty() {
            say(&format!("installs from {RELEASE}: {}", tools.join(" ")));
            self.install(&[], &tools)?;
        }
        if installed_version(QEMU)
            .and_then(|version| major(&version))
            .is_none_or(|found| found < QEMU_MAJOR_MIN)
        {
            say(&format!("installs from {RELEASE}-backports: {QEMU} (and what it needs)"));
            self.install(&["-t", &backports()], &[QEMU])?;
        }
        Ok(())
    }

    /// The newest package of a series of Debian's kernels for amd64.
    pub(crate) fn newest_kernel(&mut self, series: Series) -> Result<String, LabError> {
        self.ready()?;
        let pattern = format!("^{}", series.prefix.replace('.', "\\."));
        let found = text_of(Command::new("apt-cache").args(["search", "--names-only", &pattern]))?;
        let names = found.lines().filter_map(|line| line.split_whitespace().next());
        newest_kernel_name(series, names).ok_or_else(|| {
            LabError::new(
                format_args!("no package {}*{} in {RELEASE}", series.prefix, series.suffix),
                "check that the mirror in /etc/apt/sources.list.d carries it, its updates and its backports",
            )
        })
    }

    /// Downloads a package into `directory` and returns the file's path.
    pub(crate) fn download(&mut self, package: &str, directory: &Path) -> Result<PathBuf, LabError> {
        self.ready()?;
        fs::create_dir_all(directory).map_err(|error| LabError::io("create", directory, error))?;
        let mut command = Command::new("apt-get");
        command.args(["download", "-qq", package]).current_dir(directory);
        // Without this apt complains when its own user can't write to the directory, and downloads as root.
        command.args(["-o", "APT::Sandbox::User=root"]);
        text_of(&mut command)?;
        let prefix = format!("{package}_");
        let entries = fs::read_dir(directory).map_err(|error| LabError::io("read", directory, error))?;
        let newest = entries
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
            .max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok());
        newest.ok_or_else(|| LabError::new(format_args!("apt-get left no file of {package}"), "try again"))
    }

    fn install(&mut self, options: &[&str], packages: &[&str]) -> Result<(), LabError> {
        self.ready()?;
        let mut command = Command::new("apt-get");
        command.args(["install", "-y", "--no-install-recommends"]).args(options).args(packages);
        self.logged(command, &format!("cannot install {}", packages.join(" ")))
    }

    /// Adds backports when they are absent and reads the lists of packages anew.
    fn ready(&mut self) -> Result<(), LabError> {
        if self.ready {
            return Ok(());
        }
        require_bookworm()?;
        if !rustix::process::geteuid().is_root() {
            return Err(LabError::new(
                "installing packages needs root",
                "run `cargo xtask lab prepare` once as root; after that, tests run as any user",
            ));
        }
        add_backports()?;
        let mut command = Command::new("apt-get");
        command.arg("update");
        self.logged(command, "cannot read the lists of packages")?;
        self.ready = true;
        Ok(())
    }

    fn logged(&self, mut command: Command, what: &str) -> Result<(), LabError> {
        let open = || fs::OpenOptions::new().create(true).append(true).open(&self.log);
        let log = || open().map_err(|error| LabError::io("write", &self.log, error));
        let start = fs::metadata(&self.log).map_or(0, |meta| meta.len());
        let status = command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(log()?)
            .stderr(log()?)
            .status()
            .map_err(|error| LabError::new(format_args!("cannot run apt-get: {error}"), "use Debian 12"))?;
        if status.success() {
            return Ok(());
        }
        let text = fs::read(&self.log).unwrap_or_default();
        let said =
            String::from_utf8_lossy(text.get(usize::try_from(start).unwrap_or(0)..).unwrap_or_default())
                .into_owned();
        let line = said.lines().find(|line| line.starts_with("E: ")).unwrap_or("apt-get failed");
        Err(LabError::new(
            format_args!("{what}: {line}"),
            format_args!("check the network and apt's sources; all of it is in {}", self.log.display()),
        ))
    }
}

fn backports() -> String {
    format!("{RELEASE}-backports")
}

fn require_bookworm() -> Result<(), LabError> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if release.lines().any(|line| line == "VERSION_CODENAME=bookworm") {
        return Ok(());
    }
    Err(LabError::new(
        "the lab installs itself on Debian 12 (bookworm) only",
        "use a Debian 12 machine or container",
    ))
}

fn add_backports() -> Result<(), LabError> {
    let known = text_of(Command::new("apt-cache").arg("policy"))?;
    let marker = format!("n={}", backports());
    if known.contains(&marker) {
        return Ok(());
    }
    let sources = fs::read_to_string("/etc/apt/sources.list.d/debian.sources")
        .or_else(|_| fs::read_to_string("/etc/apt/sources.list"))
        .unwrap_or_default();
    let mirror = mirror_of(&sources).ok_or_else(|| {
        LabError::new(
            format_args!("no mirror of Debian's {RELEASE} in /etc/apt/sources.list.d/debian.sources"),
            format_args!("add {} to apt's sources by hand", backports()),
        )
    })?;
    let list = PathBuf::from(format!("/etc/apt/sources.list.d/{}.list", backports()));
    fs::write(&list, format!("deb {mirror} {} main\n", backports()))
        .map_err(|error| LabError::io("write", &list, error))
}

/// The URI of the mirror that serves the release itself (not its security updates), from either of apt's formats.
fn mirror_of(sources: &str) -> Option<&str> {
    sources.split("\n\n").find_map(mirror_of_stanza).or_else(|| sources.lines().find_map(mirror_of_line))
}

fn mirror_of_stanza(stanza: &str) -> Option<&str> {
    let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let serves = field("Suites:")?.split_whitespace().any(|suite| suite == RELEASE);
    field("URIs:")?.split_whitespace().next().filter(|_| serves)
}

fn mirror_of_line(line: &str) -> Option<&str> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
    let mut words = rest.split_whitespace();
    let uri = words.next()?;
    (words.next()? == RELEASE).then_some(uri)
}

fn installed_version(package: &str) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status} ${Version}", package]);
    let answer = text_of(&mut query).ok()?;
    answer.strip_prefix("installed ").map(str::to_owned)
}

/// The first number of a Debian version, after its epoch.
fn major(version: &str) -> Option<u32> {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Of names such as `linux-image-6.12.95+deb12-amd64-unsigned`, the one with the highest number behind the series' prefix.
/// Other flavours (`rt`, `cloud`) are left out.
fn newest_kernel_name<'a>(series: Series, names: impl Iterator<Item = &'a str>) -> Option<String> {
    let patch = |name: &str| -> Option<u32> {
        let version = name.strip_prefix(series.prefix)?.strip_suffix(series.suffix)?;
        let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
        let (number, rest) = version.split_at(digits);
        if rest.contains('-') { None } else { number.parse().ok() }
    };
    names.filter_map(|name| Some((patch(name)?, name))).max().map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{OTHERS, OWN};

    #[test]
    fn mirror_is_the_one_of_the_release() {
        let deb822 = "Types: deb\nURIs: http://security.example/x\nSuites: bookworm-security\n\n\
            Types: deb\n# comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n";
        assert_eq!(mirror_of(deb822), Some("http://mirror.example/debian"));
        let one_line = "# x\ndeb [arch=amd64 signed-by=/k] https://m.example/debian bookworm main\n";
        assert_eq!(mirror_of(one_line), Some("https://m.example/debian"));
        assert_eq!(mirror_of("deb http://m.example trixie main"), None);
    }

    #[test]
    fn newest_kernel_leaves_flavours_out() {
        let names = [
            "linux-image-6.12.9+bpo-amd64-unsigned",
            "linux-image-6.12.95+deb12-amd64-unsigned",
            "linux-image-6.12.99+deb12-rt-amd64-unsigned",
            "linux-image-6.12.99+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.95+deb12-amd64",
            "linux-image-6.1.0-9-amd64-unsigned",
            "linux-image-6.1.0-56-amd64-unsigned",
        ];
        let newest = |series| newest_kernel_name(series, names.into_iter());
        assert_eq!(newest(OWN).as_deref(), Some("linux-image-6.12.95+deb12-amd64-unsigned"));
        let [generic, cloud, newer_cloud] = OTHERS.map(newest);
        assert_eq!(generic.as_deref(), Some("linux-image-6.1.0-56-amd64-unsigned"));
        assert_eq!(cloud, None);
        assert_eq!(newer_cloud.as_deref(), Some("linux-image-6.12.99+deb12-cloud-amd64-unsigned"));
    }

    #[test]
    fn major_skips_the_epoch() {
        assert_eq!(major("1:10.0.2+ds-2"), Some(10));
        assert_eq!(major("7.2"), Some(7));
        assert_eq!(major("x"), None);
    }
}
