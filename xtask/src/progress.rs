//! A line that shows a long step is alive: what is done, and for how many seconds.

use std::{
    io::{IsTerminal, Write},
    sync::{Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

/// Set, the line is shown though standard output is (as inside the lab) no sign of somebody watching, or the reverse.
pub(crate) const WATCHED: &str = "CASEMATE_WATCHED";

const FRAMES: [char; 4] = ['-', '\\', '|', '/'];

/// Whether somebody watches this run.
pub(crate) fn watched() -> bool {
    match std::env::var_os(WATCHED) {
        Some(value) => value == "1",
        None => std::io::stdout().is_terminal(),
    }
}

/// Prints lines and, between them, the line that moves.
pub(crate) struct Ticker {
    caption: String,
    watched: bool,
    start: Instant,
    state: Mutex<State>,
}

struct State {
    frame: usize,
    /// The moving line is on the screen.
    shown: bool,
    last: Instant,
}

impl Ticker {
    pub(crate) fn new(caption: &str) -> Self {
        let now = Instant::now();
        let state = Mutex::new(State { frame: 0, shown: false, last: now });
        Self { caption: caption.to_owned(), watched: watched(), start: now, state }
    }

    /// Prints a line that stays.
    pub(crate) fn say(&self, line: &str) {
        let mut state = self.lock();
        self.erase(&mut state);
        println!("{line}");
        state.last = Instant::now();
    }

    /// Moves the moving line on, once nothing was printed for a second. Unwatched, a line every 30 s says as much.
    pub(crate) fn tick(&self) {
        let mut state = self.lock();
        let seconds = self.start.elapsed().as_secs();
        if self.watched && (state.shown || state.last.elapsed() > Duration::from_secs(1)) {
            state.frame = state.frame.wrapping_add(1);
            let frame = FRAMES.get(state.frame % FRAMES.len()).unwrap_or(&'-');
            print!("\r  {frame} {} {seconds} s ", self.caption);
            let _ = std::io::stdout().flush();
            state.shown = true;
        } else if !self.watched && state.last.elapsed() > Duration::from_secs(30) {
            println!("  ... {} {seconds} s", self.caption);
            state.last = Instant::now();
        }
    }

    /// Takes the moving line off the screen.
    pub(crate) fn clear(&self) {
        self.erase(&mut self.lock());
    }

    fn erase(&self, state: &mut State) {
        if state.shown {
            print!("\r{}\r", " ".repeat(self.caption.len() + 16));
            let _ = std::io::stdout().flush();
            state.shown = false;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` while the moving line moves.
pub(crate) fn while_working<T>(caption: &str, work: impl FnOnce(&Ticker) -> T) -> T {
    let ticker = Ticker::new(caption);
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let moving = &ticker;
        scope.spawn(move || {
            while wait.recv_timeout(Duration::from_millis(250)) == Err(mpsc::RecvTimeoutError::Timeout) {
                moving.tick();
            }
        });
        let result = work(&ticker);
        drop(done);
        ticker.clear();
        result
    })
}
