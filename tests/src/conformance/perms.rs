//! GET_PERMS and SET_PERMS, access control, and what an unprivileged caller can observe.

use super::{Case, case, guest};
use crate::raw::op;

pub(super) const CASES: &[Case] = &[
    guest("set_perms/a-malformed-request-is-not-looked-at", |c| {
        let mut guest = c.guest()?;
        let (many, n) = ("r1|r2|r3|r4|r5|", format!("n{}|", guest.domid));
        guest.conn.fails(op::SET_PERMS, &format!("a|{n}{many}x|"), "EINVAL")?;
        guest.conn.fails(op::SET_PERMS, &format!("//|{n}{many}"), "EINVAL")?;
        guest.conn.fails(op::SET_PERMS, &format!("//|n4994|{n}"), "EINVAL")?;
        guest.conn.fails(op::SET_PERMS, &format!("a|n4994|{many}"), "ENOSPC")
    }),
    case("perms/set-and-get", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        for perms in ["n0|", "r0|", "w0|", "b0|", "b0|n0|"] {
            c.dom0.gives(op::SET_PERMS, &format!("{path}|{perms}"), "OK|")?;
            c.dom0.gives(op::GET_PERMS, &format!("{path}|"), perms)?;
        }
        Ok(())
    }),
    guest("perms/entries-stay-in-order-and-may-repeat", |c| {
        let (a, b) = (c.guest()?.domid, c.guest()?.domid);
        let perms = format!("n0|r{a}|w{b}|b{a}|");
        let path = c.node("a", "", &perms)?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), &perms)
    }),
    case("perms/in-a-transaction", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        let before = c.dom0.ok(op::GET_PERMS, &format!("{path}|"))?;
        let tx = c.dom0.begin()?;
        c.dom0.gives_in(tx, op::SET_PERMS, &format!("{path}|b0|"), "OK|")?;
        c.dom0.gives_in(tx, op::GET_PERMS, &format!("{path}|"), "b0|")?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), &before)?;
        c.dom0.end(tx, "T|", "OK|")?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), "b0|")
    }),
    case("perms/malformed-is-einval", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        for perms in ["", "n0", "x0|", "n|", "|", "0n|", "nx|", "n0|q5|", "n0||"] {
            c.dom0.fails(op::SET_PERMS, &format!("{path}|{perms}"), "EINVAL")?;
        }
        Ok(())
    }),
    case("perms/domids-are-plain-decimals", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        for perms in ["n0|r0x5|", "n0|r-1|", "n0|r70000|"] {
            c.dom0.fails(op::SET_PERMS, &format!("{path}|{perms}"), "EINVAL")?;
        }
        Ok(())
    }),
    case("perms/bytes-behind-the-last-nul-are-ignored", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        c.dom0.gives(op::SET_PERMS, &format!("{path}|r0|junk"), "OK|")?;
        c.dom0.gives(op::GET_PERMS, &format!("{path}|"), "r0|")
    }),
    case("perms/missing-node-is-enoent", |c| {
        c.dom0.fails(op::GET_PERMS, &format!("{}|", c.at("a")), "ENOENT")?;
        c.dom0.fails(op::SET_PERMS, &format!("{}|n0|", c.at("a")), "ENOENT")
    }),
    case("perms/owner-that-does-not-exist-is-enoent", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        c.dom0.fails(op::SET_PERMS, &format!("{path}|n32753|"), "ENOENT")
    }),
    guest("perms/get-needs-read-access", |c| {
        let mut guest = c.guest()?;
        let domid = guest.domid;
        let readable = c.node("r", "", &format!("n0|r{domid}|"))?;
        let writable = c.node("w", "", &format!("n0|w{domid}|"))?;
        guest.conn.gives(op::GET_PERMS, &format!("{readable}|"), &format!("n0|r{domid}|"))?;
        guest.conn.fails(op::GET_PERMS, &format!("{writable}|"), "EACCES")
    }),
    guest("perms/set-needs-ownership", |c| {
        let mut guest = c.guest()?;
        let domid = guest.domid;
        let path = c.node("a", "", &format!("n0|b{domid}|"))?;
        guest.conn.fails(op::SET_PERMS, &format!("{path}|n0|b{domid}|"), "EACCES")?;
        guest.conn.ok(op::WRITE, "mine|1")?;
        guest.conn.gives(op::SET_PERMS, &format!("mine|r{domid}|w0|"), "OK|")?;
        guest.conn.gives(op::GET_PERMS, "mine|", &format!("r{domid}|w0|"))
    }),
    guest("perms/guests-cannot-give-nodes-away", |c| {
        let mut guest = c.guest()?;
        guest.conn.ok(op::WRITE, "mine|1")?;
        guest.conn.fails(op::SET_PERMS, "mine|n0|", "EPERM")
    }),
    guest("perms/dom0-can-give-nodes-to-a-guest", |c| {
        let mut guest = c.guest()?;
        let path = c.node("a", "v", &format!("n{}|", guest.domid))?;
        guest.conn.gives(op::WRITE, &format!("{path}|mine"), "OK|")
    }),
    guest("perms/matrix", |c| {
        let mut guest = c.guest()?;
        let domid = guest.domid;
        let rows = [
            ("n0|", false, false),
            ("r0|", true, false),
            ("w0|", false, true),
            ("b0|", true, true),
            ("b0|nX|", false, false),
            ("n0|rX|", true, false),
            ("n0|wX|", false, true),
            ("n0|bX|", true, true),
            ("n0|rX|bX|", true, false),
            ("nX|", true, true),
            ("nX|nX|", true, true),
        ];
        for (i, (perms, read, write)) in rows.into_iter().enumerate() {
            let path = c.node(&format!("n{i}"), "v", &perms.replace('X', &domid.to_string()))?;
            for (ty, payload, allowed) in [
                (op::READ, format!("{path}|"), read),
                (op::DIRECTORY, format!("{path}|"), read),
                (op::WRITE, format!("{path}|v"), write),
                (op::MKDIR, format!("{path}|"), write),
                (op::MKDIR, format!("{path}/new|"), write),
                (op::RM, format!("{path}|"), write),
            ] {
                let got = guest.conn.tx(0, ty, &payload)?;
                let as_expected = match &got {
                    Ok(_) => allowed,
                    Err(name) => !allowed && name == "EACCES",
                };
                if !as_expected {
                    return Err(format!("{perms} type {ty}: {got:?}, allowed: {allowed}"));
                }
            }
        }
        Ok(())
    }),
    guest("perms/entry-for-another-domain-means-nothing", |c| {
        let (mut guest, other) = (c.guest()?, c.guest()?);
        let path = c.node("a", "v", &format!("n0|b{}|", other.domid))?;
        guest.conn.fails(op::READ, &format!("{path}|"), "EACCES")
    }),
    guest("perms/existence-is-hidden", |c| {
        let mut guest = c.guest()?;
        let closed = c.node("closed", "", "n0|")?;
        c.node("closed/there", "", "n0|")?;
        for name in ["there", "absent", "absent/below"] {
            for ty in [op::READ, op::DIRECTORY, op::GET_PERMS, op::RM, op::MKDIR] {
                guest.conn.fails(ty, &format!("{closed}/{name}|"), "EACCES")?;
            }
            guest.conn.fails(op::WRITE, &format!("{closed}/{name}|v"), "EACCES")?;
        }
        Ok(())
    }),
    guest("perms/absence-is-told-to-those-who-may-look", |c| {
        let mut guest = c.guest()?;
        let open = c.node("open", "", &format!("n0|r{}|", guest.domid))?;
        guest.conn.fails(op::READ, &format!("{open}/absent|"), "ENOENT")?;
        guest.conn.fails(op::READ, &format!("{open}/absent/below|"), "ENOENT")
    }),
    guest("perms/domid-any-means-everybody", |c| {
        let mut guest = c.guest()?;
        let path = c.node("a", "v", "n0|r32757|")?;
        guest.conn.gives(op::READ, &format!("{path}|"), "v")?;
        guest.conn.fails(op::WRITE, &format!("{path}|w"), "EACCES")
    }),
    case("perms/domid-any-cannot-own", |c| {
        let path = c.at("a");
        c.dom0.ok(op::MKDIR, &format!("{path}|"))?;
        c.dom0.fails(op::SET_PERMS, &format!("{path}|n32757|"), "ENOENT")
    }),
    guest("perms/a-target-lends-its-rights", |c| {
        let (mut model, target) = (c.guest()?, c.guest()?);
        let path = c.node("a", "v", &format!("n0|n{}|r{}|", model.domid, target.domid))?;
        c.dom0.gives(op::SET_TARGET, &format!("{}|{}|", model.domid, target.domid), "OK|")?;
        model.conn.gives(op::READ, &format!("{path}|"), "v")?;
        model.conn.gives(op::WRITE, &format!("{}/x|v", target.home), "OK|")
    }),
];
