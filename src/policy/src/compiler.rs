//! Runs the compiler, `casemate-policy-compiler`: a component on its standard input, compiled code on its standard
//! output. It gets three anonymous files, an empty environment and a deadline; it limits itself further. Whoever can make
//! a cell runs it in one ([`Launch`](crate::Launch)).

use std::{
    fs::File,
    io::{Read, Seek, Write},
    path::Path,
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{Ended, Fault, Launch, PolicyError, Streams, limits::HOST_LIMITS};

/// The compiler's exit code for a component that is none.
pub const EXIT_INVALID: i32 = 2;

/// Compiles `component`; `name` is how an error calls it.
pub(crate) fn compile(
    launch: &dyn Launch,
    compiler: &Path,
    name: &str,
    component: &[u8],
) -> Result<Vec<u8>, PolicyError> {
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
    let ended = launch.compile(compiler, streams).map_err(broken)?;
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

pub(crate) fn anonymous_file() -> std::io::Result<File> {
    Ok(File::from(memfd_create("casemate-policy", MemfdFlags::CLOEXEC)?))
}

pub(crate) fn read(file: &mut File, most: usize) -> std::io::Result<Vec<u8>> {
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(most as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plain;
    use std::sync::{Mutex, PoisonError};

    /// A child that is between fork and exec holds a script open that another test writes: ETXTBSY. So, one at a time.
    static FORKS: Mutex<()> = Mutex::new(());

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
        assert_eq!(compile(&Plain::DEFAULT, &path, "p", b"bytes").unwrap(), b"bytes");
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
            assert_eq!(compile(&Plain::DEFAULT, &path, "p", b"bytes").unwrap_err().code(), code, "{text}");
        }
        assert_eq!(
            compile(&Plain::DEFAULT, Path::new("/nowhere"), "p", b"").unwrap_err().code(),
            "policy-compiler"
        );
    }
}
