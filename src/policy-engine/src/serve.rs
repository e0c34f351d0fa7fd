//! The program: loads what it's handed, then answers what it's asked, until nobody asks any more.

use std::{
    fs::File,
    io::{self, Read, Write},
    mem::ManuallyDrop,
    os::fd::AsFd,
};

use casemate_policy::{
    HOST_LIMITS, Memory,
    talk::{self, Ask, Remembered, Reply},
};

use crate::judge::{Judge, Loaded};

/// What each of its threads does when it begins a part of its life: puts on a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// The thread that counts time, at its start.
    Ticking,
    /// The main thread, when all is loaded and nothing was asked yet.
    Answering,
}

/// Serves the one who has the other end of `socket`.
///
/// # Errors
/// What went wrong between the two, in words. What goes wrong with a plugin is an answer.
pub fn serve<S>(socket: &S, enter: fn(Entered)) -> Result<(), String>
where
    S: AsFd,
    for<'s> &'s S: Read + Write,
{
    let judge = Judge::start(move || enter(Entered::Ticking)).map_err(|error| error.to_string())?;
    // The process ends with the conversation: nothing is taken apart.
    let mut judge = ManuallyDrop::new(judge);
    loop {
        let Some((message, code)) = talk::receive_with_code(socket).map_err(lost)? else { return Ok(()) };
        let reply = match (read(&message)?, code) {
            (Ask::Load(plugin), Some(code)) if judge.plugins.len() < HOST_LIMITS.plugins => {
                match judge.load(*plugin, &File::from(code)) {
                    Ok(Loaded::Taken(described)) => Reply::Loaded(described),
                    Ok(Loaded::Foreign(cause)) => Reply::Foreign(cause),
                    Err(error) => error.into(),
                }
            }
            (Ask::Ready { suspends }, None) => {
                judge.suspend(suspends);
                break;
            }
            _ => return Err("it's asked before all is loaded".into()),
        };
        answer(socket, &reply)?;
    }
    enter(Entered::Answering);
    answer(socket, &Reply::Ready)?;
    let mut reader = socket;
    while let Some(message) = talk::receive(&mut reader).map_err(lost)? {
        answer(socket, &judge.reply(read(&message)?)?)?;
    }
    Ok(())
}

fn read(message: &[u8]) -> Result<Ask<'static>, String> {
    talk::decode_ask(message).map_err(|error| format!("a question can't be read: {error}"))
}

fn answer<S>(socket: &S, reply: &Reply) -> Result<(), String>
where
    S: AsFd,
    for<'s> &'s S: Write,
{
    let message = talk::encode(reply).map_err(lost)?;
    talk::send(socket, &message, None).map_err(lost)
}

fn lost(error: io::Error) -> String {
    format!("the conversation is over: {error}")
}

impl Judge {
    fn reply(&mut self, ask: Ask<'_>) -> Result<Reply, String> {
        if let Ask::Ready { suspends } = ask {
            self.suspend(suspends);
            return Ok(Reply::Ready);
        }
        // Of one question to all plugins, time is counted once.
        let _ticking = self.ticker.during_call();
        Ok(match ask {
            Ask::Load(_) | Ask::Ready { .. } => {
                return Err("all is loaded, and no plugin comes any more".into());
            }
            Ask::Admit { request, override_why } => match self.admit(&request, override_why.as_deref()) {
                Ok(decision) => Reply::Decided(Box::new(decision)),
                Err(error) => error.into(),
            },
            Ask::Tick { samples, memory } => {
                let mut memory = memory.into_owned();
                let tick = self.tick(samples.into_owned(), &mut memory);
                Reply::Ticked { tick, memory: remembered(&memory) }
            }
            Ask::Release(device) => Reply::Ruled(self.release(&device)),
            Ask::Suspended => Reply::Suspended(self.suspended()),
        })
    }
}

fn remembered(memory: &Memory) -> Remembered {
    memory.iter().map(|(name, state)| (name.clone(), talk::hex(state))).collect()
}
