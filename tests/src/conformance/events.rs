//! Events: their receivers, their order, when they merge, and that none is lost.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    case("events/come-before-the-reply-that-caused-them", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{}|t|", c.base))?;
        for (ty, payload) in [
            (op::WRITE, format!("{path}|v")),
            (op::MKDIR, format!("{path}/x|")),
            (op::SET_PERMS, format!("{path}|n0|")),
            (op::RM, format!("{path}|")),
        ] {
            c.dom0.ok(ty, &payload)?;
            if c.dom0.order != [op::WATCH_EVENT, ty] {
                return Err(format!("type {ty}: messages came as {:?}", c.dom0.order));
            }
        }
        Ok(())
    }),
    case("events/of-a-commit-come-before-its-reply", |c| {
        c.dom0.watch(&format!("{}|t|", c.base))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{}|v", c.at("a")), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        if c.dom0.order != [op::WATCH_EVENT, op::TRANSACTION_END] {
            return Err(format!("messages came as {:?}", c.dom0.order));
        }
        Ok(())
    }),
    case("events/ids-are-0", |c| {
        // Conn::event checks the request id.
        let path = c.at("a");
        let mut other = c.another()?;
        other.watch(&format!("{path}|t|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        other.event(&format!("{path}|t|"))
    }),
    case("events/reach-other-connections-in-order", |c| {
        let mut other = c.another()?;
        other.watch(&format!("{}|t|", c.base))?;
        for i in 0..10 {
            c.dom0.ok(op::WRITE, &format!("{}|v", c.at(&i.to_string())))?;
        }
        for i in 0..10 {
            other.event(&format!("{}|t|", c.at(&i.to_string())))?;
        }
        Ok(())
    }),
    case("events/a-read-after-an-event-sees-the-change", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        other.watch(&format!("{path}|t|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}|new"))?;
        other.event(&format!("{path}|t|"))?;
        other.gives(op::READ, &format!("{path}|"), "new")
    }),
    case("events/one-for-each-watch-of-a-connection", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|1|"))?;
        c.dom0.watch(&format!("{}|2|", c.base))?;
        c.dom0.watch(&format!("{path}|3|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&format!("{path}|1|"), &format!("{path}|2|"), &format!("{path}|3|")])
    }),
    case("events/removal-deepest-first", |c| {
        let base = c.at("a");
        for name in ["b/c", "d", "d/e"] {
            c.dom0.ok(op::WRITE, &format!("{base}/{name}|"))?;
        }
        for name in ["", "/b", "/b/c", "/d", "/d/e"] {
            c.dom0.watch(&format!("{base}{name}|t|"))?;
        }
        c.dom0.ok(op::RM, &format!("{base}|"))?;
        let expected = ["/b/c", "/b", "/d/e", "/d", ""].map(|name| format!("{base}{name}|t|"));
        c.dom0.events(&expected.each_ref().map(String::as_str))
    }),
    case("events/none-from-an-aborted-transaction", |c| {
        c.dom0.watch(&format!("{}|t|", c.base))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{}|v", c.at("a")), "OK|")?;
        c.dom0.events(&[])?;
        c.dom0.end(tx, "F|", "OK|")?;
        c.dom0.events(&[])
    }),
    case("events/none-from-a-conflict", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        let tx = c.dom0.begin()?;
        c.dom0.fails_in(tx, op::READ, &format!("{path}|"), "ENOENT")?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{}|v", c.at("b")), "OK|")?;
        other.ok(op::WRITE, &format!("{path}|v"))?;
        other.watch(&format!("{}|t|", c.base))?;
        c.dom0.end(tx, "T|", "EAGAIN")?;
        other.events(&[])
    }),
    case("events/one-for-each-path-of-a-commit", |c| {
        let (a, b) = (c.at("a"), c.at("b"));
        c.dom0.watch(&format!("{}|t|", c.base))?;
        let tx = c.dom0.begin()?;
        for path in [&b, &a, &b] {
            c.dom0.gives_in(tx, op::WRITE, &format!("{path}|v"), "OK|")?;
        }
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.events(&[&format!("{b}|t|"), &format!("{a}|t|")])
    }),
    case("events/created-and-removed-in-a-transaction-is-nothing", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{}|t|", c.base))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.gives_in(tx, op::RM, &format!("{path}|"), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.events(&[])
    }),
    guest("events/only-for-those-who-may-read", |c| {
        let mut guest = c.guest()?;
        let closed = c.node("closed", "", "n0|")?;
        let open = c.node("open", "", &format!("n0|r{}|", guest.domid))?;
        guest.conn.watch(&format!("{}|t|", c.base))?;
        c.dom0.ok(op::WRITE, &format!("{closed}|v"))?;
        c.dom0.ok(op::WRITE, &format!("{open}|v"))?;
        guest.conn.event(&format!("{open}|t|"))?;
        guest.conn.events(&[])
    }),
    guest("events/for-readers-of-the-parent", |c| {
        let mut guest = c.guest()?;
        let parent = c.node("open", "", &format!("n0|r{}|", guest.domid))?;
        let child = c.node("open/closed", "", "n0|")?;
        guest.conn.watch(&format!("{parent}|t|"))?;
        c.dom0.ok(op::WRITE, &format!("{child}|v"))?;
        guest.conn.event(&format!("{child}|t|"))?;
        c.dom0.ok(op::RM, &format!("{child}|"))?;
        guest.conn.event(&format!("{child}|t|"))
    }),
    guest("events/for-readers-of-the-parent-of-a-node-removed-in-a-transaction", |c| {
        let mut guest = c.guest()?;
        let parent = c.node("open", "", &format!("n0|r{}|", guest.domid))?;
        let child = c.node("open/closed", "", "n0|")?;
        guest.conn.watch(&format!("{parent}|t|"))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::RM, &format!("{child}|"), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        guest.conn.event(&format!("{child}|t|"))
    }),
    guest("events/rights-that-are-taken-away-are-told", |c| {
        let mut guest = c.guest()?;
        let path = c.node("a", "", &format!("n0|r{}|", guest.domid))?;
        guest.conn.watch(&format!("{path}|t|"))?;
        c.dom0.ok(op::SET_PERMS, &format!("{path}|n0|"))?;
        guest.conn.event(&format!("{path}|t|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        guest.conn.events(&[])
    }),
    guest("events/first-one-is-not-filtered", |c| {
        let mut guest = c.guest()?;
        let closed = c.node("closed", "", "n0|")?;
        guest.conn.watch(&format!("{closed}|t|"))
    }),
    guest("events/unread-ones-are-not-lost", |c| {
        let mut guest = c.guest()?;
        guest.conn.watch("data|t|")?;
        for i in 0..200 {
            c.dom0.ok(op::WRITE, &format!("{}/data/{i}|v", guest.home))?;
        }
        for i in 0..200 {
            guest.conn.event(&format!("data/{i}|t|"))?;
        }
        Ok(())
    }),
];
