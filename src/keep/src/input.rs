//! What is typed, on its way to the guest's serial port.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    panic, thread,
    time::Duration,
};

use casemate_spec::{Guest, Refusal};
use casemate_wire::Ask;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    process::getpgrp,
    stdio,
    termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr},
};

use crate::{operator::Operator, watch::StopSignals};

/// Where a guest's console gets its input from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Input {
    /// From nowhere.
    #[default]
    None,
    /// From this program's terminal, which is the guest's until its end: every key goes to the guest, but for
    /// [`ESCAPE`].
    Terminal,
    /// From this program's standard input, byte for byte until its end.
    Stream,
}

/// The key that does not go to the guest: Ctrl-]. It asks the guest to power off; pressed again, it stops it.
pub const ESCAPE: u8 = 0x1d;

impl Input {
    /// The terminal if standard input is one, and this program has it to itself.
    pub fn terminal_if_any() -> Self {
        match tcgetpgrp(stdio::stdin()) {
            Ok(foreground) if foreground == getpgrp() => Self::Terminal,
            _ => Self::None,
        }
    }
}

/// The terminal in raw mode, until this is dropped.
pub(crate) struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self, Errno> {
        let before = tcgetattr(stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Lines of this program's own end in a plain line feed.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(stdio::stdin(), OptionalActions::Now, &raw)?;
        // A panic ends the process without dropping this.
        let (saved, others) = (before.clone(), panic::take_hook());
        panic::set_hook(Box::new(move |info| {
            let _ = tcsetattr(stdio::stdin(), OptionalActions::Now, &saved);
            others(info);
        }));
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Starts to carry the input into `pipe`, to the guest; the escape key is a signal to stop. The thread lives as long as
/// the input, or the process.
pub(crate) fn carry(
    input: Input,
    pipe: OwnedFd,
    signals: &StopSignals,
    guest: &Guest,
) -> Result<Option<RawTerminal>, Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        let cause = format_args!("its input cannot be set up: {error}");
        Refusal::new("keep-failed", &guest.name, cause, "give it a terminal, or none")
    };
    let terminal = match input {
        Input::None => return Ok(None),
        Input::Stream => None,
        Input::Terminal => {
            // What a guest does not take is lost, as on a line: the escape key must be heard in any case.
            let flags = fcntl_getfl(pipe.as_fd()).map_err(|error| failed(&error))?;
            fcntl_setfl(pipe.as_fd(), flags | OFlags::NONBLOCK).map_err(|error| failed(&error))?;
            Some(RawTerminal::enter().map_err(|error| failed(&error))?)
        }
    };
    let escape = (input == Input::Terminal).then_some(ESCAPE);
    let stop = signals.another().map_err(|error| failed(&error))?;
    let body = move || carry_all(io::stdin().lock(), File::from(pipe), escape, stop);
    thread::Builder::new().name("input".into()).spawn(body).map_err(|error| failed(&error))?;
    Ok(terminal)
}

/// How often is looked whether the terminal has another size.
const LOOK: Duration = Duration::from_millis(250);

/// Tells the guest the size of this program's terminal, now and whenever it has changed, until the guest's end.
pub(crate) fn follow_size(operator: Operator) {
    let mut told = None;
    let follow = move || loop {
        let size = tcgetwinsize(stdio::stdin()).ok().map(|size| (size.ws_col, size.ws_row));
        if let Some((columns, rows)) = size.filter(|_| size != told) {
            match operator.ask(Ask::TerminalSize { columns, rows }, Vec::new()) {
                Ok(_) => told = size,
                Err(refusal) if refusal.code == "guest-ending" => return,
                // It may not run yet.
                Err(_) => {}
            }
        }
        thread::sleep(LOOK);
    };
    // Without it the guest's programs wrap their lines elsewhere.
    let _ = thread::Builder::new().name("terminal".into()).spawn(follow);
}

fn carry_all(mut from: impl Read, mut to: impl Write, escape: Option<u8>, mut stop: impl Write) {
    let mut buffer = [0; 256];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        for part in bytes.split_inclusive(|byte| Some(*byte) == escape) {
            let escaped = part.last().filter(|byte| Some(**byte) == escape);
            let typed = part.get(..part.len() - escaped.iter().count()).unwrap_or_default();
            match to.write_all(typed) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                _ => {}
            }
            if escaped.is_some() && stop.write_all(&[0]).is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_stops_and_the_rest_is_typed() {
        let (mut typed, mut stops) = (Vec::new(), Vec::new());
        carry_all(&b"ls\n\x1d\x1dmore\x1d"[..], &mut typed, Some(ESCAPE), &mut stops);
        assert_eq!((typed.as_slice(), stops.len()), (&b"ls\nmore"[..], 3));
    }

    #[test]
    fn a_stream_is_carried_byte_for_byte() {
        let all: Vec<u8> = (0..=u8::MAX).cycle().take(1000).collect();
        let (mut typed, mut stops) = (Vec::new(), Vec::new());
        carry_all(all.as_slice(), &mut typed, None, &mut stops);
        assert_eq!((typed, stops.len()), (all, 0));
    }

    #[test]
    fn a_guest_that_takes_nothing_loses_keys_and_is_stopped_all_the_same() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::WouldBlock.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut stops = Vec::new();
        carry_all(&b"lost\x1d"[..], Full, Some(ESCAPE), &mut stops);
        assert_eq!(stops.len(), 1);
    }
}
