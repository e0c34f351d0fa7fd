//! The guest's console takes input.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, GuestFile, Running},
};

/// For a guest to come to its script, or from there to its end.
const SOON: Duration = Duration::from_secs(60);

/// Starts a shell command that runs the guest (`$CASEMATE run FILE`) with a FIFO as its input; returns the FIFO's other
/// end.
pub(crate) fn start(ctx: &Ctx, guest: &GuestFile, command: &str) -> Result<(Running, File), Failure> {
    let fifo = ctx.directory().join("typed");
    ctx.shell(&format!("rm -f {0}; mkfifo {0}", fifo.display()))?;
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let words: [(&str, PathBuf); 2] =
        [("$CASEMATE", ctx.program("casemate")?), ("$FILE", guest.write_into(ctx.directory())?)];
    let command = words.iter().fold(command.to_owned(), |text, (word, with)| text.replace(word, &path(with)));
    let running = ctx.start(["sh".into(), "-c".into(), format!("exec {command} <{}", fifo.display())])?;
    // Opens when the shell does.
    Ok((running, File::options().write(true).open(&fifo)?))
}

/// More than the serial port and the pipe to it hold at a time is still carried byte for byte.
pub(crate) fn takes_input(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "stty raw -echo; echo takes-input
        digest=$(head -c 5000 | sha256sum | cut -d' ' -f1)
        stty sane; echo digest: $digest";
    let (running, mut typed) =
        start(ctx, &ctx.guest(script)?.vcpus(1), "$CASEMATE run --json --stdin $FILE")?;
    running.wait_for_text("takes-input", SOON)?;
    let bytes: Vec<u8> = (0..5000_u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let digest = {
        let path = ctx.directory().join("bytes");
        std::fs::write(&path, &bytes)?;
        ctx.shell("sha256sum bytes | cut -d' ' -f1")?
    };
    typed.write_all(&bytes)?;
    let run = running.wait(SOON)?;
    let seen = run.success()?.value("digest:")?;
    expect!(seen == digest, "the guest was sent {digest} and read {seen}");
    Ok(())
}

/// Keys go to the guest; the escape key presses its power button and, again, stops it. The terminal is as
/// before afterwards.
pub(crate) fn terminal_is_the_guests(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo has-a-terminal; read line; echo \"read: $line\"; sleep 1000";
    let command = "script -qec 'stty -a >before; $CASEMATE run $FILE; stty -a >after; cmp before after && echo unchanged' \
        /dev/null";
    let (running, mut typed) = start(ctx, &ctx.guest(script)?.vcpus(1), command)?;
    running.wait_for_text("has-a-terminal", SOON)?;
    typed.write_all(b"good day\n")?;
    running.wait_for_text("read: good day", SOON)?;
    typed.write_all(b"\x1d")?;
    running.wait_for_text("asked the guest to power off", SOON)?;
    typed.write_all(b"\x1d")?;
    running.wait_for_text("the guest has ended: stopped", SOON)?;
    drop(typed);
    let run = running.wait(SOON)?;
    run.success()?.printed("the terminal is the guest's")?.printed("unchanged")?;
    Ok(())
}
