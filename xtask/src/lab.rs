//! `cargo xtask lab`: prepare the hardware lab, and run a program in it.

use std::{ffi::OsString, fs, io::IsTerminal, path::Path, process::ExitCode, time::Duration};

use casemate_hwtests::{Console, Lab, LabEnd, LabError, Layout, prepare as prepare_lab};

use crate::progress;

/// Prepares the lab, saying what is done; quick when all is there.
pub(crate) fn prepare() -> Result<Layout, LabError> {
    let layout = Layout::of_workspace();
    progress::while_working("the lab", |ticker| {
        prepare_lab(&layout, &mut |step| ticker.say(&format!("lab: {step}")))
    })?;
    println!("lab: ready in {}", layout.root().display());
    Ok(layout)
}

/// Runs a program by hand.
pub(crate) fn run(program: &[OsString], deadline: u64) -> Result<ExitCode, LabError> {
    let layout = prepare()?;
    let terminal = std::io::stdin().is_terminal();
    let console = if terminal { Console::Interactive } else { Console::Shown };
    let mut machine = Lab::new(&layout, program).console(console).start()?;
    let end = machine.wait(Duration::from_secs(deadline));
    if terminal {
        // QEMU, when it is killed, leaves the terminal as it had set it.
        let _ = std::process::Command::new("stty").arg("sane").status();
    }
    keep_what_was_left(&layout, &machine.share());
    exit_code(&end)
}

/// Moves what the program left in its share to where the next run won't clear it away.
fn keep_what_was_left(layout: &Layout, share: &Path) {
    for own in ["command", "status"] {
        let _ = fs::remove_file(share.join(own));
    }
    let kept = layout.root().join("out");
    // remove_dir takes empty directories only.
    if fs::remove_dir(share).is_err() {
        let _ = fs::remove_dir_all(&kept);
        if fs::rename(share, &kept).is_ok() {
            println!("lab: what was left in /lab/out is in {}", kept.display());
        }
    }
}

/// The program's own exit code, when it came to its end.
pub(crate) fn exit_code(end: &LabEnd) -> Result<ExitCode, LabError> {
    match end {
        LabEnd::Program(code) => Ok(ExitCode::from(*code)),
        LabEnd::Machine(why) => {
            Err(LabError::new(format_args!("the lab died: {why}"), "see its console's last lines, above"))
        }
        LabEnd::Deadline(limit) => Err(LabError::new(
            format_args!("the program did not end within {} s and the lab was killed", limit.as_secs()),
            "give it more time with --deadline, or find out what it waits for",
        )),
    }
}
