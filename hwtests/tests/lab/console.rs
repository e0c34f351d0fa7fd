//! The guest's console takes input.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
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

/// A virtio console is typed at and read, and learns of the terminal's size; and a program in the guest speaks by a port with
/// whoever connects to its socket.
pub(crate) fn virtio_console_and_ports(ctx: &mut Ctx) -> Result<(), Failure> {
    let socket = ctx.directory().join("agent.sock");
    let script = r#"until [ -e /dev/hvc0 ]; do sleep 0.1; done
        # Open all the time: what comes while the last user closes it is lost, as on any terminal.
        exec 3<>/dev/hvc0; stty raw -echo <&3; echo said-on-hvc0 >&3
        read line <&3; echo "heard: $line"
        until [ "$(stty size <&3)" = "43 132" ]; do sleep 0.1; done; echo terminal-has-grown
        until name=$(grep -l org.example.agent /sys/class/virtio-ports/*/name); do sleep 0.1; done
        exec 4<>/dev/$(basename $(dirname $name)); echo agent-listens
        for n in 1 2; do read line <&4; echo "answer to $line" >&4; done; read line <&4; echo "last: $line""#;
    let guest = ctx.guest(script)?.vcpus(1).table("console", "device = \"virtio\"")?;
    let guest = guest.port("org.example.agent", &socket);
    let (running, mut typed) = start(ctx, &guest, "$CASEMATE run --json --stdin $FILE")?;
    running.wait_for_text("said-on-hvc0", SOON)?;
    typed.write_all(b"typed\n")?;
    running.wait_for_text("heard: typed", SOON)?;
    let ask = r#"{"do":"terminal-size","columns":132,"rows":43}"#;
    let mut operator = UnixStream::connect(format!("/run/casemate/{}.operator", ctx.name()))?;
    operator.write_all(format!("{ask}\n").as_bytes())?;
    running.wait_for_text("terminal-has-grown", SOON)?;
    running.wait_for_text("agent-listens", SOON)?;
    for word in ["first", "second"] {
        let mut agent = UnixStream::connect(&socket)?;
        agent.set_read_timeout(Some(SOON))?;
        agent.write_all(format!("{word}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(agent).read_line(&mut answer)?;
        expect!(answer == format!("answer to {word}\n"), "the guest's program answered {answer:?}");
    }
    ctx.run(["casemate", "audit", ctx.name()])?.success()?;
    let stats = ctx.run(["casemate", "stats", ctx.name()])?;
    stats.success()?.printed("console 0")?.printed("console 1")?;
    UnixStream::connect(&socket)?.write_all(b"bye\n")?;
    running.wait(SOON)?.success()?.printed("last: bye")?;
    expect!(!socket.exists(), "the port's socket is still there");
    Ok(())
}
