//! The half of the test program that runs outside: the ordinary test runner, and the labs it starts.

use std::{
    collections::{HashMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use super::{
    LabTest, PATIENCE,
    lines::{Growing, add},
    protocol::{ALL, EVENTS, Event, LONG, ORDERS, Order, Outcome, PROGRAMS},
};
use crate::{COUNTED, Lab, LabEnd, LabError, Layout, RunningLab, is_counted, machine::is_set, prepare};

/// From QEMU's start until the lab's first word.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// What a test may exceed its deadline by before the lab itself counts as hung: the harness inside ends tests on time.
const SLACK: Duration = Duration::from_secs(60);
/// As many labs may run beside each other.
const LABS_MAX: usize = 2;
/// So many tests are worth another lab, which takes a while to start.
const LAB_PAYS_FROM: usize = 4;
/// Of how many tests it is told how long they took.
const LONGEST_TOLD: usize = 20;
/// How many labs may die before the rest of the tests are given up.
const DEATHS_MAX: u32 = 4;

pub(crate) fn run(tests: &'static [LabTest]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A lab runs them one after another; they are told in the table's order.
    arguments.test_threads = Some(1);
    let long = is_set(LONG);
    let board = Arc::new(Board::default());
    let mut wanted = Vec::new();
    let mut trials = Vec::new();
    // The runner takes one filter; here it may be several, with commas between.
    let filters = arguments.filter.take_if(|filter| filter.contains(',')).unwrap_or_default();
    let named = |name: &str| filters.is_empty() || filters.split(',').any(|part| name.contains(part));
    for test in tests.iter().filter(|test| named(test.name)) {
        let board = Arc::clone(&board);
        let skip = test.long.filter(|_| !long).map(|reason| format!("long ({reason}); {LONG}=1 runs it"));
        let runs = skip.is_none();
        let trial = Trial::ignorable_test(test.name, move || match skip {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => completion(board.outcome_of(test.name)),
        });
        if runs && !arguments.list && !arguments.is_filtered_out(&trial) {
            wanted.push(*test);
        }
        trials.push(trial);
    }
    let start = Instant::now();
    let (count, labs) = (wanted.len(), labs_for(wanted.len()));
    let left = Arc::new(Mutex::new(VecDeque::from(wanted)));
    let sessions = (0..labs).map(|number| {
        let session = Session::new(Layout::of_workspace(), number, Arc::clone(&left), Arc::clone(&board));
        thread::spawn(move || session.run())
    });
    let sessions: Vec<_> = sessions.collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    let sessions: Vec<Session> = sessions.into_iter().filter_map(|session| session.join().ok()).collect();
    if !sessions.is_empty() {
        println!(
            "lab: {count} tests in {} lab runs ({} froze), {:.0} s; logs in {}",
            sessions.iter().map(|session| session.labs).sum::<u32>(),
            sessions.iter().map(|session| session.frozen.len()).sum::<usize>(),
            start.elapsed().as_secs_f64(),
            Layout::of_workspace().logs().display()
        );
        let mut took: Vec<_> = sessions.iter().flat_map(|session| &session.took).collect();
        took.sort_by_key(|(_, milliseconds)| std::cmp::Reverse(*milliseconds));
        let longest = took.iter().take(LONGEST_TOLD);
        let longest: Vec<_> =
            longest.map(|(name, milliseconds)| format!("{name} {} s", milliseconds / 1000)).collect();
        println!("lab: the longest: {}\n", longest.join(", "));
    }
    conclusion.exit_code()
}

/// As many labs as this machine has processors for: a lab keeps one busy.
fn labs_for(tests: usize) -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    processors.min(LABS_MAX).min(tests.div_ceil(LAB_PAYS_FROM))
}

/// What became of the tests, told by the labs and waited for by the runner.
#[derive(Default)]
struct Board {
    outcomes: Mutex<HashMap<String, Outcome>>,
    changed: Condvar,
}

impl Board {
    fn tell(&self, name: &str, outcome: &Outcome) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        outcomes.insert(name.to_owned(), outcome.clone());
        self.changed.notify_all();
    }

    /// How a test ended, once that is known.
    fn outcome_of(&self, name: &str) -> Outcome {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = outcomes.get(name) {
                return outcome.clone();
            }
            outcomes = self.changed.wait(outcomes).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn completion(outcome: Outcome) -> Result<Completion, Failed> {
    match outcome {
        Outcome::Passed => Ok(Completion::Completed),
        Outcome::Skipped(reason) => Ok(Completion::ignored_with(reason)),
        Outcome::Failed(message) => Err(Failed::from(message)),
    }
}

/// Why a lab was killed that told nothing for too long.
const FROZEN: &str = "the lab told nothing for too long and was killed";

/// One lab after the other, each running tests of those that are left until it dies.
struct Session {
    layout: Layout,
    /// Which of the sessions of this run of the test program.
    number: usize,
    board: Arc<Board>,
    /// What no session has taken yet.
    left: Arc<Mutex<VecDeque<LabTest>>>,
    /// What this one has taken, until its outcome is known.
    current: Option<LabTest>,
    /// How long tests took, in milliseconds.
    took: Vec<(&'static str, u64)>,
    lab: Option<LiveLab>,
    /// Set when no (further) lab is to be started.
    given_up: Option<String>,
    labs: u32,
    deaths: u32,
    /// What was running when a lab froze: it is run once more.
    frozen: Vec<String>,
}

/// A lab that is under way.
struct LiveLab {
    machine: RunningLab,
    events: Growing,
    /// Whether it was told of the session's test.
    told: bool,
    running: Option<String>,
    /// When the lab counts as hung, unless it tells something before.
    patience: Instant,
}

impl Session {
    fn new(layout: Layout, number: usize, left: Arc<Mutex<VecDeque<LabTest>>>, board: Arc<Board>) -> Self {
        Self {
            layout,
            number,
            board,
            left,
            current: None,
            took: Vec::new(),
            lab: None,
            given_up: None,
            labs: 0,
            deaths: 0,
            frozen: Vec::new(),
        }
    }

    /// Starts and watches labs until no test is left.
    fn run(mut self) -> Self {
        while let Some(test) = self.take_test() {
            if let Some(reason) = self.given_up.clone() {
                self.tell(test.name, Outcome::Failed(reason));
                continue;
            }
            match self.lab.take() {
                None => match self.start_lab() {
                    Ok(lab) => self.lab = Some(lab),
                    Err(error) => self.given_up = Some(error.to_string()),
                },
                Some(mut lab) if !lab.told => {
                    lab.told = true;
                    order(&lab, &Order::Run(test.name.to_owned()));
                    lab.patience = Instant::now() + BOOT_LIMIT;
                    self.lab = Some(lab);
                }
                Some(lab) => self.watch(lab),
            }
        }
        if let Some(mut lab) = self.lab.take() {
            order(&lab, &Order::End);
            let end = lab.machine.wait(SLACK);
            self.bury(lab, &end);
        }
        self
    }

    /// The test that is under way, or the next one.
    fn take_test(&mut self) -> Option<LabTest> {
        let next = || self.left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        self.current = self.current.or_else(next);
        self.current
    }

    fn tell(&mut self, name: &str, outcome: Outcome) {
        self.board.tell(name, &outcome);
        self.current = self.current.filter(|test| test.name != name);
    }

    fn start_lab(&mut self) -> Result<LiveLab, LabError> {
        prepare(&self.layout, &mut |step| eprintln!("lab: {step}"))?;
        let this = std::env::current_exe().map_err(|error| {
            LabError::new(format_args!("cannot tell this program's path: {error}"), "report this")
        })?;
        let program = [this.display().to_string(), ALL.to_owned()];
        let mut lab = Lab::new(&self.layout, program).environment(PROGRAMS, programs_of(&this));
        lab = lab.environment("CASEMATE_LAB_DIR", self.layout.root());
        if is_counted() {
            lab = lab.environment(COUNTED, "1");
        }
        let machine = lab.environment("RUST_BACKTRACE", "1").start()?;
        self.labs += 1;
        let events = Growing::new(machine.share().join(EVENTS));
        Ok(LiveLab { machine, events, told: false, running: None, patience: Instant::now() + BOOT_LIMIT })
    }

    /// Takes in what the lab has told, and its end or hang; keeps it while it lives.
    fn watch(&mut self, mut lab: LiveLab) {
        let mut end = lab.machine.try_end();
        let events = lab.events.new_ones();
        if events.is_empty() && end.is_none() {
            if Instant::now() > lab.patience {
                lab.machine.kill();
                end = Some(LabEnd::Machine(FROZEN.to_owned()));
            } else {
                thread::sleep(Duration::from_millis(30));
            }
        }
        for event in events {
            self.take_in(&mut lab, event);
        }
        match end {
            None => self.lab = Some(lab),
            Some(end) => self.bury(lab, &end),
        }
    }

    fn take_in(&mut self, lab: &mut LiveLab, event: Event) {
        let limit = match event {
            Event::Ready => SLACK,
            Event::Started { name } => {
                let deadline = self.current.map_or(SLACK, |test| test.deadline * PATIENCE);
                lab.running = Some(name);
                deadline + SLACK
            }
            Event::Ended { name, outcome, milliseconds } => {
                (lab.running, lab.told) = (None, false);
                let log = self.keep_log(lab, &name);
                self.took.extend(self.current.map(|test| (test.name, milliseconds)));
                let outcome = match outcome {
                    Outcome::Failed(message) => {
                        let tail = tail_of(&log, 25);
                        let seconds = milliseconds / 1000;
                        Outcome::Failed(format!(
                            "{message}\nafter {seconds} s; end of {}:\n{tail}",
                            log.display()
                        ))
                    }
                    other => other,
                };
                self.tell(&name, outcome);
                SLACK
            }
        };
        lab.patience = Instant::now() + limit;
    }

    /// A lab that has ended: its console is kept; what it was running when it died has failed.
    fn bury(&mut self, lab: LiveLab, end: &LabEnd) {
        let console = self.layout.logs().join(format!("console-{}-{}.log", self.number + 1, self.labs));
        let _ = fs::copy(lab.machine.console_log(), &console);
        let why = match end {
            LabEnd::Program(0) => None,
            LabEnd::Program(code) => Some(format!("the harness inside the lab ended with {code}")),
            LabEnd::Machine(why) => Some(why.clone()),
            LabEnd::Deadline(limit) => Some(format!("killed after {} s", limit.as_secs())),
        };
        let why = match (panic_in(&console).or(why), self.current.is_none()) {
            (_, true) => return,
            (Some(why), false) => why,
            (None, false) => "the harness inside ended before all tests were run".to_owned(),
        };
        self.deaths += 1;
        let tail = tail_of(&console, 25);
        let message = format!("the lab died: {why}; end of {}:\n{tail}", console.display());
        match &lab.running {
            // A machine that stops as a whole, past the deadlines that the harness in it keeps, is QEMU's: its emulated
            // processors lose a timer interrupt now and then, with no Casemate in sight. It is told, and tried once.
            Some(name) if why == FROZEN && !self.frozen.contains(name) => {
                println!("lab: the machine froze during {name}, which is run once more in another");
                self.frozen.push(name.clone());
            }
            Some(name) => {
                self.keep_log(&lab, name);
                self.tell(name, Outcome::Failed(message.clone()));
            }
            // It did not even come up: that counts double, so it is tried once more and no oftener.
            None => self.deaths += 1,
        }
        if self.deaths >= DEATHS_MAX {
            self.given_up =
                Some(format!("not run, for {} lab runs went wrong; at last: {message}", self.labs));
        }
    }

    /// Moves a test's log from the lab's share to where logs are kept.
    fn keep_log(&self, lab: &LiveLab, name: &str) -> PathBuf {
        let file = format!("{name}.log");
        let kept = self.layout.logs().join(&file);
        let _ = fs::rename(lab.machine.share().join(file), &kept);
        kept
    }
}

/// Where the programs under test lie: what `CASEMATE_PROGRAMS` names, or beside this program's own directory, where
/// cargo puts them.
fn programs_of(this: &Path) -> PathBuf {
    match std::env::var_os(PROGRAMS) {
        Some(directory) => PathBuf::from(directory),
        None => this.ancestors().nth(2).unwrap_or(this).to_path_buf(),
    }
}

/// Tells a lab what is to be done next. One that can't be told ends by its patience.
fn order(lab: &LiveLab, order: &Order) {
    if let Err(error) = add(&lab.machine.share().join(ORDERS), order) {
        eprintln!("lab: {order:?} can't be told: {error}");
    }
}

/// The kernel's own word on why the machine ended, if it had one.
fn panic_in(console: &Path) -> Option<String> {
    let text = fs::read(console).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.lines().find_map(|line| line.find("Kernel panic").and_then(|at| line.get(at..)).map(str::to_owned))
}

fn tail_of(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}
