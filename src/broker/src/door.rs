//! How a keep gives up reading whatever it likes.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use casemate_spec::Refusal;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::protocol::gone;

/// Of this process.
const THREADS: &str = "/proc/self/task";
/// How long a thread with rights may yet be seen. One that has ended and was waited for is shown for a moment more, as it was: the kernel
/// tells who waits first, and takes it off its lists then (`do_exit`, `release_task` in kernel/exit.c).
const ENDING: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Of the calling thread, and of those that it starts; of one that has none any more, nothing is changed.
pub(crate) fn give_up_rights() -> Result<(), Refusal> {
    let none = CapabilitySet::empty();
    if capabilities(None).map_err(gone)?.permitted == none {
        return Ok(());
    }
    casemate_jail::read_only()?;
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(gone)
}

/// That no thread of this process has any.
///
/// # Errors
/// `broker-gone` when one has, and has not ended soon.
pub(crate) fn nobody_has_rights() -> Result<(), Refusal> {
    nobody_in(Path::new(THREADS), ENDING)
}

fn nobody_in(threads: &Path, patience: Duration) -> Result<(), Refusal> {
    let begun = Instant::now();
    while let Some(thread) = with_rights(threads).map_err(gone)? {
        if begun.elapsed() > patience {
            return Err(gone(format_args!("thread {thread} has rights yet")));
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// One that has rights, by its number.
fn with_rights(threads: &Path) -> io::Result<Option<String>> {
    for thread in fs::read_dir(threads)? {
        let thread = thread?;
        // One that has ended meanwhile has none.
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
        if permitted.is_some_and(|permitted| permitted.trim().bytes().any(|digit| digit != b'0')) {
            return Ok(Some(thread.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread as the kernel shows it.
    fn shown(threads: &Path, number: u32, permitted: &str) {
        let folder = threads.join(number.to_string());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("status"), format!("Name:\tkeep\nCapPrm:\t{permitted}\nCapEff:\t0\n")).unwrap();
    }

    #[test]
    fn a_thread_that_is_ending_is_waited_for() {
        let threads = tempfile::tempdir().unwrap();
        shown(threads.path(), 7, "0000000000000000");
        shown(threads.path(), 9, "0000000000000004");
        let path = threads.path().to_owned();
        let ending = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            fs::remove_dir_all(path.join("9")).unwrap();
        });
        nobody_in(threads.path(), Duration::from_secs(60)).unwrap();
        ending.join().unwrap();
    }

    #[test]
    fn a_thread_that_stays_is_named() {
        let threads = tempfile::tempdir().unwrap();
        shown(threads.path(), 9, "0000000000000004");
        let refusal = nobody_in(threads.path(), Duration::from_millis(5)).unwrap_err();
        assert!(refusal.to_string().contains("thread 9 has rights yet"), "{refusal}");
    }
}
