//! Sockets between guest and host.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::Duration,
};

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, WITH_TOOLS},
};

use crate::disks::with_tools;

const LONG: Duration = Duration::from_secs(90);

pub(crate) fn sockets_reach_both_ways(ctx: &mut Ctx) -> Result<(), Failure> {
    let socket = ctx.directory().join("web.vsock");
    let listener = UnixListener::bind(ctx.directory().join("web.vsock_7001"))?;
    let echo = thread::spawn(move || -> std::io::Result<usize> {
        let (mut guest, _) = listener.accept()?;
        let mut bytes = Vec::new();
        guest.read_to_end(&mut bytes)?;
        guest.write_all(&bytes)?;
        Ok(bytes.len())
    });
    let script = format!(
        "{WITH_TOOLS}
        head -c 1048576 /dev/urandom >/run/bytes
        tools socat -t 20 - VSOCK-CONNECT:2:7001 </run/bytes >/run/back; cmp /run/bytes /run/back && echo it came back
        tools socat - VSOCK-CONNECT:2:7002 </dev/null || echo nobody listens
        tools socat -t 20 VSOCK-LISTEN:7000 PIPE &
        sleep 2; echo guest-listens; wait"
    );
    let guest = with_tools(ctx, ctx.guest(&script)?.vsock(&socket));
    let running = ctx.start_guest(&guest)?;
    running.wait_for_text("guest-listens", LONG)?;
    let nobody = UnixStream::connect(&socket)?;
    (&nobody).write_all(b"CONNECT 7009\n")?;
    nobody.set_read_timeout(Some(Duration::from_secs(60)))?;
    expect!((&nobody).read(&mut [0; 16])? == 0, "somebody answered at a port where nobody listens");
    let said = talk(UnixStream::connect(&socket)?)?;
    expect!(said.starts_with("OK "), "the host was told {said:?}");
    let run = running.wait(LONG)?;
    run.success()?.printed("it came back")?.printed("nobody listens")?;
    let echoed = echo.join().map_err(|_| Failure::new("the echo panicked"))??;
    expect!(echoed == 1 << 20, "the host heard {echoed} bytes");
    expect!(!socket.exists(), "the socket is still there");
    Ok(())
}

/// Sends a mebibyte to the guest, which sends it back; returns the line before it.
fn talk(stream: UnixStream) -> Result<String, Failure> {
    let sent: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    (&stream).write_all(b"CONNECT 7000\n")?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let bytes = sent.clone();
    let writer =
        thread::spawn(move || (&stream).write_all(&bytes).and_then(|()| stream.shutdown(Shutdown::Write)));
    let mut back = Vec::new();
    if let Err(error) = reader.read_to_end(&mut back) {
        return Err(Failure::new(format_args!("after {} of {} bytes: {error}", back.len(), sent.len())));
    }
    writer.join().map_err(|_| Failure::new("the writer panicked"))??;
    expect!(back == sent, "{} of {} bytes came back, or others", back.len(), sent.len());
    Ok(line)
}
