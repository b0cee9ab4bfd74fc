//! Conflicts: a commit fails only if a reply would be another now.

use super::{Case, Ctx, Outcome, case};
use crate::raw::op;

/// Requests; `*` stands for the node of the case.
type Requests = &'static [(u32, &'static str)];

/// Sends `inside` in a transaction and `meanwhile` outside it. The commit must return `end`.
fn conflict(c: &mut Ctx<'_>, inside: Requests, meanwhile: Requests, end: &str) -> Outcome {
    let base = c.base.clone();
    let mut other = c.another()?;
    other.ok(op::WRITE, &format!("{base}/p/a|A"))?;
    let tx = c.dom0.begin()?;
    for (ty, payload) in inside {
        let _ = c.dom0.tx(tx, *ty, &payload.replace('*', &base))?;
    }
    for (ty, payload) in meanwhile {
        other.ok(*ty, &payload.replace('*', &base))?;
    }
    c.dom0.end(tx, "T|", end)
}

const COMMITS: &str = "OK|";
const CONFLICTS: &str = "EAGAIN";
const WRITES_Z: (u32, &str) = (op::WRITE, "*/z|1");

pub(super) const CASES: &[Case] = &[
    case("conflict/value-read-is-changed", |c| {
        conflict(c, &[(op::READ, "*/p/a|"), WRITES_Z], &[(op::WRITE, "*/p/a|new")], CONFLICTS)
    }),
    case("conflict/read-only-always-commits", |c| {
        conflict(c, &[(op::READ, "*/p/a|")], &[(op::WRITE, "*/p/a|new")], COMMITS)
    }),
    case("conflict/same-value-written-meanwhile", |c| {
        conflict(c, &[(op::READ, "*/p/a|"), WRITES_Z], &[(op::WRITE, "*/p/a|A")], COMMITS)
    }),
    case("conflict/value-changed-and-changed-back", |c| {
        let meanwhile = &[(op::WRITE, "*/p/a|x"), (op::WRITE, "*/p/a|A")];
        conflict(c, &[(op::READ, "*/p/a|"), WRITES_Z], meanwhile, COMMITS)
    }),
    case("conflict/written-not-read", |c| {
        conflict(c, &[(op::WRITE, "*/p/a|tx")], &[(op::WRITE, "*/p/a|other")], COMMITS)?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("p/a")), "tx")
    }),
    case("conflict/siblings-created", |c| {
        conflict(c, &[(op::WRITE, "*/p/x|1")], &[(op::WRITE, "*/p/y|2")], COMMITS)?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("p/x")), "1")?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("p/y")), "2")
    }),
    case("conflict/child-created-value-of-parent-written", |c| {
        conflict(c, &[(op::WRITE, "*/p/x|1")], &[(op::WRITE, "*/p|v")], COMMITS)?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("p")), "v")
    }),
    case("conflict/listed-then-child-created", |c| {
        conflict(c, &[(op::DIRECTORY, "*/p|"), WRITES_Z], &[(op::WRITE, "*/p/y|2")], CONFLICTS)
    }),
    case("conflict/read-then-child-created", |c| {
        conflict(c, &[(op::READ, "*/p|"), WRITES_Z], &[(op::WRITE, "*/p/y|2")], COMMITS)
    }),
    case("conflict/not-found-then-created", |c| {
        conflict(c, &[(op::READ, "*/p/x|"), WRITES_Z], &[(op::WRITE, "*/p/x|2")], CONFLICTS)
    }),
    case("conflict/found-then-removed", |c| {
        conflict(c, &[(op::READ, "*/p/a|"), WRITES_Z], &[(op::RM, "*/p/a|")], CONFLICTS)
    }),
    case("conflict/created-below-what-is-removed", |c| {
        conflict(c, &[(op::WRITE, "*/p/x|1")], &[(op::RM, "*/p|")], COMMITS)?;
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.at("p")), "x|")
    }),
    case("conflict/removed-while-written-into", |c| {
        conflict(c, &[(op::RM, "*/p|")], &[(op::WRITE, "*/p/x|2")], COMMITS)?;
        c.dom0.fails(op::READ, &format!("{}|", c.at("p")), "ENOENT")
    }),
    case("conflict/permissions-change-without-effect", |c| {
        let meanwhile = &[(op::SET_PERMS, "*/p/a|b0|")];
        conflict(c, &[(op::READ, "*/p/a|"), WRITES_Z], meanwhile, COMMITS)
    }),
    case("conflict/permissions-read-are-changed", |c| {
        let meanwhile = &[(op::SET_PERMS, "*/p/a|b0|")];
        conflict(c, &[(op::GET_PERMS, "*/p/a|"), WRITES_Z], meanwhile, CONFLICTS)
    }),
    case("conflict/nothing-in-common", |c| {
        let inside = &[(op::READ, "*/p/a|"), (op::WRITE, "*/p/a|1")];
        conflict(c, inside, &[(op::WRITE, "*/q|1"), (op::MKDIR, "*/r|")], COMMITS)
    }),
    case("conflict/empty-transaction", |c| conflict(c, &[], &[(op::WRITE, "*/p/a|new")], COMMITS)),
    case("conflict/leaves-nothing-behind", |c| {
        let inside = &[(op::READ, "*/p/a|"), WRITES_Z, (op::RM, "*/p/a|")];
        conflict(c, inside, &[(op::WRITE, "*/p/a|new")], CONFLICTS)?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("p/a")), "new")?;
        c.dom0.fails(op::READ, &format!("{}|", c.at("z")), "ENOENT")
    }),
    case("conflict/both-read-and-write-the-same", |c| {
        // A lost update: one of the two commits must fail.
        let path = c.at("n");
        let mut other = c.another()?;
        c.dom0.ok(op::WRITE, &format!("{path}|0"))?;
        let (a, b) = (c.dom0.begin()?, other.begin()?);
        c.dom0.gives_in(a, op::READ, &format!("{path}|"), "0")?;
        other.gives_in(b, op::READ, &format!("{path}|"), "0")?;
        c.dom0.gives_in(a, op::WRITE, &format!("{path}|1"), "OK|")?;
        other.gives_in(b, op::WRITE, &format!("{path}|1"), "OK|")?;
        c.dom0.end(a, "T|", "OK|")?;
        other.end(b, "T|", "EAGAIN")
    }),
    case("conflict/two-removals-of-the-same", |c| {
        let path = c.at("p");
        let mut other = c.another()?;
        c.dom0.ok(op::WRITE, &format!("{path}/a|A"))?;
        let (a, b) = (c.dom0.begin()?, other.begin()?);
        c.dom0.gives_in(a, op::RM, &format!("{path}|"), "OK|")?;
        other.gives_in(b, op::RM, &format!("{path}|"), "OK|")?;
        c.dom0.end(a, "T|", "OK|")?;
        other.end(b, "T|", "OK|")
    }),
];
