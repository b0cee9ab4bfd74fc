//! The most expensive single step of the engine, found by fuzzing and by [`search`].
//!
//! A step is what the main thread of a server executes without interruption: a request, the death of a
//! domain, or the events that a connection fetches. All clients wait during a step. A program is a
//! list of genes of four bytes. One gene can stand for many requests of all guests: "100 guests create
//! a chain of 900 nodes each".

use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use xenstore_store::{Config, Engine};

use super::guests::{Answer, Guests};
use crate::raw::op;

/// Number of guests. The last one dies most often.
pub const GUESTS: u16 = 24;
/// Bytes of a gene.
const GENE: usize = 4;
/// Maxima of a program: genes and requests.
const GENES: usize = 40;
const REQUESTS: usize = 8000;
/// The number that stands for all guests.
const ALL: u8 = 0xff;
/// Maximal levels of a path of a guest.
const LEVELS: usize = 980;

/// Units of deferred work that a server executes without interruption.
const PIECE: u32 = 4096;

/// Measures a step: the difference between its values after and before.
pub type Meter = dyn Fn(&Engine) -> u64;

/// A step and its cost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// The cost, in units of the meter.
    pub cost: u64,
    /// A description of the step.
    pub what: String,
    /// The index of its gene.
    pub gene: usize,
}

/// CPU time of this thread, in nanoseconds: the least time that other connections wait.
pub fn cpu_time(_: &Engine) -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

/// The execution of a program.
struct Run<'m> {
    guests: Guests,
    meter: &'m Meter,
    /// Open transactions, by guest.
    open: Vec<Vec<u32>>,
    /// Length of the next value, which changes so that no two writes are equal.
    written: usize,
    requests: usize,
    gene: usize,
    worst: Step,
}

impl Run<'_> {
    /// Executes a step, and then the deferred work of the engine.
    fn step<T>(&mut self, what: impl Fn() -> String, step: impl FnOnce(&mut Guests) -> T) -> T {
        let result = self.measure(&what, step);
        while self.guests.engine.has_work() {
            let what = || format!("a piece of what was left of {}", what());
            self.measure(&what, |guests| guests.engine.work(PIECE));
        }
        result
    }

    /// Executes and measures a step, and stores it if it is the most expensive so far.
    fn measure<T>(&mut self, what: &dyn Fn() -> String, step: impl FnOnce(&mut Guests) -> T) -> T {
        let before = (self.meter)(&self.guests.engine);
        let result = step(&mut self.guests);
        let cost = (self.meter)(&self.guests.engine) - before;
        if cost > self.worst.cost {
            self.worst = Step { cost, what: what(), gene: self.gene };
        }
        result
    }

    /// Sends a request of a guest; with `in_tx`, in its newest transaction if it has one.
    fn ask(&mut self, who: usize, in_tx: bool, ty: u32, payload: &str) {
        if self.requests == REQUESTS {
            return;
        }
        self.requests += 1;
        let tx = self.open[who].last().copied().filter(|_| in_tx).unwrap_or(0);
        let text = &payload[..payload.len().min(40)];
        let what = || format!("type {ty} of guest {who}, tx {tx}: {text:?}");
        let answer = self.step(what, |guests| guests.ask(who, tx, ty, payload.as_bytes()));
        match (ty, answer) {
            (op::TRANSACTION_START, Answer::Reply(op::TRANSACTION_START, reply)) => {
                let id = std::str::from_utf8(&reply)
                    .ok()
                    .and_then(|id| id.trim_end_matches('\0').parse::<u32>().ok());
                self.open[who].extend(id);
            }
            (op::TRANSACTION_END, Answer::Reply(..)) => drop(self.open[who].pop()),
            _ => {}
        }
    }

    /// Executes a gene for one guest.
    fn carry_out(&mut self, who: u16, [kind, _, a, b]: [u8; GENE]) {
        let (at, count) = (usize::from(who), usize::from(b) * 4);
        let in_tx = !self.open[at].is_empty() && a & 0x80 != 0;
        // The node: the guest's own or the shared one, and a chain below it.
        let base = match a & 3 {
            0 => "a".to_owned(),
            1 => "w".to_owned(),
            2 => format!("/local/domain/{}/w", 1 + who % GUESTS),
            _ => "/local/domain/1/w".to_owned(),
        };
        self.written += 1;
        let value = "v".repeat(self.written % 60);
        match kind % 14 {
            0 => self.ask(at, in_tx, op::WRITE, &format!("{base}\0{value}")),
            1 => {
                let path = format!("{base}{}", "/x".repeat(count.min(LEVELS)));
                self.ask(at, in_tx, op::WRITE, &format!("{path}\0{value}"));
            }
            2 => (0..count / 4).for_each(|child| {
                self.ask(at, in_tx, op::WRITE, &format!("{base}/{child}\0{value}"));
            }),
            3 => {
                // At most five entries; one names the last guest.
                let others = (0..b & 3).map(|other| format!("r{}\0", 1 + u16::from(other)));
                let others: String = others.collect();
                let perms = format!("{base}\0n{who}\0r{GUESTS}\0{others}");
                self.ask(at, in_tx, op::SET_PERMS, &perms);
            }
            4 => self.ask(at, in_tx, op::SET_PERMS, &format!("{base}\0r{who}\0")),
            5 => self.ask(at, in_tx, op::RM, &format!("{base}\0")),
            6 => (0..count.min(128)).for_each(|watch| {
                self.ask(at, false, op::WATCH, &format!("{base}\0{watch}\0"));
            }),
            7 => self.ask(at, false, op::RESET_WATCHES, "\0"),
            8 => self.ask(at, false, op::TRANSACTION_START, "\0"),
            9 => self.ask(at, true, op::TRANSACTION_END, if b & 7 == 0 { "F\0" } else { "T\0" }),
            10 => self.ask(at, in_tx, op::DIRECTORY, &format!("{base}\0")),
            11 => self.ask(at, in_tx, op::DIRECTORY_PART, &format!("{base}\0{count}\0")),
            12 => {
                let what = || format!("events of guest {who}");
                self.step(what, |guests| guests.drain(usize::from(who)));
            }
            _ => {
                self.step(|| format!("death of guest {who}"), |guests| guests.dies(who));
                self.open[at].clear();
                self.guests.comes_back(who);
            }
        }
    }
}

/// Executes a program. Returns its most expensive step by this meter.
pub fn dearest(program: &[u8], meter: &Meter) -> Step {
    carried_out(program, meter).worst
}

fn carried_out<'m>(program: &[u8], meter: &'m Meter) -> Run<'m> {
    let guests = Guests::new(&Config::default(), GUESTS);
    let open = vec![Vec::new(); usize::from(GUESTS) + 1];
    let worst = Step::default();
    let mut run = Run { guests, meter, open, written: 0, requests: 0, gene: 0, worst };
    for (number, gene) in program.chunks_exact(GENE).take(GENES).enumerate() {
        let gene = [gene[0], gene[1], gene[2], gene[3]];
        run.gene = number;
        match gene[1] {
            ALL => (1..=GUESTS).for_each(|who| run.carry_out(who, gene)),
            who => run.carry_out(1 + u16::from(who) % GUESTS, gene),
        }
    }
    run
}

/// The fuzz target: the engine is sound after any program. It does not measure steps, since the
/// sanitizers of a fuzzer distort their costs; [`search`] does.
pub fn dear(data: &[u8]) {
    carried_out(data, &|_| 0).guests.engine.check().expect("the engine is sound");
}

/// A generator whose numbers depend only on its seed.
struct Random {
    state: u64,
    /// The node of most genes of a hill, so that they affect each other.
    place: u8,
}

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005);
        self.state = self.state.wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.state >> 33).unwrap_or(0) % limit
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap_or(0)
    }

    fn gene(&mut self) -> [u8; GENE] {
        // In three of four cases: all guests, the first or the last one.
        let last = u8::try_from(GUESTS - 1).unwrap_or(0);
        let who = [ALL, ALL, ALL, 0, last, self.byte()][self.below(6)];
        let place = [self.place, self.place, self.place, self.byte()][self.below(4)];
        let in_tx = [0, 0x80][self.below(2)];
        [self.byte(), who, place & 0x7f | in_tx, [ALL, ALL, self.byte()][self.below(3)]]
    }

    /// A random program to start from.
    fn program(&mut self) -> Vec<u8> {
        self.place = self.byte();
        (0..4 + self.below(12)).flat_map(|_| self.gene()).collect()
    }

    /// A changed program: genes are added, removed, changed, repeated or exchanged.
    fn mutate(&mut self, program: &[u8]) -> Vec<u8> {
        let mut genes: Vec<[u8; GENE]> =
            program.chunks_exact(GENE).map(|gene| [gene[0], gene[1], gene[2], gene[3]]).collect();
        for _ in 0..=self.below(3) {
            let (len, gene) = (genes.len(), self.gene());
            let at = self.below(len + 1);
            match self.below(6) {
                0 | 1 if len < GENES => genes.insert(at, gene),
                2 if at < len => drop(genes.remove(at)),
                3 if at < len => genes[at][self.below(GENE)] = self.byte(),
                4 if at < len => genes[at] = gene,
                5 if at < len => genes.swap(at, self.below(len)),
                _ => {}
            }
        }
        genes.concat()
    }
}

/// The programs of the committed corpus, in order of their names.
pub fn known() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/dear");
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = files.map(|file| file.path()).collect();
    paths.sort();
    paths.iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

/// Searches for the program with the most expensive step while `continues` returns true. The search climbs
/// hills: it mutates a program, and starts at another one after `PATIENCE` mutations without
/// progress. It starts at the known programs, then at random ones of this seed.
pub fn search(
    seed: u64,
    meter: &Meter,
    known: &[Vec<u8>],
    mut continues: impl FnMut() -> bool,
    mut found: impl FnMut(&Step, &[u8]),
) -> (Step, Vec<u8>) {
    /// Mutations without progress before the search starts at another program.
    const PATIENCE: usize = 60;
    let mut random = Random { state: seed, place: 0 };
    let mut best: (Step, Vec<u8>) = Default::default();
    let mut hill: (Step, Vec<u8>) = Default::default();
    let (mut in_vain, mut known) = (0, known.iter());
    while continues() {
        let program = match hill.1.is_empty() {
            true => known.next().cloned().unwrap_or_else(|| random.program()),
            false => random.mutate(&hill.1),
        };
        // The smaller of two runs: other processes may have disturbed one of them.
        let mut step = dearest(&program, meter);
        if step.cost > hill.0.cost {
            let again = dearest(&program, meter);
            step = if again.cost < step.cost { again } else { step };
        }
        in_vain += 1;
        if step.cost > hill.0.cost {
            hill = (step, program);
            in_vain = 0;
        }
        if hill.0.cost > best.0.cost {
            best.clone_from(&hill);
            found(&best.0, &best.1);
        }
        if in_vain > PATIENCE {
            (hill, in_vain) = Default::default();
        }
    }
    best
}

/// A program as text, one gene per line: operation, guest, node and amount.
pub fn describe(program: &[u8]) -> String {
    const KINDS: [&str; 14] = [
        "write",
        "chain",
        "children",
        "perms with the last guest",
        "perms for all to read",
        "remove",
        "watches",
        "reset watches",
        "start",
        "end",
        "directory",
        "directory part",
        "drain",
        "die",
    ];
    let genes = program.chunks_exact(GENE).take(GENES).map(|gene| {
        let who = match gene[1] {
            ALL => "all guests".into(),
            who => format!("guest {}", 1 + u16::from(who) % GUESTS),
        };
        let place = ["a", "w", "own w by its full path", "w of guest 1"][usize::from(gene[2] & 3)];
        let tx = if gene[2] & 0x80 != 0 { ", in its transaction" } else { "" };
        let kind = KINDS[usize::from(gene[0] % 14)];
        format!("  {who}: {kind}, at {place}, amount {}{tx}\n", gene[3])
    });
    genes.collect()
}
