//! WATCH, UNWATCH, RESET_WATCHES, depth, and which watches a change fires.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    case("watch/first-event-follows-the-reply", |c| {
        let path = c.at("a");
        c.dom0.gives(op::WATCH, &format!("{path}|tok|"), "OK|")?;
        if !c.dom0.events.is_empty() {
            return Err("the event came first".into());
        }
        c.dom0.event(&format!("{path}|tok|"))?;
        c.dom0.events(&[])
    }),
    case("watch/needs-no-node", |c| c.dom0.watch(&format!("{}|t|", c.at("no/such/node")))),
    case("watch/twice-is-eexist", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.fails(op::WATCH, &format!("{path}|t|"), "EEXIST")?;
        c.dom0.watch(&format!("{path}|other|"))
    }),
    case("watch/other-depth-is-the-same-watch", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.fails(op::WATCH, &format!("{path}|t|1|"), "EEXIST")
    }),
    case("watch/relative-and-absolute-are-the-same", |c| {
        c.dom0.watch("local-x|t|")?;
        c.dom0.fails(op::WATCH, "/local/domain/0/local-x|t|", "EEXIST")
    }),
    case("watch/same-on-two-connections", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        c.dom0.watch(&format!("{path}|t|"))?;
        other.watch(&format!("{path}|t|"))
    }),
    case("watch/empty-token", |c| c.dom0.watch(&format!("{}||", c.at("a")))),
    case("watch/malformed-is-einval", |c| {
        let path = c.at("a");
        for payload in ["", "|", "||"] {
            c.dom0.fails(op::WATCH, payload, "EINVAL")?;
        }
        for rest in ["", "|", "|t", "|t|1|x|"] {
            c.dom0.fails(op::WATCH, &format!("{path}{rest}"), "EINVAL")?;
        }
        Ok(())
    }),
    case("watch/bytes-behind-the-last-nul-are-ignored", |c| {
        let path = c.at("a");
        c.dom0.gives(op::WATCH, &format!("{path}|t|junk"), "OK|")?;
        c.dom0.event(&format!("{path}|t|"))?;
        c.dom0.gives(op::UNWATCH, &format!("{path}|t|junk"), "OK|")
    }),
    case("watch/transaction-id-is-ignored", |c| {
        let path = c.at("a");
        c.dom0.gives_in(99, op::WATCH, &format!("{path}|t|"), "OK|")?;
        c.dom0.event(&format!("{path}|t|"))?;
        c.dom0.gives_in(99, op::UNWATCH, &format!("{path}|t|"), "OK|")
    }),
    case("watch/fires-for-node-and-below", |c| {
        let base = c.at("a");
        c.dom0.watch(&format!("{base}|t|"))?;
        for name in ["", "/b", "/b/c"] {
            c.dom0.ok(op::WRITE, &format!("{base}{name}|v"))?;
            c.dom0.events(&[&format!("{base}{name}|t|")])?;
        }
        Ok(())
    }),
    case("watch/does-not-fire-beside-or-above", |c| {
        c.dom0.watch(&format!("{}|t|", c.at("a/b")))?;
        for name in ["a/bc", "a/x", "ab", "z"] {
            c.dom0.ok(op::WRITE, &format!("{}|v", c.at(name)))?;
        }
        c.dom0.ok(op::WRITE, &format!("{}|v", c.at("a")))?;
        c.dom0.events(&[])
    }),
    case("watch/two-with-one-token-fire-twice", |c| {
        let (base, path) = (c.at("a"), c.at("a/b"));
        c.dom0.watch(&format!("{base}|t|"))?;
        c.dom0.watch(&format!("{path}|t|"))?;
        let event = format!("{path}|t|");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&event, &event])
    }),
    case("watch/commit-fires-in-order-of-first-change", |c| {
        let mut other = c.another()?;
        let [a, b] = ["a", "b"].map(|name| c.at(name));
        for path in [&a, &b] {
            other.ok(op::WRITE, &format!("{path}|0"))?;
        }
        c.dom0.watch(&format!("{}|t|", c.base))?;
        let tx = other.begin()?;
        other.gives_in(tx, op::READ, &format!("{a}|"), "0")?;
        for path in [&b, &a, &b] {
            other.gives_in(tx, op::WRITE, &format!("{path}|1"), "OK|")?;
        }
        other.end(tx, "T|", "OK|")?;
        c.dom0.events(&[&format!("{b}|t|"), &format!("{a}|t|")])
    }),
    case("watch/on-the-root-sees-all", |c| {
        let mut other = c.another()?;
        c.dom0.watch("/|t|")?;
        let path = c.at("a/b");
        other.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&format!("{path}|t|")])
    }),
    case("watch/mkdir-set-perms-and-rm-fire", |c| {
        let path = c.at("a");
        let event = format!("{path}|t|");
        c.dom0.watch(&event)?;
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        c.dom0.events(&[&event])?;
        c.dom0.ok(op::SET_PERMS, &format!("{path}|n0|"))?;
        c.dom0.events(&[&event])?;
        c.dom0.ok(op::RM, &format!("{path}|"))?;
        c.dom0.events(&[&event])
    }),
    case("watch/reads-and-failures-do-not-fire", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.watch(&format!("{}|t|", c.base))?;
        c.dom0.ok(op::READ, &format!("{path}|"))?;
        c.dom0.ok(op::DIRECTORY, &format!("{path}|"))?;
        c.dom0.ok(op::GET_PERMS, &format!("{path}|"))?;
        c.dom0.ok(op::RM, &format!("{path}/absent|"))?;
        c.dom0.fails(op::RM, &format!("{path}/absent/below|"), "ENOENT")?;
        c.dom0.fails(op::SET_PERMS, &format!("{path}|x0|"), "EINVAL")?;
        c.dom0.events(&[])
    }),
    case("watch/same-value-fires", |c| {
        let path = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&format!("{path}|t|")])
    }),
    case("watch/created-parents-do-not-fire-by-themselves", |c| {
        c.dom0.watch(&format!("{}|t|", c.at("a")))?;
        c.dom0.watch(&format!("{}|u|", c.at("a/b")))?;
        let path = c.at("a/b/c");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&format!("{path}|t|"), &format!("{path}|u|")])
    }),
    case("watch/removal-fires-watches-on-what-was-below", |c| {
        let (a, ab) = (c.at("a"), c.at("a/b"));
        c.dom0.ok(op::WRITE, &format!("{ab}/c|v"))?;
        c.dom0.watch(&format!("{ab}|inner|"))?;
        c.dom0.watch(&format!("{a}|outer|"))?;
        c.dom0.ok(op::RM, &format!("{a}|"))?;
        c.dom0.events(&[&format!("{ab}|inner|"), &format!("{a}|outer|")])
    }),
    case("watch/removal-does-not-fire-watches-on-what-was-not-there", |c| {
        let a = c.at("a");
        c.dom0.ok(op::WRITE, &format!("{a}/b|v"))?;
        c.dom0.watch(&format!("{a}/never|t|"))?;
        c.dom0.ok(op::RM, &format!("{a}|"))?;
        c.dom0.events(&[])
    }),
    guest("watch/relative-events-are-relative", |c| {
        let mut guest = c.guest()?;
        guest.conn.watch("data|t|")?;
        c.dom0.ok(op::WRITE, &format!("{}/data/x|v", guest.home))?;
        guest.conn.event("data/x|t|")
    }),
    case("unwatch/ends-events", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.gives(op::UNWATCH, &format!("{path}|t|"), "OK|")?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[])
    }),
    case("unwatch/unknown-is-enoent", |c| {
        let path = c.at("a");
        c.dom0.fails(op::UNWATCH, &format!("{path}|t|"), "ENOENT")?;
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.fails(op::UNWATCH, &format!("{path}|other|"), "ENOENT")?;
        c.dom0.fails(op::UNWATCH, &format!("{path}x|t|"), "ENOENT")
    }),
    case("unwatch/of-another-connection-is-enoent", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        c.dom0.watch(&format!("{path}|t|"))?;
        other.fails(op::UNWATCH, &format!("{path}|t|"), "ENOENT")
    }),
    case("unwatch/malformed-is-einval", |c| {
        let path = c.at("a");
        for rest in ["", "|", "|t", "|t|1|"] {
            c.dom0.fails(op::UNWATCH, &format!("{path}{rest}"), "EINVAL")?;
        }
        Ok(())
    }),
    case("reset_watches/drops-watches", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|"))?;
        c.dom0.gives(op::RESET_WATCHES, "|", "OK|")?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[])?;
        c.dom0.watch(&format!("{path}|t|"))
    }),
    case("reset_watches/drops-transactions", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.gives(op::RESET_WATCHES, "|", "OK|")?;
        c.dom0.end(tx, "T|", "ENOENT")
    }),
    case("reset_watches/leaves-others-alone", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        other.watch(&format!("{path}|t|"))?;
        c.dom0.gives(op::RESET_WATCHES, "|", "OK|")?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        other.events(&[&format!("{path}|t|")])
    }),
    case("depth/0-is-the-node-alone", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|0|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}/b|v"))?;
        c.dom0.events(&[])?;
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.events(&[&format!("{path}|t|")])
    }),
    case("depth/1-is-the-children-too", |c| {
        let path = c.at("a");
        c.dom0.watch(&format!("{path}|t|1|"))?;
        c.dom0.ok(op::WRITE, &format!("{path}/b/c|v"))?;
        c.dom0.events(&[])?;
        c.dom0.ok(op::WRITE, &format!("{path}/b|v"))?;
        c.dom0.events(&[&format!("{path}/b|t|")])
    }),
    case("depth/counts-from-the-root", |c| {
        c.dom0.watch("/|t|1|")?;
        c.dom0.ok(op::WRITE, &format!("{}|v", c.at("a")))?;
        c.dom0.events(&[])?;
        c.dom0.ok(op::WRITE, &format!("{}|v", c.base))?;
        c.dom0.events(&[&format!("{}|t|", c.base)])
    }),
    case("depth/removal-above-fires", |c| {
        let path = c.at("a/b");
        c.dom0.ok(op::WRITE, &format!("{path}|v"))?;
        c.dom0.watch(&format!("{path}|t|0|"))?;
        c.dom0.ok(op::RM, &format!("{}|", c.at("a")))?;
        c.dom0.events(&[&format!("{path}|t|")])
    }),
    case("depth/junk-is-einval", |c| {
        for depth in ["x", "-1", ""] {
            c.dom0.fails(op::WATCH, &format!("{}|t|{depth}|", c.at("a")), "EINVAL")?;
        }
        Ok(())
    }),
];
