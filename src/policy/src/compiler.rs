//! Runs the compiler, `casemate-policy-compiler`: a component on its standard input, compiled code on its standard
//! output. It gets three anonymous files, an empty environment and a deadline; it limits itself further. Whoever can make
//! a cell runs it in one ([`Launch`]).

use std::{
    fs::File,
    io::{Read, Seek, Write},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{Fault, PolicyError, limits::HOST_LIMITS};

/// The compiler's exit code for a component that is none.
pub const EXIT_INVALID: i32 = 2;

/// The compiler's standard streams: files in memory.
#[derive(Debug)]
pub struct Streams {
    /// The component, from its start.
    pub input: File,
    /// For the compiled code.
    pub output: File,
    /// For a line that says what is wrong.
    pub complaint: File,
}

/// How the compiler ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// In another way, in words.
    Otherwise(String),
}

/// A way to run the compiler.
pub trait Launch {
    /// Runs `program` with these streams, an empty environment and no arguments to its end, and ends it itself when that has
    /// not come within [`compile_ms`](crate::HostLimits).
    ///
    /// # Errors
    /// Why it could not be started, or was ended; in words.
    fn launch(&self, program: &Path, streams: Streams) -> Result<Ended, String>;
}

/// Runs the compiler as a child of this process, with this user's rights but for what it gives up itself: for users who
/// can't make cells.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// When it's ended.
    pub deadline: Duration,
}

impl Plain {
    /// As every host has it: [`compile_ms`](crate::HostLimits).
    pub const DEFAULT: Self = Self { deadline: Duration::from_millis(HOST_LIMITS.compile_ms) };
}

impl Launch for Plain {
    fn launch(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        let child = Command::new(program)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(streams.input))
            .stdout(Stdio::from(streams.output))
            .stderr(Stdio::from(streams.complaint))
            .spawn()
            .map_err(|error| format!("{} can't be started: {error}", program.display()))?;
        let status = wait(child, self.deadline)?;
        Ok(status.code().map_or_else(|| Ended::Otherwise(status.to_string()), Ended::Exited))
    }
}

/// The program `casemate-policy-compiler`, and the way to run it.
#[derive(Clone, Copy)]
pub struct Compiler<'a> {
    /// The program.
    pub program: &'a Path,
    /// Who runs it.
    pub launch: &'a dyn Launch,
}

impl<'a> Compiler<'a> {
    /// The program as a child of this process: see [`Plain`].
    pub fn plain(program: &'a Path) -> Self {
        Self { program, launch: &Plain::DEFAULT }
    }
}

/// Compiles `component`; `name` is how an error calls it.
pub(crate) fn compile(compiler: Compiler<'_>, name: &str, component: &[u8]) -> Result<Vec<u8>, PolicyError> {
    let broken = |cause: String| PolicyError::new(Fault::Compiler, name, cause);
    let anonymous = |error: std::io::Error| broken(format!("no anonymous file: {error}"));
    let mut input = anonymous_file().map_err(anonymous)?;
    input.write_all(component).and_then(|()| input.rewind()).map_err(anonymous)?;
    let mut output = anonymous_file().map_err(anonymous)?;
    let mut complaint = anonymous_file().map_err(anonymous)?;
    let streams = Streams {
        input,
        output: output.try_clone().map_err(anonymous)?,
        complaint: complaint.try_clone().map_err(anonymous)?,
    };
    let ended = compiler.launch.launch(compiler.program, streams).map_err(broken)?;
    if ended != Ended::Exited(0) {
        let text = read(&mut complaint, 4 << 10).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let (fault, how) = match ended {
            Ended::Exited(EXIT_INVALID) => (Fault::Invalid, format!("exit code {EXIT_INVALID}")),
            Ended::Exited(code) => (Fault::Compiler, format!("exit code {code}")),
            Ended::Otherwise(how) => (Fault::Compiler, how),
        };
        return Err(PolicyError::new(fault, name, format!("not compiled ({how}): {text}")));
    }
    let code = read(&mut output, HOST_LIMITS.compiled_bytes).map_err(|error| broken(error.to_string()))?;
    if code.is_empty() {
        return Err(broken("the compiler made nothing".into()));
    }
    Ok(code)
}

fn anonymous_file() -> std::io::Result<File> {
    Ok(File::from(memfd_create("casemate-policy", MemfdFlags::CLOEXEC)?))
}

fn wait(mut child: Child, most: Duration) -> Result<ExitStatus, String> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if start.elapsed() < most => sleep(Duration::from_millis(5)),
            outcome => {
                // It's reaped in any case; that it may have ended by itself just now changes nothing.
                let _ = child.kill();
                let _ = child.wait();
                return Err(match outcome {
                    Err(error) => format!("the compiler can't be waited for: {error}"),
                    Ok(_) => format!("the compiler did not end within {} s", most.as_secs_f64()),
                });
            }
        }
    }
}

fn read(file: &mut File, most: usize) -> std::io::Result<Vec<u8>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    /// A child that is between fork and exec holds a script open that another test writes: ETXTBSY. So, one at a time.
    static FORKS: Mutex<()> = Mutex::new(());

    fn plain(program: &Path) -> Compiler<'_> {
        Compiler { program, launch: &Plain::DEFAULT }
    }

    fn script(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("compiler");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        (folder, path)
    }

    #[test]
    fn passes_bytes_through_with_an_empty_environment() {
        let _one = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
        let (_folder, path) = script("test -z \"$HOME\" && /bin/cat");
        assert_eq!(compile(plain(&path), "p", b"bytes").unwrap(), b"bytes");
    }

    #[test]
    fn tells_a_bad_component_from_a_bad_compiler() {
        let _one = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
        for (text, code) in [
            ("echo no component >&2; exit 2", "policy-invalid"),
            ("echo oops >&2; exit 1", "policy-compiler"),
            ("kill -9 $$", "policy-compiler"),
            ("exit 0", "policy-compiler"),
        ] {
            let (_folder, path) = script(text);
            assert_eq!(compile(plain(&path), "p", b"bytes").unwrap_err().code(), code, "{text}");
        }
        assert_eq!(compile(plain(Path::new("/nowhere")), "p", b"").unwrap_err().code(), "policy-compiler");
    }

    #[test]
    fn ends_a_compiler_that_does_not_end() {
        let _one = FORKS.lock().unwrap_or_else(PoisonError::into_inner);
        let child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let start = Instant::now();
        assert!(wait(child, Duration::from_millis(20)).is_err());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
