//! READ, WRITE, MKDIR, RM.

use super::{Case, case, guest};
use crate::raw::{op, text};

pub(super) const CASES: &[Case] = &[
    case("read/value-has-no-nul-added", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|hello"))?;
        c.dom0.gives(op::READ, &format!("{path}|"), "hello")
    }),
    case("read/any-bytes", |c| {
        let path = c.at("a");
        let value: Vec<u8> = (0..=255).collect();
        let payload = [format!("{path}\0").as_bytes(), &value].concat();
        c.dom0.ask(op::WRITE, 0, &payload)??;
        let got = c.dom0.ask(op::READ, 0, format!("{path}\0").as_bytes())??;
        if got == value { Ok(()) } else { Err(text(&got)) }
    }),
    case("read/empty-value", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|"))?;
        c.dom0.gives(op::READ, &format!("{path}|"), "")
    }),
    case("read/missing-is-enoent", |c| {
        c.dom0.fails(op::READ, &format!("{}|", c.at("a")), "ENOENT")?;
        c.dom0.fails(op::READ, &format!("{}|", c.at("a/b/c")), "ENOENT")
    }),
    case("read/in-a-transaction", |c| {
        let path = c.at("a");
        let tx = c.dom0.begin()?;
        c.dom0.fails_in(tx, op::READ, &format!("{path}|"), "ENOENT")?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.gives_in(tx, op::READ, &format!("{path}|"), "v")?;
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "v")
    }),
    case("write/replaces-the-value-and-nothing-else", |c| {
        let path = c.node("a", "1", "n0|r5|")?;
        let perms = c.dom0.ok(op::GET_PERMS, &format!("{path}|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}/child|x"))?;
        c.dom0.gives(op::WRITE, &format!("{path}|2"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "2")?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), &perms)?;
        c.dom0.gives(op::DIRECTORY, &format!("{path}|"), "child|")
    }),
    case("write/creates-parents-with-empty-values", |c| {
        c.dom0.gives(op::WRITE, &format!("{}|v", c.at("x/y/z")), "OK|")?;
        for name in ["x", "x/y"] {
            c.dom0.gives(op::READ, &format!("{}|", c.at(name)), "")?;
        }
        c.dom0.gives(op::READ, &format!("{}|", c.at("x/y/z")), "v")
    }),
    case("write/the-root-has-a-value", |c| {
        let before = c.dom0.ok(op::READ, "/|")?;
        c.dom0.gives(op::WRITE, "/|root", "OK|")?;
        c.dom0.gives(op::READ, "/|", "root")?;
        c.dom0.gives(op::WRITE, &format!("/|{before}"), "OK|")
    }),
    case("write/values-may-contain-nul", |c| {
        let path = c.at("a");
        c.dom0.gives(op::WRITE, &format!("{path}|a|b||"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "a|b||")
    }),
    case("write/new-nodes-get-the-permissions-of-the-nearest-ancestor", |c| {
        let path = c.node("a", "", "r0|b5|")?;
        let perms = c.dom0.ok(op::GET_PERMS, &format!("{path}|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}/x/y|v"))?;
        for name in ["x", "x/y"] {
            c.dom0.gives(op::GET_PERMS, &format!("{path}/{name}|"), &perms)?;
        }
        Ok(())
    }),
    guest("write/guests-own-what-they-create", |c| {
        let mut guest = c.guest()?;
        let domid = guest.domid;
        let path = c.node("shared", "", &format!("n0|b{domid}|"))?;
        guest.conn.gives(op::WRITE, &format!("{path}/x/y|v"), "OK|")?;
        for name in ["x", "x/y"] {
            let expected = format!("n{domid}|b{domid}|");
            c.dom0.gives(op::GET_PERMS, &format!("{path}/{name}|"), &expected)?;
        }
        Ok(())
    }),
    guest("write/dom0-does-not-take-over-what-it-creates", |c| {
        let guest = c.guest()?;
        c.dom0.ok(op::WRITE, &format!("{}/x|v", guest.home))?;
        let expected = format!("n{}|", guest.domid);
        c.dom0.gives(op::GET_PERMS, &format!("{}/x|", guest.home), &expected)
    }),
    guest("write/needs-write-access-to-the-node-alone", |c| {
        let mut guest = c.guest()?;
        let domid = guest.domid;
        let open = c.node("closed/open", "1", &format!("n0|w{domid}|"))?;
        let closed = c.at("closed");
        guest.conn.gives(op::WRITE, &format!("{open}|2"), "OK|")?;
        guest.conn.fails(op::READ, &format!("{open}|"), "EACCES")?;
        guest.conn.fails(op::WRITE, &format!("{closed}|2"), "EACCES")?;
        guest.conn.fails(op::WRITE, &format!("{closed}/new|2"), "EACCES")
    }),
    case("mkdir/creates-an-empty-node-and-parents", |c| {
        c.dom0.gives(op::MKDIR, &format!("{}|", c.at("a/b")), "OK|")?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("a/b")), "")?;
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.at("a")), "b|")
    }),
    case("mkdir/of-what-is-there-changes-nothing", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.gives(op::MKDIR, &format!("{path}|"), "OK|")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "v")?;
        c.dom0.events(&[])
    }),
    case("mkdir/of-the-root", |c| c.dom0.gives(op::MKDIR, "/|", "OK|")),
    guest("mkdir/needs-write-access", |c| {
        let mut guest = c.guest()?;
        let readable = c.node("r", "", &format!("n0|r{}|", guest.domid))?;
        guest.conn.fails(op::MKDIR, &format!("{readable}|"), "EACCES")?;
        guest.conn.fails(op::MKDIR, &format!("{readable}/x|"), "EACCES")?;
        guest.conn.fails(op::MKDIR, "/|", "EACCES")
    }),
    case("mkdir/in-a-transaction", |c| {
        let path = c.at("a");
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::MKDIR, &format!("{path}|"), "OK|")?;
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")?;
        c.dom0.end(tx, "F|", "OK|")?;
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")
    }),
    case("rm/takes-all-below-with-it", |c| {
        c.dom0.ok(op::WRITE, &format!("{}|v", c.at("a/b/c")))?;
        c.dom0.gives(op::RM, &format!("{}|", c.at("a")), "OK|")?;
        for name in ["a", "a/b", "a/b/c"] {
            c.dom0.fails(op::READ, &format!("{}|", c.at(name)), "ENOENT")?;
        }
        c.dom0.gives(op::DIRECTORY, &format!("{}|", c.base), "")
    }),
    case("rm/absent-below-an-existing-parent-is-ok", |c| {
        c.dom0.gives(op::RM, &format!("{}|", c.at("a")), "OK|")
    }),
    case("rm/absent-below-an-absent-parent-is-enoent", |c| {
        c.dom0.fails(op::RM, &format!("{}|", c.at("a/b")), "ENOENT")
    }),
    case("rm/in-a-transaction", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::RM, &format!("{path}|"), "OK|")?;
        c.dom0.fails_in(tx, op::READ, &format!("{path}|"), "ENOENT")?;
        c.dom0.gives(op::READ, &format!("{path}|"), "v")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")
    }),
    guest("rm/needs-write-access-to-the-top-node-alone", |c| {
        let mut guest = c.guest()?;
        let top = c.node("top", "", &format!("n0|w{}|", guest.domid))?;
        c.node("top/closed", "", "n0|")?;
        guest.conn.fails(op::RM, &format!("{top}/closed|"), "EACCES")?;
        guest.conn.gives(op::RM, &format!("{top}|"), "OK|")?;
        c.dom0.fails(op::READ, &format!("{top}/closed|"), "ENOENT")
    }),
    guest("rm/absent-without-access-is-eacces", |c| {
        let mut guest = c.guest()?;
        let top = c.node("top", "", &format!("n0|r{}|", guest.domid))?;
        guest.conn.fails(op::RM, &format!("{top}/absent|"), "EACCES")
    }),
    guest("rm/the-root-without-access-is-eacces", |c| {
        c.guest()?.conn.fails(op::RM, "/|", "EACCES")
    }),
    case("rm/the-root-is-einval", |c| {
        // In a transaction: a daemon that allows it would remove all nodes.
        let tx = c.dom0.begin()?;
        let result = c.dom0.fails_in(tx, op::RM, "/|", "EINVAL");
        c.dom0.tx(tx, op::TRANSACTION_END, "F|")?.map_err(|e| format!("end: {e}"))?;
        result
    }),
];
