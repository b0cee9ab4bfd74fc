//! TRANSACTION_START and TRANSACTION_END.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    case("transaction/first-id-is-1", |c| match c.another()?.begin()? {
        1 => Ok(()),
        id => Err(format!("{id}")),
    }),
    case("transaction/reply-of-start-has-tx-id-0", |c| {
        c.dom0.start(op::TRANSACTION_START, 0, b"\0")?;
        let reply = c.dom0.reply()?;
        if reply.tx_id == 0 { Ok(()) } else { Err(format!("{reply:?}")) }
    }),
    case("transaction/several-at-once-have-different-ids", |c| {
        let ids = [c.dom0.begin()?, c.dom0.begin()?, c.dom0.begin()?];
        if ids[0] == ids[1] || ids[1] == ids[2] || ids[0] == ids[2] {
            return Err(format!("{ids:?}"));
        }
        Ok(())
    }),
    case("transaction/start-in-a-transaction-is-ebusy", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.fails_in(tx, op::TRANSACTION_START, "|", "EBUSY")?;
        c.dom0.end(tx, "T|", "OK|")
    }),
    case("transaction/unknown-id-is-enoent", |c| {
        for (ty, payload) in [
            (op::READ, "/tool|"),
            (op::WRITE, "/tool|"),
            (op::TRANSACTION_START, "|"),
            (op::TRANSACTION_END, "T|"),
            (op::GET_DOMAIN_PATH, "0|"),
        ] {
            c.dom0.fails_in(99, ty, payload, "ENOENT")?;
        }
        Ok(())
    }),
    case("transaction/ids-of-others-are-enoent", |c| {
        let mut other = c.another()?;
        let tx = c.dom0.begin()?;
        other.fails_in(tx, op::READ, "/tool|", "ENOENT")?;
        c.dom0.end(tx, "F|", "OK|")
    }),
    case("transaction/end-outside-is-enoent", |c| c.dom0.end(0, "T|", "ENOENT")),
    case("transaction/end-ends", |c| {
        for how in ["T|", "F|"] {
            let tx = c.dom0.begin()?;
            c.dom0.end(tx, how, "OK|")?;
            c.dom0.end(tx, how, "ENOENT")?;
        }
        Ok(())
    }),
    case("transaction/end-with-a-bad-argument-leaves-it-open", |c| {
        let tx = c.dom0.begin()?;
        for how in ["", "T", "X|", "TT|", "t|", "|"] {
            c.dom0.end(tx, how, "EINVAL")?;
        }
        c.dom0.gives_in(tx, op::WRITE, &format!("{}|v", c.at("a")), "OK|")?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.gives(op::READ, &format!("{}|", c.at("a")), "v")
    }),
    case("transaction/end-with-bytes-behind-the-nul-is-einval", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.end(tx, "T||", "EINVAL")?;
        c.dom0.end(tx, "F|", "OK|")
    }),
    case("transaction/end-false-drops-all", |c| {
        let path = c.at("a");
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{path}|v"), "OK|")?;
        c.dom0.end(tx, "F|", "OK|")?;
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")
    }),
    case("transaction/changes-show-at-the-end", |c| {
        let (a, b) = (c.at("a"), c.at("b"));
        let mut other = c.another()?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{a}|1"), "OK|")?;
        c.dom0.gives_in(tx, op::WRITE, &format!("{b}|2"), "OK|")?;
        other.fails(op::READ, &format!("{a}|"), "ENOENT")?;
        c.dom0.end(tx, "T|", "OK|")?;
        other.gives(op::READ, &format!("{a}|"), "1")?;
        other.gives(op::READ, &format!("{b}|"), "2")
    }),
    case("transaction/disconnecting-drops-it", |c| {
        let path = c.at("a");
        let mut other = c.another()?;
        let tx = other.begin()?;
        other.gives_in(tx, op::WRITE, &format!("{path}|v"), "OK|")?;
        drop(other);
        c.dom0.fails(op::READ, &format!("{path}|"), "ENOENT")
    }),
    case("transaction/other-requests-do-not-mind-it", |c| {
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::GET_DOMAIN_PATH, "7|", "/local/domain/7|")?;
        c.dom0.gives_in(tx, op::IS_DOMAIN_INTRODUCED, "0|", "T|")?;
        c.dom0.end(tx, "T|", "OK|")
    }),
    case("transaction/a-thousand-one-after-the-other", |c| {
        let path = c.at("a");
        for i in 0..1000 {
            let tx = c.dom0.begin()?;
            c.dom0.gives_in(tx, op::WRITE, &format!("{path}|{i}"), "OK|")?;
            c.dom0.end(tx, "T|", "OK|")?;
        }
        c.dom0.gives(op::READ, &format!("{path}|"), "999")
    }),
    case("transaction/sees-one-state", |c| {
        let (a, b) = (c.at("a"), c.at("b"));
        let mut other = c.another()?;
        other.ok(op::WRITE, &format!("{a}|1"))?;
        other.ok(op::WRITE, &format!("{b}|1"))?;
        let tx = c.dom0.begin()?;
        other.ok(op::WRITE, &format!("{a}|2"))?;
        other.ok(op::WRITE, &format!("{b}|2"))?;
        c.dom0.gives_in(tx, op::READ, &format!("{a}|"), "1")?;
        c.dom0.gives_in(tx, op::READ, &format!("{b}|"), "1")?;
        c.dom0.end(tx, "T|", "OK|")
    }),
    guest("transaction/guests-have-them-too", |c| {
        let mut guest = c.guest()?;
        let tx = guest.conn.begin()?;
        guest.conn.gives_in(tx, op::WRITE, "a|v", "OK|")?;
        guest.conn.fails_in(tx, op::WRITE, "/tool|v", "EACCES")?;
        guest.conn.fails(op::READ, "a|", "ENOENT")?;
        guest.conn.end(tx, "T|", "OK|")?;
        c.dom0.gives(op::READ, &format!("{}/a|", guest.home), "v")
    }),
];
