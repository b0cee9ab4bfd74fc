//! The conformance suite: the required behaviour of a XenStore daemon, one file per subject.
//!
//! A case states the behaviour of this project's daemon. It is that of C xenstored of the newest Xen,
//! except for the deliberate differences in `docs/differences.md`. For each other daemon, a list has the
//! cases in which it differs, its answer and the reason. A listed case that passes or has another answer
//! is a failure too, so that the lists remain correct.

mod advisories;
mod control;
mod differences;
mod directory;
mod domains;
mod events;
mod every;
mod framing;
mod nodes;
mod paths;
mod perms;
mod quotas;
mod settings;
mod transactions;
mod tx_conflicts;
mod watches;

pub use differences::{Differences, observed};

use std::sync::atomic::{AtomicU32, Ordering};

use crate::fake_guest::FakeGuest;
use crate::raw::{Conn, op};
use crate::target::Target;

/// The result of a case: nothing, or what went wrong.
pub type Outcome = Result<(), String>;

/// One case.
pub struct Case {
    /// `behaviour/what-must-be`.
    pub name: &'static str,
    /// True if it needs an unprivileged caller.
    pub guests: bool,
    /// Why it cannot run over dom0's ring, which all cases share; `None` if it can.
    pub not_on_a_ring: Option<&'static str>,
    run: fn(&mut Ctx<'_>) -> Outcome,
}

/// A case for a connection of any caller.
const fn case(name: &'static str, run: fn(&mut Ctx<'_>) -> Outcome) -> Case {
    Case { name, guests: false, not_on_a_ring: None, run }
}

/// A case that needs guests.
const fn guest(name: &'static str, run: fn(&mut Ctx<'_>) -> Outcome) -> Case {
    Case { name, guests: true, not_on_a_ring: None, run }
}

impl Case {
    /// Restricts the case to sockets.
    const fn not_on_a_ring(self, why: &'static str) -> Case {
        Case { not_on_a_ring: Some(why), ..self }
    }
}

/// All cases.
pub fn cases() -> impl Iterator<Item = &'static Case> {
    [
        framing::CASES,
        paths::CASES,
        nodes::CASES,
        directory::CASES,
        perms::CASES,
        watches::CASES,
        events::CASES,
        transactions::CASES,
        tx_conflicts::CASES,
        domains::CASES,
        settings::CASES,
        quotas::CASES,
        control::CASES,
        every::CASES,
        advisories::CASES,
    ]
    .into_iter()
    .flatten()
}

/// The environment of a case.
pub struct Ctx<'t> {
    target: &'t Target,
    /// A connection of the control domain.
    pub dom0: Conn,
    /// The node below which the case works.
    pub base: String,
    /// Domains to destroy at the end.
    domids: Vec<u16>,
}

/// A guest and its connection. The guest owns its home.
pub struct Guest {
    /// The domid.
    pub domid: u16,
    /// The connection.
    pub conn: Conn,
    /// `/local/domain/N`.
    pub home: String,
}

impl Ctx<'_> {
    /// A path below the node of the case.
    pub fn at(&self, name: &str) -> String {
        format!("{}/{name}", self.base)
    }

    /// Opens another connection of the control domain.
    pub fn another(&self) -> Result<Conn, String> {
        self.target.dom0()
    }

    /// A domid that no domain has had.
    pub fn fresh_domid(&mut self) -> u16 {
        let domid = self.target.fresh_domid();
        self.domids.push(domid);
        domid
    }

    /// Creates a domain, and does not introduce it.
    pub fn create(&mut self) -> Result<(u16, Option<FakeGuest>), String> {
        let domid = self.fresh_domid();
        Ok((domid, self.target.create(domid)?))
    }

    /// Creates and introduces a guest.
    pub fn guest(&mut self) -> Result<Guest, String> {
        let domid = self.fresh_domid();
        self.guest_as(domid)
    }

    /// Creates and introduces a guest with this domid.
    pub fn guest_as(&mut self, domid: u16) -> Result<Guest, String> {
        let conn = self.target.guest(domid)?;
        let home = format!("/local/domain/{domid}");
        self.dom0.ok(op::WRITE, &format!("{home}|"))?;
        self.dom0.ok(op::SET_PERMS, &format!("{home}|n{domid}|"))?;
        Ok(Guest { domid, conn, home })
    }

    /// Shuts the domain down.
    pub fn shut_down(&self, domid: u16) -> Outcome {
        self.target.set_state(domid, false)
    }

    /// Destroys the domain. Returns when the daemon has handled it.
    pub fn destroy(&mut self, domid: u16) -> Outcome {
        let mut watcher = self.another()?;
        watcher.watch("@releaseDomain|destroy|")?;
        self.target.set_state(domid, true)?;
        watcher.event("@releaseDomain|destroy|")
    }

    /// Creates a node below the node of the case, with these permissions. Returns its path.
    pub fn node(&mut self, name: &str, value: &str, perms: &str) -> Result<String, String> {
        let path = self.at(name);
        self.dom0.ok(op::WRITE, &format!("{path}|{value}"))?;
        self.dom0.ok(op::SET_PERMS, &format!("{path}|{perms}"))?;
        Ok(path)
    }

    /// Returns true if the target knows which domains exist. In memory, a destroyed domain exists again
    /// when it is named, until it is destroyed again.
    pub fn knows_who_exists(&self) -> bool {
        !matches!(self.target, Target::Memory(_))
    }

    fn clean_up(&mut self) {
        let Ok(mut dom0) = self.target.dom0() else { return };
        for domid in std::mem::take(&mut self.domids) {
            let _ = dom0.tx(0, op::RELEASE, &format!("{domid}|"));
            let _ = dom0.tx(0, op::RM, &format!("/local/domain/{domid}|"));
        }
        let _ = dom0.tx(0, op::RM, &format!("{}|", self.base));
    }
}

/// The result of a case that was run against a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The behaviour is as required.
    Passed,
    /// The behaviour differs; the description.
    Failed(String),
    /// The behaviour differs as listed; the answer.
    Differs(String),
    /// The case was not run; the reason.
    Skipped(&'static str),
}

/// Returns an error if the daemon does not answer.
fn is_there(target: &Target) -> Outcome {
    let mut dom0 = target.dom0()?;
    dom0.ok(op::READ, "/tool|")?;
    target.take_main().map(|main| target.return_main(main))
}

/// Runs the cases whose name contains `filter`, each on the target of `start`, which is called again
/// when the daemon does not reply any more.
///
/// # Errors
///
/// Fails if the daemon cannot be started, or does not reply before the first case or after a restart.
pub fn run(
    mut start: impl FnMut() -> Result<Target, String>,
    differences: &Differences,
    filter: &str,
    mut report: impl FnMut(&Case, &Verdict),
) -> Result<(), String> {
    let mut start = || {
        let target = start()?;
        is_there(&target).map_err(|error| format!("the daemon does not answer: {error}"))?;
        Ok::<_, String>(target)
    };
    let mut target = start()?;
    for case in cases().filter(|case| case.name.contains(filter)) {
        if case.guests && !target.has_guests() {
            report(case, &Verdict::Skipped("needs guests"));
            continue;
        }
        if let (Target::Ring(..), Some(why)) = (&target, case.not_on_a_ring) {
            report(case, &Verdict::Skipped(why));
            continue;
        }
        let outcome = run_one(&target, case);
        let alive = is_there(&target);
        if alive.is_err() {
            target = start()?;
        }
        let outcome = outcome.and(alive.map_err(|e| format!("no answer afterwards: {e}")));
        let over_ring = matches!(target, Target::Ring(..));
        let listed = differences.lists(case.name, over_ring);
        let verdict = match outcome {
            Ok(()) if !listed => Verdict::Passed,
            Ok(()) => Verdict::Failed("passes, but is on the list of differences".into()),
            Err(how) if differences.pins(case.name, over_ring, &observed(&how)) => {
                Verdict::Differs(how)
            }
            Err(why) => Verdict::Failed(why),
        };
        report(case, &verdict);
    }
    Ok(())
}

fn run_one(target: &Target, case: &Case) -> Outcome {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let base = format!("/conformance-{}-{number}", std::process::id());
    let mut ctx = Ctx { target, dom0: target.take_main()?, base, domids: Vec::new() };
    ctx.dom0.ok(op::MKDIR, &format!("{}|", ctx.base))?;
    let outcome = (case.run)(&mut ctx);
    ctx.clean_up();
    target.return_main(ctx.dom0);
    outcome
}
