//! A guest's console on its way out. A thread of its own writes it, so that a reader who stalls holds up the guest, whose
//! pipe fills, and never the one who watches over it.

use std::{
    io::{self, Write},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel},
    thread,
    time::Duration,
};

/// Pieces under way; with what the pipe holds, all that is ever kept.
const PIECES_MOST: usize = 16;

/// The way out.
pub(crate) struct Console {
    pieces: SyncSender<Vec<u8>>,
    /// Ends when the thread does.
    done: Receiver<()>,
    /// What found no room.
    pending: Option<Vec<u8>>,
}

impl Console {
    /// Starts the thread that writes to `out`. A reader that went away stops nobody: what follows is dropped.
    pub(crate) fn start(mut out: Box<dyn Write + Send>) -> io::Result<Self> {
        let (pieces, taken) = sync_channel::<Vec<u8>>(PIECES_MOST);
        let (finished, done) = channel::<()>();
        thread::Builder::new().name("console".into()).spawn(move || {
            let _finished = finished;
            for piece in taken {
                let _ = out.write_all(&piece).and_then(|()| out.flush());
            }
        })?;
        Ok(Self { pieces, done, pending: None })
    }

    /// Whether more can be taken now.
    pub(crate) fn has_room(&mut self) -> bool {
        if let Some(piece) = self.pending.take() {
            self.take(piece);
        }
        self.pending.is_none()
    }

    /// Takes a piece; to be called when there is room.
    pub(crate) fn take(&mut self, piece: Vec<u8>) {
        if let Err(TrySendError::Full(piece)) = self.pieces.try_send(piece) {
            self.pending = Some(piece);
        }
    }

    /// Waits until all is written, for so long at most.
    pub(crate) fn close(mut self, patience: Duration) {
        if self.has_room() {
            drop(self.pieces);
            let _: Result<(), RecvTimeoutError> = self.done.recv_timeout(patience);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// A reader that takes nothing until it may.
    struct Slow(Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stalls_is_not_waited_for_and_loses_nothing() {
        let (go, wait) = channel();
        let read = Arc::new(Mutex::new(Vec::new()));
        let mut console = Console::start(Box::new(Slow(wait, Arc::clone(&read)))).unwrap();
        let mut sent = Vec::new();
        while console.has_room() {
            let piece = vec![sent.len() as u8; 3];
            sent.extend_from_slice(&piece);
            console.take(piece);
        }
        assert!((PIECES_MOST..PIECES_MOST + 3).contains(&(sent.len() / 3)), "{}", sent.len());
        drop(go);
        while !console.has_room() {
            thread::yield_now();
        }
        console.close(Duration::from_secs(10));
        assert_eq!(*read.lock().unwrap(), sent);
    }
}
