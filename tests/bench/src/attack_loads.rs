//! Guests that make the daemon work as much as they can, and a quiet client beside them.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use xenstore_tests::attacks::{Attack, Prepared, Running};
use xenstore_tests::raw::op;

use crate::bars::Bar::LatencyAtMost;
use crate::meter::{Meter, Result, memory};
use crate::rows::{Case, Load, Row, Stage, case, row};
use crate::wire::Client;

const GROUP: &str = "Attacks";
/// Guests of the rows.
const GUESTS: [u16; 2] = [60, 100];

pub(crate) fn cases() -> Vec<Case> {
    Attack::ALL.map(|attack| case(GROUP, GUESTS.map(|guests| one(attack, guests)))).into()
}

fn one(attack: Attack, guests: u16) -> Row {
    let name = match attack {
        Attack::Death => format!("a domain dies that chains of {guests} guests name"),
        Attack::FanOut => format!("a commit of 960 writes below what {guests} guests watch"),
        Attack::Protected => {
            format!("1,000 writes of {guests} guests beside a protected transaction")
        }
    };
    let prepare = move |stage: &Stage| Struck::prepare(stage, attack, guests);
    row(name, prepare).item("guest").once().bar(LatencyAtMost(10.0))
}

/// An attack that has been prepared.
struct Struck {
    arena: Running,
    attack: Prepared,
    quiet: Client,
    pid: u32,
    guests: u16,
}

impl Struck {
    fn prepare(stage: &Stage, attack: Attack, guests: u16) -> Result<Struck> {
        let xen = stage.subject.xen()?;
        let mut arena = Running::new(&stage.socket(), Path::new(&xen))?;
        let attack = attack.prepare(&mut arena, guests)?;
        let quiet = stage.connect()?;
        Ok(Struck { arena, attack, quiet, pid: stage.subject.pid(), guests })
    }
}

impl Load for Struck {
    /// The strike is the operation. The latency is the longest wait of the quiet client from the strike
    /// on, and the memory what is left for each guest when it is over.
    fn round(&mut self, meter: &mut Meter) -> Result<()> {
        let (before, over) = (memory(self.pid, "RssAnon")?, AtomicBool::new(false));
        let Struck { arena, attack, quiet, .. } = self;
        meter.measure(|tally| {
            let longest = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| -> std::result::Result<_, String> {
                    let mut longest = std::time::Duration::ZERO;
                    while !over.load(Ordering::Relaxed) {
                        let asked = Instant::now();
                        quiet.ok(op::READ, "/tool|").map_err(|error| error.to_string())?;
                        longest = longest.max(asked.elapsed());
                    }
                    Ok(longest)
                });
                let struck = attack.strike(arena);
                over.store(true, Ordering::Relaxed);
                let longest = waiting.join().map_err(|_| "the quiet client has panicked")?;
                struck.and(longest)
            })?;
            tally.ops += 1;
            tally.latencies.push(longest);
            Ok(())
        })?;
        meter.bytes_each = Some((memory(self.pid, "RssAnon")? - before) / f64::from(self.guests));
        Ok(())
    }
}
